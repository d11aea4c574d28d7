"""A small vision transformer, and what is measured on it: accuracy sparse, corrupted, and where
it looks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

import entropy_attn as ea
from entropy_attn.benchmarks.images import Images

BLOCK = 16  # tokens
TILE = 4  # patches along a tile: a block of keys is a square of TILE x TILE patches
EVAL_BATCH = 512
# Of the heat maps, how many thresholds are tried.
THRESHOLDS = 64


@dataclass(frozen=True)
class Geometry:
    """Of the model; images are multiples of ``TILE * patch`` pixels."""

    patch: int = 4
    hidden: int = 192
    layers: int = 6
    heads: int = 3
    mlp: int = 384


class TiledViT(nn.Module):
    """transformers' ViT with random weights, which reads the patches of an image tile by tile.

    In the usual order 16 tokens are a row of patches, a line through whatever is in the image; in
    this one they are a square. The model is the same: its position embeddings are learned.
    The class token comes first, so that a block holds 15 patches of a tile and one of the last.
    """

    def __init__(self, geometry: Geometry, size: int, classes: int) -> None:
        from transformers import ViTConfig, ViTForImageClassification

        super().__init__()
        self.patch = geometry.patch
        self.across = across = size // (TILE * geometry.patch)  # tiles
        config = ViTConfig(
            image_size=(across**2 * geometry.patch, TILE**2 * geometry.patch),
            patch_size=geometry.patch,
            hidden_size=geometry.hidden,
            num_hidden_layers=geometry.layers,
            num_attention_heads=geometry.heads,
            intermediate_size=geometry.mlp,
            num_labels=classes,
        )
        self.blocks = -(-(1 + (size // geometry.patch) ** 2) // BLOCK)
        self.vit = ViTForImageClassification(config)
        self._start()

    @torch.no_grad()
    def _start(self) -> None:
        """Weights that learn faster than transformers' normal(0.02), which suit longer training.

        Glorot's in linear layers as in the first ViT, and sines and cosines of the place for the
        position embeddings (Beyer et al., arXiv 2205.01580), which are learned from there.
        """
        for module in self.vit.vit.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
        embeddings = self.vit.vit.embeddings
        projection = embeddings.patch_embeddings.projection.weight
        nn.init.normal_(projection, std=projection[0].numel() ** -0.5)
        embeddings.position_embeddings[0, 1:] = self._places()

    def _places(self) -> Tensor:
        """(patches, hidden): sines and cosines of row and column at several wavelengths."""
        at = torch.arange(self.across * TILE).float()
        quarter = self.vit.config.hidden_size // 4
        waves = at[:, None] * 10_000 ** -(torch.arange(quarter) / quarter)
        waves = torch.cat([waves.sin(), waves.cos()], dim=-1)
        rows, columns = (waves[:, None], waves[None])
        grid = torch.cat(torch.broadcast_tensors(rows, columns), dim=-1)
        return rearrange(grid, "(a i) (b j) c -> (a b i j) c", i=TILE, j=TILE)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (n, classes) of images (n, 3, h, w) uint8."""
        pixels = (images.float() / 255 - 0.5) / 0.25
        tiled = rearrange(
            pixels, "n c (a i p) (b j q) -> n c (a b p) (i j q)",
            i=TILE, j=TILE, p=self.patch, q=self.patch,
        )  # fmt: skip
        return self.vit(pixel_values=tiled).logits


def autocast(device: torch.device) -> Any:
    """bf16 on a GPU; fp32 on a CPU, where it is the faster one."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


@torch.inference_mode()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of right answers."""
    with autocast(images.device):
        found = torch.cat([model(part).argmax(-1) for part in images.split(EVAL_BATCH)])
    return (found == labels).double().mean().item()


@contextmanager
def sparse(model: TiledViT, count: int, scorer: Callable[..., Tensor]) -> Iterator[ea.Handle]:
    """The model with ``count`` blocks of keys kept for each block of queries, and none besides."""
    config = ea.SparsityConfig(
        block_size=BLOCK, scorer=scorer, budget=ea.TopK(count=count),
        sink=0, local=0, min_length=0, min_queries=1,
    )  # fmt: skip
    with warnings.catch_warnings():
        # The probe cannot be saved with the model, and is not meant to be.
        warnings.filterwarnings("ignore", message=".*cannot be saved.*")
        handle = ea.apply(model.vit, config)
    try:
        yield handle
    finally:
        handle.remove()


def blocks_at(sparsity: float, blocks: int) -> int:
    """How many of the blocks are kept: the number that comes nearest, at least one."""
    return max(1, round((1.0 - sparsity) * blocks))


def sparse_accuracy(
    model: TiledViT, data: Images, sparsity: float, scorer: Callable[..., Tensor]
) -> tuple[float, float]:
    """(accuracy, density as measured) at about a sparsity."""
    with sparse(model, blocks_at(sparsity, model.blocks), scorer) as handle:
        found = accuracy(model, data.images, data.labels)
        density = handle.stats().density
    assert density is not None
    return found, density


