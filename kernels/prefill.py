"""Selection of blocks and attention over them, planned as one: what a layer runs for a prompt.

The kernels are those of `pooling`, `scoring`, `budget`, and of `block_sparse_forward` or
`hopper.order` and `hopper.forward`, with the arguments that their own launchers give them. Only the
work of the host is less: everything that follows from the forms of the tensors is worked out once,
so that a call is four or five launches and the allocation of what they write.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from entropy_attn.kernels.budget import plan_lists
from entropy_attn.kernels.launch import architecture, ceil_div
from entropy_attn.kernels.plans import Launch, device_of, dot_precision
from entropy_attn.kernels.pooling import plan_pooling
from entropy_attn.kernels.scoring import plan_scores

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Prefill:
    """The launches of a call, and the shapes of what they write; see `plan_prefill`."""

    pool: Launch
    score: Launch
    keep: Launch
    order: Launch | None
    forward: Launch
    query_groups: Shape
    key_groups: Shape
    spreads: Shape | None
    mass: Shape
    width: int
    items: int

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        q_lens: Tensor | None,
        kv_lens: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """out (B, Hq, Nq, D), laid out as the query, and the counts of its lists (B, Hq, Mq)."""
        dtype, device, index = query.dtype, query.device, query.get_device()
        with device_of(query):
            query_groups = torch.empty(self.query_groups, dtype=dtype, device=device)
            key_groups = torch.empty(self.key_groups, dtype=dtype, device=device)
            spreads = torch.empty(self.spreads or (0,), dtype=torch.float32, device=device)
            self.pool.on(index, query, key, query_groups, key_groups, spreads, q_lens, kv_lens)

            mass = torch.empty(self.mass, dtype=torch.float32, device=device)
            partial, row_lse = (
                torch.empty(shape, dtype=torch.float32, device=device)
                for shape in self.score.workspace
            )
            given = None if self.spreads is None else spreads
            self.score.on(
                index, query_groups, key_groups, given, mass, partial, row_lse, q_lens, kv_lens
            )

            tiles = self.mass[:3]
            counts = torch.empty(tiles, dtype=torch.int32, device=device)
            indices = torch.empty((*tiles, self.width), dtype=torch.int32, device=device)
            self.keep.on(index, mass, counts, indices, q_lens, kv_lens)

            out = torch.empty_like(query)
            lse = torch.empty(query.shape[:3], dtype=torch.float32, device=device)
            # Entropies are not wanted; something of their dtype stands where they would go.
            rows = (out, lse, lse, lse)
            if self.order is None:
                self.forward.on(index, query, key, value, *rows, counts, indices, kv_lens, q_lens)
            else:
                order = torch.empty((self.items + 1, 4), dtype=torch.int32, device=device)
                self.order.on(index, order, counts, indices, kv_lens, q_lens)
                lens = (order if x is None else x for x in (kv_lens, q_lens))
                self.forward.on(index, query, key, value, *rows, indices, *lens, order)
            return out, counts


def plan_prefill(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    q_lens: Tensor | None,
    kv_lens: Tensor | None,
    geometry: tuple[tuple[int, int], bool, int, float],
    *,
    group: int,
    spread: float | None,
    take_maximum: bool,
    budget: tuple[int, int, str, float, int, float, int],
    on_hopper: bool,
) -> Prefill:
    """Plan a call whose tensors are not empty and whose scores fit one launch.

    Args:
        geometry: block_size, is_causal, window and scale, which is > 0.
        group: tokens a group.
        spread: of the envelope around keys; None for means.
        take_maximum: over the query groups of a tile, else the mean.
        budget: the arguments of `budget.keep_tiles` from ``sink`` to ``width``.
        on_hopper: run `hopper.forward`, which has nothing against the call, else
            `block_sparse_forward`.
    """
    batch, heads, q_len, head_dim = query.shape
    kv_heads, kv_len = key.shape[1:3]
    block_size, is_causal, window, scale = geometry
    q_tiles, kv_blocks = ceil_div(q_len, block_size[0]), ceil_div(kv_len, block_size[1])
    lens = q_lens, kv_lens
    arch, precision = architecture(query.device), dot_precision(query.dtype)

    # Only the forms of what lies between the launches matter here.
    def empty(*shape: int, dtype: torch.dtype = query.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    means = empty(batch, heads, ceil_div(q_len, group), head_dim)
    groups = empty(batch, kv_heads, ceil_div(kv_len, group), head_dim)
    spreads = None if spread is None else empty(*groups.shape[:3], dtype=torch.float32)
    mass = empty(batch, heads, q_tiles, kv_blocks, dtype=torch.float32)
    counts = empty(batch, heads, q_tiles, dtype=torch.int32)
    indices = empty(batch, heads, q_tiles, budget[-1], dtype=torch.int32)
    out = torch.empty_like(query, device="meta")

    pool = plan_pooling(query, key, *lens, group, spread)
    score = plan_scores(
        means, groups, spreads, *lens, q_len, kv_len, group, 1, take_maximum,
        block_size, is_causal, window, scale, 0, q_tiles, None, arch, precision,
    )  # fmt: skip
    keep = plan_lists(mass, *lens, q_len, kv_len, block_size, is_causal, window, *budget, 0)
    order, items = None, 0
    if on_hopper:
        from entropy_attn.kernels.hopper.forward import plan_attention

        order, forward, items = plan_attention(
            query, key, value, out, counts, indices, kv_lens, q_lens, block_size, is_causal,
            scale,
        )  # fmt: skip
    else:
        from entropy_attn.kernels.block_sparse_forward import plan_forward

        forward = plan_forward(
            query, key, value, counts, indices, kv_lens, q_lens, out.stride(), block_size,
            is_causal, window, scale, False, False, None, arch, precision,
        )  # fmt: skip
    return Prefill(
        pool, score, keep, order, forward,
        tuple(means.shape), tuple(groups.shape),
        None if spreads is None else tuple(spreads.shape),
        tuple(mass.shape), budget[-1], items,
    )  # fmt: skip
