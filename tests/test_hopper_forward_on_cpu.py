"""The Hopper forward's own source on the CPU: each pair once, in any order of its warps.

Several programs run all their partitions on small random calls (`gluon_on_cpu`). The softmax is
replaced by one that only says what its results are made of. Found are, beside what is told there:
pairs of a query and a key that are missing, added twice, or not masked; values of other keys than
the scores; results that are stored twice or never.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import gluon_on_cpu
import numpy as np
import pytest
from gluon_machine import Machine, Number, Pointer, Symbol, check, run_programs
from hopper_calls import Call, assert_found, run_calls

from entropy_attn.kernels.hopper.order import work_order
from entropy_attn.kernels.launch import ceil_div

SOURCE = ("forward", "guarded", "primitives", "producer", "row_values", "softmax")
ROWS = 64


def sums_of(*tiles: Symbol) -> SimpleNamespace:
    return SimpleNamespace(**{n: Symbol(tiles) for n in ("maximum", "mass", "row", "block")})


def later_softmax(scores: Symbol, sums: Any, *_: Any) -> tuple[Symbol, Any, Symbol]:
    return Symbol([scores]), sums_of(scores, sums.mass), Symbol([scores])


REPLACED = {
    "first_softmax": lambda scores, *_: (Symbol([scores]), sums_of(scores)),
    "next_softmax": later_softmax,
    "guarded_softmax": later_softmax,
    "for_guarded": lambda sums: sums,
    "rescale": lambda acc, alpha: Symbol([acc, alpha]),
    "where_below": lambda number, limit, x, _: gluon_on_cpu.where(number < limit, x, 0.0),
}


def load(*edits: tuple[str, str]) -> Any:
    return gluon_on_cpu.load(SOURCE, REPLACED, edits)


@dataclass(kw_only=True)
class Forward(Call):
    """A forward, and what it has done."""

    block_n: int
    key_stages: int
    warpgroups: int
    ping_pong: bool
    query_registers: bool
    pin: bool
    guard: bool

    @classmethod
    def draw(cls, seed: int) -> Forward:
        rng = random.Random(seed)
        programs = rng.choice((1, 2, 3))
        warpgroups = rng.choice((1, 2))
        block_q = 64 if warpgroups == 1 else rng.choice((128, 256))
        block_k = rng.choice((64, 128))
        block_d = rng.choice((64, 128))
        return cls(
            batch=rng.choice((1, 2)), kv_heads=rng.choice((1, 2)), group=rng.choice((1, 2)),
            q_len=rng.choice((1, 60, 129, 250, 300)), kv_len=rng.choice((1, 100, 128, 200, 330)),
            block_d=block_d, block_size=(block_q, block_k),
            block_n=rng.choice((block_k, 128)), warpgroups=warpgroups,
            is_causal=rng.random() < 0.5, is_listed=rng.random() < 0.75,
            has_lens=rng.random() < 0.3, stages=rng.choice((1, 2, 2, 3)),
            key_stages=rng.choice((1, 2, 2, 3)),
            ping_pong=warpgroups == 2 and rng.random() < 0.6,
            query_registers=(block_d == 64 or warpgroups == 1) and rng.random() < 0.5,
            pin=rng.random() < 0.3, guard=rng.random() < 0.5, programs=programs,
            places=rng.randint(1, programs), seed=seed,
        )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        self.block_m = ROWS * self.warpgroups
        self.q_tiles = ceil_div(self.q_len, self.block_m)
        self.found = np.zeros((self.batch, self.heads, self.q_len, self.kv_len))
        self.out: set[tuple[int, ...]] = set()

    def run(self, module: Any) -> None:
        mask = self.mask()
        lists = (mask.kv_num_blocks, mask.kv_indices) if self.is_listed else (None, None)
        table = work_order(
            *self.tensors(), *lists, self.block_size, self.block_m, self.is_causal, 50 << 20,
            self.programs, *self.lens(),
        )  # fmt: skip
        items = len(table) - 1
        order = table.numpy().reshape(-1).astype(np.int64)
        indices = mask.kv_indices.numpy().astype(np.int64)

        keys = min(self.block_n, self.block_size[1])
        lse = np.full(self.batch * self.heads * self.q_len, np.nan)
        numbers = {
            "index_stride_b": indices[0].size, "index_stride_h": indices[0, 0].size,
            "index_stride_t": indices.shape[-1], "heads": self.heads, "group": self.group,
            "q_len": self.q_len, "kv_len": self.kv_len, "q_tiles": self.q_tiles, "items": items,
        }  # fmt: skip

        def launch() -> None:
            module._forward_kernel(
                self.descriptor("query", ROWS), self.descriptor("key", keys),
                self.descriptor("value", keys), self.descriptor("out", ROWS),
                Pointer(lse), Pointer(lse), Pointer(lse),
                Pointer(indices.reshape(-1)), Pointer(self.kv_ends), Pointer(self.q_ends),
                Pointer(order), **{name: Number(x) for name, x in numbers.items()}, scale_log2=1.0,
                BLOCK_D=self.block_d, BLOCK_N=self.block_n, BLOCK_Q=self.block_size[0],
                BLOCK_K=self.block_size[1], WARPGROUPS=self.warpgroups,
                KEY_STAGES=self.key_stages, VALUE_STAGES=self.stages,
                IS_CAUSAL=self.is_causal, MAY_CUT=self.may_cut, LISTED=self.is_listed,
                HAS_KV_LENS=self.has_lens, HAS_Q_LENS=self.has_lens,
                ROW_ENTROPY=False, BLOCK_ENTROPY=False, PING_PONG=self.ping_pong,
                QUERY_REGISTERS=self.query_registers, PIN=self.pin, GUARD=self.guard,
                CONSUMER_REGISTERS=0, PRODUCER_REGISTERS=0,
            )  # fmt: skip

        machine = Machine(self.seed, self.places, self.stored)
        run_programs(machine, launch, min(self.programs, items))
        check(order[4 * items] == 0, "the counter is not 0 again")
        check(bool((lse == 1).all()), "log-sum-exps are missing")
        wanted = {
            (batch, head, row)
            for batch in range(self.batch) for head in range(self.heads)
            for row in range(0, self.q_tiles * self.block_m, ROWS)
        }  # fmt: skip
        check(self.out == wanted, "results are missing")
        check(bool((self.found == self.seen()).all()), "pairs are missing, or are not seen")

    def stored(self, descriptor: Any, place: Sequence[int], contents: list[Any]) -> None:
        """A tile of the output is in memory."""
        batch, head, row, _ = place
        check((batch, head, row) not in self.out, f"{place} is written twice")
        self.out.add((batch, head, row))
        columns = range(0, self.block_d, 64)
        for left, right in contents[0].symbol.products():
            tags, masks = left.gather()
            queries = {("query", batch, head, row, column) for column in columns}
            keys = {tag for tag in tags if tag[0] == "key"}
            check(tags - keys == queries, f"scores at {place} of {tags - keys}")
            check({("value", *tag[1:]) for tag in keys} == set(right), f"values {right}")
            check(all(tag[1:3] == (batch, head // self.group) for tag in right), f"heads {right}")
            self.cover(place, [tag[3] for tag in right if tag[4] == 0], masks)

    def cover(self, place: Sequence[int], runs: list[int], masks: list[np.ndarray]) -> None:
        """Of a step: keys by runs of 64, in the order in which they lie in the tile."""
        batch, head, row, _ = place
        check(len(masks) < 2, "masked twice")
        mask = masks[0] if masks else np.ones((ROWS, self.block_n), bool)
        check(len(runs) * 64 == mask.shape[1], f"keys from {runs} on")
        rows = max(0, self.q_len - row)
        valid = max(0, self.q_ends[batch] - row)
        for number, start in enumerate(runs):
            part = mask[:, number * 64 : (number + 1) * 64]
            if start >= self.kv_len and not masks:  # of an empty list; the result will be 0
                check(not self.listed[batch, head, row // self.block_size[0]].any(), "a gap")
                continue
            check(not part[:valid, max(0, self.kv_ends[batch] - start) :].any(), "not masked")
            part = part.copy()
            part[valid:] = False  # rows of padding are left out when they are stored
            self.found[batch, head, row : row + ROWS, start : start + 64] += part[
                :rows, : max(0, self.kv_len - start)
            ]


@pytest.mark.parametrize("first", range(0, 200, 50))
def test_each_pair_once_in_any_order(first):
    run_calls(Forward.draw, load(), range(first, first + 50))


KEYS_FREE = "            memory.keys.wait_empty(use)\n"
KEYS_FETCHED = "            memory.keys.fetch(use, key_desc, batch"
QUERIES_READ = "        query = query.load(gl.DotOperandLayout(0, layout, 2))\n"
QUERIES_RELEASED = "        gl.thread_barrier()\n        memory.queries.release(turn)\n"

# What is forgotten: the source, what stands there instead, and what is said of it.
FAULTS = {
    "waiting for a free slot of keys": (KEYS_FREE + KEYS_FETCHED, KEYS_FETCHED, "."),
    "waiting for values": ("    memory.values.wait_full(use - 1)\n", "", "undefined|deadlock"),
    "waiting for a free slot of items": (
        "        memory.queries.wait_empty(turn)\n", "", ".",
    ),
    "releasing keys": ("    memory.keys.release(use)\n", "", "deadlock"),
    "releasing queries": (
        "            memory.queries.release(turn)\n", "            pass\n", "deadlock",
    ),
    "releasing queries in registers": (
        "        memory.queries.release(turn)\n    return query", "    return query", "deadlock",
    ),
    "that queries are read before they are released": (
        QUERIES_READ + QUERIES_RELEASED, QUERIES_RELEASED + QUERIES_READ, "undefined",
    ),
    "the gap of an odd list": ("gl.where(slot < last, start, self.kv_len)", "start", "."),
    "the diagonal": ("gl.minimum(limits, positions + 1)", "limits", "pairs"),
    "waiting until a result has left": (
        "    tma.store_wait(0)  # the item before has left shared memory\n", "", "while it is read",
    ),
    "a fence behind a result": ("    fence_async_shared()\n", "", "without a fence"),
    "setting the counter back": ("mask=claimed == items - 1", "mask=claimed == items", "counter"),
}  # fmt: skip


@pytest.mark.parametrize("forgotten", FAULTS)
def test_what_is_forgotten_is_found(forgotten):
    assert_found(Forward.draw, load, FAULTS[forgotten])
