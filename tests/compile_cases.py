"""The calls that `compile_only.py` compiles: each kernel, in the forms that differ in code.

They are made through the custom ops and launchers, as the API makes them, with tensors of zeros;
kernels are imported where a case runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


def H200(index: int) -> tuple[int, int]:
    """`device_limits` of a GPU that is not here."""
    return 132, 50 << 20


@dataclass(frozen=True)
class Attention:
    """An attention call, forward, backward and tile mass.

    Attributes:
        gradients: the entropies whose gradients the backward takes in.
        values: without them there is the tile entropy alone.
    """

    head_dim: int
    block: int
    dtype: torch.dtype = torch.bfloat16
    is_causal: bool = False
    entropy: bool = False
    lens: bool = False
    dense: bool = False
    backward: bool = True
    gradients: tuple[str, ...] = ()
    values: bool = True

    def __str__(self) -> str:
        words = [f"D={self.head_dim}", f"blocks {self.block}", str(self.dtype).split(".")[1]]
        words += [] if self.values else ["without values"]
        flags = ("is_causal", "entropy", "lens", "dense")
        words += [name for name in flags if getattr(self, name)]
        return ", ".join(
            words + ["gradients of " + "+".join(self.gradients)] * bool(self.gradients)
        )

    def run(self) -> None:
        from entropy_attn import ops
        from entropy_attn.masks import BlockMask

        length = 1024 if not self.lens else 1000
        query = torch.zeros(1, 2, length, self.head_dim, dtype=self.dtype)
        key = query[:, :1]  # grouped queries
        lens = torch.tensor([length], dtype=torch.int32) if self.lens else None
        counts = indices = None
        if not self.dense:
            mask = BlockMask.causal(1, 2, length, length, self.block)
            counts, indices = mask.kv_num_blocks, mask.kv_indices
        lists = (counts, indices, lens, lens)
        geometry = (self.block, self.block, self.is_causal, 0, self.head_dim**-0.5)
        value, out = (key, query) if self.values else (None, None)
        kinds = (self.entropy and self.values,) * 2
        *_, lse, row, block, tile, mass = ops.attention_forward(
            query, key, value, *lists, *geometry,
            *kinds, self.entropy, "tile" in self.gradients, "triton",
        )  # fmt: skip
        if self.backward:
            grads = {"row": row, "block": block, "tile": tile}
            grads = [grads[kind] if kind in self.gradients else None for kind in grads]
            ops.attention_backward(
                out, None, *grads, query, key, value, query, lse, row, block, mass,
                *lists, *geometry, "triton",
            )  # fmt: skip


@dataclass(frozen=True)
class Decode:
    """A few queries of each sequence against a cache, in pages if their size is given."""

    head_dim: int
    block: int
    dtype: torch.dtype = torch.bfloat16
    queries: int = 1
    group: int = 4
    page: int = 0
    length: int = 4096  # it says over how many programs the keys are split

    def __str__(self) -> str:
        words = [f"D={self.head_dim}", f"blocks {self.block}", str(self.dtype).split(".")[1]]
        words += [f"{self.queries} queries of {self.group} heads, N={self.length}"]
        return ", ".join(words + [f"pages of {self.page}"] * bool(self.page))

    def run(self) -> None:
        from entropy_attn import ops
        from entropy_attn.masks import BlockMask

        query = torch.zeros(2, 2 * self.group, self.queries, self.head_dim, dtype=self.dtype)
        key = torch.zeros(2, 2, self.length, self.head_dim, dtype=self.dtype)
        mask = BlockMask.full(1, 1, self.queries, self.length, (16, self.block))
        lists = (mask.kv_num_blocks, mask.kv_indices)
        lens = torch.tensor([self.length, 1000], dtype=torch.int32)
        geometry = (16, self.block, True, 0, self.head_dim**-0.5)
        if not self.page:
            ops.attention_forward(
                query, key, key, *lists, lens, None, *geometry, *[False] * 4, "triton"
            )
            return
        pages = key.unflatten(2, (-1, self.page)).transpose(1, 2).flatten(0, 1)
        table = torch.arange(len(pages), dtype=torch.int32).view(2, -1)
        ops.paged_forward(query, pages, pages, table, *lists, lens, *geometry, "triton")


@dataclass(frozen=True)
class KeyBoxes:
    """A choice of blocks of a cache by the boxes around its keys, and attention to them."""

    head_dim: int
    block: int
    dtype: torch.dtype = torch.bfloat16
    queries: int = 1
    group: int = 4
    padded: bool = True
    length: int = 8192

    def __str__(self) -> str:
        words = [f"D={self.head_dim}", f"boxes of {self.block}", str(self.dtype).split(".")[1]]
        words += [f"{self.queries} queries of {self.group} heads, N={self.length}"]
        return ", ".join(words + ["padded"] * self.padded)

    def run(self) -> None:
        from entropy_attn.decoding import ops

        query = torch.zeros(2, 2 * self.group, self.queries, self.head_dim, dtype=self.dtype)
        # Up to 4 GiB, which nobody reads: not even zeros are written.
        key = torch.empty(2, 2, self.length, self.head_dim, dtype=self.dtype)
        blocks = self.length // self.block
        boxes = torch.zeros(2, 2, blocks, 2, self.head_dim, dtype=self.dtype)
        fresh, totals = torch.zeros(2, dtype=torch.int32), torch.zeros(2, dtype=torch.int64)
        valid = torch.ones(2, self.length, dtype=torch.int8) if self.padded else None
        lens = torch.full((2,), self.length, dtype=torch.int32) if self.padded else None
        counts, indices = ops.choose_blocks(
            query, key, boxes, fresh, totals, valid, lens, self.block, 1, 2, 0.25, 1,
            blocks // 4, 0.1, "triton",
        )  # fmt: skip
        if self.padded:
            ops.decode_forward(
                query, key, key, counts, indices, valid, lens, self.block, 0.1, "triton"
            )


@dataclass(frozen=True)
class Hopper:
    """A forward of the kernel for sm_90, as calls that are large enough run."""

    head_dim: int
    block: tuple[int, int]
    dtype: torch.dtype = torch.bfloat16
    is_causal: bool = False
    kv_len: int = 1024
    q_len: int = 1000
    dense: bool = False
    lens: bool = False
    row_entropy: bool = False
    block_entropy: bool = False

    def __str__(self) -> str:
        blocks = "x".join(map(str, self.block))
        words = [f"Hopper, D={self.head_dim}", f"blocks {blocks}", str(self.dtype).split(".")[1]]
        switches = ("is_causal", "dense", "lens", "row_entropy", "block_entropy")
        words += [name for name in switches if getattr(self, name)]
        words += [f"{self.q_len} queries"] * (self.q_len != 1000)
        return ", ".join([*words, f"N={self.kv_len}"])

    def run(self) -> None:
        from entropy_attn.kernels.hopper import forward
        from entropy_attn.masks import BlockMask

        forward.device_limits = H200
        query = torch.zeros(1, 4, self.q_len, self.head_dim, dtype=self.dtype)
        key = torch.zeros(1, 2, self.kv_len, self.head_dim, dtype=self.dtype)
        mask = BlockMask.full(1, 4, self.q_len, self.kv_len, self.block)
        lists = (None, None) if self.dense else (mask.kv_num_blocks, mask.kv_indices)
        lens = torch.tensor([900], dtype=torch.int32) if self.lens else None
        forward.hopper_forward(
            query, key, key, *lists, self.block, self.is_causal, self.head_dim**-0.5,
            kv_lens=lens, q_lens=lens,
            row_entropy=self.row_entropy, block_entropy=self.block_entropy,
        )  # fmt: skip


@dataclass(frozen=True)
class BackwardForHopper:
    """A backward of the kernel for sm_90, as calls that are large enough run."""

    head_dim: int
    dtype: torch.dtype = torch.bfloat16
    is_causal: bool = False
    kv_len: int = 1024
    dense: bool = False
    lens: bool = False
    group: int = 2
    after_lists: bool = False

    def __str__(self) -> str:
        words = [f"backward, D={self.head_dim}", str(self.dtype).split(".")[1]]
        switches = ("is_causal", "dense", "lens", "after_lists")
        words += [name for name in switches if getattr(self, name)]
        return ", ".join([*words, f"groups of {self.group}", f"N={self.kv_len}"])

    def run(self) -> None:
        from entropy_attn.block_lists import column_lists
        from entropy_attn.kernels.hopper import backward
        from entropy_attn.masks import BlockMask

        backward.device_limits = H200
        query = torch.zeros(1, 4, 1024, self.head_dim, dtype=self.dtype)
        key = torch.zeros(1, 4 // self.group, self.kv_len, self.head_dim, dtype=self.dtype)
        columns = None
        if not self.dense:
            mask = BlockMask.full(1, 4, 1024, self.kv_len, 128)
            columns = column_lists(mask.kv_num_blocks, mask.kv_indices, -(-self.kv_len // 128))
        lens = torch.tensor([900], dtype=torch.int32) if self.lens else None
        backward.hopper_backward(
            query, query, key, key, query, torch.zeros(1, 4, 1024), None, columns, (128, 128),
            self.is_causal, self.head_dim**-0.5, kv_lens=lens, q_lens=lens,
            after_lists=self.after_lists,
        )  # fmt: skip


@dataclass(frozen=True)
class Transposed:
    """The transposed lists, which a call on the CPU would sort."""

    heads: int
    with_order: bool = False
    length: int = 4096

    def __str__(self) -> str:
        words = f"{self.heads} heads, N={self.length}, transposed lists"
        return words + ", with order" * self.with_order

    def run(self) -> None:
        from entropy_attn.kernels.transposed_lists import transpose_lists
        from entropy_attn.masks import BlockMask

        mask = BlockMask.causal(1, self.heads, self.length, self.length, 128)
        transpose_lists(mask.kv_num_blocks, mask.kv_indices, self.length // 128, self.with_order)


@dataclass(frozen=True)
class TrueMass:
    """The attention mass of tiles, computed from scratch."""

    head_dim: int
    block: int
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        return f"D={self.head_dim}, blocks {self.block}, true mass"

    def run(self) -> None:
        from entropy_attn import ops

        query = torch.zeros(1, 2, 1024, self.head_dim, dtype=self.dtype)
        geometry = (self.block, self.block, True, 0, self.head_dim**-0.5)
        ops.tile_mass(query, query, None, None, None, None, None, *geometry, True, "triton")


@dataclass(frozen=True)
class Selection:
    """A choice of blocks: scoring, then the budget."""

    head_dim: int
    block: int
    scorer: str
    rule: str
    length: int = 1024
    group: int = 8

    def __str__(self) -> str:
        where = f"D={self.head_dim}, blocks {self.block}, N={self.length}"
        return f"{where}, {self.scorer} {self.group}, budget by {self.rule}"

    def run(self) -> None:
        from entropy_attn.selection import ops

        query = torch.zeros(1, 2, self.length, self.head_dim, dtype=torch.bfloat16)
        tiles = blocks = self.length // self.block
        shape = (self.length, self.length, self.block, self.block, True, 0)
        is_antidiagonal = self.scorer == "antidiagonal"
        rows = (query, query, None)
        if self.scorer == "pooled":
            rows = (*ops.pool_tokens(query, query, None, None, self.group, "triton"), None)
        elif self.scorer == "envelope":
            rows = ops.envelope_tokens(query, query, None, None, self.group, 0.5, "triton")
        ops.score_tiles(
            *rows, None, None, *shape, self.group, is_antidiagonal, False, 0.1, 0, tiles, "triton"
        )
        mass = torch.full((1, 2, 1, blocks), 1 / blocks)
        budget = (1, 2, self.rule, 0.5, 0, 1.0, blocks)
        ops.keep_tiles(mass, None, None, *shape, *budget, 0, "triton")


@dataclass(frozen=True)
class SoftCells:
    """Masses of soft cells and their gradients: k anchors, or halfspaces that cut 2^k cells."""

    dim: int
    k: int
    dtype: torch.dtype = torch.bfloat16
    halfspaces: bool = False
    weights: bool = False

    def __str__(self) -> str:
        cells = f"{self.k} {'halfspaces' if self.halfspaces else 'anchors'}"
        words = [f"d={self.dim}", cells, str(self.dtype).split(".")[1]]
        return ", ".join(words + ["weights"] * self.weights)

    def run(self) -> None:
        from entropy_attn.partition import ops

        points = torch.zeros(1, 2, 1000, self.dim, dtype=self.dtype)
        cells = torch.zeros(1, 2, self.k, self.dim)
        one = torch.ones(1, 2)
        weights = torch.ones(1, 2, 1000) if self.weights else None
        needs = (True, True, self.weights, "triton")
        if self.halfspaces:
            given = (points, cells, cells[..., 0], one, weights)
            entropy, mass = ops.halfspace_forward(*given, "triton")
            ops.halfspace_backward(one, *given, entropy, mass, *needs)
            return
        given = (points, cells, one, weights)
        entropy, mass, lse, _ = ops.range_forward(*given, self.weights, "triton")
        ops.range_backward(one, *given, entropy, mass, lse, *needs)


@dataclass(frozen=True)
class HullFilter:
    """Extreme points along 64 directions, their planes, and which points those hold."""

    dim: int
    dtype: torch.dtype = torch.float32
    packed: bool = True

    def __str__(self) -> str:
        words = [f"d={self.dim}", "hull filter", str(self.dtype).split(".")[1]]
        return ", ".join(words + ["strided"] * (not self.packed))

    def run(self) -> None:
        from entropy_attn.kernels import hull_filter

        points = torch.zeros(1, 100_000, self.dim + (not self.packed), dtype=self.dtype)
        points, directions = points[..., : self.dim], torch.zeros(64, self.dim, dtype=torch.float64)
        # What comes between the launchers reads values, and nothing was computed.
        place, kept = hull_filter._sieve(points, *hull_filter._polytope(points, directions, 1))
        hull_filter._gather(place, kept, kept, 1, 1000)


CASES = (
    Attention(128, 128),
    Attention(128, 64, is_causal=True, entropy=True),
    Attention(64, 128, is_causal=True, entropy=True, backward=False),
    Attention(64, 64, is_causal=True),
    Attention(80, 64, is_causal=True, lens=True),
    Attention(64, 64, dtype=torch.float32, is_causal=True, entropy=True),
    Attention(128, 128, dtype=torch.float32, dense=True, backward=False),
    Attention(256, 64, is_causal=True),
    Attention(128, 64, is_causal=True, entropy=True, gradients=("tile",)),
    Attention(64, 64, is_causal=True, entropy=True, gradients=("tile",), values=False),
    Attention(64, 32, dense=True, entropy=True, gradients=("tile",), values=False),
    Attention(128, 128, entropy=True, gradients=("row", "block", "tile")),
    Attention(
        64,
        64,
        dtype=torch.float32,
        is_causal=True,
        lens=True,
        entropy=True,
        dense=True,
        gradients=("row", "block", "tile"),
    ),
    Attention(256, 64, is_causal=True, entropy=True, gradients=("row", "block", "tile")),
    Attention(64, 256, is_causal=True, entropy=True, gradients=("row", "block", "tile")),
    Decode(128, 64, length=65536),
    Decode(64, 128, queries=8, group=8, page=16, length=1024),
    Decode(256, 16, torch.float16, page=64),
    Decode(256, 64, torch.float32),
    Decode(128, 64, queries=16, group=32),
    KeyBoxes(128, 32),
    KeyBoxes(80, 64, torch.float16, queries=16, padded=False, length=512),
    KeyBoxes(256, 256, torch.float32, group=1, length=1_048_576),
    KeyBoxes(128, 64, group=1, padded=False, length=1_048_576),
    Transposed(32),
    Transposed(32, with_order=True, length=32768),
    TrueMass(128, 128),
    Selection(128, 64, "pooled", "perplexity"),
    Selection(128, 64, "envelope", "perplexity"),
    Selection(64, 128, "antidiagonal", "mass"),
    Selection(64, 32, "pooled", "fraction", length=32 * 4100),
    SoftCells(64, 64),
    SoftCells(128, 128, dtype=torch.float16, weights=True),
    SoftCells(1024, 1024, weights=True),
    SoftCells(64, 64, dtype=torch.float32),
    SoftCells(3, 64, dtype=torch.float32),
    SoftCells(40, 128, dtype=torch.float32, weights=True),
    SoftCells(96, 1024, dtype=torch.float32),
    SoftCells(64, 10, halfspaces=True, weights=True),
    SoftCells(1024, 12, dtype=torch.float32, halfspaces=True),
    HullFilter(2),
    HullFilter(3, dtype=torch.float64),
    HullFilter(3, dtype=torch.float16, packed=False),
)


# Of kernels that are written for one architecture.
OWN_CASES: dict[str, tuple[Any, ...]] = {
    "sm90": (
        Hopper(128, (128, 128)),
        Hopper(128, (128, 64), is_causal=True, kv_len=1000),
        Hopper(128, (64, 64), is_causal=True),
        Hopper(64, (128, 128), torch.float16, is_causal=True, kv_len=1000),
        Hopper(64, (64, 64)),
        Hopper(64, (256, 128), dense=True),
        BackwardForHopper(128, is_causal=True, lens=True),
        BackwardForHopper(64, torch.float16, is_causal=True, kv_len=1000, dense=True),
        BackwardForHopper(64, is_causal=True),
        BackwardForHopper(128, group=1, after_lists=True),
        Hopper(128, (128, 128), row_entropy=True),
        Hopper(128, (128, 64), is_causal=True, lens=True, row_entropy=True, block_entropy=True),
        Hopper(64, (64, 64), lens=True, dense=True, block_entropy=True),
        Hopper(128, (64, 64), q_len=40_000, row_entropy=True, block_entropy=True),
    )
}


# This one is compiled in full. For others, which are not measured, a kernel is compiled once for
# each form (`form_of`), in the call of the largest head_dim, then block, that launches it. Switches
# are Triton code, which was tried here; what is left to ask is whether other compilers take the
# kernel and whether it fits other memories.
MEASURED = "sm90"


def form_of(case: Any) -> tuple[int, bool]:
    """(bytes of an entry, whether head_dim is above 128): by these code and tiles differ most.

    Tiles become narrower above 128 on all architectures. bf16 and fp16 are one form. Calls of which
    there is one dtype have 0 bytes.
    """
    dtype = getattr(case, "dtype", None)
    return dtype.itemsize if dtype else 0, _size_of(case)[0] > 128


def _size_of(case: Any) -> tuple[int, int]:
    """(head_dim, block), 0 for what a call does not have."""
    return getattr(case, "head_dim", getattr(case, "dim", 0)), getattr(case, "block", 0)


def cases_of(arch: str) -> tuple[Any, ...]:
    """All calls. Where the first of a form stands for the rest, the one that takes most is first.

    That is the one of the largest head_dim, then block; of equals the later one above, where calls
    ask for more and more.
    """
    cases = CASES + OWN_CASES.get(arch, ())
    if arch == MEASURED:
        return cases
    return tuple(sorted(cases, key=_size_of)[::-1])
