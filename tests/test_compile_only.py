"""Every kernel compiles for GPUs that are not here, and its shared memory fits them.

Spills cost speed, not correctness: `python tests/compile_only.py ARCH --record` keeps them.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from compile_cases import MEASURED, cases_of
from compile_only import KIB, SHARED_MEMORY, TARGETS, touched_early, unused_barriers

pytest.importorskip("triton")

HARNESS = Path(__file__).with_name("compile_only.py")
KERNELS = {
    "anchor_kernel", "bound_kernel", "cell_gradient_kernel", "choose_kernel", "combine_kernel",
    "entropy_kernel", "extreme_kernel", "facet_kernel",
    "forward_kernel", "gather_kernel", "halfspace_mass_kernel", "keep_kernel", "key_value_kernel",
    "mass_kernel", "normaliser_kernel", "plane_kernel", "point_kernel",
    "pool_kernel", "prepare_kernel", "query_kernel", "score_kernel", "sieve_kernel", "split_kernel",
    "statistics_kernel", "tile_gradient_kernel", "tile_mass_kernel", "transpose_kernel",
}  # fmt: skip
# Of one architecture alone.
OWN = {"sm90": {"order_kernel", "backward_kernel", "round_kernel"}}


def jit_functions() -> set[str]:
    """The kernels that launchers start, found in their sources: with a grid, or as a `Launch`."""
    folder = HARNESS.parent.parent / "kernels"
    launched = re.compile(r"\b_(\w+_kernel)(?:\[\(|, \()")
    return {name for path in folder.rglob("*.py") for name in launched.findall(path.read_text())}


def kernels_by_width(launches: list[dict[str, Any]], arch: str) -> set[tuple[str, int | None]]:
    """The kernels with the bytes of an entry of the calls that launched them."""
    dtypes = {str(case): getattr(case, "dtype", None) for case in cases_of(arch)}
    return {(each["kernel"], getattr(dtypes[each["case"]], "itemsize", None)) for each in launches}


def test_all_kernels_are_compiled():
    assert jit_functions() == KERNELS | OWN["sm90"]


@pytest.mark.parametrize("arch", TARGETS)
def test_kernels_compile_and_fit(arch, tmp_path, record_property):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(HARNESS), arch, "--json"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    launched = [json.loads(line) for line in done.stdout.splitlines()]
    compiled = [each for each in launched if "registers" in each]
    record_property("compiled", compiled)

    assert {each["kernel"] for each in compiled} == KERNELS | OWN.get(arch, set())
    assert {each["case"] for each in launched} == {str(case) for case in cases_of(arch)}
    # Elsewhere one launch stands for others: of the same kernel, for entries as wide.
    assert arch != MEASURED or compiled == launched
    assert kernels_by_width(compiled, arch) == kernels_by_width(launched, arch)
    if arch == "sm90":
        # What these spill lay around their innermost loops when somebody looked at the disassembly,
        # but for a causal backward of head_dim 64 with lists, which loads some in each step.
        spills = defaultdict(list)
        for each in compiled:
            if each["case"].startswith(("Hopper", "backward")):
                narrow = each["case"].startswith("backward, D=64, bfloat16, is_causal, groups")
                spills[each["kernel"] + ", causal, D=64" * narrow].append(each["spills"])
        assert max(spills["forward_kernel"]) <= 64
        assert max(spills["backward_kernel"]) <= 288  # more while descriptors were hoisted
        assert max(spills["backward_kernel, causal, D=64"]) <= 384
    limit = SHARED_MEMORY[arch]
    too_large = [
        f"{each['case']}: {each['kernel']} {each['config']} {each['shared'] / KIB:.1f} KiB"
        for each in compiled
        if each["shared"] > limit
    ]
    assert not too_large, f"{arch} has {limit / KIB:.0f} KiB: {too_large}"
    # A kernel that the compiler gave up on is a trap, or keeps nearly all it has in memory.
    given_up = [e for e in compiled if e["registers"] <= 8 or e["spills"] > 4 * KIB]
    assert not given_up


def test_unused_barriers_are_found():
    used = """
    %bars = ttg.local_alloc : () -> !ttg.memdesc<2x1xi64, #shared, #smem, mutable>
    %slot = ttg.memdesc_index %bars[%c0] : !ttg.memdesc<2x1xi64> -> !ttg.memdesc<1xi64>
    ttng.init_barrier %slot, 1 : !ttg.memdesc<1xi64>
    """
    assert unused_barriers(used + "ttng.wait_barrier %slot, %phase") == []
    assert unused_barriers(used + "ttg.warp_specialize(%query, %bars) attributes {}") == []
    assert unused_barriers(used + "ttng.wait_barrier %slot_1, %phase") == ["%bars"]
    assert unused_barriers(used.replace("xi64", "xf32")) == []


def test_what_a_kernel_does_too_early_is_found():
    wait, write = "griddepcontrol.wait;\n", "st.global.b32 [%rd1], %r1;\n"
    begin = "griddepcontrol.launch_dependents;\n"
    read = "ld.global.b32 %r1, [%rd1];\n"
    assert touched_early("_statistics_kernel", read + begin + write + wait) == []
    assert touched_early("_statistics_kernel", wait + read + write) == []
    assert touched_early("_statistics_kernel", read + wait + write) == ["ld.global"]
    assert touched_early("_transpose_kernel", wait + begin + write) == []
    assert touched_early("_transpose_kernel", begin + wait + write) == [begin.strip(";\n")]
    assert touched_early("_split_kernel", read + wait + write) == ["ld.global"]
    assert touched_early("_round_kernel", read + write + wait) == []  # its programs wait themselves
    # One that lets others begin has to wait; others are launched one after the other.
    for kernel in ("_transpose_kernel", "_statistics_kernel", "_order_kernel"):
        assert touched_early(kernel, begin + read + write) == [begin.strip(";\n")]
        assert touched_early(kernel, read + write) == []
    assert touched_early("_mass_kernel", begin + read + write) == []  # begins when the last ended
