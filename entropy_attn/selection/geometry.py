"""From a caller's arguments to a checked Geometry, and the backend that selects blocks."""

from __future__ import annotations

from torch import Tensor

from entropy_attn import backend as backend_table
from entropy_attn import validation as check
from entropy_attn.reference.selection import Geometry


def make_geometry(
    query: Tensor,
    key: Tensor,
    block_size: int | tuple[int, int],
    is_causal: bool,
    kv_lens: Tensor | None,
    q_lens: Tensor | None,
    window: int | None,
) -> Geometry:
    check.check_qkv(query, key)
    kv_lens = check.check_lens("kv_lens", kv_lens, query)
    q_lens = check.check_lens("q_lens", q_lens, query)
    return Geometry(
        q_len=query.shape[2],
        kv_len=key.shape[2],
        block_size=check.check_block_size(block_size),
        is_causal=bool(is_causal),
        window=check.check_window(window, is_causal),
        q_lens=q_lens,
        kv_lens=kv_lens,
    )


def choose_backend(tensor: Tensor, geometry: Geometry, backend: str) -> str:
    """ "triton" or "reference"; a named backend that cannot run on ``tensor`` raises."""
    call = backend_table.Call(
        device=tensor.device.type,
        dtype=tensor.dtype,
        head_dim=tensor.shape[3],
        q_len=geometry.q_len,
        kv_len=geometry.kv_len,
        keeps_all=False,
        is_causal=geometry.is_causal,
        has_lens=geometry.kv_lens is not None or geometry.q_lens is not None,
        has_window=geometry.window > 0,
        wants_statistics=False,
    )
    return backend_table.choose(call, backend).backend


def most_visible(geometry: Geometry) -> int:
    """The most blocks of keys that a tile can see, known from shapes alone."""
    blocks = geometry.kv_blocks
    if geometry.window:
        # The queries of a tile see a run of block_q + window - 1 keys, which may start anywhere.
        run = geometry.block_size[0] + geometry.window - 1
        blocks = min(blocks, (run - 2) // geometry.block_size[1] + 2)
    return blocks


def most_always_kept(geometry: Geometry, sink: int, local: int) -> int:
    """The most blocks that are kept whatever the budget says."""
    if local == 0:
        return sink
    block_q, block_k = geometry.block_size
    diagonal = (block_q - 2) // block_k + 2
    return sink + diagonal + (local - 1) * (1 if geometry.is_causal else 2)
