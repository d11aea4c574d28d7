"""Each backend with the reason why it is available here or not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch


@dataclass(frozen=True)
class Availability:
    """Whether a backend can run on this machine, its version, and why (not)."""

    name: str
    available: bool
    version: str | None
    reason: str


@dataclass(frozen=True)
class Backend:
    """One implementation of attention.

    Attributes:
        name: what `backend=` takes.
        summary: what it runs.
        probe: returns (reason why it is missing or None, version).
        sparse: takes block lists, valid lengths, windows, and returns lse and entropies.
        devices: device types that it runs on.
    """

    name: str
    summary: str
    probe: Callable[[], tuple[str | None, str | None]]
    sparse: bool
    devices: tuple[str, ...]


def _package_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _probe_triton() -> tuple[str | None, str | None]:
    installed = _package_version("triton") or _package_version("pytorch-triton")
    if find_spec("triton") is None:
        return "the package triton is not installed (pip install triton; Linux only)", None
    if not torch.cuda.is_available() and not triton_interprets():
        reason = "no GPU is visible to torch (TRITON_INTERPRET=1 runs the kernels on the CPU)"
        return reason, installed
    return None, installed


@torch.compiler.assume_constant_result
def triton_interprets() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on CPU tensors."""
    if find_spec("triton") is None:
        return False
    from triton import knobs

    return bool(knobs.runtime.interpret)


def _probe_sdpa() -> tuple[str | None, str | None]:
    return None, torch.__version__


def _flash_probe(module: str, package: str, minimum: tuple[int, int], maximum: tuple[int, int]):
    def probe() -> tuple[str | None, str | None]:
        parent = module.split(".")[0]
        if find_spec(parent) is None or ("." in module and find_spec(module) is None):
            return f"the package {package} is not installed (pip install {package})", None
        if not torch.cuda.is_available():
            return "no GPU is visible to torch", _package_version(package)
        capability = torch.cuda.get_device_capability()
        if not minimum <= capability < maximum:
            have = ".".join(map(str, capability))
            return f"it does not run on compute capability {have}", _package_version(package)
        return None, _package_version(package)

    return probe


BACKENDS: dict[str, Backend] = {
    b.name: b
    for b in (
        Backend(
            "triton",
            "this package's Triton kernels: block-sparse and dense, lse, entropies, backward",
            _probe_triton,
            sparse=True,
            devices=("cuda",),
        ),
        Backend(
            "reference",
            "plain PyTorch, one block of queries at a time; any device",
            lambda: (None, torch.__version__),
            sparse=True,
            devices=("cpu", "cuda", "mps", "xpu"),
        ),
        Backend(
            "flash-attn-4",
            "flash_attn.cute, dense",
            _flash_probe("flash_attn.cute", "flash-attn-4", (9, 0), (12, 0)),
            sparse=False,
            devices=("cuda",),
        ),
        Backend(
            "flash-attn-3",
            "flash_attn_interface, dense",
            _flash_probe("flash_attn_interface", "flash-attn-3", (9, 0), (10, 0)),
            sparse=False,
            devices=("cuda",),
        ),
        Backend(
            "flash-attn-2",
            "flash_attn, dense",
            _flash_probe("flash_attn.flash_attn_interface", "flash-attn", (8, 0), (10, 0)),
            sparse=False,
            devices=("cuda",),
        ),
        Backend(
            "sdpa",
            "torch's scaled_dot_product_attention (FlashAttention 2, cuDNN), dense",
            _probe_sdpa,
            sparse=False,
            devices=("cpu", "cuda", "mps", "xpu"),
        ),
    )
}


@torch.compiler.assume_constant_result
def availability(name: str) -> Availability:
    """Whether the backend ``name`` is here; probed once a process."""
    return _probed(name)


@cache
def _probed(name: str) -> Availability:
    missing, found = BACKENDS[name].probe()
    reason = missing or BACKENDS[name].summary
    return Availability(name, missing is None, found, reason)


def backends() -> list[Availability]:
    """Every backend with its version and the reason why it is available or not."""
    return [availability(name) for name in BACKENDS]
