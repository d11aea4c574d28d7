"""observe: the entropy of every attention layer and head of a model, while it runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from entropy_attn.api import attention_with_entropy
from entropy_attn.entropy import AttentionEntropy
from entropy_attn.integrations.call import AttentionCall
from entropy_attn.integrations.padding import restore, valid_first
from entropy_attn.integrations.sites import Installation, check_reach, find_sites
from entropy_attn.integrations.statistics import visible_blocks
from entropy_attn.integrations.table import render
from entropy_attn.validation import check_block_size

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MEASURES = ("row_entropy", "block_entropy", "tile_entropy", "effective_blocks", "density")


@dataclass(frozen=True, eq=False)
class LayerEntropy:
    """Means over all that a layer attended to since `observe`; fp64 on the CPU, one value a head.

    Attributes:
        name: of the attention module.
        calls: of its attention; packed sequences of similar length count as one.
        row_entropy, block_entropy: (H,) nats, mean over the queries.
        tile_entropy: (H,) nats, mean over the blocks of queries.
        effective_blocks: (H,) mean of exp(tile entropy), the blocks of keys that a block of
            queries really needs.
        density: (H,) what keeping ceil(exp(tile entropy)) blocks a tile would visit, as a share
            of the blocks that hold a visible key.
        rows: with keep_rows, the row entropies of each call, (B, H, Nq) on the CPU, with NaN
            where a query is padding or sees no key; else None. Packed sequences come as the
            groups that they are computed in.
    """

    name: str
    calls: int
    row_entropy: Tensor
    block_entropy: Tensor
    tile_entropy: Tensor
    effective_blocks: Tensor
    density: Tensor
    rows: tuple[Tensor, ...] | None


class _Observer:
    """Computes the dense attention of one layer and adds up its entropies on the device."""

    def __init__(
        self, name: str, block_size: tuple[int, int], keep_rows: bool, backend: str
    ) -> None:
        self.name = name
        self.block_size = block_size
        self.backend = backend
        self.keep_rows = keep_rows
        self.reset()

    def reset(self) -> None:
        self.calls = 0
        self.rows: list[Tensor] = []
        # row and block entropy, rows; tile entropy, effective blocks, tiles; kept, visible blocks
        self._sums: Tensor | None = None

    def attend(self, call: AttentionCall) -> Tensor:
        if torch.compiler.is_compiling():
            raise RuntimeError("ea.observe does not work under torch.compile; run the model eager")
        if call.explicit_mask is not None:
            raise ValueError(
                f"{self.name} was given an attention mask of shape "
                f"{tuple(call.explicit_mask.shape)}, which ea.observe cannot express; pass a 2D "
                "padding mask"
            )
        if call.packing is not None:
            return call.packing.attend(call, self.attend)
        call, place = valid_first(call)
        out, entropy = attention_with_entropy(
            call.query,
            call.key,
            call.value,
            block_size=self.block_size,
            backend=self.backend,
            **call.geometry,
        )
        self._add(call, entropy, place)
        return restore(out, place)

    @torch.no_grad()
    def _add(self, call: AttentionCall, entropy: AttentionEntropy, place: Tensor | None) -> None:
        batch, heads = call.query.shape[:2]
        sees_key = self._queries_with_keys(call)  # (B, 1, Nq)
        kwargs = {k: v for k, v in call.geometry.items() if k != "scale"}
        visible = visible_blocks(
            call.q_len, call.kv_len, self.block_size, batch=batch, **kwargs
        ).to(call.query.device)[:, None]  # (B, 1, Mq)
        tiles = visible > 0
        effective = entropy.tile.exp()
        # The rounding of fp32 must not add a block to exp(H) = 16.00001.
        kept = torch.minimum((effective * (1 - 1e-4)).ceil(), visible)

        def total(x: Tensor, where: Tensor) -> Tensor:
            x = x.expand(batch, heads, -1)
            return torch.where(where, x, 0.0).sum((0, 2), dtype=torch.float64)

        sums = torch.stack([
            total(entropy.row, sees_key),
            total(entropy.block, sees_key),
            total(sees_key.double(), sees_key),
            total(entropy.tile, tiles),
            total(effective, tiles),
            total(tiles.double(), tiles),
            total(kept, tiles),
            total(visible.double(), tiles),
        ])  # fmt: skip
        self._sums = sums if self._sums is None else self._sums + sums.to(self._sums.device)
        self.calls += 1
        if self.keep_rows:
            rows = torch.where(sees_key, entropy.row, float("nan"))
            self.rows.append(restore(rows[..., None], place)[..., 0].cpu())

    def _queries_with_keys(self, call: AttentionCall) -> Tensor:
        """(B, 1, Nq) bool. A query that may see any key at all sees its last one."""
        device = call.query.device
        q_end = call.q_len if call.q_lens is None else call.q_lens.view(-1, 1, 1)
        k_end = call.kv_len if call.kv_lens is None else call.kv_lens.view(-1, 1, 1)
        row = torch.arange(call.q_len, device=device).expand(call.query.shape[0], 1, -1)
        first = row + k_end - q_end if call.is_causal else row
        some_key = torch.as_tensor(k_end, device=device) > 0
        return (row < q_end) & (first >= 0) & some_key

    def read(self) -> LayerEntropy:
        """Waits for the device."""
        if self._sums is None:
            raise RuntimeError(
                f"{self.name} has not run since ea.observe; run the model inside the with block"
            )
        row, block, rows, tile, effective, tiles, kept, visible = self._sums.cpu()
        return LayerEntropy(
            name=self.name,
            calls=self.calls,
            row_entropy=row / rows,
            block_entropy=block / rows,
            tile_entropy=tile / tiles,
            effective_blocks=effective / tiles,
            density=kept / visible,
            rows=tuple(self.rows) if self.keep_rows else None,
        )


class Observation:
    """Entropies of a model's attention; also a context manager that stops observing at the end.

    ``str()`` gives a table, `plot` a heat map, `layers` the numbers. The model attends densely
    while it is observed, and is what it was before after `remove`.
    """

    def __init__(
        self,
        model: nn.Module,
        observers: tuple[_Observer, ...],
        block_size: tuple[int, int],
        installation: Installation,
    ) -> None:
        self.model = model
        self.block_size = block_size
        self._observers = observers
        self._installation = installation

    @property
    def layers(self) -> tuple[LayerEntropy, ...]:
        """One entry a layer that ran, in the order of the model. Waits for the device."""
        layers = tuple(o.read() for o in self._observers if o.calls)
        if not layers:
            raise RuntimeError("no attention ran yet; run the model inside the with block")
        return layers

    @property
    def density(self) -> float:
        """Mean over layers and heads of the density that Perplexity(1.0) would take."""
        return float(torch.cat([layer.density for layer in self.layers]).mean())

    def reset(self) -> None:
        """Forget what was seen."""
        for observer in self._observers:
            observer.reset()

    def remove(self) -> None:
        """Stop observing; the numbers stay. A second call does nothing."""
        self._installation.remove()

    def __enter__(self) -> Observation:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def __str__(self) -> str:
        if not any(o.calls for o in self._observers):
            return f"Observation({type(self.model).__name__}, nothing ran yet)"
        columns = (
            "layer",
            "calls",
            "row H",
            "block H",
            "tile H",
            "eff. blocks",
            "density",
            "heads",
        )
        rows = []
        for layer in self.layers:
            means = (f"{getattr(layer, name).mean():.3f}" for name in MEASURES)
            low, high = layer.density.min(), layer.density.max()
            rows.append((layer.name, str(layer.calls), *means, f"{low:.3f}..{high:.3f}"))
        note = (
            f"entropies in nats, blocks of {self.block_size[0]} x {self.block_size[1]} tokens; "
            f"density of keeping ceil(exp(tile H)) blocks, mean {self.density:.3f}"
        )
        return render("entropy of attention, means over heads", columns, rows, [note])

    def plot(self, measure: str = "effective_blocks", axes: Axes | None = None) -> Axes:
        """A heat map, layers by heads. Needs matplotlib.

        Args:
            measure: one of row_entropy, block_entropy, tile_entropy, effective_blocks, density.
            axes: where to draw; a new figure by default.
        """
        if measure not in MEASURES:
            raise ValueError(f"measure must be one of {MEASURES}, got {measure!r}")
        try:
            import matplotlib.pyplot as plt
        except ImportError as error:
            raise ImportError("plot needs matplotlib: pip install matplotlib") from error
        layers = self.layers
        heads = max(len(getattr(layer, measure)) for layer in layers)
        grid = torch.full((len(layers), heads), float("nan"), dtype=torch.float64)
        for row, layer in zip(grid, layers, strict=True):
            values = getattr(layer, measure)
            row[: len(values)] = values
        if axes is None:
            _, axes = plt.subplots(figsize=(2 + 0.35 * heads, 1.5 + 0.3 * len(layers)))
        image = axes.imshow(grid.numpy(), aspect="auto", cmap="viridis")
        axes.figure.colorbar(image, ax=axes, label=measure.replace("_", " "))
        axes.set_xlabel("head")
        axes.set_ylabel("layer")
        return axes


def observe(
    model: nn.Module,
    *,
    block_size: int | tuple[int, int] = 64,
    keep_rows: bool = False,
    partial: bool = False,
    backend: str = "auto",
) -> Observation:
    """Measure the entropies of a model's attention while it runs, dense and unchanged.

    Args:
        model: a model of transformers or timm, or a module that contains one.
        block_size: of the blocks and tiles, in tokens.
        keep_rows: also keep the entropy of every query (4 bytes a query, head and layer).
        partial: allow attention modules that cannot be observed; they are left out.
        backend: "auto", or a name of `ea.backends()`.

    Returns:
        An `Observation`, to be used as a context manager or with ``.remove()``.

    Raises:
        ValueError: some attention of the model cannot be observed.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    size = check_block_size(block_size)
    sites = find_sites(model)
    check_reach(model, sites, partial)
    observers = tuple(_Observer(site.name, size, keep_rows, backend) for site in sites)
    return Observation(model, observers, size, Installation(sites, observers))
