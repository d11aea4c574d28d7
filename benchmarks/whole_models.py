"""Whole models with one attention or another: the contestants of the suites ``vit`` and ``llm``.

The weights are random but for SmolLM2's: time depends on shapes, and a budget that states its share
keeps that share of any attention. All contestants of a model share its weights in memory. The one
that leaves attention out computes nothing that is of use: its time is the limit of any attention.
"""

from __future__ import annotations

import contextlib
import copy
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import entropy_attn as ea
from entropy_attn.benchmarks.baselines import our_backend
from entropy_attn.benchmarks.contest import first_line
from entropy_attn.benchmarks.environment import sm_clock_mhz
from entropy_attn.benchmarks.model import shared_copy
from entropy_attn.benchmarks.plugins import REGISTERED, Baseline
from entropy_attn.benchmarks.registry import Row
from entropy_attn.benchmarks.timing import measure, peak_bytes
from entropy_attn.benchmarks.timm_attention import set_attention
from entropy_attn.integrations.statistics import SPARSE
from entropy_attn.testing import assert_close_to_reference

LEFT_OUT = "no attention"
CHECKED_LAYERS = 2
LEAST_ROUNDS = 3
COMPILED = ", compiled"
UNMASKED = "sdpa_unmasked"  # a name for which transformers makes no masks
FLASH, OURS = "FlashAttention-2", "entropy-attn"
Forward = Callable[[], Tensor]


@dataclass(frozen=True)
class Attention:
    """What a contestant does to a model of transformers or timm.

    Attributes:
        name: in tables and records.
        implementation: of transformers' registry; timm has "sdpa", "eager" and "left_out" of them.
        kernel: that SDPA may use; None for what it chooses.
        sparsity: of `ea.apply`, None for dense attention.
        compiled: by torch.compile, the whole model in one graph.
        version: of a registered baseline.
        captured: as a CUDA graph, the whole forward pass; the inputs must stay where they are.
    """

    name: str
    implementation: str = "sdpa"
    kernel: SDPBackend | None = None
    sparsity: ea.SparsityConfig | None = None
    compiled: bool = False
    version: str | None = None
    captured: bool = False

    @property
    def in_graph(self) -> Attention:
        return replace(self, name=self.name + COMPILED, compiled=True)

    def in_capture(self, is_prefill: bool) -> Attention:
        """As a CUDA graph. While it is captured transformers would hand SDPA a causal mask, which
        its fast kernels do not take: there might be packed sequences. There are none here, so in
        prefill it gets none."""
        unmasked = is_prefill and self.implementation == "sdpa" and not self.is_ours
        implementation = UNMASKED if unmasked else self.implementation
        return replace(self, captured=True, implementation=implementation)

    @property
    def is_ours(self) -> bool:
        return self.sparsity is not None


EAGER = Attention("eager", "eager")
SDPA = Attention("SDPA")
FLASH_ONLY = Attention(FLASH, kernel=SDPBackend.FLASH_ATTENTION)
CUDNN = Attention("cuDNN", kernel=SDPBackend.CUDNN_ATTENTION)
LIMIT = Attention(LEFT_OUT, "left_out")
ALL_BLOCKS = Attention(f"{OURS}, all blocks", "all_blocks")


def ours(sparsity: float, **options: Any) -> Attention:
    """This package at a sparsity, where it decides by itself which calls run sparse."""
    budget = ea.TopK(round(1.0 - sparsity, 6))
    return Attention(OURS, sparsity=ea.SparsityConfig(budget=budget, **options))


def ours_decoding(keep: float, **options: Any) -> Attention:
    """This package in decoding, where steps keep a share of the blocks of a cache."""
    decode = ea.SparseDecoding(keep, **options)
    return Attention(OURS, sparsity=ea.SparsityConfig(decode=decode))


def registered() -> tuple[Attention, ...]:
    """The dense baselines of plugins, for models of transformers."""
    from transformers import AttentionInterface

    found = []
    for baseline in REGISTERED.values():
        if not baseline.sparse:  # a model has no mask for the others
            name = "baseline_" + re.sub(r"\W", "_", baseline.name)
            AttentionInterface.register(name, _adapted(baseline))
            found.append(Attention(baseline.name, name, version=baseline.version))
    return tuple(found)


def _adapted(baseline: Baseline) -> Callable[..., tuple[Tensor, None]]:
    """A registered baseline as transformers calls attention."""

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **_: Any
    ) -> tuple[Tensor, None]:
        if attention_mask is not None:
            raise ValueError(f"baseline {baseline.name!r} takes no mask, and the model passes one")
        is_causal = module.is_causal and query.shape[2] > 1
        out = baseline.attention(query, key, value, is_causal=is_causal)
        return out.transpose(1, 2).contiguous(), None

    return attention


