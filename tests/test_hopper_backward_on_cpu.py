"""The Hopper backward's own source on the CPU: each pair once, in any order of its warps.

Several programs run all their partitions on small random calls (`gluon_on_cpu`). Found are, beside
what is told there: pairs of a query and a key that are missing, added twice, or not masked; dK, dV
and parts of dQ that are made of another step's tiles; sums that are cleared, rounded or added to at
a wrong time.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gluon_on_cpu
import numpy as np
import pytest
import torch
from gluon_machine import Machine, Number, Part, Pointer, Symbol, check, run_programs
from hopper_calls import Call, assert_found, run_calls

from entropy_attn.block_lists import column_lists
from entropy_attn.kernels.hopper.order import backward_order
from entropy_attn.kernels.hopper.sum_tiles import STRIP
from entropy_attn.kernels.hopper.sums import UNITS, divide
from entropy_attn.kernels.launch import ceil_div

SOURCE = (
    "backward", "backward_memory", "backward_step", "columns", "primitives", "sum_tiles", "sums",
)  # fmt: skip
BLOCK_N = 128


def load(*edits: tuple[str, str]) -> Any:
    replaced = {"add_to_global": gluon_on_cpu.copy_out}
    return gluon_on_cpu.load(SOURCE, replaced, edits)


@dataclass(kw_only=True)
class Backward(Call):
    """A backward, and what it has done."""

    turns: bool
    unit: int
    lead: int

    @classmethod
    def draw(cls, seed: int) -> Backward:
        rng = random.Random(seed)
        programs = rng.choice((1, 2, 3, 5))
        return cls(
            batch=rng.choice((1, 1, 2)),
            kv_heads=rng.choice((1, 2, 4)), group=rng.choice((1, 1, 2)),
            q_len=rng.choice((1, 60, 129, 250, 257, 441)),
            kv_len=rng.choice((1, 100, 128, 200, 300)), block_d=rng.choice((64, 128)),
            block_size=(rng.choice((128, 128, 256)), BLOCK_N), is_causal=rng.random() < 0.5,
            is_listed=rng.random() < 0.75, has_lens=rng.random() < 0.3,
            stages=rng.choice((1, 2, 2, 3)), turns=rng.random() < 0.5, unit=rng.choice((1, 1, 4)),
            lead=rng.choice((1, 1, 2, 3)), programs=programs, places=rng.randint(1, programs),
            seed=seed,
        )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        self.block_m = 8192 // self.block_d
        self.head_dim = self.block_d - 56  # the last columns are cut, and few numbers are to move
        self.steps = ceil_div(self.q_len, self.block_m)
        self.units = divide(
            self.batch * self.kv_heads, self.group, self.key_blocks, self.steps, self.unit,
            self.lead,
        )  # fmt: skip
        self.sums = np.full((self.batch * self.heads, self.steps, 8192), np.nan)
        self.out = np.full((self.batch * self.heads, self.q_len, self.head_dim), np.nan)
        cleared = self.units.lead * self.units.strips * STRIP.value
        self.sums.reshape(-1)[:cleared] = 0
        self.counters = np.zeros(2 * self.units.count + 1, np.int64)
        self.gradients: dict[tuple[Any, ...], Symbol] = {}

    def lists(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Offsets (B, Hq, Mk + 1) and rows (B, Hq, all) of the transposed lists; none is spare."""
        mask = self.mask()
        offsets, rows = column_lists(mask.kv_num_blocks, mask.kv_indices, self.key_blocks)
        return offsets, rows[..., : max(1, int(offsets.max()))].contiguous()

    def run(self, module: Any) -> None:
        lists = self.lists()
        table = backward_order(
            *self.tensors(), *lists, self.units.heads, self.block_size[0], self.is_causal,
            *self.lens(),
        )  # fmt: skip
        order, offsets, rows = (x.numpy().astype(np.int64) for x in (table[:-1], *lists))
        box = {"query": self.block_m, "grad": self.block_m, "key": 128, "value": 64}

        descriptors = {f"{name}_desc": self.descriptor(name, rows) for name, rows in box.items()}
        descriptors |= {
            "rows_desc": self.descriptor("rows", 1, self.block_m, 4),
            "sum_desc": self.descriptor("dQ", 64, 128, 4),
            "grad_key_desc": self.descriptor("dK", 64),
            "grad_value_desc": self.descriptor("dV", 64),
        }
        pointers = {
            "sums_ptr": self.sums.reshape(-1), "grad_query_ptr": self.out.reshape(-1),
            "counters_ptr": self.counters,
            "order_ptr": order.reshape(-1), "offsets_ptr": offsets.reshape(-1),
            "rows_ptr": rows.reshape(-1), "kv_lens_ptr": self.kv_ends, "q_lens_ptr": self.q_ends,
        }  # fmt: skip
        numbers = {
            "count_stride_b": offsets[0].size, "count_stride_h": offsets[0, 0].size,
            "index_stride_b": rows[0].size, "index_stride_h": rows[0, 0].size,
            "kv_heads": self.kv_heads, "q_len": self.q_len, "kv_len": self.kv_len,
            "kv_tiles": self.key_blocks, **dict(zip(UNITS, self.units.numbers(), strict=True)),
        }  # fmt: skip

        def launch() -> None:
            module._backward_kernel(
                **descriptors, **{name: Pointer(x) for name, x in pointers.items()},
                **{name: Number(x) for name, x in numbers.items()}, scale_log2=1.0, scale=1.0,
                GROUP=self.group, HEAD_DIM=self.head_dim, BLOCK_D=self.block_d,
                BLOCK_M=self.block_m, BLOCK_Q=self.block_size[0], STAGES=self.stages,
                IS_CAUSAL=self.is_causal, MAY_CUT=self.may_cut, LISTED=self.is_listed,
                HAS_KV_LENS=self.has_lens, HAS_Q_LENS=self.has_lens,
                TURNS=self.turns, CONSUMER_REGISTERS=0, PRODUCER_REGISTERS=0,
            )  # fmt: skip

        machine = Machine(self.seed, self.places, self.stored)
        run_programs(machine, launch, min(self.programs, self.units.all_items))
        self.check_gradients()

    # What is made of what

    def tiles(self, name: str, head: tuple[int, int], start: int, rows: int) -> set[Any]:
        return {
            (name, *head, start + row, column)
            for row in range(0, rows, 64)
            for column in range(0, self.block_d, 64)
        }

    def step(self, query: tuple[int, int, int], key: tuple[int, int, int]) -> dict[str, set[Any]]:
        """Tags of the operands of a step of 64 keys."""
        batch, head, start = query
        row = 2 * (batch * self.heads + head)
        return {
            "query": self.tiles("query", (batch, head), start, self.block_m),
            "grad": self.tiles("grad", (batch, head), start, self.block_m),
            "key": self.tiles("key", key[:2], key[2], 64),
            "value": self.tiles("value", key[:2], key[2], 64),
            "lse": {("rows", row, start)},
            "delta": {("rows", row + 1, start)},
        }

    def stored(self, descriptor: Any, place: Sequence[int], contents: list[Any]) -> None:
        """A tile of dK or dV, or a part of dQ, is in memory."""
        symbol = contents[0].symbol
        if descriptor.name != "dQ":
            key = (descriptor.name, *place[:3])
            check(key not in self.gradients, f"{key} is written twice")
            check(all(part.symbol is symbol for part in contents), f"{key} is of two tiles")
            self.gradients[key] = symbol
            return
        head, step = divmod(place[0], self.steps)
        for half, part in enumerate(contents):
            self.check_tile(divmod(head, self.heads), step * self.block_m, half, part.symbol)
        self.sums[head, step] += 1

    def check_tile(self, head: tuple[int, int], start: int, half: int, symbol: Symbol) -> None:
        """A tile of what a step adds to dQ: of the first or second half of its rows or columns."""
        [(left, right)] = symbol.products()
        rows, columns = (half, 0) if self.block_m > 64 else (0, half)
        for number, part in enumerate(left):
            assert isinstance(part, Part)
            tags, _ = part.symbol.gather()
            key = min(tag[1:4] for tag in right if tag[0] == "key")
            step = self.step((*head, start), (*key[:2], key[2] + 64 * number))
            check(tags == set().union(*step.values()), f"dQ at {head}, {start}: dS of {tags}")
            check(part.column == rows, "another half of dS")
        keys = {("key", *key[:2], key[2] + n, 64 * columns) for n in (0, 64)}
        check(len(left) == 2 and set(right) == keys, f"dQ at {head}, {start}: keys {right}")

    def check_gradients(self) -> None:
        seen, found = self.seen(), np.zeros((self.batch, self.heads, self.q_len, self.kv_len))
        added = np.zeros((self.batch, self.heads, self.q_len))
        wanted = {
            (name, batch, head, start)
            for name in ("dK", "dV") for batch in range(self.batch)
            for head in range(self.kv_heads) for start in range(0, self.key_blocks * BLOCK_N, 64)
        }  # fmt: skip
        check(set(self.gradients) == wanted, "columns are missing")
        steps: dict[Any, Counter[Any]] = {name: Counter() for name in ("dK", "dV")}
        for (name, *key), symbol in self.gradients.items():
            if symbol.is_zero:
                continue
            for left, right in symbol.products():
                tags, masks = left.gather()
                query = min(tag[1:4] for tag in tags if tag[0] == "query")
                steps[name][(*key, *query)] += 1
                check(
                    query[2] < self.blocks * self.block_size[0],
                    "keys that nobody lists have a gradient",
                )
                step = self.step(query, tuple(key))
                of_p = step["key"] | step["query"] | step["lse"]
                if name == "dV":
                    check(tags == of_p and set(right) == step["grad"], f"dV of {tags}, {right}")
                    self.cover(found, query, key[2], masks)
                    if key[2] % BLOCK_N == 0:  # once for both warpgroups
                        added[query[0], query[1], query[2] : query[2] + self.block_m] += 1
                else:
                    of_ds = of_p | step["grad"] | step["value"] | step["delta"]
                    check(tags == of_ds and set(right) == step["query"], f"dK of {tags}, {right}")
        check(steps["dK"] == steps["dV"], "dK and dV of other steps")
        # Where a row sees nothing, its log-sum-exp makes P zero.
        rows = seen.any(-1)
        check((found == seen)[rows].all(), "pairs are missing, or added that are not seen")
        self.check_sums(added)

    def cover(self, found: np.ndarray, query: tuple[int, ...], key: int, masks: list[Any]) -> None:
        batch, head, start = query
        check(len(masks) < 2, "masked twice")
        mask = masks[0] if masks else np.ones((64, self.block_m), bool)
        found[batch, head, start : start + self.block_m, key : key + 64] += mask.T[
            : max(0, self.q_len - start), : max(0, self.kv_len - key)
        ]
        beyond = mask.T[: max(0, self.q_ends[batch] - start), max(0, self.kv_ends[batch] - key) :]
        check(not beyond.any(), "keys past the end are not masked")

    def check_sums(self, added: np.ndarray) -> None:
        units = self.units
        told = self.counters[units.count : 2 * units.count]
        last_items = units.all_items - (units.count - 1) * units.items
        check((told[:-1] == units.items).all() and told[-1] == last_items, "who has added")
        first = (units.count - units.lead) * units.heads * self.group
        check(bool(np.isnan(self.out[first:]).all()), "rounded before the last launch")
        same = bool((self.sums == self.sums[..., :1]).all())
        check(same, "dQ lacks parts of a step")
        found = self.sums[..., 0].repeat(self.block_m, 1)[:, : self.q_len]
        rounded = self.out[:first]
        check(bool((rounded == found[:first, :, None]).all()), "dQ is rounded at a wrong time")
        check(bool((found == added.reshape(found.shape)).all()), "dQ lacks parts, or has too many")


