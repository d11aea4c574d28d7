"""Decoding: one token a sequence against a long cache, as a share of the memory's bandwidth.

Every listed key and value has to be read once, and products cost nothing, so memory is the limit.
It is measured in two ways: by a copy of all keys, whose bandwidth no launch dims, and by a
sum over as many bytes as are listed, which lie side by side. Sparse rows visit random blocks of 64
keys, as many for every key head; choosing them is not part of this suite.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import entropy_attn as ea
from entropy_attn.benchmarks.baselines import our_backend
from entropy_attn.benchmarks.contest import first_line
from entropy_attn.benchmarks.environment import sm_clock_mhz
from entropy_attn.benchmarks.registry import Context, Row
from entropy_attn.benchmarks.timing import measure
from entropy_attn.reference.dense import dense_attention
from entropy_attn.testing import assert_close_to_reference

OURS, PAGED = "entropy-attn", "entropy-attn, pages of 64"
COPY, SUM = "copy", "sum of as many bytes"
KERNELS = {
    "SDPA": None,
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
}
PAGE = 64


@dataclass(frozen=True)
class Case:
    """``queries`` tokens of each of ``batch`` sequences against ``length`` keys."""

    batch: int
    length: int
    density: float = 1.0
    heads: int = 32
    kv_heads: int = 8
    queries: int = 1
    head_dim: int = 128
    block: int = 64
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        heads = f"{self.heads}/{self.kv_heads} heads"
        words = f"decode, {self.batch} x {self.length}, {heads}, density {self.density:g}"
        return words if self.queries == 1 else f"{words}, {self.queries} queries"


def cases(form: str) -> list[Case]:
    if form == "small":
        return [Case(2, 512, 0.5, heads=4, kv_heads=2, head_dim=32, dtype="float32")]
    found = [Case(8, 65536, density) for density in (1.0, 0.25, 0.1)]
    if form == "quick":
        return found[:2]
    found += [Case(8, 16384, density) for density in (1.0, 0.25)]
    found += [Case(1, 65536, density) for density in (1.0, 0.25)]
    found += [Case(8, 32768, 0.25, kv_heads=32), Case(8, 65536, 0.25, queries=4)]
    return [*found, Case(64, 8192, 0.25)]


@dataclass(frozen=True)
class Inputs:
    """Tensors of a case; ``kept`` (B, Hkv, 1, Mk) bool are the blocks of ``mask``."""

    query: Tensor
    key: Tensor
    value: Tensor
    kept: Tensor
    mask: ea.BlockMask

    @classmethod
    def of(cls, case: Case, device: torch.device) -> Inputs:
        generator = torch.Generator(device).manual_seed(0)

        def normal(heads: int, length: int) -> Tensor:
            shape = (case.batch, heads, length, case.head_dim)
            return torch.randn(
                shape, device=device, generator=generator, dtype=getattr(torch, case.dtype)
            )

        key, value = (normal(case.kv_heads, case.length) for _ in range(2))
        query = normal(case.heads, case.queries)
        blocks = case.length // case.block
        score = torch.rand(case.batch, case.kv_heads, 1, blocks, device=device, generator=generator)
        kept = score.argsort(-1).argsort(-1) < round(case.density * blocks)
        kept[..., -1] = True  # the block of the token itself
        mask = ea.BlockMask.from_dense(kept, (16, case.block), case.queries, case.length)
        if case.density == 1:
            mask = ea.BlockMask.full(
                1, 1, case.queries, case.length, (16, case.block), device=device
            )
        return cls(query, key, value, kept, mask)

    def read_bytes(self) -> int:
        """Of the listed keys and values."""
        block = self.mask.block_size[1] * self.key.shape[3] * self.key.element_size()
        return 2 * block * int(self.kept.sum())

    def pages(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values in pages of `PAGE` tokens in disorder, and the table of the pages."""
        key, value = (
            x.unflatten(2, (-1, PAGE)).transpose(1, 2).flatten(0, 1) for x in (self.key, self.value)
        )
        order = torch.randperm(len(key), device=key.device)
        key, value = (torch.empty_like(x).index_copy_(0, order, x) for x in (key, value))
        return key, value, order.view(len(self.query), -1).to(torch.int32)

    def contestants(self, case: Case) -> dict[str, Callable[[], Tensor]]:
        query, key, value = self.query, self.key, self.value
        backend = our_backend(query.device)
        *pages, table = self.pages()
        lens = torch.full((case.batch,), case.length, dtype=torch.int32, device=query.device)
        found: dict[str, Callable[[], Tensor]] = {
            OURS: lambda: ea.block_sparse_attention(
                query, key, value, self.mask, is_causal=True, backend=backend
            ),
            PAGED: lambda: ea.paged_attention(
                query, *pages, table, lens, self.mask, backend=backend
            ),
        }
        if case.density == 1:
            for name, kernel in KERNELS.items():
                found[name] = _sdpa(query, key, value, kernel)
        return found

    def wrong(self, found: Tensor) -> str | None:
        """What is wrong with an output, judged by the first sequence, or None."""
        group = self.query.shape[1] // self.key.shape[1]
        queries, keys = self.query.shape[2], self.key.shape[2]
        position = torch.arange(queries, device=self.key.device)[:, None] + keys - queries
        visible = torch.arange(keys, device=self.key.device) <= position
        listed = self.kept[:1].repeat_interleave(self.mask.block_size[1], -1)
        visible = visible & listed.repeat_interleave(group, 1)
        first = (self.query[:1], self.key[:1], self.value[:1])
        high = torch.float64 if self.query.dtype == torch.float32 else torch.float32
        exact, plain = (
            dense_attention(*(x.to(dtype) for x in first), visible, self.query.shape[3] ** -0.5)[0]
            for dtype in (high, self.query.dtype)
        )
        try:
            assert_close_to_reference(found[:1], plain, exact)
        except AssertionError as error:
            return str(error)
        return None