def _left_out(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **_: Any
) -> tuple[Tensor, None]:
    """Each query gets the value at its own place, which is among the last."""
    group, value = query.shape[1] // value.shape[1], value[:, :, -query.shape[2] :]
    value = value if group == 1 else value.repeat_interleave(group, dim=1)
    return value.transpose(1, 2).contiguous(), None


def _all_blocks(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any,
    scaling: float | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """This package's kernel, dense: of few queries the one for decoding."""
    if attention_mask is not None:
        raise ValueError("all_blocks takes no attention_mask")
    full = ea.BlockMask.full(1, 1, query.shape[2], key.shape[2], device=query.device)
    out = ea.block_sparse_attention(
        query, key, value, full, is_causal=True, scale=scaling, backend=our_backend(query.device)
    )
    return out.transpose(1, 2).contiguous(), None


@dataclass
class Prepared:
    """A model with its attention in place.

    Attributes:
        handle: of `ea.apply`, None for other contestants.
        compiled: the model in one graph, None if it is not compiled.
    """

    attention: Attention
    model: nn.Module
    handle: Any = None
    compiled: Any = None

    def call(self, inputs: Mapping[str, Any], output: str) -> Tensor:
        """The named output of the model; what a model of timm returns has no name."""
        kernel = self.attention.kernel
        where = contextlib.nullcontext() if kernel is None else sdpa_kernel(kernel)
        model = self.model if self.compiled is None else self.compiled
        with torch.inference_mode(), where:
            found = model(**inputs)
        return found if isinstance(found, Tensor) else getattr(found, output)


def prepare(attention: Attention, model: nn.Module) -> Prepared:
    """A copy of the model, its weights shared, that attends in this way."""
    copied = shared_copy(model)
    if hasattr(copied, "set_attn_implementation"):
        from transformers import AttentionInterface
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        AttentionInterface.register("left_out", _left_out)
        AttentionInterface.register("all_blocks", _all_blocks)
        AttentionInterface.register(UNMASKED, sdpa_attention_forward)
        copied.set_attn_implementation(attention.implementation)
    else:
        set_attention(copied, attention.implementation)
    handle = None if attention.sparsity is None else ea.apply(copied, attention.sparsity)
    compiled = None
    if attention.compiled:  # at a graph break this raises
        compiled = torch.compile(copied, dynamic=False, fullgraph=True)
    return Prepared(attention, copied, handle, compiled)


def contest(
    attentions: tuple[Attention, ...],
    model: nn.Module,
    inputs: Mapping[str, Any],
    few: Mapping[str, Any],
    output: str,
    *,
    options: Mapping[str, Any] | None = None,
    seconds: float,
    progress: Callable[[str], None],
) -> Iterator[tuple[Attention, dict[str, Any]]]:
    """Check and time all contestants together; yields each with its result.

    Args:
        inputs: of the model, that are timed.
        few: inputs that are small enough for fp32 and eager attention, for the check.
        output: of the model, that is compared.
        options: of the model's forward, besides the inputs.
    """
    torch._dynamo.reset()  # all graphs of a model count towards one limit
    device = next(model.parameters()).device
    inputs, few = ({**each, **(options or {})} for each in (inputs, few))
    check = Check(model, few, output)
    calls: dict[str, Forward] = {}
    prepared: dict[str, Prepared] = {}
    results: dict[str, dict[str, Any]] = {}
    round_seconds = 0.0
    for attention in attentions:
        progress(attention.name)
        try:
            wrong = check.verdict(attention)
            if wrong is not None:
                results[attention.name] = {"status": "wrong", "reason": wrong}
                continue
            ready = prepare(attention, model)
            forward = _forward(ready, inputs, output)
            forward()
            start = time.perf_counter()
            peak = peak_bytes(forward, device)
            round_seconds += time.perf_counter() - start
        except Exception as error:  # a rival that breaks is a finding, not the end of the suite
            results[attention.name] = {"status": "failed", "reason": first_line(error)}
            continue
        calls[attention.name], prepared[attention.name] = forward, ready
        results[attention.name] = {"status": "ok", "peak_bytes": peak or None}
    progress(f"timing {len(calls)} contestants")
    # Calls of seconds are warm by now: another two of each would be most of the suite's time.
    rounds = LEAST_ROUNDS if LEAST_ROUNDS * round_seconds > seconds else None
    timings = {}
    if calls:
        timings = measure(
            {name: [call] for name, call in calls.items()}, seconds=seconds,
            min_rounds=LEAST_ROUNDS, rounds=rounds, device=device,
        )  # fmt: skip
    clock = sm_clock_mhz()
    for attention in attentions:
        result = results[attention.name]
        if attention.version is not None:
            result["version"] = attention.version
        if attention.compiled and result["status"] == "ok":
            result["graph_breaks"] = 0  # a model that has some fails
        if attention.name in timings:
            result |= timings[attention.name].as_dict() | {"sm_clock_mhz": clock}
            if FLASH in timings:
                flash = timings[FLASH].median_ms
                result["over_flash"] = flash / timings[attention.name].median_ms
            result |= _what_ran(prepared[attention.name])
        yield attention, result


def row(
    name: str, attention: Attention, result: dict[str, Any], config: Mapping[str, Any],
    sparsity: float, count: int, unit: str,
) -> Row:  # fmt: skip
    """A contestant's record of a case, with how many of ``unit`` it does in a second.

    Args:
        name: of the case, for the terminal.
        config: of the case; the contestant is added.
        sparsity: of ours.
        count: images or tokens of a call.
    """
    own = {"contestant": attention.name, "sparsity": sparsity if attention.is_ours else 0.0}
    text = f"{name} | {attention.name}: {result.get('reason', '')}"
    if "median_ms" in result:
        rate = result[f"{unit}_per_s"] = count / result["median_ms"] * 1e3
        text += f"{rate:.0f} {unit}/s"
    return Row({**config, "dtype": "bfloat16", **own}, result, text, attention.is_ours)


def _forward(prepared: Prepared, inputs: Mapping[str, Any], output: str) -> Forward:
    def call() -> Tensor:
        return prepared.call(inputs, output)

    return _captured(call) if prepared.attention.captured else call


def _captured(call: Forward) -> Forward:
    """The call as a CUDA graph, so that no launch waits for the host."""
    for _ in range(2):  # compiles, and leaves what a second call finds
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


def _what_ran(prepared: Prepared) -> dict[str, Any]:
    """Of ours, the share of the blocks and of the calls that ran sparse."""
    if prepared.handle is None:
        return {}
    statistics = prepared.handle.stats()
    sparse, dense = statistics.sparse + statistics.decoded, Counter(statistics.dense)
    for layer in statistics.layers:  # what torch.compile traced, whose runs are not counted
        traced = Counter(layer.compiled)
        sparse += traced.pop(SPARSE, 0)
        dense += traced
    return {
        "sparse_calls": sparse / (sparse + dense.total()),
        "density": statistics.decode_density if statistics.decoded else statistics.density,
        "why_dense": next(iter(dense), None),
    }


def cut(model: nn.Module, count: int) -> None:
    """Leave the model its first layers."""
    lists = (m for m in model.modules() if isinstance(m, (nn.ModuleList, nn.Sequential)))
    layers = max(lists, key=len)
    del layers[count:]


def _in_fp32(x: Any) -> Any:
    """Of tensors and caches of floating point numbers a copy in fp32, all else itself."""
    if isinstance(x, Tensor) and not x.is_floating_point():
        return x
    return x.float() if hasattr(x, "float") else x


class Check:
    """Whether a contestant computes attention: its output on small inputs against eager fp32.

    The model is cut to its first layers, since 7B parameters in fp32 may not fit.

    Sparse attention is checked with every block kept; what blocks it leaves out is its business,
    that it computes the others right is checked by the tests and the suite ``attention``. The limit
    is not checked: it is wrong by design.
    """

    def __init__(self, model: nn.Module, few: Mapping[str, Any], output: str) -> None:
        self.model, self.few, self.output = shared_copy(model), few, output
        cut(self.model, CHECKED_LAYERS)
        # A model of a GGUF file refuses .float() by itself, though its weights are plain numbers.
        exact = nn.Module.float(copy.deepcopy(self.model))
        floats = {name: _in_fp32(x) for name, x in few.items()}
        self.exact = prepare(EAGER, exact).call(floats, output)
        self.plain = prepare(EAGER, self.model).call(few, output)

    def verdict(self, attention: Attention) -> str | None:
        """What is wrong, or None."""
        if attention.name.startswith(LEFT_OUT):
            return None
        if attention.sparsity is not None:
            decode = attention.sparsity.decode
            if decode is not None:
                decode = replace(decode, keep=1.0, min_length=0)
            whole = ea.SparsityConfig(
                budget=ea.TopK(1.0), min_length=0, min_queries=1, decode=decode
            )
            attention = replace(attention, sparsity=whole)
        actual = prepare(attention, self.model).call(self.few, self.output)
        try:
            assert_close_to_reference(actual, self.plain, self.exact, self.output)
        except AssertionError as error:
            return str(error)
        return None
