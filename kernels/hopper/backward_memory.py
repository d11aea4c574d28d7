"""Shared memory and barriers of the Hopper backward."""

# No `from __future__ import annotations`: Gluon's aggregates look at the annotations of fields.
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.language.core import _aggregate as aggregate

from entropy_attn.kernels.hopper.columns import BLOCK_N, KEYS, PIECE
from entropy_attn.kernels.hopper.primitives import (
    Items,
    Ring,
    barriers,
    item_slots,
    phase_of,
    ring,
    slot_of,
)
from entropy_attn.kernels.hopper.sum_tiles import TILE

TAKERS = gl.constexpr(4)  # of an item: two warpgroups, writer, caretaker


@aggregate
class Buffers:
    """Shared memory and barriers.

    Attributes:
        keys: a ring of two slots, (128, D) each; key_pieces: the same memory by 64 columns.
        values: a ring whose slots hold two tiles of (64, D). dV and dK leave through it.
        queries: a ring whose slots hold a tile (BLOCK_M, D) of queries and one of their gradients.
        row_boxes: (2 * slots of `queries`, 1, BLOCK_M) fp32, a slot's lse in base 2, then -delta;
            row_values: the same memory, (.., BLOCK_M).
        scores: dS, (2 slots, 128, BLOCK_M); pieces: the same memory by 64 columns; scores_full: its
            barriers.
        sum_box: what a step adds to dQ, on its way to the writer; sum_tiles: the same memory,
            (2, 4096), a tile of each warpgroup; sum_full and sum_empty are its barriers.
        items: two slots for what an item is; taken: (2, 1) barriers, at which each of its `TAKERS`
            arrives when it needs the slot no more.
    """

    keys: Ring
    key_pieces: gl.shared_memory_descriptor
    values: Ring
    queries: Ring
    row_boxes: gl.shared_memory_descriptor
    row_values: gl.shared_memory_descriptor
    scores: gl.shared_memory_descriptor
    pieces: gl.shared_memory_descriptor
    scores_full: gl.shared_memory_descriptor
    sum_box: gl.shared_memory_descriptor
    sum_tiles: gl.shared_memory_descriptor
    sum_full: gl.shared_memory_descriptor
    sum_empty: gl.shared_memory_descriptor
    items: Items
    taken: gl.shared_memory_descriptor

    @gluon.constexpr_function
    def __init__(
        self, keys, key_pieces, values, queries, row_boxes, row_values, scores, pieces, scores_full,
        sum_box, sum_tiles, sum_full, sum_empty, items, taken,
    ):  # fmt: skip
        self.keys = keys
        self.key_pieces = key_pieces
        self.values = values
        self.queries = queries
        self.row_boxes = row_boxes
        self.row_values = row_values
        self.scores = scores
        self.pieces = pieces
        self.scores_full = scores_full
        self.sum_box = sum_box
        self.sum_tiles = sum_tiles
        self.sum_full = sum_full
        self.sum_empty = sum_empty
        self.items = items
        self.taken = taken

    @gluon.jit
    def give_item_back(self, turn):
        """This partition needs to know no more what the item is."""
        mbarrier.arrive(self.taken.index(slot_of(turn, self.items.SLOTS)), count=1)

    @gluon.jit
    def await_item_slot(self, turn):
        """Until nobody needs the item that stood there before."""
        SLOTS: gl.constexpr = self.items.SLOTS
        mbarrier.wait(self.taken.index(slot_of(turn, SLOTS)), phase_of(turn, SLOTS) ^ 1)

    @gluon.jit
    def rows(self, use, layout: gl.constexpr, PART: gl.constexpr):
        """(BLOCK_M,) lse or -delta of a slot's queries."""
        return self.row_values.index(slot_of(use, self.queries.SLOTS) * 2 + PART).load(layout)


@gluon.jit
def allocate_buffers(
    query_desc, key_desc, value_desc, rows_desc, sum_desc,
    STAGES: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_D: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = query_desc.dtype
    keys = ring(key_desc, 2, 1, BLOCK_N, BLOCK_D, 2)
    key_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, PIECE], dtype)
    score_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, BLOCK_M], dtype)
    scores = gl.allocate_shared_memory(dtype, [2, BLOCK_N, BLOCK_M], score_layout)
    row_boxes = gl.allocate_shared_memory(gl.float32, [2 * STAGES, 1, BLOCK_M], rows_desc.layout)
    run_layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    sum_box = gl.allocate_shared_memory(gl.float32, [1, 1, 64, 128], sum_desc.layout)
    # With two of them, the next values are on their way while dV and dK leave.
    VALUE_SLOTS: gl.constexpr = 128 // BLOCK_D
    return Buffers(
        keys,
        keys.boxes._reinterpret(dtype, [2 * BLOCK_D // PIECE, BLOCK_N, PIECE], key_layout),
        ring(value_desc, VALUE_SLOTS, 2, KEYS, BLOCK_D, 2),
        ring(query_desc, STAGES, 2, BLOCK_M, BLOCK_D, 2),
        row_boxes,
        row_boxes._reinterpret(gl.float32, [2 * STAGES, BLOCK_M], run_layout),
        scores,
        scores._reinterpret(dtype, [2 * BLOCK_M // PIECE, BLOCK_N, PIECE], key_layout),
        barriers(2, 2),
        sum_box.index(0),
        sum_box._reinterpret(gl.float32, [2, TILE], run_layout),
        barriers(1, 2).index(0),
        barriers(1, 1).index(0),
        item_slots(2),
        barriers(2, TAKERS),
    )
