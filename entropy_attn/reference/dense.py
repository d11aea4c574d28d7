"""Dense masked attention that materialises the scores: the yardstick, for small inputs only.

Every other implementation, the CPU backend included, is judged against these few lines.
"""

from __future__ import annotations

import torch
from torch import Tensor


def visible_pairs(
    batch: int,
    q_len: int,
    kv_len: int,
    *,
    is_causal: bool = False,
    window: int | None = None,
    kv_lens: Tensor | None = None,
    q_lens: Tensor | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """(B, 1, Nq, Nk) bool: which key each query may see, before any block mask.

    Causal attention is aligned to the last valid key: query i stands at key position
    ``i + kv_lens - q_lens``. A window w keeps the w keys that end at that position.
    """
    row = torch.arange(q_len, device=device)[None, :, None]
    col = torch.arange(kv_len, device=device)[None, None, :]
    q_end = _column(q_lens, batch, q_len, device)
    k_end = _column(kv_lens, batch, kv_len, device)
    position = row + k_end - q_end
    visible = (row < q_end) & (col < k_end)
    if is_causal:
        visible = visible & (col <= position)
    if window is not None:
        visible = visible & (position - col < window)
    return visible[:, None]


def _column(lengths: Tensor | None, batch: int, default: int, device) -> Tensor:
    if lengths is None:
        return torch.full((batch, 1, 1), default, device=device)
    return lengths.to(device=device, dtype=torch.int64).view(batch, 1, 1)


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Masked softmax attention in the dtype of the inputs.

    Args:
        query: (B, Hq, Nq, D); key, value: (B, Hkv, Nk, D) with Hq a multiple of Hkv.
        visible: bool, broadcastable to (B, Hq, Nq, Nk).
        scale: factor of the scores.

    Returns:
        out (B, Hq, Nq, D), lse (B, Hq, Nq) in nats, probabilities (B, Hq, Nq, Nk). A row that
        sees no key gives 0, -inf and 0, and gradients of 0.
    """
    group = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(group, dim=1) for t in (key, value))
    scores = (query @ key.transpose(-1, -2)) * scale
    empty = ~visible.any(-1, keepdim=True)
    # An empty row attends to everything for a moment, so that no NaN enters its gradient.
    scores = scores.masked_fill(~(visible | empty), float("-inf"))
    lse = torch.logsumexp(scores, -1).masked_fill(empty[..., 0], float("-inf"))
    probabilities = torch.softmax(scores, -1).masked_fill(empty, 0.0)
    return probabilities @ value, lse, probabilities


def entropy(probabilities: Tensor) -> Tensor:
    """Shannon entropy over the last dimension, in nats; 0·log 0 = 0, as is its gradient."""
    logarithm = probabilities.masked_fill(probabilities == 0, 1.0).log()
    return -(probabilities * logarithm).sum(-1)


def sum_blocks(x: Tensor, block: int, dim: int) -> Tensor:
    """Sum runs of ``block`` entries along ``dim``; the last run may be shorter."""
    dim = dim % x.ndim
    pad = -x.shape[dim] % block
    x = torch.nn.functional.pad(x, [0, 0] * (x.ndim - 1 - dim) + [0, pad])
    return x.unflatten(dim, (-1, block)).sum(dim + 1)


def dense_tile_mass(probabilities: Tensor, block_size: tuple[int, int]) -> Tensor:
    """(B, H, Mq, Mk): attention mass per tile, the mean over the tile's rows that see a key."""
    tiles = sum_blocks(sum_blocks(probabilities, block_size[1], -1), block_size[0], -2)
    rows = (probabilities.sum(-1) > 0).to(probabilities.dtype)
    return tiles / sum_blocks(rows, block_size[0], -1).clamp(min=1)[..., None]
