"""Block-sparse attention, forward, for Hopper (sm_90a): copy engine, warpgroup products, in Gluon.

The same sums as `entropy_attn.kernels.block_sparse_forward`, without windows: for a block of
queries A with the list L(A) of key blocks

    S_ij = scale * q_i . k_j,  O_i = sum_j exp(S_ij - lse_i) v_j,  lse_i = log sum_j exp S_ij

over the visible j in L(A). Online softmax (Dao et al., arXiv 2205.14135), warp-specialised as in
FlashAttention-3 (Shah et al., arXiv 2407.08608): one producer warp feeds rings of tiles in shared
memory through the copy engine, and one or two warpgroups of 64 queries each consume them; while a
step's exponentials run, the products Q K^T of the same step are done and P V of the step before is
in flight. Two more things:
- The running maximum may lag: it is raised, and what was summed rescaled, only when a row's scores
  grew by more than a factor of 2^8 (as FlashAttention-4 does), or, in steps without masks where no
  entropy is asked for, when a sum grew beyond 2^14: then nobody looks for maxima (`guarded`). That
  is exact: the same power of two cancels in O and l.
- Programs are persistent and claim work items (a tile of queries each, `order.work_order`) from a
  counter. The first Q K^T of the next item runs together with the last P V of the present one. A
  scheduler warp claims an item ahead and looks up where its list ends, so that its first tiles are
  fetched while the present one is worked at.

A list is walked from its end, so that the blocks with masks (cut by the diagonal or by the last
key) come first; of an odd list of blocks that are taken in pairs, the first step has a gap.

Memory and barriers. Everything that the producer fills is a `Ring` of slots, each with a barrier
`full` (the copy engine arrives with the bytes) and a barrier `empty` (each warpgroup arrives when
its products have read the slot, or it has itself, of queries that lie in registers). The n-th use
of a slot completes phase n of both. A program sees
    producer:   item 0: Q K, K V, K V, ..., item 1: Q K V (that V of item 0), K V, ..., end: Q K V
    warpgroup:  Q K, then K+V, K+V, ..., Q K+V (that K of the next item), K+V, ...
where K of step s and V of step s - 1 are used together; the end is an item without V, so that the
last product needs no branch. What an item is stands in one of two slots of shared memory, with a
barrier `announced` each. It is announced when there is room for its queries. With two slots of
queries the item before the last is done by then; with one, all have read the last. So nobody needs
any more what stood in its slot, the item before the last.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_wait

from entropy_attn.kernels.hopper.config import REGISTERS, HopperConfig, hopper_config
from entropy_attn.kernels.hopper.order import plan_order, work_order
from entropy_attn.kernels.hopper.primitives import (
    ROWS,
    ZERO,
    Memory,
    Problem,
    Results,
    barriers,
    item_slots,
    operand,
    pass_turn,
    ring,
    take_turn,
    where_below,
)
from entropy_attn.kernels.hopper.producer import producer, scheduler
from entropy_attn.kernels.hopper.row_values import rescale
from entropy_attn.kernels.hopper.softmax import (
    first_softmax,
    for_guarded,
    guarded_softmax,
    next_softmax,
    visible,
)
from entropy_attn.kernels.launch import (
    LENGTHS,
    adjacent_lists,
    architecture,
    ceil_div,
    device_limits,
    exponent_scale,
    has_copy_engine,
    list_strides,
)
from entropy_attn.kernels.plans import Launch, planned

LN_2 = gl.constexpr(0.6931471805599453)


# Consumers


@gluon.jit
def _query(problem, memory, turn, WARPGROUP: gl.constexpr):
    """(64, D) queries as operand of the products, in shared memory or in registers.

    In registers they have left their slot; the others do when the item is done.
    """
    query = memory.queries.tile(turn, WARPGROUP)
    if problem.QUERY_REGISTERS:
        layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, problem.BLOCK_N, 16])
        query = query.load(gl.DotOperandLayout(0, layout, 2))
        gl.thread_barrier()
        memory.queries.release(turn)
    return query


@gluon.jit
def _scores(problem, memory, query, use):
    """Start Q K^T of a step, (64, N)."""
    N: gl.constexpr = problem.BLOCK_N
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    zeros = gl.zeros([ROWS, N], gl.float32, layout)
    memory.keys.wait_full(use)
    keys = memory.keys.tile(use).permute((1, 0))  # (D, N)
    return warpgroup_mma(query, keys, zeros, use_acc=False, is_async=True)


@gluon.jit
def _products(problem, memory, query, p, acc, use, WARPGROUP: gl.constexpr):
    """Start Q K^T of step ``use`` and P V of the step before; wait for the former."""
    if problem.PING_PONG:
        take_turn(WARPGROUP)
    scores = _scores(problem, memory, query, use)
    memory.values.wait_full(use - 1)
    acc = warpgroup_mma(p, memory.values.tile(use - 1), acc, is_async=True)
    if problem.PING_PONG:
        pass_turn(WARPGROUP)
    scores = warpgroup_mma_wait(1, deps=(scores,))
    memory.keys.release(use)
    return scores, acc


@gluon.jit
def _step(
    problem, memory, query, p, acc, sums, use, address, last, step, limits,
    WARPGROUP: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """One step after the first: fold its scores into the softmax and the last step's p into acc."""
    low = 0
    high = 0
    if MASKED:
        low, high = problem.starts(address, last, step)  # on their way meanwhile
    scores, acc = _products(problem, memory, query, p, acc, use, WARPGROUP)
    if MASKED:
        scores = visible(scores, problem, low, high, limits)
    if problem.GUARD and not MASKED:
        p, sums, alpha = guarded_softmax(scores, sums, problem)
    else:
        p, sums, alpha = next_softmax(scores, sums, problem, MASKED)
    if problem.PIN:
        # Never blocks. ptxas moves the wait below above the exponentials, but not past this.
        mbarrier.wait(memory.pin, 1)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    memory.values.release(use - 1)
    acc = rescale(acc, alpha)
    return operand(p, acc, memory.values.tiles.dtype), acc, sums


