"""Selection and attention in one call, as a layer of a model makes it for every prompt.

`attend_selected` is `select_blocks` and then `block_sparse_attention`. Where nobody watches (no
gradient, no tracing, no profiler) the checks, the choices and the launches of a call are kept for
the next one of the same form: a small model would wait for the host to go through them again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from entropy_attn import ops
from entropy_attn import validation as check
from entropy_attn.api import block_sparse_attention
from entropy_attn.autocast import is_autocasting
from entropy_attn.custom_ops import is_unwatched
from entropy_attn.kernels.plans import dot_precision, planned
from entropy_attn.selection import Rules, most_tiles, select_blocks
from entropy_attn.selection.budgets import Budget, Perplexity, TopK, TopP
from entropy_attn.selection.geometry import choose_backend, make_geometry
from entropy_attn.selection.scorers import Envelope, Pooled

# Whose calls are kept; what a user derives from them may do anything.
SCORERS, BUDGETS = (Pooled, Envelope), (TopK, TopP, Perplexity)


def attend_selected(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    block_size: int | tuple[int, int],
    scorer: Any,
    budget: Budget,
    sink: int,
    local: int,
    backend: str,
    is_causal: bool,
    scale: float | None,
    kv_lens: Tensor | None,
    q_lens: Tensor | None,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """Attention over the blocks that are selected for these queries and keys.

    Returns:
        out (B, Hq, Nq, D), and how many blocks each list holds, (B, Hq, Mq) int32.
    """
    tensors = query, key, value, q_lens, kv_lens
    is_known = type(scorer) in SCORERS and type(budget) in BUDGETS
    if is_known and is_unwatched(tensors) and not is_autocasting():
        launches = _plan(
            *tensors, block_size, scorer, budget, sink, local, backend, is_causal, scale, window,
            dot_precision(query.dtype), ops.SMALL,
        )  # fmt: skip
        if launches is not None:
            return launches(*tensors)
    geometry: dict[str, Any] = dict(
        is_causal=is_causal, scale=scale, kv_lens=kv_lens, q_lens=q_lens, window=window
    )
    with torch.no_grad():
        mask = select_blocks(
            query, key, block_size=block_size, scorer=scorer, budget=budget, sink=sink,
            local=local, backend=backend, **geometry,
        )  # fmt: skip
    out = block_sparse_attention(query, key, value, mask, **geometry, backend=backend)
    assert isinstance(out, Tensor)
    return out, mask.kv_num_blocks


@planned
def _plan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    q_lens: Tensor | None,
    kv_lens: Tensor | None,
    block_size: int | tuple[int, int],
    scorer: Pooled,
    budget: Budget,
    sink: int,
    local: int,
    backend: str,
    is_causal: bool,
    scale: float | None,
    window: int | None,
    *settings: Any,
) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """The launches of a call, or None where it takes the long way.

    Raises what `select_blocks` and `block_sparse_attention` raise; that is not kept.
    """
    check.check_qkv(query, key, value)
    geometry = make_geometry(query, key, block_size, is_causal, kv_lens, q_lens, window)
    rules = Rules(budget, sink, local)
    scale = check.check_scale(scale, query.shape[3])
    if choose_backend(query, geometry, backend) != "triton":
        return None
    is_empty = 0 in (*query.shape, key.shape[2])
    if any(x is not None and not x.is_contiguous() for x in (q_lens, kv_lens)):
        return None
    if is_empty or scale <= 0 or geometry.q_tiles > most_tiles(scorer, query, geometry):
        return None
    check.check_group("pool", scorer.pool, geometry.block_size)
    plain = geometry.block_size, geometry.is_causal, geometry.window, scale
    kernel, _ = ops.forward_kernel(query, key, value, *plain)
    if kernel == ops.DECODE:
        return None
    from entropy_attn.kernels.prefill import plan_prefill

    return plan_prefill(
        query, key, value, geometry.q_lens, geometry.kv_lens, plain,
        group=scorer.pool,
        spread=float(scorer.spread) if isinstance(scorer, Envelope) else None,
        take_maximum=scorer.reduce == "max",
        budget=rules.numbers(geometry),
        on_hopper=kernel == ops.HOPPER,
    )  # fmt: skip
