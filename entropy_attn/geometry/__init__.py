"""Orders of point sets, what they are worth, and triangulations: `entropy-attn[geometry]`."""

try:
    import numba  # noqa: F401
    import scipy  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"entropy_attn.geometry needs {error.name}: pip install 'entropy-attn[geometry]'",
        name=error.name,
    ) from error

from entropy_attn.geometry.orders import entropy_order
from entropy_attn.geometry.sequence_entropy import order_entropy, run_entropy, soft_order_entropy
from entropy_attn.geometry.triangulation import triangulate

__all__ = [
    "entropy_order",
    "order_entropy",
    "run_entropy",
    "soft_order_entropy",
    "triangulate",
]
