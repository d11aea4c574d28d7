"""Pictures of block masks. Needs matplotlib, which is imported on the first call."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from entropy_attn.block_lists import listed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from entropy_attn.masks import BlockMask

# Cells along the longer axis; more than a picture shows is merged before it is drawn.
MAX_CELLS = 512
# A sequential map whose lightest colour still differs from the background.
COLORS = ("#f4f1ea", "#b8d4dc", "#5a9bb5", "#1f5f8b", "#0b2545")
HIDDEN = "#d9d9d9"


def plot_block_mask(
    mask: BlockMask,
    *,
    batch: int = 0,
    head: int | None = None,
    is_causal: bool = False,
    title: str | None = None,
    ax: Axes | None = None,
    path: str | os.PathLike | None = None,
) -> Axes:
    """Draw which blocks a mask keeps, over axes in tokens; reads the mask from its device.

    Args:
        mask: any size; blocks are averaged into cells where there are more than a picture shows.
        batch: the batch row to draw.
        head: one head, or None for the share of the heads that keep each block.
        is_causal: grey out the blocks without a visible pair and count density without them.
        title: replaces the text above the density.
        ax: axes to draw into; new ones by default.
        path: write the figure to this file (and close it, if it is new).

    Raises:
        ImportError: matplotlib is missing.
        IndexError: the mask has no such batch row or head.
        ValueError: the mask covers no token pair.
    """
    if 0 in mask.shape:
        raise ValueError(f"mask has shape {mask.shape}; there is nothing to draw")
    pyplot = _pyplot()
    mask = _selected(mask, batch, head)
    share = kept_share(mask, is_causal)
    graded = bool(((share > 0) & (share < 1)).any())
    is_new = ax is None
    if ax is None:
        size = (6.4, 5.4) if graded else (5.4, 5.6)  # with and without a colour bar
        _, ax = pyplot.subplots(figsize=size, layout="constrained")
    merged = blocks_per_cell(mask)
    # A cell of many blocks is hardly ever full: its colours span what there is to see.
    highest = share.nan_to_num(0.0).max().item() if merged > 1 and graded else 1.0
    image = ax.imshow(
        share.nan_to_num(-1.0).numpy(),
        cmap=_color_map(),
        vmin=0.0,
        vmax=highest,
        extent=(0, mask.kv_len, mask.q_len, 0),
        aspect="auto" if _is_long(mask) else "equal",
        interpolation="nearest",
    )
    ax.set_xlabel("key position (tokens)")
    ax.set_ylabel("query position (tokens)")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(pyplot.MaxNLocator(nbins=6, integer=True, steps=[1, 2, 4, 5, 10]))
        axis.set_major_formatter(pyplot.FuncFormatter(lambda tokens, _: f"{tokens:,.0f}"))
    ax.tick_params(length=3, color="#888888")
    ax.spines[:].set_color("#888888")
    ax.set_title(_title(mask, batch, head, is_causal, title), fontsize=10, loc="left")
    if graded:
        cell = f"share kept in cells of {merged} x {merged} blocks"
        label = "share of heads that keep the block" if merged == 1 else cell
        bar = ax.figure.colorbar(image, ax=ax, label=label, shrink=0.85)
        bar.outline.set_visible(False)
    if path is not None:
        figure: Any = ax.figure.figure  # the whole, where the axes lie in a part of one
        figure.savefig(path, dpi=160)
        if is_new:
            pyplot.close(figure)
    return ax


def blocks_per_cell(mask: BlockMask) -> int:
    """Side of a cell of the picture, in blocks."""
    return max(1, -(-max(mask.num_rows, mask.num_columns) // MAX_CELLS))


def kept_share(mask: BlockMask, is_causal: bool = False) -> Tensor:
    """Share of the blocks kept in each cell of the picture, averaged over batch and heads.

    The cost follows the lists, not Mq x Mk.

    Returns:
        (rows, columns) fp32 on the CPU; NaN where ``is_causal`` hides the whole cell.
    """
    batch, heads, num_rows, num_columns = mask.shape
    step = blocks_per_cell(mask)
    rows, columns = -(-num_rows // step), -(-num_columns // step)
    limit = torch.full((num_rows,), num_columns)
    if is_causal:
        limit = mask.grid.causal_counts().long()
    counts, indices = mask.kv_num_blocks.cpu(), mask.kv_indices.cpu()
    kept = listed(counts, indices) & (indices < limit[:, None])
    row = torch.arange(num_rows)[:, None] // step
    cell = (row * columns + indices // step)[kept]
    total = torch.bincount(cell, minlength=rows * columns).view(rows, columns)
    first = torch.arange(columns) * step
    visible = (limit[:, None].clamp(max=num_columns) - first).clamp(0, step)
    visible = torch.zeros(rows, columns, dtype=torch.int64).index_add_(0, row[:, 0], visible)
    return total / (visible * batch * heads)


def _selected(mask: BlockMask, batch: int, head: int | None) -> BlockMask:
    for name, index, size in (("batch", batch, mask.shape[0]), ("head", head, mask.shape[1])):
        # A mask with one batch row or head is every batch row's or head's.
        if index is not None and size != 1 and not 0 <= index < size:
            raise IndexError(
                f"{name}={index}, but the mask has {size}; allowed are 0 to {size - 1}"
            )
    selected = mask.select(batch=batch if mask.shape[0] > 1 else slice(None))
    if head is not None and mask.shape[1] > 1:
        selected = selected.select(heads=head)
    # Heads that share their lists need to be read once.
    if selected.kv_indices.stride(1) == 0 and selected.kv_num_blocks.stride(1) == 0:
        selected = selected.select(heads=slice(0, 1))
    return selected.select(batch=slice(0, 1))


def _title(
    mask: BlockMask, batch: int, head: int | None, is_causal: bool, title: str | None
) -> str:
    block_q, block_k = mask.block_size
    if title is None:
        heads = mask.shape[1]
        which = f"head {head}" if head is not None else f"mean of {heads} heads"
        title = "Block mask" if head is None and heads == 1 else f"Block mask, {which}"
        title = f"{title}, batch {batch}" if batch else title
    density = mask.density(is_causal).item()
    tiles = "of causal tiles" if is_causal else "of tiles"
    return f"{title}\ndensity {density:.3f} {tiles}, blocks {block_q} x {block_k}"


def _is_long(mask: BlockMask) -> bool:
    """Whether a true aspect ratio would leave a sliver."""
    lengths = (mask.q_len, mask.kv_len)
    return max(lengths) > 4 * min(lengths)


def _color_map() -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("block_mask", COLORS).with_extremes(under=HIDDEN)


def _pyplot() -> Any:
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(
            "plotting a mask needs matplotlib: pip install 'entropy-attn[bench]'"
        ) from error
    return pyplot
