"""The contestants: this package's attention and every implementation that it is compared with.

Adding one is adding a `Contestant` to the table; `plugins` adds those of users. FlexAttention only
ever runs compiled: eager, it ignores block lists and returns dense attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import entropy_attn as ea
from entropy_attn.benchmarks.cases import AttentionCase, Inputs
from entropy_attn.benchmarks.environment import package_version

Forward = Callable[[], Tensor]
# FlexAttention specialises on shapes and blocks; over its limit it would run uncompiled.
COMPILE_LIMIT = 256
MATH_LONGEST = 4096  # SDPA math stores the scores


@dataclass(frozen=True)
class Contestant:
    """One implementation of attention.

    Attributes:
        name: in tables and records.
        sparse: visits only the blocks of the mask; others compute dense attention.
        package: the distribution whose version is recorded.
        refuses: (case, device) -> why it cannot run the case here, or None.
        setup: inputs -> the forward, a callable without arguments.
        known_version: what is recorded instead of the package's.
        deterministic: its gradients are taken under `torch.use_deterministic_algorithms`.
    """

    name: str
    sparse: bool
    package: str
    refuses: Callable[[AttentionCase, torch.device], str | None]
    setup: Callable[[Inputs], Forward]
    known_version: str | None = None
    deterministic: bool = False

    @property
    def version(self) -> str | None:
        if self.known_version is not None:
            return self.known_version
        return ea.__version__ if self.package == "entropy-attn" else package_version(self.package)

    def forward(self, inputs: Inputs) -> Forward:
        """A callable that computes the output (B, H, N, D)."""
        return self.setup(inputs)

    def backward(self, inputs: Inputs) -> Callable[[], tuple[Tensor, ...]]:
        """A callable that computes the gradients of query, key and value, from a saved forward."""
        out = self.setup(inputs)()
        tensors = (inputs.query, inputs.key, inputs.value)

        def gradients() -> tuple[Tensor, ...]:
            with deterministic_algorithms(self.deterministic):
                return torch.autograd.grad(out, tensors, inputs.grad_out, retain_graph=True)

        return gradients

    def call(self, inputs: Inputs) -> Callable[[], object]:
        """What the case times: the forward or the backward."""
        return getattr(self, inputs.case.direction)(inputs)


@contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """Inside, torch's setting is as wanted; memory is not filled, which is to find bugs only."""
    before = torch.are_deterministic_algorithms_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(wanted)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = filled


def our_backend(device: torch.device | str) -> str:
    """The backend of this package that is benchmarked on a device."""
    return "triton" if torch.device(device).type == "cuda" else "reference"


def _always(case: AttentionCase, device: torch.device) -> str | None:
    return None


def _ours(inputs: Inputs) -> Forward:
    return lambda: ea.block_sparse_attention(
        inputs.query,
        inputs.key,
        inputs.value,
        inputs.mask,
        is_causal=inputs.case.is_causal,
        backend=our_backend(inputs.device),
    )


def _ours_with_entropy(inputs: Inputs) -> Forward:
    return lambda: ea.attention_with_entropy(
        inputs.query,
        inputs.key,
        inputs.value,
        block_mask=inputs.mask,
        is_causal=inputs.case.is_causal,
        kinds=("row", "block"),
        backend=our_backend(inputs.device),
    )[0]


def _forward_only(case: AttentionCase, device: torch.device) -> str | None:
    return "entropies are a statistic of the forward" if case.direction == "backward" else None


def _backward_only(case: AttentionCase, device: torch.device) -> str | None:
    return "every forward is deterministic" if case.direction == "forward" else None


def _sdpa(backend: SDPBackend) -> Callable[[Inputs], Forward]:
    def setup(inputs: Inputs) -> Forward:
        def forward() -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(
                    inputs.query, inputs.key, inputs.value, is_causal=inputs.case.is_causal
                )

        return forward

    return setup


def _needs_gpu(case: AttentionCase, device: torch.device) -> str | None:
    return None if device.type == "cuda" else f"it needs a GPU, the tensors are on {device.type}"


def _short_only(case: AttentionCase, device: torch.device) -> str | None:
    if case.length > MATH_LONGEST:
        return f"it stores the scores; N={case.length} is over the limit of {MATH_LONGEST} here"
    return None


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.config.recompile_limit = COMPILE_LIMIT
    # The backward is called several times on one forward.
    torch._functorch.config.donated_buffer = False
    return torch.compile(flex_attention, fullgraph=True, dynamic=False)


def _causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= key


def _flex(inputs: Inputs, *, sparse: bool) -> Forward:
    from torch.nn.attention.flex_attention import BlockMask as FlexMask
    from torch.nn.attention.flex_attention import create_block_mask

    case, mask, options = inputs.case, None, None
    length = case.length
    if sparse:
        partial, full = _partial_and_full(inputs)
        mask = FlexMask.from_kv_blocks(
            *partial,
            *full,
            BLOCK_SIZE=case.block_size,
            mask_mod=_causal if case.is_causal else None,
            seq_lengths=(length, length),
        )
        # Its default tiles are larger than small blocks and would be refused.
        if min(case.block_size) < 128:
            options = dict(zip(("BLOCK_M", "BLOCK_N"), case.block_size, strict=True))
    elif case.is_causal:
        mask = create_block_mask(_causal, None, None, length, length, device=inputs.device)

    def forward() -> Tensor:
        return _compiled_flex()(
            inputs.query, inputs.key, inputs.value, block_mask=mask, kernel_options=options
        )

    return forward


