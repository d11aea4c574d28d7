"""BlockMask: which blocks of keys each block of queries visits, as counts and indices."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import InitVar, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from entropy_attn import block_lists, mask_formats, mask_patterns, validation
from entropy_attn.block_lists import column_lists
from entropy_attn.mask_formats import FlashAttentionLists
from entropy_attn.mask_patterns import BlockGrid

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["BlockMask", "FlashAttentionLists", "column_lists"]

BlockSize = int | tuple[int, int]
Device = torch.device | str | None


@dataclass(frozen=True, eq=False, repr=False)
class BlockMask:
    """Block lists, one per block of queries.

    The mask keeps whole blocks. What is hidden inside a kept block (causality, a window, padding)
    is said in the attention call, where queries are aligned to the last key.

    The constructor checks every value, which waits for the device. ``validate=False`` trusts the
    lists and never waits: it is for lists that were built on the device, and inside
    ``torch.compile``.

    Attributes:
        kv_num_blocks: (B|1, H|1, Mq) int32, how many key blocks each query block visits. H counts
            query heads, or in calls the heads of keys, whose query heads then share their lists; a
            1 stands for every batch or head.
        kv_indices: (B|1, H|1, Mq, W) int32, the key blocks in ascending order, each at most once
            (the constructor sorts unsorted ones), W >= the largest count; entries past the count
            are unspecified but lie in [0, Mk). May be expanded: strides of 0 are common.
        block_size: (block_q, block_k) in tokens, powers of two from 16 to 256.
        q_len, kv_len: lengths in tokens; Mq = ceil(q_len / block_q), Mk = ceil(kv_len / block_k).
        is_full: known on the host to keep every block.

    Raises:
        TypeError, ValueError: a wrong type, shape, device or value; the message names the
            argument, the position and what is allowed.
    """

    kv_num_blocks: Tensor
    kv_indices: Tensor
    block_size: tuple[int, int]
    q_len: int
    kv_len: int
    is_full: bool = False
    validate: InitVar[bool] = True

    def __post_init__(self, validate: bool) -> None:
        if not validate:
            return
        block_size = validation.check_block_size(self.block_size)
        validation.check_integer("q_len", self.q_len, 0)
        validation.check_integer("kv_len", self.kv_len, 0)
        indices = validation.check_block_lists(
            self.kv_num_blocks, self.kv_indices, block_size, self.q_len, self.kv_len, self.is_full
        )
        object.__setattr__(self, "block_size", block_size)
        object.__setattr__(self, "kv_indices", indices)

    # Shape

    @property
    def grid(self) -> BlockGrid:
        """Where the blocks stand on the token axes."""
        return BlockGrid(self.q_len, self.kv_len, self.block_size)

    @property
    def num_rows(self) -> int:
        """Mq, blocks of queries."""
        return self.grid.num_rows

    @property
    def num_columns(self) -> int:
        """Mk, blocks of keys."""
        return self.grid.num_columns

    @property
    def width(self) -> int:
        """W, how many blocks a row has room for."""
        return self.kv_indices.shape[-1]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B|1, H|1, Mq, Mk)."""
        batch, heads = self.kv_num_blocks.shape[:2]
        return batch, heads, self.num_rows, self.num_columns

    @property
    def device(self) -> torch.device:
        """Where the lists are."""
        return self.kv_indices.device

    # Constructors. None of them waits for the device, except from_lists and from_flex.

    @classmethod
    def from_dense(cls, dense: Tensor, block_size: BlockSize, q_len: int, kv_len: int) -> BlockMask:
        """Keep the blocks that are True in ``dense`` (B|1, H|1, Mq, Mk) bool; W = Mk."""
        grid = _grid(q_len, kv_len, block_size)
        validation.check_dense_blocks(dense, grid.block_size, q_len, kv_len)
        return cls._on(grid, block_lists.lists_from_dense(dense))

    @classmethod
    def from_lists(
        cls,
        lists: Sequence,
        block_size: BlockSize,
        q_len: int,
        kv_len: int,
        device: Device = None,
    ) -> BlockMask:
        """Keep the blocks named in Python lists, one list a block of queries.

        Args:
            lists: Mq lists of key blocks for all heads, or nested as [batch][head][Mq].
        """
        grid = _grid(q_len, kv_len, block_size)
        # A row of numbers is one level deep in the short form.
        if not any(isinstance(block, Sequence) for row in lists for block in row):
            lists = [[lists]]
        for batch in lists:
            for head in batch:
                if len(batch) != len(lists[0]) or len(head) != grid.num_rows:
                    raise ValueError(
                        f"lists must hold {grid.num_rows} rows (q_len={q_len}, block_size="
                        f"{grid.block_size}) for each head, and as many heads for each batch; got "
                        f"{[[len(h) for h in b] for b in lists]}"
                    )
        width = max((len(row) for batch in lists for head in batch for row in head), default=0)
        counts = [[[len(row) for row in head] for head in batch] for batch in lists]
        padded = [
            [[[*row, *[0] * (width - len(row))] for row in head] for head in batch]
            for batch in lists
        ]
        shape = (len(lists), len(lists[0]) if lists else 0, grid.num_rows)
        return cls(
            torch.tensor(counts, dtype=torch.int32, device=device).view(shape),
            torch.tensor(padded, dtype=torch.int32, device=device).view(*shape, width),
            grid.block_size,
            q_len,
            kv_len,
        )

    @classmethod
    def full(
        cls,
        batch: int,
        heads: int,
        q_len: int,
        kv_len: int,
        block_size: BlockSize = 64,
        device: Device = None,
    ) -> BlockMask:
        """Keep every block. Memory is O(Mq + Mk): the rows share one row."""
        grid = _grid(q_len, kv_len, block_size)
        lists = mask_patterns.full_lists(grid, device)
        return replace(cls._on(grid, lists, (batch, heads)), is_full=True, validate=False)

    @classmethod
    def causal(
        cls,
        batch: int,
        heads: int,
        q_len: int,
        kv_len: int,
        block_size: BlockSize = 64,
        device: Device = None,
    ) -> BlockMask:
        """Keep every block in which a query, aligned to the last key, may see a key.

        The diagonal blocks are kept whole: pass ``is_causal=True`` to attention as well. Memory
        is O(Mq + Mk): the rows share one row.
        """
        grid = _grid(q_len, kv_len, block_size)
        return cls._on(grid, mask_patterns.causal_lists(grid, device), (batch, heads))

    @classmethod
    def sliding_window(
        cls,
        batch: int,
        heads: int,
        q_len: int,
        kv_len: int,
        window: int,
        sink: int = 0,
        block_size: BlockSize = 64,
        is_causal: bool = True,
        device: Device = None,
    ) -> BlockMask:
        """Keep the blocks near the diagonal, aligned to the last key, and the first ones.

        Whole blocks are kept: to hide keys by the token, pass ``window=`` to attention (which
        then hides the sink too).

        Args:
            window: tokens. Causal: a query sees the ``window`` keys that end at its own position.
                Otherwise: those fewer than ``window`` tokens away on either side. A block is kept
                if any query of the row sees any key of it.
            sink: tokens; the blocks of the first ``sink`` keys are kept for every row (that may
                see them, if causal).
            is_causal: whether keys behind the query are out of reach.
        """
        grid = _grid(q_len, kv_len, block_size)
        validation.check_integer("window", window, 1)
        validation.check_integer("sink", sink, 0)
        lists = mask_patterns.sliding_window_lists(grid, window, sink, is_causal, device)
        return cls._on(grid, lists, (batch, heads))

    @classmethod
    def random(
        cls,
        batch: int,
        heads: int,
        q_len: int,
        kv_len: int,
        density: float,
        block_size: BlockSize = 64,
        *,
        is_causal: bool = False,
        irregular: bool = False,
        seed: int = 0,
        device: Device = None,
    ) -> BlockMask:
        """Random blocks for benchmarks, drawn for each batch and head, the diagonal block kept.

        Args:
            density: share of the blocks that a row may see which it lists, in (0, 1]; at least
                one block.
            is_causal: draw only among blocks with a visible pair.
            irregular: let the share vary from row to row, uniformly, with mean ``density``.
            seed: of a generator on ``device``; the same seed gives the same mask on that device.
        """
        grid = _grid(q_len, kv_len, block_size)
        validation.check_integer("batch", batch, 1)
        validation.check_integer("heads", heads, 1)
        density = validation.check_share("density", density)
        lists = mask_patterns.random_lists(
            grid, batch, heads, density, irregular, is_causal, seed, device
        )
        return cls._on(grid, lists)

    @classmethod
    def _on(
        cls, grid: BlockGrid, lists: block_lists.Lists, size: tuple[int, int] | None = None
    ) -> BlockMask:
        """Trusted lists on a grid, expanded to (batch, heads) if given."""
        mask = cls(*lists, grid.block_size, grid.q_len, grid.kv_len, validate=False)
        return mask if size is None else mask.expand(*size)

    # What the mask keeps

    def to_dense(self) -> Tensor:
        """(B|1, H|1, Mq, Mk) bool, True for the blocks kept."""
        return block_lists.dense_from_lists(self.kv_num_blocks, self.kv_indices, self.num_columns)

    def to_token_mask(
        self,
        *,
        is_causal: bool = False,
        window: int | None = None,
        kv_lens: Tensor | None = None,
        q_lens: Tensor | None = None,
        max_elements: int = 1 << 28,
    ) -> Tensor:
        """(B|1, H|1, q_len, kv_len) bool, True where a query sees a key: SDPA's ``attn_mask``.

        For tests and baselines: raises ValueError above ``max_elements`` entries. The other
        arguments are those of `block_sparse_attention`.
        """
        from entropy_attn.reference.dense import visible_pairs

        batch, heads = self.kv_num_blocks.shape[:2]
        for lens in (kv_lens, q_lens):
            batch = batch if lens is None else max(batch, lens.shape[0])
        elements = batch * heads * self.q_len * self.kv_len
        if elements > max_elements:
            raise ValueError(
                f"a token mask of shape {(batch, heads, self.q_len, self.kv_len)} has {elements} "
                f"entries, more than max_elements={max_elements}; use the block lists, or raise it"
            )
        block_q, block_k = self.block_size
        tokens = self.to_dense().repeat_interleave(block_q, dim=2).repeat_interleave(block_k, dim=3)
        return tokens[:, :, : self.q_len, : self.kv_len] & visible_pairs(
            batch,
            self.q_len,
            self.kv_len,
            is_causal=is_causal,
            window=window,
            kv_lens=kv_lens,
            q_lens=q_lens,
            device=self.device,
        )

    def num_blocks(self) -> Tensor:
        """How many blocks are listed, over all (B|1, H|1) of the mask: () int64, no sync."""
        return self.kv_num_blocks.sum(dtype=torch.int64)

    def density(self, is_causal: bool = False, per_head: bool = False) -> Tensor:
        """Share of the tiles that are visited, fp32 on the device, no sync; 0 if there are none.

        Args:
            is_causal: count, among the listed blocks and in the total, only tiles with a visible
                pair for queries aligned to the last key.
            per_head: (B|1, H|1) instead of the mean over them, ().
        """
        if is_causal:
            visible = self.grid.causal_counts(self.device)
            total: Tensor | int = visible.sum(dtype=torch.int64).clamp(min=1)
            listed = block_lists.listed(self.kv_num_blocks, self.kv_indices)
            visited = (listed & (self.kv_indices < visible[:, None])).sum((-1, -2))
        else:
            total = max(self.num_rows * self.num_columns, 1)
            visited = self.kv_num_blocks.sum(-1, dtype=torch.int64)
        share = visited / total
        return share if per_head else share.mean()

    def column_lists(self) -> tuple[Tensor, Tensor]:
        """Offsets and rows of the transposed lists; see the function `column_lists`. No sync."""
        return column_lists(self.kv_num_blocks, self.kv_indices, self.num_columns)

    def same_blocks(self, other: BlockMask) -> bool:
        """Whether both keep the same blocks for every batch and head; waits for the device.

        Widths, unlisted entries and expansion do not matter.
        """
        if self.grid != other.grid:
            return False
        for sizes in zip(self.shape[:2], other.shape[:2], strict=True):
            if sizes[0] != sizes[1] and 1 not in sizes:
                return False
        if not (self.kv_num_blocks == other.kv_num_blocks).all():
            return False
        width = min(self.width, other.width)
        mine, its = self.kv_indices[..., :width], other.kv_indices[..., :width]
        return bool(((mine == its) | ~block_lists.listed(self.kv_num_blocks, mine)).all())

    # Other masks of the same blocks

    def transposed(self, width: int | None = None) -> BlockMask:
        """The mask of keys visiting queries: lengths and block sizes swap.

        Args:
            width: W of the result. None measures the largest count, which waits for the device
                (and breaks a torch.compile graph); Mq is always enough. A key block that every
                row visits needs all of Mq: `column_lists` has no such cost.
        """
        if width is None:
            longest = self.column_lists()[0].diff(dim=-1)
            width = max(1, int(longest.max())) if longest.numel() else 1
        lists = block_lists.transposed_lists(
            self.kv_num_blocks, self.kv_indices, self.num_columns, width
        )
        block_q, block_k = self.block_size
        swapped = BlockGrid(self.kv_len, self.q_len, (block_k, block_q))
        return replace(self._on(swapped, lists), is_full=self.is_full, validate=False)

    def with_size(self, block_size: BlockSize) -> BlockMask:
        """The mask in blocks of another size: what meets a kept block is kept. No sync."""
        grid = _grid(self.q_len, self.kv_len, block_size)
        lists = block_lists.resized_lists(
            self.kv_num_blocks,
            self.kv_indices,
            self.block_size,
            grid.block_size,
            self.q_len,
            self.kv_len,
        )
        return replace(self._on(grid, lists), is_full=self.is_full, validate=False)

    def compact(self) -> BlockMask:
        """The same lists, as wide as the largest count; waits for the device once."""
        longest = int(self.kv_num_blocks.max()) if self.kv_num_blocks.numel() else 0
        # One entry at least, so that kernels get a valid address.
        indices = self.kv_indices[..., : max(longest, 1)]
        return replace(self, kv_indices=indices.contiguous(), validate=False)

    def to(self, device: torch.device | str) -> BlockMask:
        """The mask on ``device``."""
        return replace(
            self,
            kv_num_blocks=self.kv_num_blocks.to(device),
            kv_indices=self.kv_indices.to(device),
            validate=False,
        )

    def expand(self, batch: int, heads: int) -> BlockMask:
        """The mask with dimensions of 1 expanded to ``batch`` and ``heads``, without a copy."""
        has_batch, has_heads, _ = self.kv_num_blocks.shape
        for name, size, have in (("batch", batch, has_batch), ("heads", heads, has_heads)):
            validation.check_integer(name, size, 0)
            if have not in (1, size):
                raise ValueError(f"{name}={size}, but the mask has {have}; only 1 can be expanded")
        return replace(
            self,
            kv_num_blocks=self.kv_num_blocks.expand(batch, heads, -1),
            kv_indices=self.kv_indices.expand(batch, heads, -1, -1),
            validate=False,
        )

    def select(
        self,
        batch: int | slice | Sequence[int] | Tensor | None = None,
        heads: int | slice | Sequence[int] | Tensor | None = None,
    ) -> BlockMask:
        """The mask of some batch rows and heads, in the order named; both dimensions stay.

        None takes all of them.
        """
        batch, heads = (
            slice(None) if some is None else [some] if isinstance(some, int) else some
            for some in (batch, heads)
        )
        return replace(
            self,
            kv_num_blocks=self.kv_num_blocks[batch][:, heads],
            kv_indices=self.kv_indices[batch][:, heads],
            validate=False,
        )

    # Other formats

    def to_flex(self, is_causal: bool = False, *, exact_mask_mod: bool = True) -> Any:
        """A ``torch.nn.attention.flex_attention.BlockMask`` of the same tokens.

        Visible blocks become full blocks; with ``is_causal``, those that the diagonal crosses
        become partial blocks under a causal mask_mod. FlexAttention's lists are Mk wide and it
        transposes them as an Mq x Mk matrix, so this is not for very long masks. No sync.

        Args:
            exact_mask_mod: let the mask_mod look the kept blocks up, so that FlexAttention is
                right without torch.compile too. False gives the plain causal (or no) mask_mod,
                the fastest under torch.compile; but FlexAttention outside torch.compile ignores
                block lists and would then attend to everything.
        """
        return mask_formats.to_flex(self, is_causal, exact_mask_mod)

    @classmethod
    def from_flex(cls, flex_mask: Any, is_causal: bool = False) -> BlockMask:
        """The mask of a ``torch.nn.attention.flex_attention.BlockMask``; waits for the device.

        Full and partial blocks are kept. A BlockMask has no mask_mod, so what mask_mod hides in
        the partial blocks must be expressible: it is evaluated on all their pairs.

        Args:
            is_causal: the mask will be used with ``is_causal=True``. Then mask_mod must equal the
                causal mask aligned to the last key on the partial blocks, and full blocks must
                lie below the diagonal. Otherwise mask_mod must be true on the partial blocks.

        Raises:
            TypeError, ValueError: not such a mask, block sizes that are not allowed, or a
                mask_mod that is not expressible.
        """
        return mask_formats.from_flex(flex_mask, is_causal)

    def to_flash_attn(
        self, is_causal: bool = False, *, backward: bool = False, width: int | None = None
    ) -> FlashAttentionLists:
        """Lists with the field names of flash-attn-4's ``BlockSparseTensorsTorch``. No sync.

        Without ``is_causal`` every block is a full block. With it, the blocks that the diagonal
        crosses are mask blocks, to which flash-attn-4 applies its mask_mod (or ``causal=True``,
        which it applies to both lists), and blocks above the diagonal are left out.

        Args:
            backward: lists of query blocks for each key block, which its backward takes.
            width: of the backward's lists, at least the largest count; None is Mq.
        """
        return mask_formats.to_flash_attn(self, is_causal, backward, width)

    def save(self, path: str | os.PathLike) -> None:
        """Write the mask to a file: a versioned dict that torch.load(weights_only=True) reads."""
        mask_formats.save(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike, device: Device = None) -> BlockMask:
        """Read a mask that `save` wrote; every value is checked.

        Raises:
            ValueError: another kind of file, another version, or broken lists.
        """
        return mask_formats.load(path, device)

    def plot(self, **options: Any) -> Axes:
        """A heat map of the kept blocks; see `entropy_attn.plotting.plot_block_mask`."""
        from entropy_attn.plotting import plot_block_mask

        return plot_block_mask(self, **options)

    def __repr__(self) -> str:
        # Only a real tensor on the CPU can be read without waiting or breaking a trace.
        if type(self.kv_num_blocks) is Tensor and self.device.type == "cpu":
            density = f"{self.density().item():.4g}"
        else:
            density = "call .density()"
        full = ", is_full=True" if self.is_full else ""
        return (
            f"BlockMask(shape={self.shape}, block_size={self.block_size}, q_len={self.q_len}, "
            f"kv_len={self.kv_len}, width={self.width}, device={self.device}, "
            f"density={density}{full})"
        )


def _grid(q_len: int, kv_len: int, block_size: BlockSize) -> BlockGrid:
    block_size = validation.check_block_size(block_size)
    validation.check_integer("q_len", q_len, 0)
    validation.check_integer("kv_len", kv_len, 0)
    return BlockGrid(q_len, kv_len, block_size)
