"""Procedural scenes with known objects: one textured target among plain shapes, on clutter.

The label is the shape of the target. Shapes without its texture are everywhere and of the same
kinds, so that an image can be read only by looking at the target. Every number of a scene is a hash
of (seed, index, place): a scene is the same in whichever batch and on whichever device it is made.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from entropy_attn.benchmarks.images import Images

SIZE = 64  # pixels along an image
SHAPES = ("square", "diamond", "disc", "ring", "triangle", "wedge", "plus", "cross")
DISTRACTORS = 4
# Radii in pixels; a target of these covers from 5 to 20 % of the image.
TARGET_RADIUS = (10.5, 17.5)
DISTRACTOR_RADIUS = (5.0, 11.0)
LARGEST_TURN = 0.25  # radians: a turned square is no diamond yet
COARSE, FINE = 8, 32  # cells along the two noises of the background
NUMBERS = 11  # random numbers an object
CHUNK = 1024  # scenes made at a time: 0.2 GB

_MIX = (0x7FEB352D, 0x846CA68B)  # Wellons' lowbias32


def make_scenes(count: int, seed: int, device: torch.device, start: int = 0) -> Images:
    """Scenes ``start`` to ``start + count``; labels take turns, so that they are balanced.

    Returns:
        With masks (n, 64, 64) bool of the target.
    """
    index = torch.arange(start, start + count, device=device)
    made = [_make(part, seed) for part in index.split(CHUNK)]
    images, labels, masks = (torch.cat(parts) for parts in zip(*made, strict=True))
    return Images("scenes", images, labels, SHAPES, masks)


def _make(index: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    cells = 3 * (COARSE**2 + FINE**2)
    objects = DISTRACTORS + 1
    numbers = _uniform(index, seed, cells + NUMBERS * objects)
    noise, numbers = numbers[:, :cells], numbers[:, cells:].view(len(index), objects, NUMBERS)
    image = _background(noise)
    for which in range(DISTRACTORS):
        u = numbers[:, which]
        inside = _shape((u[:, 0] * len(SHAPES)).long(), u, DISTRACTOR_RADIUS)
        image = torch.where(inside[:, None], _plain(u), image)
    u = numbers[:, DISTRACTORS]
    labels = index % len(SHAPES)
    mask = _shape(labels, u, TARGET_RADIUS)
    image = torch.where(mask[:, None], _checks(u), image)
    return (image * 255).round().to(torch.uint8), labels, mask


def _uniform(index: Tensor, seed: int, count: int) -> Tensor:
    """(n, count) in [0, 1), a hash of seed, index and place."""
    place = torch.arange(count, device=index.device)
    x = _mix(index + _mix(torch.full_like(index, seed)))
    return _mix(x[:, None] ^ _mix(place + 1)).float() / 2**32


def _mix(x: Tensor) -> Tensor:
    """A hash of 32-bit numbers in int64, whose products may wrap around in the upper half."""
    x = x & 0xFFFFFFFF
    for factor, shift in zip(_MIX, (16, 15), strict=True):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return x ^ (x >> 16)


def _background(noise: Tensor) -> Tensor:
    """(n, 3, 64, 64): large patches of colour and grain."""
    coarse, fine = noise.split([3 * COARSE**2, 3 * FINE**2], dim=1)
    layers: Iterator[Tensor] = (
        F.interpolate(x.view(-1, 3, cells, cells), SIZE, mode="bilinear")
        for x, cells in ((coarse, COARSE), (fine, FINE))
    )
    patches, grain = layers
    return 0.2 + 0.4 * patches + 0.2 * grain


def _shape(kind: Tensor, u: Tensor, radius: tuple[float, float]) -> Tensor:
    """(n, 64, 64) bool: the pixels of a shape somewhere within the image."""
    low, high = radius
    r = (low + (high - low) * u[:, 1]).view(-1, 1, 1)
    at = torch.arange(SIZE, device=u.device) + 0.5
    x = (at - r - (SIZE - 2 * r) * u[:, 2].view(-1, 1, 1)) / r  # (n, 1, 64)
    y = ((at - r - (SIZE - 2 * r) * u[:, 3].view(-1, 1, 1)) / r).mT
    turn = (LARGEST_TURN * (2 * u[:, 4] - 1)).view(-1, 1, 1)
    x, y = x * turn.cos() + y * turn.sin(), y * turn.cos() - x * turn.sin()
    a, b, square = x.abs(), y.abs(), torch.maximum(x.abs(), y.abs())
    distance = (x.square() + y.square()).sqrt()
    along, across = (x + y).abs() * 0.5**0.5, (x - y).abs() * 0.5**0.5
    inside = (
        square < 0.8,
        a + b < 1.1,
        distance < 0.9,
        (distance < 1.0) & (distance > 0.5),
        (b < 0.9) & (a < 0.55 * (y + 0.9)),
        (b < 0.9) & (a < 0.55 * (0.9 - y)),
        (torch.minimum(a, b) < 0.3) & (square < 1.0),
        (torch.minimum(along, across) < 0.3) & (torch.maximum(along, across) < 1.0),
    )
    found = torch.zeros_like(square, dtype=torch.bool)
    for which, pixels in enumerate(inside):
        found |= pixels & (kind == which).view(-1, 1, 1)
    return found


def _plain(u: Tensor) -> Tensor:
    return u[:, 5:8, None, None].expand(-1, -1, SIZE, SIZE)


def _checks(u: Tensor) -> Tensor:
    """(n, 3, 64, 64): checks of 2 pixels in a dark and a light colour."""
    at = torch.arange(SIZE, device=u.device) // 2
    light = ((at + at[:, None]) % 2).bool()
    dark, bright = 0.25 * u[:, 5:8, None, None], 0.75 + 0.25 * u[:, 8:11, None, None]
    return torch.where(light, bright, dark)
