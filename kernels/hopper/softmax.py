"""Online softmax of the forward kernel, with the sums that its statistics are made of.

For a row with scores s_j in base 2 and a maximum m, a step adds to e_j = 2^(s_j - m) times v_j and
to l = sum e_j. Row and block entropy are log l - T / l, with T = sum e_j (s_j - m) for rows and
T = sum_B e_B log2 e_B for blocks, e_B = sum over the block of e_j; when m rises by d, T becomes
2^-d (T - d l) (see `entropy_attn.kernels.block_sparse_forward`). All that holds for any m, and so
for one that lags behind the largest score. Without entropies, steps that need no mask may not even
look for it (`guarded`).

Four threads share a row. Every sum is linear in parts of the row, so that each thread adds up its
own columns, T included, and the four meet after the last step. Only the logarithm of e_B wants the
whole row of a block at once: two shuffles a block.
"""

# No `from __future__ import annotations`: Gluon's aggregates look at the annotations of fields.
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.core import _aggregate as aggregate

from entropy_attn.kernels.hopper.guarded import guarded_exp2
from entropy_attn.kernels.hopper.primitives import (
    MINUS_INFINITY,
    ROWS,
    exp2,
    log2,
    settled,
    where_below,
)
from entropy_attn.kernels.hopper.row_values import by_thread, of_threads

NO_SCORE = gl.constexpr(-1.0e38)  # below every score, yet finite: see primitives.NO_SCORE
# How far a row's maximum may lag, in powers of two: p stays below 2^8, far from fp16's limit.
LAG = gl.constexpr(8.0)
NO_MASS = gl.constexpr(1.0e-37)  # has a logarithm, and adds nothing


@aggregate
class Sums:
    """What a row has added up to so far, beside its accumulator.

    Attributes:
        maximum: (64,) m, in base 2; (64, 4) for `guarded_softmax`, as a thread knows it.
        mass: (64, 4) l, each thread's part.
        row, block: (64, 4) T of row and of block entropy, each thread's part; the mass again, never
            read, where that entropy is not wanted.
    """

    maximum: gl.tensor
    mass: gl.tensor
    row: gl.tensor
    block: gl.tensor

    @gluon.constexpr_function
    def __init__(self, maximum, mass, row, block):
        self.maximum = maximum
        self.mass = mass
        self.row = row
        self.block = block


@gluon.jit
def visible(scores, problem, low, high, limits):
    """(64, N) scores of a step, -inf for the keys from each row's limit on."""
    lane = gl.arange(0, problem.BLOCK_N, gl.SliceLayout(0, scores.type.layout))
    keys = low + lane  # (N,)
    if problem.BLOCKS > 1:
        keys = gl.where(lane < problem.BLOCK_K, keys, high + lane - problem.BLOCK_K)
    return where_below(keys[None, :], limits[:, None], scores, MINUS_INFINITY)


@gluon.jit
def first_softmax(scores, problem, MASKED: gl.constexpr):
    """(64, N) p of an item's first step, and its `Sums`. MASKED: scores may be -inf."""
    layout: gl.constexpr = gl.SliceLayout(1, scores.type.layout)
    no_score = gl.full([ROWS], NO_SCORE, gl.float32, layout)
    maximum = gl.maximum(gl.max(scores, 1) * problem.scale_log2, no_score)  # (64,)
    return _step(scores, maximum, problem, MASKED)


@gluon.jit
def next_softmax(scores, sums, problem, MASKED: gl.constexpr):
    """(64, N) p of a later step, the new `Sums` and 2^(old maximum - new one), (64, 4)."""
    highest = gl.max(scores, 1) * problem.scale_log2  # (64,)
    maximum = gl.where(highest > sums.maximum + LAG, highest, sums.maximum)
    shift = sums.maximum - maximum
    alpha = exp2(shift)
    p, step = _step(scores, maximum, problem, MASKED)
    layout: gl.constexpr = gl.SliceLayout(1, sums.mass.type.layout)
    factor = gl.convert_layout(alpha, layout)[:, None]
    mass = sums.mass * factor + step.mass
    row = mass
    block = mass
    if problem.ROW_ENTROPY or problem.BLOCK_ENTROPY:
        moved = gl.convert_layout(shift, layout)[:, None] * sums.mass
        if problem.ROW_ENTROPY:
            row = factor * (sums.row + moved) + step.row
            if problem.PIN:
                row = settled(row)
        if problem.BLOCK_ENTROPY:
            block = factor * (sums.block + moved) + step.block
    return p, Sums(maximum, mass, row, block), of_threads(alpha, mass)


@gluon.jit
def guarded_softmax(scores, sums, problem):
    """As `next_softmax`, without a look at the scores; sums.maximum is (64, 4)."""
    p, maximum, alpha, step_mass = guarded_exp2(scores, sums.maximum, problem.scale_log2)
    mass = sums.mass * alpha + step_mass
    return p, Sums(maximum, mass, mass, mass), alpha


@gluon.jit
def for_guarded(sums):
    """The sums as `guarded_softmax` takes them."""
    maximum = of_threads(sums.maximum, sums.mass)
    return Sums(maximum, sums.mass, sums.mass, sums.mass)


@gluon.jit
def _step(scores, maximum, problem, MASKED: gl.constexpr):
    """p (64, N), and the `Sums` of one step alone."""
    BLOCKS: gl.constexpr = problem.BLOCKS if problem.BLOCK_ENTROPY else 1
    exponents = scores * problem.scale_log2 - maximum[:, None]  # (64, N)
    p = exp2(exponents)
    parts = gl.sum(gl.sum(by_thread(p, BLOCKS), 4), 2)  # (64, blocks, 4)
    mass = gl.sum(parts, 1)
    row = mass
    block = mass
    if problem.ROW_ENTROPY:
        if MASKED:
            exponents = gl.maximum(exponents, NO_SCORE)  # 0 * -inf would be NaN
        # Along the columns first: then most products and sums are one instruction.
        columns = gl.sum(by_thread(p * exponents, 1), 2)  # (64, 1, 4, 2)
        row = gl.convert_layout(gl.sum(gl.sum(columns, 3), 1), mass.type.layout)
    if problem.BLOCK_ENTROPY:
        log_mass = log2(gl.maximum(gl.sum(parts, 2), NO_MASS))  # (64, blocks)
        block = gl.sum(parts * log_mass[:, :, None], 1)
    return p, Sums(maximum, mass, row, block)
