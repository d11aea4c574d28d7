"""Values of rows as the threads have them: four threads share a row of the accumulators.

A value that a thread has for a row is an entry of a (64, 4) tensor. Where all four threads know
the value of the row, no shuffle is needed to go on with it, but the compiler inserts one wherever
it is to become a (64,) tensor again. So what is used in every step stays (64, 4): here are the ways
there, none of which moves anything.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from entropy_attn.kernels.hopper.primitives import ROWS


@gluon.jit
def of_threads(x, like):
    """x (64,) as ``like`` (64, 4) is, a column for each of the four threads that share a row."""
    layout: gl.constexpr = gl.SliceLayout(1, like.type.layout)
    x, _ = gl.broadcast(gl.convert_layout(x, layout)[:, None], like)
    return x


@gluon.jit
def by_thread(x, BLOCKS: gl.constexpr = 1):
    """x (64, N) as (64, blocks, N / blocks / 8, 4, 2): of every 8 columns a thread holds two."""
    return gl.reshape(x, [ROWS, BLOCKS, x.shape[1] // (8 * BLOCKS), 4, 2])


@gluon.jit
def spread(x, like):
    """x (64, 4), a column a thread, as ``like`` (64, N): each thread's x in all that it holds."""
    parts = by_thread(like)  # (64, 1, N / 8, 4, 2)
    layout: gl.constexpr = parts.type.layout
    x = gl.convert_layout(x, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(4, layout))))
    x = gl.expand_dims(gl.expand_dims(gl.expand_dims(x, 1), 2), 4)
    x, _ = gl.broadcast(x, parts)
    return gl.convert_layout(gl.reshape(x, [ROWS, like.shape[1]]), like.type.layout)


@gluon.jit
def first_of_rows(x, like):
    """(64, 4), as ``like`` is, of x (64, N): each thread's first entry of each row."""
    HALVINGS: gl.constexpr = 4 if x.shape[1] == 128 else 3
    x = gl.reshape(x, [ROWS, x.shape[1] // 8, 4, 2])
    x, _ = gl.split(x)
    x = gl.permute(x, (0, 2, 1))  # (64, 4, N / 8)
    for _ in gl.static_range(HALVINGS):
        x = gl.reshape(x, [ROWS, 4, x.shape[2] // 2, 2])
        x, _ = gl.split(x)
    return gl.convert_layout(gl.reshape(x, [ROWS, 4]), like.type.layout)


@gluon.constexpr_function
def _rescale_asm(count):
    """Multiply ``count`` registers by as many factors, unless no thread of the warp needs it.

    A thread holds two rows; pairs of columns alternate between them, so that the factors number
    0 and 2 are all there are.
    """
    products = [f"mul.f32 ${i}, ${i}, ${2 * count + i};" for i in range(count)]
    lines = [
        "{",
        ".reg .pred p, q;",
        f"setp.ne.f32 p, ${2 * count}, 0f3F800000;",
        f"setp.ne.or.f32 p, ${2 * count + 2}, 0f3F800000, p;",
        "vote.sync.any.pred q, p, 0xffffffff;",
        "@!q bra DONE;",
        *products,
        "DONE:",
        "}",
    ]
    return "\n".join(lines)


@gluon.constexpr_function
def _rescale_constraints(count):
    tied = [str(i) for i in range(count)]  # each result starts as the register it replaces
    return ",".join(["=f"] * count + tied + ["f"] * count)


@gluon.jit
def rescale(acc, alpha):
    """acc (64, D) times alpha (64, 4), a column a thread; skipped by warps where all are 1."""
    registers: gl.constexpr = acc.shape[1] // 2  # a thread's, of 128
    return gl.inline_asm_elementwise(
        _rescale_asm(registers), _rescale_constraints(registers), [acc, spread(alpha, acc)],
        dtype=gl.float32, is_pure=True, pack=registers,
    )  # fmt: skip
