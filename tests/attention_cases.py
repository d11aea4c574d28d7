"""Attention problems of every shape, with what dense PyTorch says about them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

import entropy_attn as ea
from entropy_attn.reference import dense


@dataclass(frozen=True)
class Case:
    """One problem; `build` draws its tensors.

    Attributes:
        density: share of blocks that are kept, None for no block mask.
        fused: query, key and value are slices of one tensor (B, N, 3, H, D), as in many models.
        odd_strides: rows do not start at multiples of 16 bytes, which the copy engine needs.
        lens: valid lengths shorter than the tensors.
        mask_heads: 1 or None for one list a query head; mask_batch likewise.
    """

    head_dim: int = 32
    block_size: tuple[int, int] = (16, 16)
    q_len: int = 40
    kv_len: int = 56
    heads: int = 2
    kv_heads: int = 1
    batch: int = 2
    dtype: torch.dtype = torch.float32
    is_causal: bool = False
    lens: bool = False
    window: int | None = None
    density: float | None = 0.5
    scale: float | None = None
    fused: bool = False
    odd_strides: bool = False
    mask_heads: int | None = None
    mask_batch: int | None = None

    def __str__(self) -> str:
        defaults = Case()
        parts = [f"d{self.head_dim}", "x".join(map(str, self.block_size))]
        for name, value in vars(self).items():
            if name not in ("head_dim", "block_size") and value != getattr(defaults, name):
                parts.append(f"{name}={str(value).removeprefix('torch.')}")
        return "-".join(parts)

    def build(self, device: str) -> Problem:
        def draw(heads: int, length: int) -> Tensor:
            shape = (self.batch, heads, length, self.head_dim)
            return torch.randn(shape, device=device).to(self.dtype)

        if self.fused:
            assert self.q_len == self.kv_len
            assert self.heads == self.kv_heads
            shape = (self.batch, self.q_len, 3, self.heads, self.head_dim)
            fused = torch.randn(shape, device=device).to(self.dtype)
            query, key, value = (t.transpose(1, 2) for t in fused.unbind(2))
        else:
            query, key = draw(self.heads, self.q_len), draw(self.kv_heads, self.kv_len)
            value = draw(self.kv_heads, self.kv_len)
        if self.odd_strides:
            longer = (torch.cat([t, t[..., :1]], -1) for t in (query, key, value))
            query, key, value = (t[..., : self.head_dim] for t in longer)
        blocks = None
        if self.density is not None:
            lengths = (self.q_len, self.kv_len)
            tiles = [-(-n // b) for n, b in zip(lengths, self.block_size, strict=True)]
            shape = (self.mask_batch or self.batch, self.mask_heads or self.heads, *tiles)
            blocks = torch.rand(shape, device=device) < self.density
            blocks[:, :, 0] = False  # rows that see nothing
        kv_lens = q_lens = None
        if self.lens:
            kv_lens = torch.linspace(self.kv_len, self.kv_len // 3, self.batch, device=device)
            q_lens = torch.linspace(self.q_len, self.q_len // 4, self.batch, device=device)
            kv_lens, q_lens = kv_lens.to(torch.int32), q_lens.to(torch.int32)
        return Problem(self, query, key, value, blocks, kv_lens, q_lens)


@dataclass
class Problem:
    """The tensors of a case.

    Attributes:
        blocks: (B|1, H|1, Mq, Mk) bool, or None for no block mask.
    """

    case: Case
    query: Tensor
    key: Tensor
    value: Tensor
    blocks: Tensor | None
    kv_lens: Tensor | None
    q_lens: Tensor | None

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.query, self.key, self.value

    @property
    def scale(self) -> float:
        return self.case.head_dim**-0.5 if self.case.scale is None else self.case.scale

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of the public functions."""
        return dict(
            is_causal=self.case.is_causal,
            scale=self.case.scale,
            kv_lens=self.kv_lens,
            q_lens=self.q_lens,
            window=self.case.window,
        )

    @cached_property
    def block_mask(self) -> ea.BlockMask | None:
        if self.blocks is None:
            return None
        case = self.case
        return ea.BlockMask.from_dense(self.blocks, case.block_size, case.q_len, case.kv_len)

    @cached_property
    def visible(self) -> Tensor:
        """(B, H|1, Nq, Nk) bool."""
        case = self.case
        visible = dense.visible_pairs(
            case.batch,
            case.q_len,
            case.kv_len,
            is_causal=case.is_causal,
            window=case.window,
            kv_lens=self.kv_lens,
            q_lens=self.q_lens,
            device=self.query.device,
        )
        if self.blocks is not None:
            block_q, block_k = case.block_size
            tokens = self.blocks.repeat_interleave(block_q, -2).repeat_interleave(block_k, -1)
            visible = visible & tokens[..., : case.q_len, : case.kv_len]
        return visible

    def dense(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
        """Dense PyTorch in ``dtype`` on leaves of its own: out, lse, probabilities, leaves."""
        leaves = tuple(t.detach().to(dtype).requires_grad_() for t in self.inputs)
        out, lse, probabilities = dense.dense_attention(*leaves, self.visible, self.scale)
        return out, lse, probabilities, leaves

    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        """query, key and value that take gradients, with the strides that the case asks for."""
        return tuple(t.detach().requires_grad_() for t in self.inputs)
