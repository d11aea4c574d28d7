"""Exact computational geometry of point sets, on the CPU and on a GPU; docs/geometry.md.

Needs NumPy, SciPy and numba: ``pip install entropy-attn[geometry]``. Compiled code is kept beside
the modules or, where that cannot be written to, in numba's cache folder of the user.
"""

try:
    from entropy_attn.geometry.hull import convex_hull
except ModuleNotFoundError as error:
    if error.name != "numba":
        raise
    message = "entropy_attn.geometry needs numba: pip install entropy-attn[geometry]"
    raise ModuleNotFoundError(message, name="numba") from error

__all__ = ["convex_hull"]
