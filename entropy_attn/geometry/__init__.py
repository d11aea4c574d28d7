"""Exact computational geometry of point sets, on the CPU and on a GPU; docs/geometry.md.

Needs NumPy, SciPy and numba, and pythoncdt or startinpy to triangulate:
``pip install entropy-attn[geometry]`` brings all but the last. Compiled code is kept beside
the modules or, where that cannot be written to, in numba's cache folder of the user.
"""

try:
    import numba  # noqa: F401
    import scipy  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"entropy_attn.geometry needs {error.name}: pip install 'entropy-attn[geometry]'",
        name=error.name,
    ) from error

from entropy_attn.geometry.entropy_net import EntropyNet
from entropy_attn.geometry.hull import convex_hull
from entropy_attn.geometry.orders import entropy_order
from entropy_attn.geometry.sequence_entropy import order_entropy, run_entropy, soft_order_entropy
from entropy_attn.geometry.triangulation import triangulate

__all__ = [
    "EntropyNet",
    "convex_hull",
    "entropy_order",
    "order_entropy",
    "run_entropy",
    "soft_order_entropy",
    "triangulate",
]