@pytest.mark.parametrize("first", range(0, 300, 50))
def test_each_pair_once_in_any_order(first):
    run_calls(Backward.draw, load(), range(first, first + 50))


RAISE = "    _wait_added()\n        _raise"
ADDED = "                self.wait_added(unit - self.lead)\n"
GIVEN_BACK = "            buffers.values.release(turn)"
TAKEN = "mbarrier.wait(self.taken.index(slot_of(turn, SLOTS)), phase_of(turn, SLOTS) ^ 1)"
FETCH = "        buffers.keys.wait_empty(turn)\n"
DS_SLOT = "    buffers.queries.wait_empty(use - 1 + buffers.queries.SLOTS)\n"
DS_FULL = "mbarrier.arrive(buffers.scores_full"
HANDED_OVER = "store(in_order(acc * columns.scale))"
FENCE = "\n    fence_async_shared()"

# What is forgotten: the source, what stands there instead, and what is said of it.
FAULTS = {
    "waiting for sums to be cleared": ("sums.wait_cleared(item)", "pass", "dQ lacks"),
    "waiting for sums to be added": (ADDED, "", "dQ is rounded"),
    "additions on their way": (RAISE, "    _raise", "dQ is rounded"),
    "the last column's keys": ("turn - is_first, use", "turn, use", "dQ at"),
    "waiting for a slot of dS": (DS_SLOT, "", "undefined|dS"),
    "the copy engine's alignment": ("Q * self.BLOCK_Q", "Q * 0 + self.q_len", "takes no"),
    "waiting for gradients to leave": (
        f"            tma.store_wait(0)\n{GIVEN_BACK}", GIVEN_BACK, "while it is read",
    ),
    "a fence behind dQ": (HANDED_OVER + FENCE, HANDED_OVER, "without a fence"),
    "a fence behind dS": (f"{FENCE}\n    {DS_FULL}", f"\n    {DS_FULL}", "without a fence"),
    "what the producer must not wait for": (
        FETCH, f"        sums.wait_cleared(item)\n{FETCH}", "deadlock",
    ),
    "waiting for a slot of items": (TAKEN, "pass", "."),
    "a step for each column": ("(step == last), last + 1", "(step == last), last", "."),
    "columns that nobody lists": ("nobody = end > last", "nobody = False", "nobody"),
    "keys past the end": (
        "gl.where(key_start + BLOCK_N > kv_end, count, clear)", "clear", "not masked",
    ),
    "aligning queries to the end": ("(start + kv_end - q_end)", "(start + kv_end)", "pairs"),
    "releasing queries": ("    buffers.queries.release(use)\n    return", "    return", "deadlock"),
    "releasing keys": ("        buffers.keys.release(turn - 1)\n", "", "deadlock"),
}  # fmt: skip


@pytest.mark.parametrize("forgotten", FAULTS)
def test_what_is_forgotten_is_found(forgotten):
    assert_found(Backward.draw, load, FAULTS[forgotten])