def _partial_and_full(inputs: Inputs) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Counts and indices of the blocks that need the causal mask, and of those that do not."""
    diagonal = torch.zeros_like(inputs.kept)
    if inputs.case.is_causal:
        diagonal.diagonal(dim1=-2, dim2=-1).fill_(True)
    return _lists(inputs.kept & diagonal), _lists(inputs.kept & ~diagonal)


def _lists(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Counts (B, H, M) and indices (B, H, M, M) int32 of the True entries, kept ones first."""
    order = torch.argsort((~blocks).to(torch.uint8), dim=-1, stable=True)
    return blocks.sum(-1, dtype=torch.int32), order.to(torch.int32).contiguous()


def _flash_layout(inputs: Inputs) -> list[Tensor]:
    return [t.transpose(1, 2) for t in (inputs.query, inputs.key, inputs.value)]


def _from_flash_layout(out: Tensor | tuple[Tensor, ...]) -> Tensor:
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)


def _flash_attn(module: str) -> Callable[[Inputs], Forward]:
    def setup(inputs: Inputs) -> Forward:
        function = __import__(module, fromlist=["flash_attn_func"]).flash_attn_func
        return lambda: _from_flash_layout(
            function(*_flash_layout(inputs), causal=inputs.case.is_causal)
        )

    return setup


def _flash_attn_4_sparse(inputs: Inputs) -> Forward:
    from flash_attn.cute import flash_attn_func
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    block_size = inputs.case.block_size

    def tensors(blocks: Tensor) -> BlockSparseTensorsTorch:
        partial = _lists(torch.zeros_like(blocks))
        return BlockSparseTensorsTorch(*partial, *_lists(blocks), block_size=block_size)

    by_query, by_key = tensors(inputs.kept), tensors(inputs.kept.transpose(-1, -2))
    return lambda: _from_flash_layout(
        flash_attn_func(
            *_flash_layout(inputs),
            block_sparse_tensors=by_query,
            block_sparse_tensors_bwd=by_key,
        )
    )


def _needs_package(module: str, package: str):
    def refuses(case: AttentionCase, device: torch.device) -> str | None:
        parent = module.split(".")[0]
        if find_spec(parent) is None or find_spec(module) is None:
            return f"the package {package} is not installed"
        return _needs_gpu(case, device)

    return refuses


def _flash_attn_4_sparse_refuses(case: AttentionCase, device: torch.device) -> str | None:
    missing = _needs_package("flash_attn.cute", "flash-attn-4")(case, device)
    if missing is None and case.block_size != (128, 128):
        return f"its key tiles are 128 wide, the blocks {case.block_size[1]}"
    if missing is None and case.is_causal:
        return "its block lists with causal=True are not covered here"
    return missing


OURS = "entropy-attn"
OURS_WITH_ENTROPY = "entropy-attn + row and block entropy"
OURS_DETERMINISTIC = "entropy-attn, deterministic"

CONTESTANTS: dict[str, Contestant] = {
    c.name: c
    for c in (
        Contestant(OURS, True, "entropy-attn", _always, _ours),
        Contestant(OURS_WITH_ENTROPY, True, "entropy-attn", _forward_only, _ours_with_entropy),
        Contestant(
            OURS_DETERMINISTIC, True, "entropy-attn", _backward_only, _ours, deterministic=True
        ),
        Contestant(
            "FlexAttention, block lists", True, "torch", _needs_gpu,
            lambda inputs: _flex(inputs, sparse=True),
        ),
        Contestant(
            "flash-attn-4, block lists", True, "flash-attn-4", _flash_attn_4_sparse_refuses,
            _flash_attn_4_sparse,
        ),
        Contestant(
            "FlexAttention", False, "torch", _needs_gpu,
            lambda inputs: _flex(inputs, sparse=False),
        ),
        Contestant(
            "SDPA flash", False, "torch", _always, _sdpa(SDPBackend.FLASH_ATTENTION)
        ),
        Contestant(
            "SDPA cuDNN", False, "torch", _needs_gpu, _sdpa(SDPBackend.CUDNN_ATTENTION)
        ),
        Contestant(
            "SDPA efficient", False, "torch", _needs_gpu, _sdpa(SDPBackend.EFFICIENT_ATTENTION)
        ),
        Contestant("SDPA math", False, "torch", _short_only, _sdpa(SDPBackend.MATH)),
        Contestant(
            "flash-attn-4", False, "flash-attn-4",
            _needs_package("flash_attn.cute", "flash-attn-4"), _flash_attn("flash_attn.cute"),
        ),
        Contestant(
            "flash-attn-3", False, "flash-attn-3",
            _needs_package("flash_attn_interface", "flash-attn-3"),
            _flash_attn("flash_attn_interface"),
        ),
        Contestant(
            "flash-attn-2", False, "flash-attn",
            _needs_package("flash_attn.flash_attn_interface", "flash-attn"),
            _flash_attn("flash_attn"),
        ),
    )
}  # fmt: skip


def is_sparse(contestant: str, result: Mapping[str, Any]) -> bool:
    """Whether the contestant of a record visits only the blocks of the mask.

    One that was registered by a plugin, which need not be here now, says so in its record.
    """
    known = CONTESTANTS.get(contestant)
    return known.sparse if known is not None else result.get("sparse", False)
