"""Exponentials whose maximum is looked for only where a sum outgrows it.

p_j = 2^(s_j - m) gives the same softmax for any m, as long as p and its sums stay in range. So m
stays as it was, and nobody looks for the largest score, until a thread's part of a sum exceeds
2^14; fp16 can hold all p up to there. Then the step starts again with the largest scores. Looking
for them in every step costs 17 % of its instructions.

It is one piece of PTX, because Gluon would compute both branches.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from entropy_attn.kernels.hopper.row_values import first_of_rows, spread

LIMIT = gl.constexpr("0f46800000")  # 2^14


@gluon.constexpr_function
def _guarded_asm(count, limit):
    """p = 2^(scale s - m) of a thread's ``count`` scores in two rows, and their sums.

    Outputs: p, m, 2^(old m - m), sums. Inputs: s, m, scale. Each is ``count`` registers, of which
    those number 0 and 2 are used where all of a row are the same. A row whose sum exceeds ``limit``
    in any thread of the warp makes the warp start again with the largest score of each row as m, if
    it is larger.
    """
    p, m, alpha, mass, s, old, scale = (range(i * count, (i + 1) * count) for i in range(7))
    chains = 4
    exponentials = []
    for i in range(count):
        row = i >> 1 & 1
        exponentials.append(f"fma.rn.f32 t, ${s[i]}, ${scale[0]}, n{row};")
        exponentials.append(f"ex2.approx.ftz.f32 ${p[i]}, t;")
    members = [[i for i in range(count) if i >> 1 & 1 == row] for row in (0, 1)]
    for row in (0, 1):
        for n, i in enumerate(members[row]):
            if n < chains:
                exponentials.append(f"mov.f32 a{n}, ${p[i]};")
            else:
                exponentials.append(f"add.f32 a{n % chains}, a{n % chains}, ${p[i]};")
        exponentials += ["add.f32 a0, a0, a1;", "add.f32 a2, a2, a3;"]
        exponentials.append(f"add.f32 ${mass[2 * row]}, a0, a2;")

    lines = ["{", ".reg .pred q, any;", ".reg .f32 t, m0, m1, n0, n1, a0, a1, a2, a3;"]
    for row in (0, 1):
        lines.append(f"mov.f32 m{row}, ${old[2 * row]};")
        lines.append(f"neg.f32 n{row}, ${old[2 * row]};")
        lines.append(f"mov.f32 ${alpha[2 * row]}, 0f3F800000;")
    lines += exponentials
    lines += [
        f"setp.gt.f32 q, ${mass[0]}, {limit};",
        f"setp.gt.or.f32 q, ${mass[2]}, {limit}, q;",
        "vote.sync.any.pred any, q, 0xffffffff;",
        "@!any bra DONE;",
    ]
    for row in (0, 1):
        lines.append(f"mov.f32 t, ${s[members[row][0]]};")
        lines += [f"max.f32 t, t, ${s[i]};" for i in members[row][1:]]
        for lane in (1, 2):
            lines.append(f"shfl.sync.bfly.b32 a0, t, {lane}, 31, 0xffffffff;")
            lines.append("max.f32 t, t, a0;")
        lines.append(f"mul.f32 t, t, ${scale[0]};")
        lines.append(f"max.f32 m{row}, ${old[2 * row]}, t;")
        lines.append(f"neg.f32 n{row}, m{row};")
        lines.append(f"sub.f32 t, ${old[2 * row]}, m{row};")
        lines.append(f"ex2.approx.ftz.f32 ${alpha[2 * row]}, t;")
    lines += [*exponentials, "DONE:"]
    # m may be the register of the old m, and is written last.
    return "\n".join([*lines, f"mov.f32 ${m[0]}, m0;", f"mov.f32 ${m[2]}, m1;", "}"])


@gluon.constexpr_function
def _guarded_constraints(count):
    early = ["=&f"] * count  # written before all inputs are read
    return ",".join(early + ["=f"] * count + 2 * early + ["f"] * (3 * count))


@gluon.jit
def guarded_exp2(scores, maxima, scale):
    """p (64, N) = 2^(scale scores - m), m, 2^(old m - m) and sums of p, (64, 4): a column a thread.

    m is ``maxima`` (64, 4), unless that makes a sum larger than 2^14: then it is the largest score.
    """
    COUNT: gl.constexpr = scores.shape[1] // 2  # a thread's, of 128
    scales = gl.zeros_like(scores) + scale
    p, m, alpha, sums = gl.inline_asm_elementwise(
        _guarded_asm(COUNT, LIMIT), _guarded_constraints(COUNT),
        [scores, spread(maxima, scores), scales],
        dtype=(gl.float32,) * 4, is_pure=True, pack=COUNT,
    )  # fmt: skip
    return p, first_of_rows(m, maxima), first_of_rows(alpha, maxima), first_of_rows(sums, maxima)
