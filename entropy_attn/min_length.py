"""min_length: which calls are too short for sparse attention to be faster.

That is known from their sizes, and from whether torch.compile traces them, never from values: with
"auto" what was measured decides, at the density to expect. The density of a call is known only on
the device, after its blocks were chosen, and reading it would make the call wait.
"""

from __future__ import annotations

import torch

from entropy_attn.backend.crossover import Crossover, beats_dense, find_crossover, smallest_block
from entropy_attn.config import SparsityConfig
from entropy_attn.selection import TopK
from entropy_attn.traced import find, key_of
from entropy_attn.validation import check_block_size

# What min_length="auto" means on devices without measurements, such as the CPU.
UNMEASURED_LENGTH = 4096
# Floating point operations of a dense layer below which the GPU waits for the host where a model
# runs eager: then sparse attention, which launches more kernels, only adds to that. In `bench llm`
# and `bench vit` on an H200, layers of 1.4e11 became slower (SmolLM2, 8192 tokens) and of 5.7e11
# faster (ViT-B, 32 images of 512 px); this is between.
LEAST_WORK = 3e11
WAITS = (
    "the layer is so small that it waits for the host where the model runs eager, and sparse "
    "attention launches more kernels (min_length='auto'): give min_length a number for CUDA graphs"
)


class MinLength:
    """Decides whether a call is too short to run sparse."""

    def __init__(self, config: SparsityConfig) -> None:
        self.config = config
        self.key = key_of(self)
        self._known: dict[tuple[object, ...], Crossover | None] = {}

    def __reduce__(self) -> tuple[type[MinLength], tuple[SparsityConfig]]:
        return MinLength, (self.config,)  # a copy has a key of its own

    def too_short(
        self,
        query: torch.Tensor,
        kv_len: int,
        is_causal: bool,
        window: int | None = None,
    ) -> str | None:
        """Why a call of these sizes runs dense, or None if it does not.

        Args:
            query: (B, Hq, Nq, D), of which only the shape, dtype and device are read.
            kv_len: keys, in tokens.
            window: sliding window in tokens, None for none.
        """
        least = self.config.min_length
        if least != "auto":
            return f"fewer than min_length={least} keys" if kv_len < least else None
        batch, heads, q_len, head_dim = query.shape
        found = _crossover(self.key, query.device, query.dtype, head_dim, is_causal)
        if found is None:
            short = f"fewer than {UNMEASURED_LENGTH} keys (min_length='auto', not measured on "
            return f"{short}{query.device.type})" if kv_len < UNMEASURED_LENGTH else None
        # A window bounds the keys that a query sees, and with them those that can be left out.
        seen = kv_len if window is None else min(window, kv_len)
        starts, reason = found
        if not beats_dense(starts, batch * heads, q_len, seen):
            return reason
        if torch.compiler.is_compiling():
            return None
        work = dense_work(query.shape, kv_len, is_causal, seen)
        return None if work >= LEAST_WORK else WAITS

    def crossover(
        self, device: torch.device, dtype: torch.dtype, head_dim: int, is_causal: bool
    ) -> Crossover | None:
        """`expected_crossover`, worked out once for each kind of call."""
        kind = (device, dtype, head_dim, is_causal)
        if kind not in self._known:
            self._known[kind] = expected_crossover(self.config, *kind)
        return self._known[kind]


def dense_work(shape: torch.Size, kv_len: int, is_causal: bool, seen: int) -> int:
    """Floating point operations of the forward of a layer around a query (B, Hq, Nq, D).

    It is taken to be as wide as its heads together, with a feed-forward of four times that width.

    Args:
        seen: keys that a query sees at most.
    """
    batch, heads, q_len, head_dim = shape
    width = heads * head_dim
    pairs = q_len * seen
    if is_causal:  # the queries are the last tokens, and the first of them may see fewer keys
        fewer = max(seen - max(kv_len - q_len, 0), 0)
        pairs -= fewer * (fewer - 1) // 2
    return batch * (4 * pairs * width + 24 * q_len * width**2)


@torch.compiler.assume_constant_result
def _crossover(
    key: str, device: torch.device, dtype: torch.dtype, head_dim: int, is_causal: bool
) -> tuple[tuple[tuple[int, int, int], ...], str] | None:
    """`crossover` of the `MinLength` of a key, as what is constant to torch.compile."""
    found = find(key).crossover(device, dtype, head_dim, is_causal)
    return None if found is None else (found.starts, found.reason)


def expected_crossover(
    config: SparsityConfig,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    is_causal: bool,
) -> Crossover | None:
    """From where on sparse attention pays with these settings; None where nothing was measured."""
    share, blocks = expected_blocks(config, is_causal)
    block_size = check_block_size(config.block_size)
    found = find_crossover(device, head_dim, is_causal, share, blocks * block_size[1])
    if found is None:
        return None
    # Both are slower than what was measured, by an amount that was not.
    if dtype == torch.float32 or min(block_size) < smallest_block():
        unmeasured = "fp32" if dtype == torch.float32 else f"blocks of {min(block_size)}"
        reason = f"sparse attention was not measured in {unmeasured}: give min_length a number"
        return Crossover((), reason)
    return found


def expected_blocks(config: SparsityConfig, is_causal: bool) -> tuple[float, float]:
    """What a row of the mask is expected to keep: a share of its visible blocks, and a number of
    blocks on top."""
    budget = config.budget
    if isinstance(budget, TopK) and budget.count is not None:
        share, blocks = 0.0, float(max(budget.count, budget.min_blocks))
    else:
        share = budget.fraction if isinstance(budget, TopK) else config.expected_density
        share = min(share, budget.max_density)
        # Rounded up to whole blocks, which adds half a block on average.
        blocks = budget.min_blocks - 0.5
    block_q, block_k = check_block_size(config.block_size)
    always, local = config.always_kept
    if local:
        always += -(-block_q // block_k) + (local - 1) * (1 if is_causal else 2)
    # The budget chooses these at least as often as other blocks.
    return share, blocks + always * (1 - share)
