"""Queries and keys with structure, for what depends on the data: clusters, and a photograph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

PHOTOGRAPH = "grace_hopper.jpg"  # ships with matplotlib
PATCH = 8  # pixels along a patch of the photograph


class PictureNotFound(RuntimeError):
    """The photograph is not on this machine; the message says how to get it."""


@dataclass(frozen=True)
class Tokens:
    """A set of tokens, from which queries and keys are drawn.

    Attributes:
        name: what they are, in words.
        make: (length, head_dim, heads) -> query, key (1, H, N, D) fp32 on the CPU, the same each
            time.
    """

    name: str
    make: Callable[[int, int, int], tuple[Tensor, Tensor]]


def clusters(count: int, noise: float, paired: bool) -> Tokens:
    """Tokens around ``count`` random centres, in random order.

    Args:
        noise: standard deviation around a centre, whose coordinates have the deviation 1.
        paired: a query attends to the keys of its cluster; else queries and keys are rotated
            independently, so that clusters attend to each other at random.
    """

    def make(length: int, head_dim: int, heads: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        centres = torch.randn(count, head_dim, generator=generator)
        label = torch.randint(count, (length,), generator=generator)
        query, key = (
            centres[label] + noise * torch.randn(length, head_dim, generator=generator)
            for _ in range(2)
        )
        return _project(query, key, head_dim, heads, paired, generator)

    attends = "attending to their own" if paired else "attending at random"
    return Tokens(f"{count} clusters, noise {noise:g}, {attends}", make)


def photograph(paired: bool) -> Tokens:
    """Patches of a photograph in raster order, through random orthogonal projections and a layer
    norm. The pixels are real, the projections are not those of a trained model.

    Args:
        paired: queries and keys share a projection, so that a patch attends to what looks like it;
            else the projections are independent.
    """

    def make(length: int, head_dim: int, heads: int) -> tuple[Tensor, Tensor]:
        edge = round(length**0.5)
        if edge**2 != length:
            raise ValueError(f"a square picture has no {length} patches; pass a square number")
        patches = F.unfold(_picture(edge * PATCH)[None], PATCH, stride=PATCH)[0].T
        generator = torch.Generator().manual_seed(0)
        patches = patches - patches.mean(0)
        query, key = _project(patches, patches, head_dim, heads, paired, generator)
        return F.layer_norm(query, (head_dim,)), F.layer_norm(key, (head_dim,))

    attends = "attending to what looks alike" if paired else "attending at random"
    return Tokens(f"patches of a photograph, {attends}", make)


def _project(
    query: Tensor,
    key: Tensor,
    head_dim: int,
    heads: int,
    paired: bool,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """(1, H, N, D) both: (N, C) through orthogonal maps of each head, shared if paired."""
    maps = torch.linalg.qr(torch.randn(2, heads, key.shape[1], head_dim, generator=generator)).Q
    return (query @ maps[0])[None], (key @ maps[0 if paired else 1])[None]


def _picture(size: int) -> Tensor:
    """(3, size, size) in [0, 1]: the photograph, its middle square."""
    try:
        from matplotlib import cbook, image

        with cbook.get_sample_data(PHOTOGRAPH) as file:
            pixels = torch.tensor(image.imread(file, format="jpg")).permute(2, 0, 1) / 255
    except (ImportError, OSError) as error:
        raise PictureNotFound(
            f"{PHOTOGRAPH} is not on this machine: pip install matplotlib"
        ) from error
    edge = min(pixels.shape[1:])
    top, left = ((side - edge) // 2 for side in pixels.shape[1:])
    square = pixels[None, :, top : top + edge, left : left + edge]
    return F.interpolate(square, (size, size), mode="bilinear", antialias=True)[0]