@gluon.jit
def _store(
    problem, memory, results, acc, sums, batch_head, row, last, q_end, WARPGROUP: gl.constexpr
):  # fmt: skip
    """Write O = acc / l, the log-sum-exp and the entropies of an item.

    A row without a key, or of padding, gets 0, -inf and 0.
    """
    batch, head = problem.place(batch_head)
    row += WARPGROUP * ROWS
    layout: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    mass = gl.convert_layout(gl.sum(sums.mass, 1), layout)  # (64,)
    maximum = sums.maximum
    if problem.GUARD:
        maximum = gl.max(maximum, 1)  # all four are the same
    maximum = gl.convert_layout(maximum, layout)
    is_alive = (mass != 0.0) & (last > 0)  # what is NaN stays NaN
    if problem.HAS_Q_LENS:
        is_alive = is_alive & (row + gl.arange(0, ROWS, layout) < q_end)
    safe_mass = gl.where(is_alive, mass, 1.0)
    acc *= (1.0 / safe_mass)[:, None]
    acc = where_below(0, is_alive.to(gl.int32)[:, None], acc, ZERO)  # (64, D)
    tma.store_wait(0)  # the item before has left shared memory
    out_tile = memory.out_tiles.index(WARPGROUP)
    out_tile.store(acc.to(out_tile.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(
        results.out, [batch, head, row, 0], memory.out_boxes.index(WARPGROUP)
    )
    log_mass = gl.log2(safe_mass)
    lse = gl.where(is_alive, (maximum + log_mass) * LN_2, float("-inf"))
    rows = row + gl.arange(0, ROWS, layout)
    head_start = batch_head.to(gl.int64) * problem.q_len
    gl.store(results.lse + head_start + rows, lse, mask=rows < problem.q_len)
    if problem.ROW_ENTROPY:
        entropy = _entropy(sums.row, safe_mass, log_mass, is_alive)
        gl.store(results.row + head_start + rows, entropy, mask=rows < problem.q_len)
    if problem.BLOCK_ENTROPY:
        entropy = _entropy(sums.block, safe_mass, log_mass, is_alive)
        gl.store(results.block + head_start + rows, entropy, mask=rows < problem.q_len)


@gluon.jit
def _entropy(total, mass, log_mass, is_alive):
    """(64,) log l - T / l in nats; total is (64, 4), the threads' parts of T."""
    total = gl.convert_layout(gl.sum(total, 1), mass.type.layout)
    entropy = (log_mass - total / mass) * LN_2
    return gl.where(is_alive, gl.maximum(entropy, 0.0), 0.0)


@gluon.jit
def _consumer(problem, memory, results, WARPGROUP: gl.constexpr):
    BLOCK_D: gl.constexpr = memory.values.tiles.shape[2]
    DTYPE: gl.constexpr = memory.values.tiles.dtype
    # Of the first step, which may have a gap.
    FIRST_MASKED: gl.constexpr = problem.MASKED or problem.BLOCKS > 1
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    if problem.PING_PONG and WARPGROUP == 1:
        pass_turn(1)  # the first turn is the other's

    batch_head, row, last, full, low, high = memory.items.read(0)
    q_end, kv_end = problem.ends(batch_head)
    memory.queries.wait_full(0)
    query = _query(problem, memory, 0, WARPGROUP)
    scores = warpgroup_mma_wait(0, deps=(_scores(problem, memory, query, 0),))
    memory.keys.release(0)
    row_layout: gl.constexpr = gl.SliceLayout(1, scores.type.layout)
    lane = gl.arange(0, ROWS, row_layout)  # (64,)
    turn = 0  # items done
    use = 1  # steps whose Q K^T was started
    while batch_head >= 0:
        step = problem.steps(last) - 1
        full_steps = full // problem.BLOCKS
        address = problem.address(batch_head, row)
        limits = gl.zeros_like(lane) + kv_end  # (64,) the first key that a row must not see
        if problem.IS_CAUSAL:
            positions = row + WARPGROUP * ROWS + lane + kv_end - q_end
            limits = gl.minimum(limits, positions + 1)

        if FIRST_MASKED:
            scores = visible(scores, problem, low, high, limits)
        p, sums = first_softmax(scores, problem, FIRST_MASKED)
        acc = gl.zeros([ROWS, BLOCK_D], gl.float32, acc_layout)
        p = operand(p, acc, DTYPE)
        step -= 1
        if problem.MASKED:
            while step >= full_steps:
                p, acc, sums = _step(
                    problem, memory, query, p, acc, sums, use, address, last, step, limits,
                    WARPGROUP, True,
                )  # fmt: skip
                use += 1
                step -= 1
        if problem.GUARD:
            sums = for_guarded(sums)
        while step >= 0:
            p, acc, sums = _step(
                problem, memory, query, p, acc, sums, use, address, last, step, limits,
                WARPGROUP, False,
            )  # fmt: skip
            use += 1
            step -= 1
        if not problem.QUERY_REGISTERS:
            memory.queries.release(turn)

        turn += 1
        next_batch_head, next_row, next_last, full, low, high = memory.items.read(turn)
        next_q_end, next_kv_end = problem.ends(next_batch_head)
        memory.queries.wait_full(turn)
        query = _query(problem, memory, turn, WARPGROUP)
        scores, acc = _products(problem, memory, query, p, acc, use, WARPGROUP)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        memory.values.release(use - 1)
        use += 1
        _store(
            problem, memory, results, acc, sums, batch_head, row, last, q_end, WARPGROUP
        )  # fmt: skip
        batch_head = next_batch_head
        row = next_row
        last = next_last
        q_end = next_q_end
        kv_end = next_kv_end
    tma.store_wait(0)


@gluon.jit(do_not_specialize=(*LENGTHS, "items", "heads", "group"))
def _forward_kernel(
    query_desc, key_desc, value_desc, out_desc, lse_ptr, row_ptr, block_ptr,
    indices_ptr, kv_lens_ptr, q_lens_ptr, items_ptr,
    index_stride_b, index_stride_h, index_stride_t,
    heads, group, q_len, kv_len, q_tiles, items, scale_log2,
    BLOCK_D: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr,
    WARPGROUPS: gl.constexpr, KEY_STAGES: gl.constexpr, VALUE_STAGES: gl.constexpr,
    IS_CAUSAL: gl.constexpr, MAY_CUT: gl.constexpr, LISTED: gl.constexpr,
    HAS_KV_LENS: gl.constexpr, HAS_Q_LENS: gl.constexpr,
    ROW_ENTROPY: gl.constexpr, BLOCK_ENTROPY: gl.constexpr,
    PING_PONG: gl.constexpr, QUERY_REGISTERS: gl.constexpr, PIN: gl.constexpr,
    GUARD: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    problem = Problem(
        indices_ptr, kv_lens_ptr, q_lens_ptr, index_stride_b, index_stride_h, index_stride_t,
        heads, group, q_len, kv_len, q_tiles, scale_log2,
        WARPGROUPS * ROWS, BLOCK_N, BLOCK_Q, BLOCK_K, IS_CAUSAL, IS_CAUSAL or MAY_CUT, LISTED,
        HAS_KV_LENS, HAS_Q_LENS, ROW_ENTROPY, BLOCK_ENTROPY, PING_PONG, QUERY_REGISTERS, PIN,
        GUARD,
    )  # fmt: skip
    results = Results(out_desc, lse_ptr, row_ptr, block_ptr)
    dtype: gl.constexpr = out_desc.dtype
    out_boxes = gl.allocate_shared_memory(dtype, [WARPGROUPS, 1, 1, ROWS, BLOCK_D], out_desc.layout)
    out_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, BLOCK_D], dtype)
    QUERY_STAGES: gl.constexpr = 1 if QUERY_REGISTERS else 2
    queries = ring(query_desc, QUERY_STAGES, WARPGROUPS, ROWS, BLOCK_D, WARPGROUPS)
    pin = queries.full.index(0)  # no barrier that nobody uses: see `ring`
    if PIN:
        pin = barriers(1, 1).index(0)
    memory = Memory(
        queries,
        ring(key_desc, KEY_STAGES, 1, BLOCK_N, BLOCK_D, WARPGROUPS),
        ring(value_desc, VALUE_STAGES, 1, BLOCK_N, BLOCK_D, WARPGROUPS),
        item_slots(2),
        out_boxes,
        out_boxes._reinterpret(dtype, [WARPGROUPS, ROWS, BLOCK_D], out_layout),
        pin,
    )
    gdc_wait()  # for the order, and what its launch had waited for
    # The first partition is the program's own four warps.
    FIRST: gl.constexpr = 0
    SECOND: gl.constexpr = 1
    produce = (problem, memory, query_desc, key_desc, value_desc)
    schedule = (problem, memory, items_ptr, items)
    if WARPGROUPS == 2:
        gl.warp_specialize(
            [
                (_consumer, (problem, memory, results, FIRST)),
                (_consumer, (problem, memory, results, SECOND)),
                (producer, produce),
                (scheduler, schedule),
            ],
            [4, 1, 1],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS, PRODUCER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (_consumer, (problem, memory, results, FIRST)),
                (producer, produce),
                (scheduler, schedule),
            ],
            [1, 1],
            [PRODUCER_REGISTERS, PRODUCER_REGISTERS],
        )