def natural_density(model: TiledViT, images: Tensor) -> float:
    """The density that the attention needs: ceil(exp(tile entropy)) blocks a tile."""
    with torch.inference_mode(), autocast(images.device):
        with ea.observe(model.vit, block_size=BLOCK) as observation:
            for part in images.split(EVAL_BATCH):
                model(part)
        return observation.density


# --- where it looks -----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ClassTokenProbe:
    """A scorer, the true mass, that notes what the class token attends to.

    Attributes:
        count: blocks that the budget keeps.
        kept: of each call, (B, H, blocks) whether the class token's tile keeps a block.
        attention: of each call, (B, H, tokens) the attention of the class token itself.
    """

    count: int
    kept: list[Tensor] = field(default_factory=list)
    attention: list[Tensor] = field(default_factory=list)

    def __call__(
        self, query: Tensor, key: Tensor, *, scale: float | None = None, **options: Any
    ) -> Tensor:
        mass = ea.TrueMass()(query, key, scale=scale, **options)
        chosen = mass[:, :, 0].topk(self.count).indices
        self.kept.append(torch.zeros_like(mass[:, :, 0]).scatter(-1, chosen, 1.0))
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        scores = factor * (query[:, :, :1].float() @ key.float().mT)
        self.attention.append(scores.softmax(-1)[:, :, 0])
        return mass


@dataclass(frozen=True)
class Overlap:
    """Mean IoU between what a model keeps of an image and its object.

    Attributes:
        blocks: patches count as kept as often as heads and layers keep their block for the tile
            of the class token.
        attention: patches count by the attention of the class token, mean of heads and layers.
        by_layer: as ``blocks``, of each layer alone.
        everything: of keeping all of the image.
        best_blocks: of the choice of blocks that knows the object.
    """

    blocks: float
    attention: float
    by_layer: list[float]
    everything: float
    best_blocks: float


@torch.inference_mode()
def object_overlap(model: TiledViT, data: Images, sparsity: float) -> Overlap:
    """How well a sparse model's kept blocks match the objects of ``data.masks``.

    The model runs at the sparsity with the true mass, so that no predictor is judged. A map over
    the patches becomes a mask by one threshold a model: the best one on the first half of the
    images; the IoU is that of the second half. Intersections are counted in pixels of the exact
    mask. It is the same for all models.
    """
    assert data.masks is not None
    count = blocks_at(sparsity, model.blocks)
    kept, attention = [], []
    for part in data.images.split(EVAL_BATCH):
        probe = ClassTokenProbe(count)
        with sparse(model, count, probe), autocast(part.device):
            model(part)
        kept.append(torch.stack(probe.kept).mean(2))  # (layers, B, blocks)
        attention.append(torch.stack(probe.attention).mean((0, 2))[:, 1:])
    patches = rearrange(
        data.masks, "n (a i p) (b j q) -> n (a b i j) (p q)",
        i=TILE, j=TILE, p=model.patch, q=model.patch,
    )  # fmt: skip
    covered = patches.sum(-1).float()
    block_of = (torch.arange(covered.shape[1], device=covered.device) + 1) // BLOCK
    maps = torch.cat(kept, dim=1)[:, :, block_of]  # (layers, n, patches)
    # What covers the object is known: the ceiling of what blocks can do.
    inside = torch.zeros_like(torch.cat(kept, dim=1)[0])
    inside = inside.index_add(1, block_of, covered)[:, block_of]
    pixels = patches.shape[-1]
    return Overlap(
        blocks=best_overlap(maps.mean(0), covered, pixels),
        attention=best_overlap(torch.cat(attention), covered, pixels),
        by_layer=[best_overlap(layer, covered, pixels) for layer in maps],
        everything=best_overlap(torch.ones_like(covered), covered, pixels),
        best_blocks=best_overlap(inside, covered, pixels),
    )


def best_overlap(heat: Tensor, covered: Tensor, pixels: int) -> float:
    """Mean IoU on the second half of the images at the threshold that is best on the first half.

    Args:
        heat: (n, patches) how much a patch is kept.
        covered: (n, patches) how many of its pixels belong to the object.
        pixels: of a patch.
    """
    half = len(heat) // 2
    levels = torch.linspace(0, 1, THRESHOLDS, device=heat.device)
    thresholds = torch.quantile(heat[:half].float().flatten(), levels).unique()
    found = torch.stack([
        _overlap(heat[:half] >= level, covered[:half], pixels) for level in thresholds
    ])  # fmt: skip
    best = thresholds[found.argmax()]
    return _overlap(heat[half:] >= best, covered[half:], pixels).item()


def _overlap(kept: Tensor, covered: Tensor, pixels: int) -> Tensor:
    common = (kept * covered).sum(-1)
    union = kept.sum(-1) * pixels + covered.sum(-1) - common
    return (common / union).mean()
