"""Thousands of launches over random shapes, every output checked: `make soak`, on a GPU.

    python tests/soak.py --launches 10000 --seed 1

Each problem is solved by the reference in fp64 and in its own dtype; the kernels may be twice as
far from the truth as the latter is, and an epsilon. Then the launches are repeated: outputs,
entropies, dK and dV must be the same bits each time, dQ only where its sum has a fixed order.
Calls are sent to the kernel of this GPU's architecture whatever their size. The backward for Hopper
divides its work as on a small GPU, so that also that of few heads is in many units, or as on one
that is larger than this one. New memory is filled with NaN: else it may hold the right answer of
the launch before.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import repeat
from multiprocessing import get_context
from typing import Any

import torch
from poison import poison_memory
from torch import Tensor

import entropy_attn as ea
from entropy_attn import ops
from entropy_attn.benchmarks.store import Record, Store
from entropy_attn.kernels.launch import architecture, other_gluon

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Problem:
    """One random call; the tensors follow from ``seed``."""

    seed: int
    batch: int
    kv_heads: int
    group: int
    q_len: int
    kv_len: int
    head_dim: int
    dtype: str
    block: tuple[int, int]
    is_causal: bool
    has_lengths: bool
    density: float
    entropy: bool
    backward: bool

    @classmethod
    def draw(cls, rng: random.Random) -> Problem:
        few = rng.random() < 0.2  # as in decoding
        entropy = not few and rng.random() < 0.3
        return cls(
            seed=rng.randrange(2**31),
            batch=rng.randint(1, 3),
            kv_heads=rng.choice((1, 2, 3, 7)),
            group=rng.choice((1, 2, 3, 4)),
            q_len=rng.randint(1, 16) if few else rng.choice((rng.randint(17, 700), 256, 512)),
            kv_len=rng.choice((rng.randint(1, 900), rng.randint(1, 900), 128, 640)),
            head_dim=rng.choice((64, 80, 128)),
            dtype=rng.choice(tuple(DTYPES)),
            block=rng.choice(((64, 64), (128, 64), (128, 128), (256, 128))),
            is_causal=rng.random() < 0.5,
            has_lengths=rng.random() < 0.3,
            density=rng.choice((0.0, 0.1, 0.3, 0.7, 1.0)),
            entropy=entropy,
            backward=not few and rng.random() < 0.5,
        )

    def tensors(self) -> tuple[list[Tensor], ea.BlockMask, dict[str, Any], Tensor]:
        """Query, key and value; the mask; options; the gradient of the output."""
        generator = torch.Generator(DEVICE).manual_seed(self.seed)
        heads = self.group * self.kv_heads

        def normal(heads: int, length: int) -> Tensor:
            shape = (self.batch, heads, length, self.head_dim)
            x = torch.randn(shape, generator=generator, device=DEVICE)
            return x.to(DTYPES[self.dtype])

        query, grad = normal(heads, self.q_len) * 3, normal(heads, self.q_len)
        key, value = normal(self.kv_heads, self.kv_len), normal(self.kv_heads, self.kv_len)
        tiles, blocks = -(-self.q_len // self.block[0]), -(-self.kv_len // self.block[1])
        shape = (self.batch, heads, tiles, blocks)
        kept = torch.rand(shape, generator=generator, device=DEVICE) < self.density
        if self.density == 1:  # every block: no lists are read
            mask = ea.BlockMask.full(
                self.batch, heads, self.q_len, self.kv_len, self.block, device=DEVICE
            )
        else:
            mask = ea.BlockMask.from_dense(kept, self.block, self.q_len, self.kv_len)
        options: dict[str, Any] = {"is_causal": self.is_causal}
        if self.has_lengths:
            for name, most in (("q_lens", self.q_len), ("kv_lens", self.kv_len)):
                lens = torch.randint(0, most + 1, (self.batch,), generator=generator, device=DEVICE)
                options[name] = lens.to(torch.int32)
        return [query, key, value], mask, options, grad


def solve(problem: Problem, backend: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """What a backend gives, by name."""
    inputs, mask, options, grad = problem.tensors()
    if dtype is not None:
        inputs, grad = [x.to(dtype) for x in inputs], grad.to(dtype)
    leaves = [x.requires_grad_(problem.backward) for x in inputs]
    if problem.entropy:
        out, entropy = ea.attention_with_entropy(
            *leaves, block_mask=mask, kinds=("row", "block"), backend=backend, **options
        )
        found = {"out": out, "row": entropy.row, "block": entropy.block}
    else:
        out, lse = ea.block_sparse_attention(
            *leaves, mask, return_lse=True, backend=backend, **options
        )
        is_empty = lse == float("-inf")
        found = {"out": out, "lse": torch.where(is_empty, 0.0, lse), "empty": is_empty.float()}
    if problem.backward:
        loss = (out * grad).sum()
        if not problem.entropy:
            loss = loss + found["lse"].sum()
        grads = torch.autograd.grad(loss, leaves)
        found |= dict(zip(("dQ", "dK", "dV"), grads, strict=True))
    return {name: x.detach() for name, x in found.items()}


def adds_in_any_order(problem: Problem) -> bool:
    """Whether dQ is summed up in an order that is not fixed."""
    (query, key, value), _, _, grad = problem.tensors()
    kernel, _ = ops.backward_kernel(
        grad, query, key, value, problem.block, 0, problem.head_dim**-0.5
    )
    return kernel == ops.HOPPER_BACKWARD


def check(problem: Problem, backend: str, repeats: int) -> list[str]:
    """What is wrong in any of some launches of a problem."""
    poison_memory()
    rng = random.Random(problem.seed)
    ops.SMALL = ops.SMALL_BACKWARD = 0
    if DEVICE == "cuda" and architecture(torch.device(DEVICE)) == "sm90" and other_gluon() is None:
        from entropy_attn.kernels.hopper import backward

        backward.device_limits = lambda index: (rng.choice((2, 20, 1000)), 50 << 20)
    truth = solve(problem, "reference", torch.float64)
    rounded = solve(problem, "reference")
    first, wrong, unordered = solve(problem, backend), [], adds_in_any_order(problem)
    for launch in range(repeats):
        found = first if launch == 0 else solve(problem, backend)
        for name, x in found.items():
            true = truth[name]
            epsilon = torch.finfo(
                DTYPES[problem.dtype] if x.dtype != torch.float32 else x.dtype
            ).eps
            size = true.abs().amax()
            if x.dtype == torch.float32:  # lse and entropies: of scores of some ten
                size = size.clamp(min=10.0)
            allowed = 2 * (rounded[name] - true).abs().amax() + 4 * epsilon * size
            error = (x - true).abs().amax()
            if not error <= allowed:  # NaN is wrong
                wrong.append(f"launch {launch}, {name}: {error:.3g} exceeds {allowed:.3g}")
            elif not (name == "dQ" and unordered) and not torch.equal(x, first[name]):
                wrong.append(f"launch {launch}, {name}: other bits than the first time")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--launches", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=8, help="launches of each problem")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1, help="processes; each compiles kernels")
    parser.add_argument("--backend", default="triton" if DEVICE == "cuda" else "reference")
    arguments = parser.parse_args()
    rng, failures, start = random.Random(arguments.seed), [], time.perf_counter()
    problems = [Problem.draw(rng) for _ in range(-(-arguments.launches // arguments.repeats))]
    with ProcessPoolExecutor(arguments.workers, get_context("spawn")) as workers:
        results = workers.map(check, problems, repeat(arguments.backend), repeat(arguments.repeats))
        for number, (problem, wrong) in enumerate(zip(problems, results, strict=True), 1):
            for text in wrong:
                print(f"{problem}: {text}", flush=True)
                failures.append({**asdict(problem), "wrong": text})
            if number % 50 == 0:
                print(f"{number} of {len(problems)} problems, {len(failures)} failures", flush=True)
    result = {
        "status": "failed" if failures else "ok",
        "launches": len(problems) * arguments.repeats,
        "failures": failures[:20],
        "seconds": round(time.perf_counter() - start, 1),
    }
    config = {name: getattr(arguments, name) for name in ("seed", "backend", "launches", "repeats")}
    Store().append(Record("soak", config, result))
    print(f"{result['launches']} launches, {len(failures)} failures")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
