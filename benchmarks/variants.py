"""Configurations of a kernel beside its default, for those who tune it.

    python -m entropy_attn.benchmarks.variants hopper --head-dim 64 --density 0.1
    python -m entropy_attn.benchmarks.variants portable --block 64
    python -m entropy_attn.benchmarks.variants hopper-entropy
    python -m entropy_attn.benchmarks.variants hopper-backward --length 8192
    python -m entropy_attn.benchmarks.variants decode-paged --length 65536

With "-entropy" the kernel computes row and block entropy as well; what is checked is its output.
Of a backward the transposed lists are not timed.

Every configuration is checked against the reference, then all are timed in turns. Nothing is
stored: a default that should be another one is changed in the kernel's file and measured by the
suite ``attention``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, partial
from itertools import product
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from entropy_attn.api import block_sparse_attention
from entropy_attn.benchmarks.cases import AttentionCase, Inputs, make_inputs
from entropy_attn.benchmarks.check import expected
from entropy_attn.benchmarks.contest import first_line
from entropy_attn.benchmarks.suites import decode as decoding
from entropy_attn.benchmarks.timing import measure
from entropy_attn.block_lists import column_lists
from entropy_attn.kernels.launch import architecture, has_copy_engine

# What is checked: an output, or the gradients of query, key and value.
Kernel = Callable[[Inputs, Any], Tensor | tuple[Tensor, ...]]
DEFAULT = "default"


def hopper(inputs: Inputs, config: Any, entropy: bool = False) -> Tensor:
    from entropy_attn.kernels.hopper.forward import hopper_forward

    case, mask = inputs.case, inputs.mask
    return hopper_forward(
        inputs.query, inputs.key, inputs.value, mask.kv_num_blocks, mask.kv_indices,
        mask.block_size, case.is_causal, case.head_dim**-0.5, config,
        row_entropy=entropy, block_entropy=entropy,
    )[0]  # fmt: skip


def hopper_variants(inputs: Inputs, entropies: bool = False) -> dict[str, Any]:
    """The default and what differs from it by the switches of `HopperConfig`."""
    from entropy_attn.kernels.hopper.forward import hopper_config

    default = hopper_config(inputs.case.head_dim, inputs.mask.block_size, entropies)
    changes: dict[str, dict[str, Any]] = {}
    if default.warpgroups == 2:
        for ping_pong in (False, True):
            for registers in (False, True):
                for pin in (False, True):
                    words = ["ping-pong"] * ping_pong + ["query in registers"] * registers
                    changes[", ".join([*words, *["pin"] * pin]) or "plain"] = {
                        "ping_pong": ping_pong, "query_registers": registers, "pin": pin,
                        "guard": False,
                    }  # fmt: skip
                if not entropies:
                    changes[", ".join([*words, "guard"])] = {
                        "ping_pong": ping_pong, "query_registers": registers, "pin": False,
                        "guard": True,
                    }  # fmt: skip
        for stages in (2, 3, 4):
            changes[f"{stages} stages"] = {"key_stages": stages, "value_stages": stages}
    else:
        two_stages = {"key_stages": 2, "value_stages": 2}
        # In shared memory the queries of head_dim 128 leave no room for a third slot of keys.
        in_memory = {"query_registers": False, **two_stages}
        two_blocks = {"block_n": 128, "programs": 2, **in_memory}
        changes["two blocks a step"] = two_blocks
        changes["two blocks a step, pin"] = {**two_blocks, "pin": True}
        changes["pin"] = {"pin": True}
        changes["two stages"] = two_stages
        if default.query_registers:
            changes["query in shared memory, two stages"] = in_memory
            changes["query in shared memory, two stages, pin"] = {**in_memory, "pin": True}
        else:
            changes["query in registers"] = {"query_registers": True}
            changes["query in registers, pin"] = {"query_registers": True, "pin": True}
        changes["two programs, two stages"] = {"programs": 2, **two_stages}
        changes["three programs, two stages"] = {"programs": 3, **two_stages}
        if not entropies:
            changes["no guard" if default.guard else "guard"] = {"guard": not default.guard}
    return _others(default, changes)


@cache
def _before_the_backward(inputs: Inputs) -> tuple[Tensor, Tensor, None, Any]:
    """Output, log-sum-exp, no gradient of that, and the transposed lists."""
    case, mask = inputs.case, inputs.mask
    with torch.no_grad():
        out, lse = block_sparse_attention(
            inputs.query, inputs.key, inputs.value, mask, is_causal=case.is_causal,
            return_lse=True, backend="triton",
        )  # fmt: skip
    return out, lse, None, column_lists(mask.kv_num_blocks, mask.kv_indices, case.num_key_blocks)


def hopper_backward(inputs: Inputs, config: Any) -> tuple[Tensor, ...]:
    from entropy_attn.kernels.hopper import backward

    case = inputs.case
    tensors = (inputs.grad_out, inputs.query, inputs.key, inputs.value)
    return backward.hopper_backward(
        *tensors, *_before_the_backward(inputs), inputs.mask.block_size, case.is_causal,
        case.head_dim**-0.5, config,
    )  # fmt: skip


def hopper_backward_variants(inputs: Inputs) -> dict[str, Any]:
    from entropy_attn.kernels.hopper.backward import hopper_backward_config

    case = inputs.case
    default = hopper_backward_config(case.head_dim, case.is_causal)
    changes: dict[str, dict[str, Any]] = {
        "no turns": {"turns": False},
        "one stage": {"stages": 1},
        "sums all cleared before and rounded after, longest of all heads first": {"unit": 1e6},
    }
    for unit in (0.5, 1.0, 1.5, 2.0, 4.0):
        for lead in (1, 2, 3):
            words = f"units of {unit} blocks of keys a multiprocessor, lead {lead}"
            changes[words] = {"unit": unit, "lead": lead}
    return _others(default, changes)


def portable(inputs: Inputs, config: Any, entropy: bool = False) -> Tensor:
    from entropy_attn.kernels.block_sparse_forward import block_sparse_forward

    case, mask = inputs.case, inputs.mask
    return block_sparse_forward(
        inputs.query, inputs.key, inputs.value, mask.kv_num_blocks, mask.kv_indices, None, None,
        mask.block_size, case.is_causal, 0, case.head_dim**-0.5, entropy, entropy, config,
    )[0]  # fmt: skip


def portable_variants(inputs: Inputs, entropy: bool = False) -> dict[str, Any]:
    """The default and its neighbours in tile sizes, warps and stages."""
    from entropy_attn.kernels.block_sparse_forward import forward_config

    arch, block = architecture(inputs.device), inputs.mask.block_size
    default = forward_config(
        arch, inputs.case.head_dim, inputs.query.element_size(), block, inputs.case.is_causal,
        entropy, copy_engine=has_copy_engine(arch, inputs.key, inputs.value),
    )  # fmt: skip
    changes: dict[str, dict[str, Any]] = {
        f"{name} {value}": {name: value}
        for name, values in {
            "block_m": (64, 128),
            "block_n": (32, 64, 128),
            "num_warps": (4, 8),
            "num_stages": (2, 3, 4),
        }.items()
        for value in values
        if name not in ("block_m", "block_n") or value <= block[name == "block_n"]
    }
    return _others(default, changes)


def _others(default: Any, changes: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The default, and each change of it that is one."""
    found = {DEFAULT: default}
    for name, change in changes.items():
        config = replace(default, **change)
        if config not in found.values():
            found[name] = config
    return found


