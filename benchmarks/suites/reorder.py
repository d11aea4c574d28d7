"""Reordering: what sorting tokens costs, and how many blocks it saves.

The cost is timed beside the sparse attention that it serves, at a density of 0.2, and the best
dense attention of torch. The density is that which holds 95 % of the true mass of every tile, so
that only the order of the tokens differs. Besides queries sorted by cells of their own space, as
`ea.reorder_tokens` does, they are sorted by the anchor of the keys that scores highest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import entropy_attn as ea
from entropy_attn.api import tile_mass
from entropy_attn.benchmarks.baselines import our_backend
from entropy_attn.benchmarks.cases import AttentionCase, Inputs, make_inputs
from entropy_attn.benchmarks.check import expected
from entropy_attn.benchmarks.environment import sm_clock_mhz
from entropy_attn.benchmarks.registry import Context, Row
from entropy_attn.benchmarks.timing import measure
from entropy_attn.benchmarks.tokens import PictureNotFound, Tokens, clusters, photograph
from entropy_attn.reference.cells import anchor_ranks, fit_anchors, nearest
from entropy_attn.selection import keep_blocks

DENSITY = 0.2
SHARE = 0.95
BLOCK = 64
INPUT_SETS = 2
SPARSE = "sparse attention"


def lengths(form: str) -> tuple[int, ...]:
    """Tokens of the timed cases."""
    return {"small": (256,), "quick": (4096, 16384), "full": (1024, 2048, 4096, 8192, 16384)}[form]


def sets_of_tokens() -> list[Tokens]:
    spread = [clusters(8, noise, paired=True) for noise in (0.5, 1.0, 2.0)]
    spread += [clusters(64, 0.5, paired) for paired in (True, False)]
    return [*spread, photograph(paired=True), photograph(paired=False)]


def run(context: Context) -> Iterator[Row]:
    shape = {"batch": 1, "heads": 16}
    if context.form == "small":
        shape = {"batch": 1, "heads": 2, "dtype": "float32"}
    found = [AttentionCase(64, n, DENSITY, BLOCK, **shape) for n in lengths(context.form)]
    for case in context.left(found, lambda c: asdict(c) | {"kind": "time"}):
        yield from _times(context, case)
    last = {"kind": "density", "order": list(ORDERS)[-1]}
    for tokens in context.left(sets_of_tokens(), lambda t: {"tokens": t.name, **last}):
        yield from _densities(context, tokens)


# What sorting costs


def _times(context: Context, case: AttentionCase) -> Iterator[Row]:
    context.progress(f"reordering, {case.shape}")
    sets = [make_inputs(case, context.device, seed) for seed in range(INPUT_SETS)]
    config = {"form": context.form, "kind": "time", **case.config()}
    problem = _wrong(sets[0])
    if problem is not None:
        result = {"status": "wrong", "reason": problem}
        yield Row(config, result, f"{case.shape} | wrong: {problem}", is_ours=True)
        return
    steps: dict[str, Callable[[Inputs], object]] = {
        "order": lambda i: (ea.token_order(i.query), ea.token_order(i.key)),
        "sort and restore": _sort_and_restore,
        "selection": lambda i: ea.select_blocks(
            i.query, i.key, block_size=case.block, sink=0, local=0, backend=our_backend(i.device)
        ),
        SPARSE: lambda i: _attend(i.query, i.key, i.value, i.mask),
        "SDPA": lambda i: F.scaled_dot_product_attention(i.query, i.key, i.value),
    }
    calls = {name: [_bind(step, inputs) for inputs in sets] for name, step in steps.items()}
    seconds = {"full": 1.0, "quick": 0.3, "small": 0.05}[context.form]
    timings = measure(calls, seconds=seconds, device=context.device)
    for name, timing in timings.items():
        share = timing.median_ms / timings[SPARSE].median_ms
        result: dict[str, Any] = {"status": "ok", **timing.as_dict(), "share": share}
        result |= {"sm_clock_mhz": sm_clock_mhz(), "backend": our_backend(context.device)}
        text = f"{case.shape} | {name}: {timing.median_ms:.3f} ms, {share:.2f} x {SPARSE}"
        yield Row({**config, "step": name}, result, text, is_ours=True)


def _bind(step: Callable[[Inputs], object], inputs: Inputs) -> Callable[[], object]:
    return lambda: step(inputs)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: ea.BlockMask) -> Tensor:
    return ea.block_sparse_attention(query, key, value, mask, backend=our_backend(query.device))


def _sort_and_restore(inputs: Inputs) -> Tensor:
    tokens = ea.reorder_tokens(inputs.query, inputs.key, inputs.value)
    return tokens.restore(tokens.query)  # as large as the output


def _wrong(inputs: Inputs) -> str | None:
    """Compare attention over sorted tokens, every block kept, with the dense one."""
    case = inputs.case
    full = ea.BlockMask.full(1, 1, case.length, case.length, case.block, device=inputs.device)
    tokens = ea.reorder_tokens(inputs.query, inputs.key, inputs.value)
    out = tokens.restore(_attend(*tokens[:3], full))
    return expected(replace(inputs, mask=full), sparse=False).verdict((out,))


# How many blocks it saves


def _densities(context: Context, tokens: Tokens) -> Iterator[Row]:
    context.progress(f"reordering, {tokens.name}")
    length, heads = (2304, 1) if context.form == "small" else (4096, 4)
    shape = {"length": length, "heads": heads, "head_dim": 64, "block": BLOCK, "share": SHARE}
    config = {"form": context.form, "kind": "density", "tokens": tokens.name, **shape}
    try:
        query, key = tokens.make(length, 64, heads)
    except PictureNotFound as error:
        result = {"status": "unavailable", "reason": str(error)}
        yield Row(config, result, f"{tokens.name} | {error}", is_ours=False)
        return
    query, key = query.to(context.device), key.to(context.device)
    for name, order in ORDERS.items():
        density = _density(*order(query, key))
        result = {"status": "ok", "density": density}
        text = f"{tokens.name}, N={length} | {name}: density {density:.3f}"
        yield Row({**config, "order": name}, result, text, is_ours=True)


def _density(query: Tensor, key: Tensor) -> float:
    """The share of the blocks that holds SHARE of the mass of every tile."""
    backend = our_backend(query.device)
    mass = tile_mass(query, key, block_size=BLOCK, backend=backend)
    size = {"block_size": BLOCK, "q_len": query.shape[2], "kv_len": key.shape[2]}
    mask = keep_blocks(mass, ea.TopP(SHARE), sink=0, local=0, backend=backend, **size)
    return float(mask.density())


def _by_own_cells(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    return ea.reorder_tokens(query, key, key)[:2]


def _by_anchors_of_keys(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    anchors = fit_anchors(key, cells=64, iterations=2)
    rank = anchor_ranks(anchors)
    cells = (query @ anchors.mT).argmax(-1), nearest(key, anchors)
    orders = [rank.gather(2, cell).sort(dim=-1, stable=True).indices for cell in cells]
    return tuple(
        torch.take_along_dim(x, order[..., None], 2)
        for x, order in zip((query, key), orders, strict=True)
    )


ORDERS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "as they come": lambda query, key: (query, key),
    "sorted": _by_own_cells,
    "queries by anchors of keys": _by_anchors_of_keys,
}
