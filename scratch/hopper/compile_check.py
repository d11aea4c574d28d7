"""Compile every variant of the Hopper kernel for sm_90, without a GPU.

    PYTHONPATH=. python scratch/hopper/compile_check.py [--keep DIR] [--only WORD]

Prints registers, spills, shared memory, ptxas' warnings on serialised products, and for each
ttgir loop whether it carries as many scalars as expected.
"""

import argparse
import contextlib
import io
import os
import re
import sys
import time
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from compile_only import NamedTarget  # noqa: E402
from triton import knobs  # noqa: E402
from triton.runtime.driver import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

knobs.nvidia.dump_ptxas_log = True
knobs.compilation.always_compile = True
driver.set_active(NamedTarget("sm90"))

from entropy_attn.kernels.hopper import forward  # noqa: E402
from entropy_attn.masks import BlockMask  # noqa: E402

forward._device_limits = lambda index: (132, 50 << 20)
found = []


def compile_only(kernel, grid, *args, **kwargs):
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        compiled = kernel.warmup(*args, grid=(1,), **kwargs)
    found.append((compiled, log.getvalue()))


JITFunction.__getitem__ = lambda kernel, grid: partial(compile_only, kernel, grid)

CASES = {
    # name: (D, (block_q, block_k), dtype, causal, kv_len, changes to the default config)
    "128 128x128": (128, (128, 128), torch.bfloat16, False, 1024, {}),
    "64 128x128": (64, (128, 128), torch.bfloat16, False, 1024, {}),
    "128 128x64": (128, (128, 64), torch.bfloat16, False, 1024, {}),
    "64 128x64": (64, (128, 64), torch.bfloat16, False, 1024, {}),
    "128 64x64": (128, (64, 64), torch.bfloat16, False, 1024, {}),
    "64 64x64": (64, (64, 64), torch.bfloat16, False, 1024, {}),
    "128 128x128 causal": (128, (128, 128), torch.bfloat16, True, 1024, {}),
    "64 128x128 causal": (64, (128, 128), torch.bfloat16, True, 1024, {}),
    "128 128x64 causal": (128, (128, 64), torch.bfloat16, True, 1000, {}),
    "64 128x64 causal": (64, (128, 64), torch.bfloat16, True, 1000, {}),
    "128 64x64 causal": (128, (64, 64), torch.bfloat16, True, 1000, {}),
    "64 64x64 causal": (64, (64, 64), torch.bfloat16, True, 1000, {}),
    "128 128x128 fp16 cut": (128, (128, 128), torch.float16, False, 1000, {}),
    "128 128x128 dense": (128, (128, 128), torch.bfloat16, True, 1000, dict(lists=False)),
    "64 64x64 n128": (64, (64, 64), torch.bfloat16, False, 1024, dict(block_n=128, stages=2)),
    "64 64x64 n128 qreg pin": (
        64, (64, 64), torch.bfloat16, False, 1024,
        dict(block_n=128, stages=2, query_registers=True, pin=True),
    ),
    "64 64x64 three": (64, (64, 64), torch.bfloat16, False, 1024, dict(programs=3, stages=2)),
    "64 64x64 three causal": (64, (64, 64), torch.bfloat16, True, 1000, dict(programs=3, stages=2)),
    "64 256x128": (64, (256, 128), torch.bfloat16, True, 1024, {}),
    "128 qreg pin": (
        128, (128, 128), torch.bfloat16, False, 1024,
        dict(ping_pong=False, query_registers=True, pin=True),
    ),
    "128 pp qreg": (
        128, (128, 128), torch.bfloat16, False, 1024, dict(query_registers=True),
    ),
    "128 pp pin": (128, (128, 128), torch.bfloat16, False, 1024, dict(pin=True)),
    "64 pp": (
        64, (128, 128), torch.bfloat16, False, 1024,
        dict(ping_pong=True, query_registers=False, pin=False),
    ),
    "64 pp qreg pin": (64, (128, 128), torch.bfloat16, False, 1024, dict(ping_pong=True)),
}  # fmt: skip


def loops(ttgir: str) -> list[str]:
    """How many values of each kind every loop carries."""
    lines = []
    for match in re.finditer(r"scf\.(while|for)\b[^\n]*", ttgir):
        types = match[0].split(") : (")[-1] if ") : (" in match[0] else match[0].split("->")[-1]
        lines.append(f"{match[1]}: i32 x{types.count('i32')} tensors x{types.count('tensor')}")
    return lines


def main() -> None:
    from dataclasses import replace

    parser = argparse.ArgumentParser()
    parser.add_argument("--keep")
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    for name, (dim, block, dtype, causal, kv_len, changes) in CASES.items():
        if arguments.only not in name:
            continue
        found.clear()
        query = torch.zeros(1, 4, 1000, dim, dtype=dtype)
        key = torch.zeros(1, 2, kv_len, dim, dtype=dtype)
        mask = BlockMask.full(1, 4, 1000, kv_len, block)
        changes = dict(changes)
        lists = (mask.kv_num_blocks, mask.kv_indices) if changes.pop("lists", True) else (None,) * 2
        config = replace(forward.hopper_config(dim, block), **changes)
        start = time.time()
        forward.hopper_forward(query, key, key, *lists, block, causal, dim**-0.5, config)
        for compiled, log in found:
            registers = re.search(r"Used (\d+) registers", log)
            spills = re.search(r"(\d+) bytes spill stores", log)
            stack = re.search(r"(\d+) bytes stack frame", log)
            warnings = sorted(set(re.findall(r"C7\d+", log)))
            shown = [m and m[1] for m in (registers, spills, stack)]
            print(
                f"{name:22} {compiled.metadata.name:16} registers {shown[0]} spills {shown[1]} "
                f"stack {shown[2]} smem {compiled.metadata.shared} warnings {warnings} "
                f"{time.time() - start:.1f} s", flush=True,
            )  # fmt: skip
            if compiled.metadata.name == "_forward_kernel":
                if arguments.only:
                    print("   ", loops(compiled.asm["ttgir"]))
                    print(log)
                if arguments.keep:
                    folder = Path(arguments.keep)
                    folder.mkdir(parents=True, exist_ok=True)
                    for kind in ("source", "ttgir", "ptx"):
                        if kind in compiled.asm:
                            path = folder / f"{name.replace(' ', '_')}.{kind}"
                            path.write_text(str(compiled.asm[kind]))
                    (folder / f"{name.replace(' ', '_')}.cubin").write_bytes(compiled.asm["cubin"])


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    main()
