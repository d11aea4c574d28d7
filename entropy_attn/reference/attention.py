"""Block-sparse attention in plain PyTorch, one block of queries at a time: the CPU backend.

Nothing of size Nq x Nk is ever stored. Half precision is computed in fp32, fp64 in fp64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from entropy_attn.reference.dense import entropy, sum_blocks
from entropy_attn.reference.precision import without_autocast


@dataclass(frozen=True)
class Problem:
    """What fixes which query sees which key; see `entropy_attn.api` for the semantics.

    Attributes:
        kv_num_blocks, kv_indices: block lists, or None where every block is visited.
        kv_lens, q_lens: (B,) int32 valid lengths, or None.
        block_size: (block_q, block_k).
        window: 0 for none.
    """

    kv_num_blocks: Tensor | None
    kv_indices: Tensor | None
    kv_lens: Tensor | None
    q_lens: Tensor | None
    block_size: tuple[int, int]
    is_causal: bool
    window: int
    scale: float


@dataclass(frozen=True)
class Tile:
    """One block of queries of all heads, with the keys that it visits.

    Attributes:
        rows: the slice of the query length.
        query: (B, Hq, m, D); key, value: (B, Hq, n, D), gathered.
        position: (B, Hq, n) int64, where each gathered key stands.
        visible: (B, Hq, m, n) bool.
    """

    rows: slice
    query: Tensor
    key: Tensor
    value: Tensor
    position: Tensor
    visible: Tensor

    def scores(self, scale: float) -> Tensor:
        """(B, Hq, m, n), -inf where not visible."""
        scores = (self.query @ self.key.transpose(-1, -2)) * scale
        return scores.masked_fill(~self.visible, float("-inf"))


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def tiles(query: Tensor, key: Tensor, value: Tensor | None, problem: Problem) -> Iterator[Tile]:
    """Walk over the blocks of queries, gathering the keys and values of each.

    Without values the keys stand in their place.
    """
    value = key if value is None else value
    batch, heads, q_len, _ = query.shape
    kv_heads, kv_len = key.shape[1:3]
    block_q, block_k = problem.block_size
    dtype, device = compute_dtype(query.dtype), query.device
    q_end = _lengths(problem.q_lens, batch, q_len, device)
    k_end = _lengths(problem.kv_lens, batch, kv_len, device)
    batch_index = torch.arange(batch, device=device)[:, None, None]
    kv_head = (torch.arange(heads, device=device) // (heads // kv_heads))[None, :, None]
    in_block = torch.arange(block_k, device=device)

    for index in range(math.ceil(q_len / block_q)):
        rows = slice(index * block_q, min((index + 1) * block_q, q_len))
        row = torch.arange(rows.start, rows.stop, device=device).view(1, 1, -1, 1)
        if problem.kv_indices is None:
            position = torch.arange(kv_len, device=device).expand(batch, heads, kv_len)
            listed = torch.ones_like(position, dtype=torch.bool)
        else:
            counts = problem.kv_num_blocks[:, :, index].expand(batch, heads)
            width = int(counts.max()) if counts.numel() else 0
            blocks = problem.kv_indices[:, :, index, :width].expand(batch, heads, width)
            listed = torch.arange(width, device=device) < counts[..., None]
            listed = listed.repeat_interleave(block_k, -1)
            position = (blocks.long()[..., None] * block_k + in_block).flatten(-2)
        column = position[:, :, None, :]
        diagonal = row + k_end - q_end
        visible = listed[:, :, None, :] & (row < q_end) & (column < k_end)
        if problem.is_causal:
            visible = visible & (column <= diagonal)
        if problem.window:
            visible = visible & (diagonal - column < problem.window)
        position = position.clamp(max=kv_len - 1)
        yield Tile(
            rows=rows,
            query=query[:, :, rows].to(dtype),
            key=key[batch_index, kv_head, position].to(dtype),
            value=value[batch_index, kv_head, position].to(dtype),
            position=position,
            visible=visible,
        )


def _lengths(lengths: Tensor | None, batch: int, default: int, device) -> Tensor:
    if lengths is None:
        return torch.full((batch, 1, 1, 1), default, device=device)
    return lengths.to(torch.int64).view(batch, 1, 1, 1)


def _probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    """exp(scores - lse), 0 in the rows that see no key."""
    return torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0.0)[..., None])


@without_autocast
def attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    problem: Problem,
    row_entropy: bool = False,
    block_entropy: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns out (B, Hq, Nq, D), lse, row entropy and block entropy, each (B, Hq, Nq) or empty.

    Without values out is empty too.
    """
    dtype = compute_dtype(query.dtype)
    statistics = query.new_zeros(query.shape[:3], dtype=dtype)
    out = query.new_zeros((0,) if value is None else query.shape)
    lse = torch.full_like(statistics, float("-inf"))
    row = torch.zeros_like(statistics) if row_entropy else statistics.new_zeros(0)
    block = torch.zeros_like(statistics) if block_entropy else statistics.new_zeros(0)
    for tile in tiles(query, key, value, problem):
        if tile.key.shape[2] == 0:
            continue
        scores = tile.scores(problem.scale)
        tile_lse = torch.logsumexp(scores, -1)
        p = _probabilities(scores, tile_lse)
        lse[:, :, tile.rows] = tile_lse
        if value is not None:
            out[:, :, tile.rows] = (p @ tile.value).to(out.dtype)
        if row_entropy:
            row[:, :, tile.rows] = entropy(p).clamp(min=0)
        if block_entropy:
            # The gathered keys are whole blocks, so runs of block_k entries are blocks.
            masses = sum_blocks(p, problem.block_size[1], -1)
            block[:, :, tile.rows] = entropy(masses).clamp(min=0)
    return out, lse, row, block