KERNELS: dict[str, tuple[Kernel, Callable[[Inputs], dict[str, Any]]]] = {
    "hopper": (hopper, hopper_variants),
    "hopper-entropy": (partial(hopper, entropy=True), partial(hopper_variants, entropies=True)),
    "hopper-backward": (hopper_backward, hopper_backward_variants),
    "portable": (portable, portable_variants),
    "portable-entropy": (
        partial(portable, entropy=True),
        partial(portable_variants, entropy=True),
    ),
}


# Few queries of many keys, by the cases of the suite ``decode``.
DECODING = ("decode", "decode-paged")
NAMES = (*KERNELS, *DECODING)

# Keys and values, or pages of them with their table.
Cache = tuple[Tensor, Tensor, Tensor | None]


def decode_cache(inputs: decoding.Inputs, kernel: str) -> Cache:
    return inputs.pages() if kernel == "decode-paged" else (inputs.key, inputs.value, None)


def decode(inputs: decoding.Inputs, cache: Cache, config: Any) -> Tensor:
    from entropy_attn.kernels.decode import split_forward

    query, mask = inputs.query, inputs.mask
    key, value, table = cache
    return split_forward(
        query, key, value, mask.kv_num_blocks, mask.kv_indices, None, None, mask.block_size, True,
        0, query.shape[3] ** -0.5, table, config=config,
    )[0]  # fmt: skip


def decode_variants(inputs: decoding.Inputs, kernel: str) -> dict[str, Any]:
    from entropy_attn.kernels.decode import adjacent_steps, decode_config

    query = inputs.query
    arch, block_k = architecture(query.device), inputs.mask.block_size[1]
    page = decoding.PAGE if kernel == "decode-paged" else 0
    copies = has_copy_engine(arch, inputs.key, inputs.value)
    default = decode_config(arch, query.shape[3], query.element_size(), block_k, page, copies)
    changes: dict[str, dict[str, Any]] = {}
    steps = ((32, 3), (32, 4), (32, 6), (64, 2), (64, 3), (64, 4), (128, 2))
    switches = (False, True), (False, True), (256, 384, 512)
    for (block, stages), descriptors, ahead, programs in product(steps, *switches):
        if descriptors and not (copies and adjacent_steps(block, block_k, page)):
            continue
        words = f"{block} keys, {stages} stages, {programs} programs"
        words += ", lists read ahead" * ahead + ", copy engine" * descriptors
        changes[words] = {
            "block_n": block, "num_stages": stages, "programs": programs,
            "ahead": ahead, "descriptors": descriptors,
        }  # fmt: skip
    return _others(default, changes)


