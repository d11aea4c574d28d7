"""Where a measurement was made: machine, versions and commit, as one flat dictionary."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parent.parent
COMMIT_VARIABLE = "ENTROPY_ATTN_COMMIT"


@cache
def environment() -> dict[str, Any]:
    """Machine, versions and commit; constant in a process.

    The commit comes from git, or from the variable ENTROPY_ATTN_COMMIT where the sources were
    copied without their history ("-dirty" at the end marks uncommitted changes).
    """
    commit, dirty = _commit()
    found = {
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "gpu": None,
        "cpu": _cpu_name(),
        "cpu_cores": len(os.sched_getaffinity(0)),
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "commit": commit,
        "dirty": dirty,
    }
    for package in ("torch", "triton", "transformers"):
        found[package] = package_version(package)
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "arch": f"sm_{properties.major}{properties.minor}",
            "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "driver": _nvidia_smi("driver_version", of_all=True),
            "max_sm_clock_mhz": _number(_nvidia_smi("clocks.max.sm")),
        }
    return found


def machine_name(found: dict[str, Any]) -> str:
    """What to call the machine of a record in a table: the GPU, or the CPU without one."""
    return found.get("gpu") or f"{found['cpu']}, {found['torch_threads']} threads"


def sm_clock_mhz() -> int | None:
    """The clock of the GPU's multiprocessors now: read it directly after the timed calls."""
    return _number(_nvidia_smi("clocks.sm")) if torch.cuda.is_available() else None


def package_version(package: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> tuple[str | None, bool | None]:
    given = os.environ.get(COMMIT_VARIABLE)
    if given:
        return given.removesuffix("-dirty"), given.endswith("-dirty")
    head = _output("git", "-C", str(REPOSITORY), "rev-parse", "HEAD")
    if head is None:
        return None, None
    # Results are written while suites run, so they do not make the sources dirty.
    results = ":(exclude)benchmarks/results"
    status = _output("git", "-C", str(REPOSITORY), "status", "--porcelain", "--", ".", results)
    return head, None if status is None else bool(status)


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _nvidia_smi(field: str, of_all: bool = False) -> str | None:
    """What it says of the GPU that is measured; None if that is a part of one (MIG).

    By its name, as nvidia-smi counts all GPUs and PyTorch those of CUDA_VISIBLE_DEVICES.
    """
    gpu = [] if of_all else [f"--id=GPU-{torch.cuda.get_device_properties(0).uuid}"]
    found = _output("nvidia-smi", *gpu, f"--query-gpu={field}", "--format=csv,noheader,nounits")
    return found.splitlines()[0].strip() if found else None


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isdigit() else None


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
