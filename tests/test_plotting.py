"""Pictures of block masks: what is drawn, not how it looks."""

from __future__ import annotations

import sys

import pytest
import torch

from entropy_attn.masks import BlockMask
from entropy_attn.plotting import MAX_CELLS, blocks_per_cell, kept_share

matplotlib = pytest.importorskip("matplotlib")


@pytest.fixture(autouse=True)
def no_window():
    from matplotlib import pyplot

    with matplotlib.rc_context():
        pyplot.switch_backend("Agg")
        yield
    pyplot.close("all")


def drawn(ax) -> torch.Tensor:
    return torch.from_numpy(ax.images[0].get_array().data).float()


def test_mean_over_heads():
    mask = BlockMask.random(2, 4, 100, 150, 0.4, (16, 32))
    ax = mask.plot(batch=1)
    assert torch.equal(drawn(ax), mask.to_dense()[1].float().mean(0))
    # Tokens, not blocks; queries run downwards; the last block is cut at the length.
    assert ax.images[0].get_extent() == [0, 150, 100, 0]
    assert (ax.get_xlabel(), ax.get_ylabel()) == (
        "key position (tokens)",
        "query position (tokens)",
    )
    density = mask.density(per_head=True)[1].mean().item()
    title = f"Block mask, mean of 4 heads, batch 1\ndensity {density:.3f} of tiles, blocks 16 x 32"
    assert ax.get_title(loc="left") == title
    assert len(ax.figure.axes) == 2, "a colour bar for shares"


def test_one_head_needs_no_colour_bar():
    mask = BlockMask.random(1, 4, 100, 150, 0.4, 16)
    ax = mask.plot(head=2)
    assert torch.equal(drawn(ax), mask.to_dense()[0, 2].float())
    assert "head 2" in ax.get_title(loc="left")
    assert len(ax.figure.axes) == 1


def test_causal_blocks_are_grey():
    mask = BlockMask.full(1, 1, 64, 96, 16)
    ax = mask.plot(is_causal=True)
    causal = BlockMask.causal(1, 1, 64, 96, 16).to_dense()[0, 0]
    # Grey is drawn for what lies under the range of the colours.
    assert torch.equal(drawn(ax) < 0, ~causal)
    assert ax.images[0].get_clim()[0] == 0
    assert "density 1.000 of causal tiles" in ax.get_title(loc="left")


@pytest.mark.parametrize("is_causal", [False, True])
def test_long_masks_are_averaged_into_cells(is_causal):
    length = 16 * (2 * MAX_CELLS + 5)
    mask = BlockMask.random(1, 2, length, length, 0.01, 16, is_causal=True)
    step = blocks_per_cell(mask)
    assert step == 3
    share = kept_share(mask, is_causal)
    kept = mask.to_dense()[0].float().mean(0)
    visible = torch.ones_like(kept)
    if is_causal:
        visible = BlockMask.causal(1, 1, length, length, 16).to_dense()[0, 0].float()

    def sums(blocks):
        pad = -blocks.shape[0] % step
        blocks = torch.nn.functional.pad(blocks, (0, pad, 0, pad))
        return blocks.unflatten(1, (-1, step)).unflatten(0, (-1, step)).sum((1, 3))

    torch.testing.assert_close(share, sums(kept) / sums(visible), equal_nan=True)
    ax = mask.plot(is_causal=is_causal)
    assert max(drawn(ax).shape) <= MAX_CELLS
    assert ax.images[0].get_clim()[1] == share.nan_to_num(0).max().item()


def test_path_title_and_axes(tmp_path):
    from matplotlib import pyplot

    mask = BlockMask.sliding_window(1, 8, 200, 200, 50, block_size=16)
    path = tmp_path / "mask.png"
    mask.plot(path=path, title="Window")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert not pyplot.get_fignums(), "a figure that is written is closed"
    figure, axes = pyplot.subplots(1, 2)
    ax = mask.plot(ax=axes[1], title="Window", head=7, path=path)
    assert ax is axes[1]
    assert ax.get_title(loc="left").startswith("Window\n")
    assert pyplot.fignum_exists(figure.number), "the caller's figure stays"


def test_bad_arguments():
    mask = BlockMask.random(2, 3, 64, 64, 0.5, 16)
    with pytest.raises(IndexError, match="head=3, but the mask has 3; allowed are 0 to 2"):
        mask.plot(head=3)
    with pytest.raises(IndexError, match="batch=-1, but the mask has 2"):
        mask.plot(batch=-1)
    with pytest.raises(ValueError, match=r"\(1, 1, 0, 1\); there is nothing to draw"):
        BlockMask.full(1, 1, 0, 64).plot()


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'entropy-attn\[bench\]'"):
        BlockMask.full(1, 1, 64, 64).plot()
