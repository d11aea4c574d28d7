"""Compile a configuration for sm_90 here and count the instructions of the main loop.

    python scratch/soft/sass.py forward bfloat16 128,64,64,0,8,3,264 [--dump FILE]
"""

from __future__ import annotations

import argparse
import collections
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import compile_only  # noqa: E402

CLASSES = {
    "MMA": r"HGMMA|HMMA|WARPGROUP|IGMMA", "MUFU": r"MUFU", "FFMA": r"FFMA", "FADD": r"FADD",
    "FMUL": r"FMUL", "FMNMX": r"FMNMX", "F2F": r"F2F|F2FP|HADD2|HMUL2|HFMA2|I2F|F2I", "LDS": r"LDS|LDSM",
    "STS": r"STS|STSM", "LDG": r"LDG", "LDGSTS": r"LDGSTS|UTMALDG", "STG": r"STG|UTMASTG", "LDL/STL": r"LDL|STL",
    "SHFL": r"SHFL", "BAR": r"BAR|SYNCS|DEPBAR|FENCE", "FSETP/SEL": r"FSETP|FSEL|SEL",
    "MOV": r"MOV|PRMT|CS2R", "INT": r"IMAD|IADD|LEA|LOP|SHF|ISETP|VIADD|PLOP|VIMNMX|IMNMX|UIADD|ULEA|UIMAD|ULOP|USHF|UISETP|R2UR",
}


def nvidia(tool):
    import triton

    return str(Path(triton.__file__).parent / "backends/nvidia/bin" / tool)


def disassemble(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([nvidia("cuobjdump"), "-sass", file.name], capture_output=True, text=True).stdout


def loops(sass: str):
    lines = []
    for line in sass.splitlines():
        m = re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", line)
        if m:
            lines.append((int(m[1], 16), m[2]))
    found = []
    for at, text in lines:
        m = re.search(r"BRA(?:\.\w+)*\s+(?:!?U?P\d+,\s*)?(?:`\(.*\)|0x([0-9a-f]+))", text)
        if m and m[1] and int(m[1], 16) < at:
            start = int(m[1], 16)
            found.append((start, at, [t for a, t in lines if start <= a <= at]))
    return lines, found


def classify(body):
    counts = collections.Counter()
    for text in body:
        op = re.sub(r"^@!?U?P\w+\s+", "", text).split()[0]
        for name, pattern in CLASSES.items():
            if re.match(rf"(?:{pattern})", op):
                counts[name] += 1
                break
        else:
            counts["other:" + op.split(".")[0]] += 1
    return counts


def main():
    p = argparse.ArgumentParser()
    p.add_argument("direction")
    p.add_argument("dtype")
    p.add_argument("config")
    p.add_argument("--dim", type=int, default=64)
    p.add_argument("--k", type=int, default=64)
    p.add_argument("--dump")
    p.add_argument("--all", action="store_true")
    a = p.parse_args()
    compiler = compile_only.Compiler("sm90")
    captured = {}
    from triton.runtime.jit import JITFunction
    from functools import partial

    def compile(kernel, *args, **kwargs):
        import io, contextlib
        log = io.StringIO()
        with contextlib.redirect_stdout(log):
            compiled = kernel.warmup(*args, grid=(1,), **kwargs)
        captured[compiled.metadata.name] = (compiled, compile_only._resources(compiled, log.getvalue()), kwargs)

    JITFunction.__getitem__ = lambda kernel, grid: partial(compile, kernel)
    from entropy_attn.kernels import range_entropy, range_gradients
    from entropy_attn.kernels.range_primitives import RangeConfig

    config = RangeConfig(*eval(a.config)) if a.config != "default" else None
    dtype = getattr(torch, a.dtype)
    x = torch.zeros(1, 1, 1_000_000, a.dim, dtype=dtype)
    c, alpha = torch.zeros(1, 1, a.k, a.dim), torch.ones(1, 1)
    if a.direction == "forward":
        range_entropy.range_mass(x, c, alpha, None, False, config)
    else:
        mass, lse = torch.zeros(1, 1, a.k), torch.zeros(1, 1, 1_000_000)
        range_gradients.range_gradients(alpha, x, c, alpha, None, alpha, mass, lse, True, True, False, config)
    for name, (compiled, (registers, spills), kwargs) in captured.items():
        if not a.all and name not in ("_mass_kernel", "_anchor_kernel"):
            continue
        sass = disassemble(compiled.asm["cubin"])
        if a.dump:
            Path(a.dump).write_text(sass)
            Path(a.dump + ".ttgir").write_text(compiled.asm["ttgir"])
            Path(a.dump + ".ptx").write_text(compiled.asm["ptx"])
        lines, found = loops(sass)
        warps = kwargs.get("num_warps", 4)
        print(f"{name}: {registers} registers, {spills} B spilled, shared {compiled.metadata.shared / 1024:.1f} KiB, warps {warps}, {len(lines)} instructions")
        found = [f for f in found if f[0] != f[1] and not any("EXIT" in t for t in f[2])]
        for start, end, body in sorted(found, key=lambda f: -len(f[2]))[: 1 if not a.all else 3]:
            rows = kwargs.get("BLOCK_M", 64)
            elements = rows * kwargs.get("BLOCK_N", 64) / (warps * 32)
            counts = classify(body)
            total = sum(counts.values())
            print(f"  loop {start:x}-{end:x}: {total} instructions, {elements:.0f} elements a thread, {total / elements:.2f} an element; issue {total * warps / 4 / rows:.2f} clk/point, MUFU {counts['MUFU'] * warps * 2 / rows:.2f}")
            print("   ", ", ".join(f"{k} {v}" for k, v in counts.most_common()))


main()