def unsupported(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_size: tuple[int, int],
    scale: float,
    *,
    window: int = 0,
) -> str | None:
    """Why this kernel cannot take a call, or None if it can. Never waits for the device."""
    return _unsupported(query, key, value, block_size, scale, window, architecture(query.device))


@planned
def _unsupported(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_size: tuple[int, int],
    scale: float,
    window: int,
    arch: str,
) -> str | None:
    if arch != "sm90":
        return "it is written for sm_90"
    if query.dtype not in (torch.float16, torch.bfloat16):
        return f"it takes fp16 and bf16, not {query.dtype}"
    if query.shape[-1] > 128 or query.shape[-1] % 8:
        return f"head_dim must be a multiple of 8 and at most 128, not {query.shape[-1]}"
    if block_size not in ((64, 64), (128, 64), (128, 128), (256, 64), (256, 128)):
        return f"it has no tiles for blocks of {block_size}"
    if not has_copy_engine("sm90", query, key, value):
        return "the copy engine needs addresses and strides that are multiples of 16 bytes"
    if scale <= 0:
        return "the running maximum needs a positive scale"
    if window > 0:
        return "it has no window"
    return None


# How the copy engine lays out every box in shared memory; it takes long to make.
BOX_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)


def descriptor(tensor: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """What the copy engine needs to move (rows, columns) boxes of (B, H, N, D)."""
    # The stride of a dimension of size 1 is never used, but has to be a valid one.
    strides = [s if n > 1 else 16 for n, s in zip(tensor.shape, tensor.stride(), strict=True)]
    return TensorDescriptor(
        tensor, list(tensor.shape), [*strides[:-1], 1], [1, 1, rows, columns], BOX_LAYOUT
    )


def hopper_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_num_blocks: Tensor | None,
    kv_indices: Tensor | None,
    block_size: tuple[int, int],
    is_causal: bool,
    scale: float,
    config: HopperConfig | None = None,
    order: Tensor | None = None,
    *,
    kv_lens: Tensor | None = None,
    q_lens: Tensor | None = None,
    row_entropy: bool = False,
    block_entropy: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the kernel, for calls that `unsupported` has nothing against.

    Args:
        order: of `work_order` for the same lists and lengths; None computes it, in one short
            launch.
        kv_lens, q_lens: (B,) int32 valid lengths, or None.

    Returns:
        out (B, Hq, Nq, D), lse (B, Hq, Nq) fp32, row and block entropy, each like lse or empty,
        as `block_sparse_forward`.
    """
    out = torch.empty_like(query)
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    row = torch.empty_like(lse) if row_entropy else lse.new_empty(0)
    block = torch.empty_like(lse) if block_entropy else lse.new_empty(0)
    if out.numel() == 0:
        return out, lse, row, block
    if key.shape[2] == 0:
        return out.zero_(), lse.fill_(float("-inf")), row.zero_(), block.zero_()

    entropies = row_entropy or block_entropy
    config = config or hopper_config(query.shape[3], block_size, entropies)
    counts, indices = adjacent_lists(kv_num_blocks, kv_indices)
    multiprocessors, l2_bytes = device_limits(query.get_device())
    programs = multiprocessors * config.programs
    if order is None:
        order = work_order(
            query, key, counts, indices, block_size, ROWS.value * config.warpgroups, is_causal,
            l2_bytes, programs, kv_lens, q_lens,
        )  # fmt: skip
    launch = plan_forward(
        query, key, value, out, counts, indices, kv_lens, q_lens, order.shape[0] - 1, block_size,
        is_causal, scale, row_entropy, block_entropy, config, programs,
    )  # fmt: skip
    # An int32 tensor stands where there is none.
    integers = (order if x is None else x for x in (indices, kv_lens, q_lens))
    launch(query, key, value, out, lse, row, block, *integers, order)
    return out, lse, row, block


def plan_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    counts: Tensor | None,
    indices: Tensor | None,
    kv_lens: Tensor | None,
    q_lens: Tensor | None,
    block_size: tuple[int, int],
    is_causal: bool,
    scale: float,
) -> tuple[Launch, Launch, int]:
    """The launches of the order and of the kernel without entropies, and the number of items."""
    config = hopper_config(query.shape[3], block_size)
    block_m = ROWS.value * config.warpgroups
    items = query.shape[0] * query.shape[1] * ceil_div(query.shape[2], block_m)
    multiprocessors, l2_bytes = device_limits(query.get_device())
    programs = multiprocessors * config.programs
    order = plan_order(
        query, key, counts, indices, block_size, block_m, is_causal, l2_bytes, programs, kv_lens,
        q_lens,
    )  # fmt: skip
    forward = plan_forward(
        query, key, value, out, counts, indices, kv_lens, q_lens, items, block_size, is_causal,
        scale, False, False, config, programs,
    )  # fmt: skip
    return order, forward, items


@planned
def plan_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    counts: Tensor | None,
    indices: Tensor | None,
    kv_lens: Tensor | None,
    q_lens: Tensor | None,
    items: int,
    block_size: tuple[int, int],
    is_causal: bool,
    scale: float,
    row_entropy: bool,
    block_entropy: bool,
    config: HopperConfig,
    programs: int,
) -> Launch:
    heads, q_len, head_dim = query.shape[1:]
    kv_heads, kv_len = key.shape[1:3]
    block_d = 64 if head_dim <= 64 else 128
    # Two blocks make a step: then their tiles are put together from boxes of 64 columns.
    box = (block_size[1], 64) if config.block_n > block_size[1] else (config.block_n, block_d)
    launch_registers, *registers = REGISTERS[config.programs]
    return Launch(
        _forward_kernel, (min(items, programs),),
        (
            *list_strides(counts, indices)[3:],
            heads, heads // kv_heads, q_len, kv_len,
            ceil_div(q_len, ROWS.value * config.warpgroups), items, exponent_scale(scale),
        ),
        described={
            0: descriptor(query, ROWS.value, block_d), 1: descriptor(key, *box),
            2: descriptor(value, *box), 3: descriptor(out, ROWS.value, block_d),
        },
        BLOCK_D=block_d, BLOCK_N=config.block_n,
        BLOCK_Q=block_size[0], BLOCK_K=block_size[1],
        WARPGROUPS=config.warpgroups,
        KEY_STAGES=config.key_stages, VALUE_STAGES=config.value_stages,
        IS_CAUSAL=is_causal, MAY_CUT=kv_lens is not None or kv_len % block_size[1] != 0,
        LISTED=indices is not None,
        HAS_KV_LENS=kv_lens is not None, HAS_Q_LENS=q_lens is not None,
        ROW_ENTROPY=row_entropy, BLOCK_ENTROPY=block_entropy,
        PING_PONG=config.ping_pong and config.warpgroups == 2,
        QUERY_REGISTERS=config.query_registers, PIN=config.pin,
        GUARD=config.guard and not (row_entropy or block_entropy),
        CONSUMER_REGISTERS=registers[0], PRODUCER_REGISTERS=registers[1],
        num_warps=4, maxnreg=launch_registers, launch_pdl=True,
    )  # fmt: skip
