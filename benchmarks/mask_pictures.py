"""Pictures of attention heads as records keep them: mass and kept blocks, some kilobytes."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from entropy_attn.benchmarks.plots import LEAST_MASS, HeadPicture

LEVELS = 255  # of the logarithm of the mass between `LEAST_MASS` and 1


def encoded(picture: HeadPicture) -> dict[str, Any]:
    """What a record's result keeps of a picture; the mass to 4 %, and none below `LEAST_MASS`."""
    decades = np.log10(np.maximum(picture.mass, LEAST_MASS) / LEAST_MASS)
    levels = np.round(decades / -np.log10(LEAST_MASS) * LEVELS).astype(np.uint8)
    return {
        "title": picture.title,
        "tiles": len(picture.mass),
        "mass": _text(levels),
        "kept": _text(np.packbits(picture.kept)),
        "density": picture.density,
        "kept_mass": picture.kept_mass,
    }


def decoded(result: Mapping[str, Any]) -> HeadPicture:
    """The picture of a record's result."""
    tiles = result["tiles"]
    levels = _array(result["mass"]).reshape(tiles, tiles)
    kept = np.unpackbits(_array(result["kept"]), count=tiles**2).reshape(tiles, tiles)
    mass = np.where(levels > 0, LEAST_MASS ** (1 - levels / LEVELS), 0.0)
    return HeadPicture(
        result["title"], mass, kept.astype(bool), result["density"], result["kept_mass"]
    )


def _text(array: np.ndarray) -> str:
    return base64.b64encode(zlib.compress(array.tobytes(), 9)).decode()


def _array(text: str) -> np.ndarray:
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8)
