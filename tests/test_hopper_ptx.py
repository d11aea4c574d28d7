"""The inline PTX of the Hopper kernels that is more than an instruction, in a small interpreter.

It runs a warp of 32 threads in numpy, straight through and over branches that all threads take.
"""

from __future__ import annotations

import re

import numpy as np
import pytest

from entropy_attn.kernels.hopper import guarded, primitives

LANES = np.arange(32)


def run(
    asm: str, outputs: int, inputs: list[np.ndarray], more: dict[str, np.ndarray]
) -> list[np.ndarray]:
    """Registers $0.. of a warp, (32,) fp32 each, after the instructions."""
    registers = more | {f"${outputs + i}": x for i, x in enumerate(inputs)}
    lines = [line.strip() for line in asm.splitlines() if not re.match(r"[{}]|\.reg", line)]

    def value(name: str) -> np.ndarray:
        if name.startswith("0f"):
            return np.full(32, np.array(int(name[2:], 16), np.uint32).view(np.float32))
        return registers[name]

    at = 0
    with np.errstate(all="ignore"):
        while at < len(lines):
            line = lines[at].rstrip(";")
            at += 1
            if line.endswith(":"):
                continue
            name, *arguments = re.split(r"[\s,]+", line)
            if name.startswith("@!"):
                assert len(set(registers[name[2:]])) == 1, "a branch that not all threads take"
                if not registers[name[2:]][0]:
                    at = lines.index(f"{arguments[1]}:")
                continue
            target, *sources = arguments
            registers[target] = execute(name, sources, value)
    return [registers.get(f"${i}") for i in range(outputs)]


def execute(name: str, sources: list[str], value) -> np.ndarray:
    if name == "shfl.sync.bfly.b32":
        return value(sources[0])[LANES ^ int(sources[1])]
    if name == "vote.sync.any.pred":
        return np.full(32, value(sources[0]).any())
    x = [value(source) for source in sources]
    if name == "setp.gt.f32":
        return x[0] > x[1]
    if name == "setp.gt.or.f32":
        return (x[0] > x[1]) | x[2]
    if name == "setp.lt.s32":
        return x[0] < x[1]
    if name == "selp.f32":
        return np.where(x[2], x[0], x[1])
    if name == "fma.rn.f32":
        return (x[0].astype(np.float64) * x[1] + x[2]).astype(np.float32)
    if name == "ex2.approx.ftz.f32":
        return np.exp2(x[0])
    if name == "max.f32":
        return np.fmax(x[0], x[1])
    unary = {"mov.f32": lambda a: a, "neg.f32": lambda a: -a}
    binary = {"add.f32": np.add, "sub.f32": np.subtract, "mul.f32": np.multiply}
    return unary[name](*x) if name in unary else binary[name](*x)


def rows_of(registers: list[np.ndarray]) -> np.ndarray:
    """(16 rows, columns) of a warp: four threads share rows r and r + 8, two columns of eight."""
    count = len(registers)
    out = np.empty((16, 2 * count), np.float32)
    for i, x in enumerate(registers):
        for lane in LANES:
            row = lane // 4 + 8 * (i >> 1 & 1)
            out[row, (i >> 2) * 8 + 2 * (lane % 4) + (i & 1)] = x[lane]
    return out


def registers_of(rows: np.ndarray) -> list[np.ndarray]:
    count = rows.shape[1] // 2
    found = [np.empty(32, np.float32) for _ in range(count)]
    for i in range(count):
        for lane in LANES:
            row = lane // 4 + 8 * (i >> 1 & 1)
            found[i][lane] = rows[row, (i >> 2) * 8 + 2 * (lane % 4) + (i & 1)]
    return found


