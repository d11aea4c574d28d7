"""Exact computational geometry of point sets, on the CPU and on a GPU; docs/geometry.md.

Needs NumPy, SciPy and numba: ``pip install entropy-attn[geometry]``. Compiled code is kept beside
the modules or, where that cannot be written to, in numba's cache folder of the user.
"""

from importlib.util import find_spec

if find_spec("numba") is None:
    raise ModuleNotFoundError(
        "entropy_attn.geometry needs numba: pip install entropy-attn[geometry]", name="numba"
    )

from entropy_attn.geometry.hull import convex_hull

__all__ = ["convex_hull"]