@without_autocast
def attention_backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    grad_row: Tensor | None,
    grad_block: Tensor | None,
    grad_tile: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    out: Tensor,
    lse: Tensor,
    problem: Problem,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; probabilities are recomputed tile by tile.

    Args:
        grad_out: None where only entropies have gradients. Without values theirs is empty.
        grad_row, grad_block (B, Hq, Nq), grad_tile (B, Hq, Mq): of the entropies.
    """
    dtype = compute_dtype(query.dtype)
    batch, heads, _, _ = query.shape
    kv_heads = key.shape[1]
    grad_query = torch.zeros_like(query, memory_format=torch.contiguous_format)
    grad_key = torch.zeros(key.shape, dtype=dtype, device=key.device)
    grad_value = torch.zeros((0,) if value is None else value.shape, dtype=dtype, device=key.device)
    delta = torch.zeros_like(lse)
    if grad_out is not None:
        delta = (grad_out.to(dtype) * out.to(dtype)).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse.to(dtype)
    delta = delta.masked_fill(lse == float("-inf"), 0.0)
    batch_index = torch.arange(batch, device=query.device)[:, None, None]
    kv_head = (torch.arange(heads, device=query.device) // (heads // kv_heads))[None, :, None]
    for index, tile in enumerate(tiles(query, key, value, problem)):
        if tile.key.shape[2] == 0:
            continue
        p = _probabilities(tile.scores(problem.scale), lse[:, :, tile.rows])
        grad_p = -delta[:, :, tile.rows, None]
        if grad_out is not None:
            grad = grad_out[:, :, tile.rows].to(dtype)
            grad_p = grad_p + grad @ tile.value.transpose(-1, -2)
        if grad_row is not None:
            grad_p = grad_p + _grad_of_entropy(p, grad_row[:, :, tile.rows])
        if grad_block is not None or grad_tile is not None:
            # The gathered keys are whole blocks, so runs of block_k entries are blocks.
            masses = sum_blocks(p, problem.block_size[1], -1)
            grad_mass = torch.zeros_like(masses)
            if grad_block is not None:
                grad_mass += _grad_of_entropy(masses, grad_block[:, :, tile.rows])
            if grad_tile is not None:
                alive = (lse[:, :, tile.rows] > float("-inf")).sum(-1).clamp(min=1)
                mean = masses.sum(-2) / alive[..., None]
                terms = _grad_of_entropy(mean, grad_tile[:, :, index] / alive)[:, :, None]
                grad_mass += terms - (masses * terms).sum(-1, keepdim=True)
            spread = grad_mass.repeat_interleave(problem.block_size[1], -1)
            grad_p = grad_p + spread[..., : p.shape[-1]]
        grad_scores = p * grad_p * problem.scale
        grad_query[:, :, tile.rows] = (grad_scores @ tile.key).to(query.dtype)
        at = (batch_index, kv_head, tile.position)
        grad_key.index_put_(at, grad_scores.transpose(-1, -2) @ tile.query, accumulate=True)
        if grad_out is not None:
            grad_value.index_put_(at, p.transpose(-1, -2) @ grad, accumulate=True)
    return grad_query, grad_key.to(key.dtype), grad_value.to(key.dtype)


def _grad_of_entropy(probabilities: Tensor, grad: Tensor) -> Tensor:
    """d/dS of an entropy H over the last dimension, divided by the probability: -(log p + H).

    Args:
        grad: of the entropy, without the last dimension; what it is where all are 0 is ignored.
    """
    log = probabilities.masked_fill(probabilities == 0, 1.0).log()
    grad = grad.to(log.dtype).masked_fill((probabilities == 0).all(-1), 0.0)
    return -(log + entropy(probabilities)[..., None]) * grad[..., None]


@without_autocast
def tile_entropy(query: Tensor, key: Tensor, problem: Problem) -> Tensor:
    """(B, Hq, Mq): entropy of the masses of each row of tiles."""
    return entropy(tile_mass(query, key, problem)).clamp(min=0)


@without_autocast
def tile_mass(query: Tensor, key: Tensor, problem: Problem) -> Tensor:
    """(B, Hq, Mq, Mk): mean attention mass of each tile over its rows that see a key."""
    batch, heads, q_len, _ = query.shape
    block_q, block_k = problem.block_size
    shape = (batch, heads, math.ceil(q_len / block_q), math.ceil(key.shape[2] / block_k))
    mass = torch.zeros(shape, dtype=compute_dtype(query.dtype), device=query.device)
    for index, tile in enumerate(tiles(query, key, key, problem)):
        if tile.key.shape[2] == 0:
            continue
        scores = tile.scores(problem.scale)
        tile_lse = torch.logsumexp(scores, -1)
        p = _probabilities(scores, tile_lse).sum(-2)
        rows = (tile_lse > float("-inf")).sum(-1, keepdim=True).clamp(min=1)
        mass[:, :, index].scatter_add_(-1, tile.position // block_k, p / rows)
    return mass