@pytest.mark.parametrize("is_shared", [False, True])
@pytest.mark.parametrize("grown", [3, 11])  # one of either row of a thread
@pytest.mark.parametrize("columns", [64, 128])
@pytest.mark.parametrize(
    ("growth", "start"),
    [
        (0.0, "first"),
        (5.0, "first"),
        (13.5, "first"),
        (20.0, "first"),
        (60.0, "first"),
        (2000.0, "first"),
        (0.0, "none"),
        (3, "mixed"),
    ],
)
def test_guarded_exponentials(columns, growth, start, grown, is_shared):
    """Any m gives the same softmax, and no p is too large for fp16; m rises where it has to."""
    rng = np.random.default_rng(0)
    count, scale = columns // 2, np.float32(0.2)
    scores = rng.normal(size=(16, columns)).astype(np.float32) * 10
    scores[grown, 5] += growth / scale
    scores[:, 7] = -np.inf  # masked
    maximum = scores.max(1, initial=-1e30, where=np.isfinite(scores)) * scale - np.float32(1)
    maximum = (maximum - growth * (np.arange(16) == grown)).astype(np.float32)
    if start == "none":  # rows that have seen no key
        maximum[:] = -1.0e38
    if start == "mixed":
        maximum[4] = -1.0e38
        scores[9] = -np.inf
    same = np.ones((16, columns), np.float32)
    old = registers_of(maximum[:, None] * same)
    inputs = registers_of(scores) + old + [np.full(32, scale)] * count
    asm = guarded._guarded_asm(count, guarded.LIMIT.value)
    outputs = 4 * count
    if is_shared:  # the compiler may keep the new m where the old one was
        for row in (0, 2):
            asm = re.sub(rf"\${outputs + count + row}\b", f"${count + row}", asm)
            inputs[count + row], given = np.full(32, np.nan), inputs[count + row]
            asm = asm.replace("{", f"{{\nmov.f32 ${count + row}, old{row};", 1)
            old[row] = given
    found = run(asm, outputs, inputs, {f"old{row}": old[row] for row in (0, 2)})
    p, new, alpha, sums = (found[i * count : (i + 1) * count] for i in range(4))

    assert all(x is None for n, x in enumerate(new) if n not in (0, 2))
    row_of = [[LANES // 4, 0], [LANES // 4 + 8, 2]]
    m, total = np.empty(16), np.zeros(16)
    for rows, register in row_of:
        for lane in LANES:
            m[rows[lane]] = new[register][lane]
            rise = m[rows[lane]] - maximum[rows[lane]]
            assert alpha[register][lane] == pytest.approx(np.exp2(-rise), rel=1e-3)
            total[rows[lane]] += sums[register][lane]
    p = rows_of(p)
    exact = np.exp2(scores.astype(np.float64) * scale - m[:, None])
    np.testing.assert_allclose(p, exact, rtol=1e-3, atol=1e-30)
    np.testing.assert_allclose(total, exact.sum(1), rtol=1e-3)
    assert p.max() <= 2**14
    assert (m >= maximum).all()
    has_risen = growth > 13 or start != "first"
    assert (m > maximum).any() == has_risen
    seen = np.isfinite(scores).any(1)
    assert (m[seen] > -1e38).all()


@pytest.mark.parametrize("count", [32, 64])
def test_what_is_written_early_has_registers_of_its_own(count):
    """An output without & may be where an input is, and so is written after all are read."""
    lines = guarded._guarded_asm(count, guarded.LIMIT.value).splitlines()
    constraints = guarded._guarded_constraints(count).split(",")
    written: dict[int, int] = {}
    read = 0
    for at, line in enumerate(lines):
        target, *sources = re.findall(r"\$\d+|[a-z]\w*(?=[,;])", line) or [""]
        if target.startswith("$"):
            written.setdefault(int(target[1:]), at)
        inputs = [s for s in sources if s.startswith("$") and constraints[int(s[1:])] == "f"]
        read = at if inputs else read
    assert read > 2 * count
    late = [at for output, at in written.items() if constraints[output] == "=f"]
    early = [at for output, at in written.items() if constraints[output] == "=&f"]
    assert len(late) == 2
    assert min(late) > read > min(early)


@pytest.mark.parametrize(
    ("other", "number"), [(primitives.ZERO, 0.0), (primitives.MINUS_INFINITY, -np.inf)]
)
def test_where_below(other, number):
    """Also where what is left out is no number, and at the limit."""
    x = np.where(LANES % 3 == 0, np.nan, LANES).astype(np.float32)
    limit = np.full(32, 12)
    [found] = run(primitives._below_asm(other.value), 1, [LANES, limit, x], {})
    np.testing.assert_array_equal(found, np.where(LANES < 12, x, number).astype(np.float32))
