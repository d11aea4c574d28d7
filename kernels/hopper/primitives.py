"""What the Hopper kernels are built of: pieces of PTX, rings of tiles, the shape of the problem."""

# No `from __future__ import annotations`: Gluon's aggregates look at the annotations of fields.
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.language.core import _aggregate as aggregate

ROWS = gl.constexpr(64)  # queries a warpgroup
# Named barriers of the two warpgroups' turns at the tensor cores. Triton uses the low numbers.
TURN = gl.constexpr(12)
NO_ITEM = gl.constexpr(-1)  # announced at the end
# As PTX writes them.
ZERO = gl.constexpr("0f00000000")
MINUS_INFINITY = gl.constexpr("0fFF800000")


# Pieces of PTX that Gluon has no name for


@gluon.jit
def exp2(x):
    """2^x, one instruction."""
    return gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def log2(x):
    """Logarithm to base 2, one instruction; x is at least 2^-126."""
    return gl.inline_asm_elementwise(
        "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.constexpr_function
def _below_asm(other):
    """$0 = $3 where $1 < $2, else ``other``."""
    lines = "{", ".reg .pred below;", "setp.lt.s32 below, $1, $2;"
    return "\n".join([*lines, f"selp.f32 $0, $3, {other}, below;", "}"])


@gluon.jit
def where_below(number, limit, x, OTHER: gl.constexpr):
    """x where number < limit, else OTHER, a float32 in PTX; all are broadcast to one shape.

    A comparison and a selection an element. Of `gl.where` the compiler makes all predicates first,
    more than there are registers for, so that ptxas packs them into others and unpacks them again;
    and before a conversion to 16 bits it selects halves of registers.
    """
    return gl.inline_asm_elementwise(
        _below_asm(OTHER), "=f,r,r,f", [number, limit, x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def settled(x):
    """x, by a shuffle to where it is: ptxas moves that over no branch, nor what it needs."""
    return gl.inline_asm_elementwise(
        "shfl.sync.bfly.b32 $0, $1, 0, 31, 0xffffffff;", "=f,f", [x], dtype=gl.float32,
        is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def take_turn(warpgroup: gl.constexpr):
    """Wait until the other warpgroup has issued its products."""
    gl.inline_asm_elementwise(
        "bar.sync $1, 256; mov.b32 $0, 0;",
        "=r,r", [gl.to_tensor(TURN + warpgroup)], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def pass_turn(warpgroup: gl.constexpr):
    """Let the other warpgroup issue its products."""
    gl.inline_asm_elementwise(
        "bar.arrive $1, 256; mov.b32 $0, 0;",
        "=r,r", [gl.to_tensor(TURN + 1 - warpgroup)], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def operand(x, acc, DTYPE: gl.constexpr):
    """x (64, N) as left operand of a product that is added to acc, in the registers where it is."""
    return gl.convert_layout(x.to(DTYPE), gl.DotOperandLayout(0, acc.type.layout, 2))


# Rings in shared memory


@gluon.jit
def slot_of(use, SLOTS: gl.constexpr):
    """The slot of a ring's ``use``-th use; of unsigned uses and two slots one instruction."""
    return gl.to_tensor(use % SLOTS).to(gl.int32)


@gluon.jit
def phase_of(use, SLOTS: gl.constexpr):
    """The phase that ends when what is used then is there."""
    return gl.to_tensor(use // SLOTS & 1).to(gl.int32)


@aggregate
class Ring:
    """Slots of shared memory that go round between the producer and the warpgroups.

    Attributes:
        boxes: (SLOTS * boxes a slot, 1, 1, rows, columns), what one copy fills.
        tiles: (SLOTS * tiles a slot, rows, D), the same memory as the tensor cores read it.
        full, empty: (SLOTS, 1) barriers.
    """

    boxes: gl.shared_memory_descriptor
    tiles: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    SLOTS: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, boxes, tiles, full, empty, SLOTS):
        self.boxes = boxes
        self.tiles = tiles
        self.full = full
        self.empty = empty
        self.SLOTS = gl.constexpr(SLOTS)

    @gluon.jit
    def wait_full(self, use):
        """Before reading what the copy engine brought for the ring's ``use``-th use."""
        mbarrier.wait(self.full.index(slot_of(use, self.SLOTS)), phase_of(use, self.SLOTS))

    @gluon.jit
    def release(self, use):
        """This warpgroup has read it."""
        mbarrier.arrive(self.empty.index(slot_of(use, self.SLOTS)), count=1)

    @gluon.jit
    def wait_empty(self, use):
        """Before a slot is filled; the first round passes at once."""
        mbarrier.wait(self.empty.index(slot_of(use, self.SLOTS)), phase_of(use, self.SLOTS) ^ 1)

    @gluon.jit
    def tile(self, use, PART: gl.constexpr = 0):
        """(rows, D) of the slot."""
        PARTS: gl.constexpr = self.tiles.shape[0] // self.SLOTS
        return self.tiles.index(slot_of(use, self.SLOTS) * PARTS + PART)

    @gluon.jit
    def fetch(self, use, descriptor, batch, head, start_low, start_high):
        """Fill a slot: with one run of rows, or its lower and its upper half with one each."""
        rows: gl.constexpr = self.boxes.shape[3]
        columns: gl.constexpr = self.boxes.shape[4]
        boxes: gl.constexpr = self.boxes.shape[0] // self.SLOTS
        halves: gl.constexpr = boxes // (self.tiles.shape[2] // columns)
        slot = slot_of(use, self.SLOTS)
        full = self.full.index(slot)
        mbarrier.expect(full, boxes * rows * columns * 2)
        for box in gl.static_range(boxes):
            # Swizzled tiles lie in memory as runs of 64 columns, each with all rows.
            start = start_low if box % halves == 0 else start_high
            place = [batch, head, start, box // halves * columns]
            tma.async_copy_global_to_shared(
                descriptor, place, full, self.boxes.index(slot * boxes + box)
            )


@gluon.jit
def barriers(SLOTS: gl.constexpr, ARRIVALS: gl.constexpr):
    bars = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(bars.index(slot), count=ARRIVALS)
    return bars


@gluon.jit
def ring(
    descriptor, SLOTS: gl.constexpr, TILES: gl.constexpr, TILE: gl.constexpr,
    BLOCK_D: gl.constexpr, READERS: gl.constexpr,
):  # fmt: skip
    """A ring whose slots hold TILES tiles of (TILE, D), filled by boxes of the descriptor.

    READERS: warpgroups that release a slot; 0 where a slot is filled once and never again. Then
    there is no barrier for it: the compiler would give the memory of a barrier that nobody uses to
    something else, and the hardware may write the barrier's state over that long after.
    """
    dtype: gl.constexpr = descriptor.dtype
    rows: gl.constexpr = descriptor.block_type.shape[2]
    columns: gl.constexpr = descriptor.block_type.shape[3]
    count: gl.constexpr = SLOTS * TILES * (TILE // rows) * (BLOCK_D // columns)
    boxes = gl.allocate_shared_memory(dtype, [count, 1, 1, rows, columns], descriptor.layout)
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE, BLOCK_D], dtype)
    tiles = boxes._reinterpret(dtype, [SLOTS * TILES, TILE, BLOCK_D], layout)
    full = barriers(SLOTS, 1)
    empty = full
    if READERS > 0:
        empty = barriers(SLOTS, READERS)
    return Ring(boxes, tiles, full, empty, SLOTS)


# Work items


@aggregate
class Items:
    """Work items on their way from the warp that claims them to the other partitions.

    Attributes:
        fields: (SLOTS, 8) int32, what an item is; announced: (SLOTS, 1) barriers, which say that it
            stands there. When a slot is free again is for the kernel to know.
    """

    fields: gl.shared_memory_descriptor
    announced: gl.shared_memory_descriptor
    SLOTS: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, fields, announced, SLOTS):
        self.fields = fields
        self.announced = announced
        self.SLOTS = gl.constexpr(SLOTS)

    @gluon.jit
    def announce(self, turn, first, second, third, fourth, fifth, sixth):
        """Tell the other partitions what the ``turn``-th item is."""
        layout: gl.constexpr = gl.BlockedLayout([8], [32], [1], [0])  # all of it in every thread
        lane = gl.arange(0, 8, layout)
        fields = gl.where(lane == 2, third, 0)
        fields = gl.where(lane == 0, first, gl.where(lane == 1, second, fields))
        fields = gl.where(lane == 3, fourth, gl.where(lane == 4, fifth, fields))
        fields = gl.where(lane == 5, sixth, fields)
        slot = slot_of(turn, self.SLOTS)
        self.fields.index(slot).store(fields)
        mbarrier.arrive(self.announced.index(slot), count=1)

    @gluon.jit
    def read(self, turn):
        """The six fields of an item, once it is announced."""
        slot = slot_of(turn, self.SLOTS)
        mbarrier.wait(self.announced.index(slot), phase_of(turn, self.SLOTS))
        layout: gl.constexpr = gl.BlockedLayout([8], [32], [gl.num_warps()], [0])
        fields = self.fields.index(slot).load(layout)  # (8,)
        lane = gl.arange(0, 8, layout)  # all of it in every thread
        first = gl.sum(gl.where(lane == 0, fields, 0), 0)
        second = gl.sum(gl.where(lane == 1, fields, 0), 0)
        third = gl.sum(gl.where(lane == 2, fields, 0), 0)
        fourth = gl.sum(gl.where(lane == 3, fields, 0), 0)
        fifth = gl.sum(gl.where(lane == 4, fields, 0), 0)
        sixth = gl.sum(gl.where(lane == 5, fields, 0), 0)
        return first, second, third, fourth, fifth, sixth


@gluon.jit
def item_slots(SLOTS: gl.constexpr):
    layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    fields = gl.allocate_shared_memory(gl.int32, [SLOTS, 8], layout)
    return Items(fields, barriers(SLOTS, 1), SLOTS)


# What the partitions share


@gluon.jit
def valid_ends(shape, batch):
    """Valid queries and keys of a batch row, of a `Problem` or of the backward's `Columns`."""
    q_end = shape.q_len
    kv_end = shape.kv_len
    if shape.HAS_Q_LENS:
        q_end = gl.minimum(gl.load(shape.q_lens + batch), q_end)
    if shape.HAS_KV_LENS:
        kv_end = gl.minimum(gl.load(shape.kv_lens + batch), kv_end)
    return q_end, kv_end


@aggregate
class Memory:
    """Shared memory and barriers.

    Attributes:
        queries, keys, values: rings that the producer fills.
        items: two slots; when they are free says the ring of queries.
        out_boxes, out_tiles: (warpgroups, 64, D), results on their way out.
        pin: a barrier of which phase 0 never completes; not one of its own without `Problem.PIN`.
    """

    queries: Ring
    keys: Ring
    values: Ring
    items: Items
    out_boxes: gl.shared_memory_descriptor
    out_tiles: gl.shared_memory_descriptor
    pin: gl.shared_memory_descriptor

    @gluon.constexpr_function
    def __init__(self, queries, keys, values, items, out_boxes, out_tiles, pin):
        self.queries = queries
        self.keys = keys
        self.values = values
        self.items = items
        self.out_boxes = out_boxes
        self.out_tiles = out_tiles
        self.pin = pin


@aggregate
class Results:
    """Where the results go.

    Attributes:
        out: the descriptor of O.
        lse, row, block: (B, Hq, Nq) fp32; entropies that are not wanted are never written.
    """

    out: tma.tensor_descriptor
    lse: gl.tensor
    row: gl.tensor
    block: gl.tensor

    @gluon.constexpr_function
    def __init__(self, out, lse, row, block):
        self.out = out
        self.lse = lse
        self.row = row
        self.block = block


@aggregate
class Problem:
    """The block lists, the lengths, the shapes and how the kernel is built."""

    indices: gl.tensor
    kv_lens: gl.tensor
    q_lens: gl.tensor
    stride_b: gl.tensor
    stride_h: gl.tensor
    stride_t: gl.tensor
    heads: gl.tensor
    group: gl.tensor
    q_len: gl.tensor
    kv_len: gl.tensor
    q_tiles: gl.tensor
    scale_log2: gl.tensor
    BLOCK_M: gl.constexpr
    BLOCK_N: gl.constexpr
    BLOCK_Q: gl.constexpr
    BLOCK_K: gl.constexpr
    IS_CAUSAL: gl.constexpr
    MASKED: gl.constexpr
    LISTED: gl.constexpr
    HAS_KV_LENS: gl.constexpr
    HAS_Q_LENS: gl.constexpr
    ROW_ENTROPY: gl.constexpr
    BLOCK_ENTROPY: gl.constexpr
    PING_PONG: gl.constexpr
    QUERY_REGISTERS: gl.constexpr
    PIN: gl.constexpr
    GUARD: gl.constexpr
    BLOCKS: gl.constexpr  # a step

    @gluon.constexpr_function
    def __init__(
        self, indices, kv_lens, q_lens, stride_b, stride_h, stride_t, heads, group, q_len, kv_len,
        q_tiles, scale_log2, BLOCK_M, BLOCK_N, BLOCK_Q, BLOCK_K, IS_CAUSAL, MASKED, LISTED,
        HAS_KV_LENS, HAS_Q_LENS, ROW_ENTROPY, BLOCK_ENTROPY, PING_PONG, QUERY_REGISTERS, PIN, GUARD,
    ):  # fmt: skip
        self.indices = indices
        self.kv_lens = kv_lens
        self.q_lens = q_lens
        self.stride_b = stride_b
        self.stride_h = stride_h
        self.stride_t = stride_t
        self.heads = heads
        self.group = group
        self.q_len = q_len
        self.kv_len = kv_len
        self.q_tiles = q_tiles
        self.scale_log2 = scale_log2
        self.BLOCK_M = gl.constexpr(BLOCK_M)
        self.BLOCK_N = gl.constexpr(BLOCK_N)
        self.BLOCK_Q = gl.constexpr(BLOCK_Q)
        self.BLOCK_K = gl.constexpr(BLOCK_K)
        self.IS_CAUSAL = gl.constexpr(IS_CAUSAL)
        self.MASKED = gl.constexpr(MASKED)
        self.LISTED = gl.constexpr(LISTED)
        self.HAS_KV_LENS = gl.constexpr(HAS_KV_LENS)
        self.HAS_Q_LENS = gl.constexpr(HAS_Q_LENS)
        self.ROW_ENTROPY = gl.constexpr(ROW_ENTROPY)
        self.BLOCK_ENTROPY = gl.constexpr(BLOCK_ENTROPY)
        self.PING_PONG = gl.constexpr(PING_PONG)
        self.QUERY_REGISTERS = gl.constexpr(QUERY_REGISTERS)
        self.PIN = gl.constexpr(PIN)
        self.GUARD = gl.constexpr(GUARD)
        self.BLOCKS = gl.constexpr(BLOCK_N // BLOCK_K)

    @gluon.jit
    def place(self, batch_head):
        """(batch, head)."""
        return batch_head // self.heads, batch_head % self.heads

    @gluon.jit
    def ends(self, batch_head):
        """Valid queries and keys of a head's batch row; a head below 0 stands for the first."""
        batch, _ = self.place(gl.maximum(batch_head, 0))
        return valid_ends(self, batch)

    @gluon.jit
    def address(self, batch_head, row):
        """Where the list of the queries from ``row`` on starts."""
        batch, head = self.place(batch_head)
        offset = batch.to(gl.int64) * self.stride_b + head.to(gl.int64) * self.stride_h
        return self.indices + offset + (row // self.BLOCK_Q).to(gl.int64) * self.stride_t

    @gluon.jit
    def steps(self, last):
        """Steps that ``last`` blocks take; a step without blocks for an empty list."""
        return gl.maximum((last + self.BLOCKS - 1) // self.BLOCKS, 1)

    @gluon.jit
    def starts(self, address, last, step):
        """First keys of a step's lower and upper block, the same one if it has only one."""
        low = self._start(address, last, step * self.BLOCKS)
        high = low
        if self.BLOCKS > 1:
            high = self._start(address, last, step * self.BLOCKS + 1)
        return low, high

    @gluon.jit
    def _start(self, address, last, slot):
        """First key of the block in a slot of the list; past the last key for a gap."""
        start = slot * self.BLOCK_K
        if self.LISTED:
            start = gl.load(address + slot, mask=slot < last, other=0) * self.BLOCK_K
        return gl.where(slot < last, start, self.kv_len)
