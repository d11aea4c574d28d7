"""Corrupted images at five severities, after Hendrycks and Dietterich (arXiv 1903.12261).

The corruptions are kornia's, which run on the device; which there are and how strong they are is
chosen here for images of 64 pixels, so that errors do not compare with published ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SEVERITIES = 5
CHUNK = 256  # images corrupted at a time


def _kornia() -> Any:
    try:
        import kornia.augmentation
        import kornia.enhance
        import kornia.filters
        import kornia.geometry
    except ImportError as error:
        raise ImportError(
            "corrupting images needs kornia: pip install 'entropy-attn[experiments]'"
        ) from error
    return kornia


def _gaussian_noise(x: Tensor, std: float) -> Tensor:
    return _kornia().augmentation.RandomGaussianNoise(std=std, p=1.0)(x)


def _salt_and_pepper(x: Tensor, share: float) -> Tensor:
    return _kornia().augmentation.RandomSaltAndPepperNoise(amount=(share, share), p=1.0)(x)


def _gaussian_blur(x: Tensor, sigma: float) -> Tensor:
    size = 2 * round(3 * sigma) + 1
    return _kornia().filters.gaussian_blur2d(x, (size, size), (sigma, sigma))


def _motion_blur(x: Tensor, size: float) -> Tensor:
    return _kornia().filters.motion_blur(x, int(size), 45.0, 0.0)


def _brightness(x: Tensor, added: float) -> Tensor:
    return _kornia().enhance.adjust_brightness(x, added)


def _contrast(x: Tensor, factor: float) -> Tensor:
    return _kornia().enhance.adjust_contrast_with_mean_subtraction(x, factor)


def _elastic(x: Tensor, alpha: float) -> Tensor:
    noise = 2 * torch.rand_like(x[:, :2]) - 1
    return _kornia().geometry.transform.elastic_transform2d(
        x, noise, (25, 25), (4.0, 4.0), (alpha, alpha), padding_mode="reflection"
    )


def _pixelate(x: Tensor, share: float) -> Tensor:
    resize, size = _kornia().geometry.transform.resize, x.shape[-2:]
    small = resize(x, tuple(max(1, round(s * share)) for s in size), antialias=True)
    return resize(small, tuple(size), interpolation="nearest")


def _jpeg(x: Tensor, quality: float) -> Tensor:
    qualities = torch.full((len(x),), quality, device=x.device)
    return _kornia().enhance.jpeg_codec_differentiable(x, qualities)


@dataclass(frozen=True)
class Corruption:
    """What it does to images (n, 3, h, w) in [0, 1], and how much at severities 1 to 5."""

    apply: Callable[[Tensor, float], Tensor]
    amounts: tuple[float, float, float, float, float]


CORRUPTIONS: dict[str, Corruption] = {
    "gaussian noise": Corruption(_gaussian_noise, (0.04, 0.08, 0.12, 0.18, 0.26)),
    "salt and pepper": Corruption(_salt_and_pepper, (0.01, 0.03, 0.06, 0.1, 0.17)),
    "gaussian blur": Corruption(_gaussian_blur, (0.5, 0.8, 1.2, 1.7, 2.5)),
    "motion blur": Corruption(_motion_blur, (3, 5, 7, 9, 13)),
    "brightness": Corruption(_brightness, (0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": Corruption(_contrast, (0.7, 0.5, 0.35, 0.22, 0.12)),
    "elastic": Corruption(_elastic, (0.15, 0.3, 0.5, 0.75, 1.0)),
    "pixelate": Corruption(_pixelate, (0.75, 0.6, 0.45, 0.35, 0.25)),
    "jpeg": Corruption(_jpeg, (50.0, 30.0, 18.0, 10.0, 5.0)),
}


@torch.no_grad()
def corrupt(images: Tensor, name: str, severity: int, seed: int = 0) -> Tensor:
    """Images (n, 3, h, w) uint8 under a corruption; the same ones for the same seed and device."""
    corruption = CORRUPTIONS[name]
    amount = corruption.amounts[severity - 1]
    with torch.random.fork_rng([images.device] if images.is_cuda else []):
        torch.manual_seed(seed)
        parts = [corruption.apply(part.float() / 255, amount) for part in images.split(CHUNK)]
    return (torch.cat(parts).clamp(0, 1) * 255).round().to(torch.uint8)


def mean_corruption_error(
    errors: Mapping[str, Sequence[float]], baseline: Mapping[str, Sequence[float]]
) -> float:
    """mCE: the mean over corruptions of the errors of all severities over those of a baseline.

    Args:
        errors: of each corruption, the share of wrong answers at each severity.
        baseline: the same of the model that is compared with; corruptions under which it makes no
            error, and which have no ratio, are left out.
    """
    if errors.keys() != baseline.keys():
        raise ValueError(f"corruptions differ: {sorted(errors)} and {sorted(baseline)}")
    ratios = [sum(errors[name]) / sum(baseline[name]) for name in errors if sum(baseline[name])]
    if not ratios:
        raise ValueError("the baseline makes no error under any corruption")
    return sum(ratios) / len(ratios)
