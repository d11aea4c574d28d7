"""Compile every kernel for a GPU that is not here, and report what each takes.

    python tests/compile_only.py sm90              a table
    python tests/compile_only.py sm90 --json       one JSON object a launch
    python tests/compile_only.py sm90 --record     a table, and a record in the result store

The launchers run as always, on CPU tensors, through the same custom ops as the API, so that the
default configurations of that GPU are what is compiled. Two things are replaced: Triton's driver,
by one that only names the target, and the launch, by compilation: of each launch for the GPU that
is measured, of each form of a kernel for others (`compile_cases.form_of`). It must be a process of
its own without TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from compile_cases import MEASURED, cases_of, form_of

KIB = 1024
# As Triton's GPUTarget takes them: backend, architecture, threads a warp.
TARGETS: dict[str, tuple[str, int | str, int]] = {
    "sm80": ("cuda", 80, 32),
    "sm90": ("cuda", 90, 32),
    "sm100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
# Bytes a program may have: CUDA C programming guide, table of compute capabilities; CDNA 3 ISA.
SHARED_MEMORY = {"sm80": 163 * KIB, "sm90": 227 * KIB, "sm100": 227 * KIB, "gfx942": 64 * KIB}


@dataclass(frozen=True)
class Compiled:
    """What one kernel takes on one GPU.

    Attributes:
        case: the call that needed it.
        registers: a thread's; on AMD its vector registers.
        spills: bytes a thread that do not fit in them (stores).
        shared: bytes of shared memory a program.
        seconds: of compilation.
    """

    arch: str
    case: str
    kernel: str
    config: dict[str, Any]
    registers: int
    spills: int
    shared: int
    seconds: float


@dataclass(frozen=True)
class LeftOut:
    """A launch that was not compiled, since one of the same form was."""

    case: str
    kernel: str


class NamedTarget:
    """A driver that says which GPU to compile for and has none."""

    def __init__(self, arch: str) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget(*TARGETS[arch])

    def get_current_target(self):
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


class Compiler:
    """Replaces launches by compilations and keeps what came out."""

    def __init__(self, arch: str) -> None:
        from triton import knobs
        from triton.runtime.driver import driver
        from triton.runtime.jit import JITFunction

        from entropy_attn.kernels import launch

        if knobs.runtime.interpret:
            raise RuntimeError("TRITON_INTERPRET is set: nothing would be compiled; unset it")
        self.arch = arch
        self.case: Any = None
        self.found: list[Compiled | LeftOut] = []
        self._forms: set[tuple[Any, ...]] = set()
        self._resources: dict[str, tuple[int, int]] = {}
        knobs.nvidia.dump_ptxas_log = True
        knobs.compilation.always_compile = True
        driver.set_active(NamedTarget(arch))
        # The launchers ask for it by the name they imported: replaced before they are imported.
        launch.architecture = lambda device: arch
        JITFunction.__getitem__ = lambda kernel, grid: partial(self.compile, kernel)

    def compile(self, kernel: Any, *args: Any, **kwargs: Any) -> None:
        form = (kernel.fn, *form_of(self.case))
        if self.arch != MEASURED and form in self._forms:
            self.found.append(LeftOut(str(self.case), kernel.fn.__name__.strip("_")))
            return
        self._forms.add(form)
        start, log = time.perf_counter(), io.StringIO()
        with contextlib.redirect_stdout(log):
            compiled = kernel.warmup(*args, grid=(1,), **kwargs)
        unused = unused_barriers(compiled.asm["ttgir"])
        if unused:
            raise RuntimeError(f"{compiled.metadata.name}: nobody uses the mbarriers {unused}")
        early = touched_early(compiled.metadata.name, compiled.asm.get("ptx", ""))
        if early:
            raise RuntimeError(f"{compiled.metadata.name}: ahead of its wait it has {early}")
        # A kernel that was compiled before in this process comes without a report.
        if compiled.hash not in self._resources:
            self._resources[compiled.hash] = _resources(compiled, log.getvalue())
        registers, spills = self._resources[compiled.hash]
        shown = {"HEAD_DIM": "D", "BLOCK_M": "M", "BLOCK_N": "N", "ROWS": "M", "COLS": "N"}
        config = {short: kwargs[name] for name, short in shown.items() if name in kwargs}
        config |= {"warps": kwargs.get("num_warps", 4), "stages": kwargs.get("num_stages", 3)}
        self.found.append(
            Compiled(
                arch=self.arch,
                case=str(self.case),
                kernel=compiled.metadata.name.strip("_"),
                config=config,
                registers=registers,
                spills=spills,
                shared=compiled.metadata.shared,
                seconds=round(time.perf_counter() - start, 2),
            )
        )


def _resources(compiled: Any, log: str) -> tuple[int, int]:
    """(registers, spilled bytes) a thread, from ptxas' report or AMD's assembly."""
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]
        registers, spilled = r"\.vgpr_count:\s+(\d+)", r"\.vgpr_spill_count:\s+(\d+)"
        bytes_each = 4
    else:
        text, registers, spilled = log, r"Used (\d+) registers", r"(\d+) bytes spill stores"
        bytes_each = 1
    numbers = [re.search(pattern, text) for pattern in (registers, spilled)]
    if None in numbers:
        raise RuntimeError(f"the compiler's report does not say what it used:\n{text[-2000:]}")
    if "wgmma.mma_async instructions are serialized" in text:
        raise RuntimeError(f"the tensor cores' products wait for each other:\n{text[-2000:]}")
    used, spills = (int(match[1]) for match in numbers if match)
    return used, spills * bytes_each


def unused_barriers(ttgir: str) -> list[str]:
    """mbarriers that are initialised and never used or invalidated.

    The compiler gives their memory to something else, and the hardware, which keeps their state,
    may write it over that long after.
    """
    found = []
    for barrier in re.findall(r"(%\w+) = ttg\.local_alloc : \(\) -> !ttg\.memdesc<\w+xi64", ttgir):
        names, is_used = {barrier}, False
        for line in ttgir.splitlines():
            view = re.match(r"\s*(%\w+) = ttg\.memdesc_index (%\w+)\[", line)
            if view:
                names |= {view[1]} if view[2] in names else set()
            elif "init_barrier" not in line and f"{barrier} = " not in line:
                is_used |= not names.isdisjoint(re.findall(r"%\w+", line))
        if not is_used:
            found.append(barrier)
    return found


ACCESSES = r"\b(?:ld|st)\.global|\b(?:red|atom)\."
BEGIN, WAIT = "griddepcontrol.launch_dependents", "griddepcontrol.wait"
WAIT_FIRST = "_transpose_kernel", "_split_kernel", "_combine_kernel", "_backward_kernel"
# Those, and others, begin before the launch ahead of them has ended.
BEGIN_EARLY = *WAIT_FIRST, "_statistics_kernel", "_order_kernel"


def touched_early(kernel: str, ptx: str) -> list[str]:
    """What a kernel does before it waits for the launch ahead, where it must not.

    Those that `BEGIN_EARLY`: letting the next launch begin and never waiting, as that one relies on
    it. Those that `WAIT_FIRST`: anything. The statistics: some of their reads and writes; all of
    them come before the wait, or none.
    """
    before, wait, after = ptx.partition(WAIT)
    if not wait:
        return [BEGIN] if kernel in BEGIN_EARLY and BEGIN in ptx else []
    if kernel in WAIT_FIRST:
        return re.findall(f"{re.escape(BEGIN)}|{ACCESSES}", before)
    if kernel == "_statistics_kernel" and re.search(ACCESSES, after):
        return re.findall(ACCESSES, before)
    return []


def compiled_kernels(arch: str, cases: tuple[Any, ...] = ()) -> Iterator[Compiled | LeftOut]:
    """Compile the cases one after the other; this process can launch nothing afterwards."""
    compiler = Compiler(arch)
    for case in cases or cases_of(arch):
        compiler.case, done = case, len(compiler.found)
        case.run()
        yield from compiler.found[done:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("arch", choices=TARGETS)
    parser.add_argument("--json", action="store_true", help="one JSON object a launch")
    parser.add_argument("--record", action="store_true", help="append to the result store")
    arguments = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)
    found = []
    for each in compiled_kernels(arguments.arch):
        if arguments.json:
            print(json.dumps(asdict(each)), flush=True)
        if isinstance(each, LeftOut):
            continue
        found.append(each)
        if not arguments.json:
            config = " ".join(f"{name}={value}" for name, value in each.config.items())
            print(
                f"{each.case:62} {each.kernel:18} {config:36} {each.registers:4} registers "
                f"{each.spills:5} B spilled {each.shared / KIB:6.1f} KiB {each.seconds:5.1f} s",
                flush=True,
            )
    if arguments.record:
        record(arguments.arch, found)


def record(arch: str, found: list[Compiled]) -> None:
    """Append what the kernels take on one GPU to the result store, as one record."""
    from entropy_attn.benchmarks.store import Record, Store

    kernels = [asdict(each) for each in found]
    Store().append(Record("compile_only", {"arch": arch}, {"status": "ok", "kernels": kernels}))


if __name__ == "__main__":
    main()