def compare(kernel: str, case: AttentionCase, device: torch.device, seconds: float) -> Table:
    """A table of all configurations of a kernel on a case, the fastest first."""
    run, variants = KERNELS[kernel]
    inputs = make_inputs(case, device, 0)
    reference = expected(inputs, sparse=True)

    def verdict(found: Tensor | tuple[Tensor, ...]) -> str | None:
        return reference.verdict(found if isinstance(found, tuple) else (found,))

    configs = variants(inputs)
    calls = {name: partial(run, inputs, config) for name, config in configs.items()}
    work = ("TFLOP/s", inputs.flops(sparse=True) / 1e9)
    return _table(f"{kernel}, {case}", configs, calls, verdict, work, device, seconds)


def compare_decoding(
    kernel: str, case: decoding.Case, device: torch.device, seconds: float
) -> Table:
    """The same of a decoding kernel."""
    inputs = decoding.Inputs.of(case, device)
    cache = decode_cache(inputs, kernel)
    configs = decode_variants(inputs, kernel)
    calls = {name: partial(decode, inputs, cache, config) for name, config in configs.items()}
    work = ("GB/s", inputs.read_bytes() / 1e6)
    title = f"{kernel}, {case.name}"
    return _table(title, configs, calls, inputs.wrong, work, device, seconds)


def _table(
    title: str,
    configs: Mapping[str, Any],
    calls: Mapping[str, Callable[[], Any]],
    verdict: Callable[[Any], str | None],
    work: tuple[str, float],
    device: torch.device,
    seconds: float,
) -> Table:
    """Check and time calls; ``work`` is the unit of the speed, and what it is in a millisecond."""
    right: dict[str, list[Callable[[], object]]] = {}
    table = Table(title=title, title_justify="left")
    unit, amount = work
    for column in ("configuration", "ms", unit, "what differs, or what is wrong"):
        table.add_column(column, overflow="fold")
    failed: list[tuple[str, str]] = []
    for name, call in calls.items():
        try:
            wrong = verdict(call())
        except Exception as error:  # one that does not compile or fit is a finding
            wrong = first_line(error)
        if wrong is None:
            right[name] = [call]
        else:
            failed.append((name, wrong))
    timings = measure(right, seconds=seconds, device=device) if right else {}
    for name, timing in sorted(timings.items(), key=lambda item: item[1].median_ms):
        speed = f"{amount / timing.median_ms:.0f}"
        table.add_row(name, f"{timing.median_ms:.3f}", speed, str(configs[name]))
    for name, reason in failed:
        table.add_row(name, "–", "–", reason)
    return table


def main(
    kernel: Annotated[str, typer.Argument(help=f"One of {', '.join(NAMES)}.")],
    head_dim: int = 128,
    block: int = 128,
    density: float = 0.25,
    length: int = 16384,
    causal: bool = False,
    irregular: bool = False,
    block_k: int | None = None,
    seconds: float = 2.0,
    profile: Annotated[
        bool, typer.Option("--profile", help="Call the default three times, for a profiler.")
    ] = False,
) -> None:
    """Time the configurations of a kernel on one case, B=2 and H=16, bf16.

    Decoding kernels take 8 sequences of ``length`` keys, 32 heads and 8 of keys.
    """
    if kernel not in NAMES:
        raise typer.BadParameter(f"{kernel!r} is not one of {', '.join(NAMES)}")
    if not torch.cuda.is_available():
        raise typer.BadParameter("configurations are timed on a GPU, and there is none")
    if kernel in DECODING:
        few = decoding.Case(8, length, density, head_dim=head_dim)
        if profile:
            inputs = decoding.Inputs.of(few, torch.device("cuda"))
            cache = decode_cache(inputs, kernel)
            _repeat(partial(decode, inputs, cache, decode_variants(inputs, kernel)[DEFAULT]))
        else:
            Console().print(compare_decoding(kernel, few, torch.device("cuda"), seconds))
        return
    direction = "backward" if kernel.endswith("backward") else "forward"
    case = AttentionCase(
        head_dim, length, density, block, is_causal=causal, irregular=irregular,
        direction=direction, block_k=block_k,
    )  # fmt: skip
    device = torch.device("cuda")
    if not profile:
        Console().print(compare(kernel, case, device, seconds))
        return
    run, variants = KERNELS[kernel]
    inputs = make_inputs(case, device, 0)
    _repeat(partial(run, inputs, variants(inputs)[DEFAULT]))


def _repeat(call: Callable[[], object]) -> None:
    for _ in range(3):
        call()
    torch.cuda.synchronize()


if __name__ == "__main__":
    typer.run(main)