def _sdpa(
    query: Tensor, key: Tensor, value: Tensor, kernel: SDPBackend | None
) -> Callable[[], Tensor]:
    def call() -> Tensor:
        # One query is causal without saying so.
        return F.scaled_dot_product_attention(query, key, value, enable_gqa=True)

    def forced() -> Tensor:
        with sdpa_kernel(kernel):
            return call()

    return call if kernel is None else forced


def run(context: Context) -> Iterator[Row]:
    seconds = {"full": 1.0, "quick": 0.5, "small": 0.05}[context.form]
    for case in context.left(cases(context.form), contestants=(OURS,)):
        context.progress(case.name)
        yield from _run_case(context, case, seconds)
        if context.on_gpu:
            torch.cuda.empty_cache()


def _run_case(context: Context, case: Case, seconds: float) -> Iterator[Row]:
    inputs = Inputs.of(case, context.device)
    results: dict[str, dict[str, Any]] = {}
    calls: dict[str, Callable[[], object]] = {}
    for name, call in inputs.contestants(case).items():
        try:
            reason = inputs.wrong(call())
        except Exception as error:  # a rival that breaks is a finding, not the end of the suite
            results[name] = {"status": "failed", "reason": first_line(error)}
            continue
        if reason is not None:
            results[name] = {"status": "wrong", "reason": reason}
            continue
        results[name], calls[name] = {"status": "ok"}, call
    source = inputs.key.flatten()
    target = torch.empty_like(source)
    numbers = torch.randn(inputs.read_bytes() // 4, device=context.device)
    calls[COPY] = lambda: target.copy_(source)
    calls[SUM] = numbers.sum
    timings = measure({name: [call] for name, call in calls.items()}, seconds=seconds,
                      device=context.device)  # fmt: skip
    copied = 2 * source.numel() * source.element_size() / timings[COPY].median_ms  # bytes a ms
    limits: dict[str, dict[str, Any]] = {name: {"status": "ok"} for name in (COPY, SUM)}
    for name, result in {**results, **limits}.items():
        text = f"{case.name} | {name}: {result.get('reason', '')}"
        if name in timings:
            result |= timings[name].as_dict() | {
                "copy_gb_s": copied / 1e6, "sm_clock_mhz": sm_clock_mhz()
            }  # fmt: skip
            text += f"{timings[name].median_ms:.3f} ms"
            if name not in limits:
                result["bandwidth"] = inputs.read_bytes() / timings[name].median_ms / copied
                result["of_sum"] = timings[SUM].median_ms / timings[name].median_ms
                text += f", {result['bandwidth']:.0%} of the copy's bandwidth"
                text += f", {result['of_sum']:.0%} of the speed of a sum"
        config = {"form": context.form, **asdict(case), "contestant": name}
        yield Row(config, result, text, name in (OURS, PAGED))
