"""The transposed lists, as the warps of the Hopper backward read them: steps of a column."""

# No `from __future__ import annotations`: Gluon's aggregates look at the annotations of fields.
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.core import _aggregate as aggregate

KEYS = gl.constexpr(64)  # a warpgroup's
BLOCK_N = gl.constexpr(128)  # a column's
# Columns of 16 bits that a row of swizzled shared memory has: tiles are made of such pieces.
PIECE = gl.constexpr(64)


@aggregate
class Columns:
    """The transposed block lists, the order of work, the shapes and how the kernel is built."""

    order: gl.tensor
    offsets: gl.tensor
    rows: gl.tensor
    kv_lens: gl.tensor
    q_lens: gl.tensor
    offset_stride_b: gl.tensor
    offset_stride_h: gl.tensor
    row_stride_b: gl.tensor
    row_stride_h: gl.tensor
    kv_heads: gl.tensor
    q_len: gl.tensor
    kv_len: gl.tensor
    kv_tiles: gl.tensor
    scale_log2: gl.tensor
    scale: gl.tensor
    GROUP: gl.constexpr
    BLOCK_M: gl.constexpr
    BLOCK_Q: gl.constexpr
    IS_CAUSAL: gl.constexpr
    MAY_CUT: gl.constexpr
    LISTED: gl.constexpr
    HAS_KV_LENS: gl.constexpr
    HAS_Q_LENS: gl.constexpr
    TURNS: gl.constexpr

    @gluon.constexpr_function
    def __init__(
        self, order, offsets, rows, kv_lens, q_lens, offset_stride_b, offset_stride_h,
        row_stride_b, row_stride_h, kv_heads, q_len, kv_len, kv_tiles, scale_log2, scale, GROUP,
        BLOCK_M, BLOCK_Q, IS_CAUSAL, MAY_CUT, LISTED, HAS_KV_LENS, HAS_Q_LENS, TURNS,
    ):  # fmt: skip
        self.order = order
        self.offsets = offsets
        self.rows = rows
        self.kv_lens = kv_lens
        self.q_lens = q_lens
        self.offset_stride_b = offset_stride_b
        self.offset_stride_h = offset_stride_h
        self.row_stride_b = row_stride_b
        self.row_stride_h = row_stride_h
        self.kv_heads = kv_heads
        self.q_len = q_len
        self.kv_len = kv_len
        self.kv_tiles = kv_tiles
        self.scale_log2 = scale_log2
        self.scale = scale
        self.GROUP = gl.constexpr(GROUP)
        self.BLOCK_M = gl.constexpr(BLOCK_M)
        self.BLOCK_Q = gl.constexpr(BLOCK_Q)
        self.IS_CAUSAL = gl.constexpr(IS_CAUSAL)
        self.MAY_CUT = gl.constexpr(MAY_CUT)
        self.LISTED = gl.constexpr(LISTED)
        self.HAS_KV_LENS = gl.constexpr(HAS_KV_LENS)
        self.HAS_Q_LENS = gl.constexpr(HAS_Q_LENS)
        self.TURNS = gl.constexpr(TURNS)

    @gluon.jit
    def entry(self, item):
        """What the order of work says of an item, all of it read at once.

        Returns:
            the column's number; of it in the group's first query head: where it begins in the rows,
            how many there are, the first one.
        """
        column = item
        begin = 0
        first_row = 0
        count = (self.q_len + self.BLOCK_Q - 1) // self.BLOCK_Q
        if self.LISTED:
            row = self.order + item * 4
            column = gl.load(row)
            begin = gl.load(row + 1)
            count = gl.load(row + 2)
            first_row = gl.load(row + 3)
        return column, begin, count, first_row

    @gluon.jit
    def place(self, column):
        """(batch, head of keys, first key)."""
        head = column // self.kv_tiles
        key_start = column % self.kv_tiles * BLOCK_N
        return head // self.kv_heads, head % self.kv_heads, key_start

    @gluon.jit
    def next_column(self, batch, head, key_start, member, begin, count):
        """(begin, count) in query head ``head``, which is that ``member`` of the group."""
        if self.LISTED and self.GROUP > 1:
            base = self.offsets + batch.to(gl.int64) * self.offset_stride_b
            base += head.to(gl.int64) * self.offset_stride_h + key_start // BLOCK_N
            begin = gl.load(base, mask=member < self.GROUP, other=0)
            count = (gl.load(base + 1, mask=member < self.GROUP, other=0) - begin).to(gl.int32)
            begin = begin.to(gl.int32)
        return begin, count

    @gluon.jit
    def pointer(self, batch, head, begin):
        """To the query blocks of a column."""
        pointer = self.rows
        if self.LISTED:
            pointer += batch.to(gl.int64) * self.row_stride_b
            pointer += head.to(gl.int64) * self.row_stride_h + begin
        return pointer

    @gluon.jit
    def below(self, pointer, count, limit):
        """How many blocks of a list stand before ``limit``."""
        found = gl.minimum(count, limit)
        if self.LISTED:
            CHUNK: gl.constexpr = 128
            layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
            found = 0
            start = 0
            while start < count:
                slots = start + gl.arange(0, CHUNK, layout)
                blocks = gl.load(pointer + slots, mask=slots < count, other=2147483647)
                found += gl.sum((blocks < limit).to(gl.int32), 0)
                start += CHUNK
        return found

    @gluon.jit
    def steps(self, pointer, count, key_start, q_end, kv_end):
        """(first, clear, last) step: before ``first`` nothing is seen, from ``clear`` on all is."""
        STEPS: gl.constexpr = self.BLOCK_Q // self.BLOCK_M
        if self.HAS_Q_LENS:
            count = self.below(pointer, count, (q_end + self.BLOCK_Q - 1) // self.BLOCK_Q)
        if self.HAS_KV_LENS:
            count = gl.where(key_start < kv_end, count, 0)
        first = 0
        clear = 0
        if self.IS_CAUSAL:
            diagonal = kv_end - q_end
            first = gl.maximum(key_start - diagonal, 0) // self.BLOCK_Q
            first = self.below(pointer, count, first)
            clear = gl.maximum(key_start + BLOCK_N - 1 - diagonal, 0)
            clear = self.below(pointer, count, (clear + self.BLOCK_Q - 1) // self.BLOCK_Q)
        if self.MAY_CUT:
            clear = gl.where(key_start + BLOCK_N > kv_end, count, clear)
        return first * STEPS, gl.maximum(clear, first) * STEPS, count * STEPS

    @gluon.jit
    def end(self, step, last, member, is_first):
        """End of the steps of a query head. Every column has a step, if of no queries.

        is_first: whether the column had no step in the heads before.
        """
        return gl.where((member == self.GROUP - 1) & is_first & (step == last), last + 1, last)

    @gluon.jit
    def start(self, pointer, step, last):
        """First query of a step.

        Of a step that is none, from ``last`` on, past the last query, at a whole block: the copy
        engine takes statistics at multiples of 16 bytes only, also where it fetches none.
        """
        STEPS: gl.constexpr = self.BLOCK_Q // self.BLOCK_M
        block = step // STEPS
        if self.LISTED:
            block = gl.load(pointer + block, mask=step < last, other=0)
        start = block * self.BLOCK_Q + step % STEPS * self.BLOCK_M
        return gl.where(step < last, start, self._past_end())

    @gluon.jit
    def _past_end(self):
        return (self.q_len + self.BLOCK_Q - 1) // self.BLOCK_Q * self.BLOCK_Q

    @gluon.jit
    def first_start(self, pointer, step, last, first_row):
        """`start` of a column's first step; without GQA and diagonal no list is read for that."""
        start = gl.where(step < last, first_row * self.BLOCK_Q, self._past_end())
        if self.IS_CAUSAL or self.GROUP > 1 or not self.LISTED:
            start = self.start(pointer, step, last)
        return start
