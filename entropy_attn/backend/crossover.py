"""From which length on sparse attention beats dense, by what was measured (crossover.json).

Each point of the data is a shape with its break-even density: below it sparse attention, the
choice of blocks included, was faster than the best dense attention. Where the data leave room,
dense gets the benefit of the doubt, since it is never wrong:

- A length counts with the least break-even density of its own and of all longer ones, so that one
  lucky point does not let short calls run sparse.
- Between two lengths it is linear in the logarithm of the length. A density of 0 means 0 or less,
  so from there on nothing is gained before the next length. Nothing is gained below the shortest
  length either, and beyond the longest the density stays what it was there.
- A head_dim between two measured ones takes the worse of both at every length.
- What a call costs besides its products (launches, choosing) weighs more the fewer there are. So
  fewer heads over the batch than were measured, fewer queries than keys, or narrower heads need a
  length that makes as many products. More heads earn what was measured with more of them, and
  nothing between: what many heads earn says nothing about fewer ones.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import accumulate
from typing import Any

import torch

# Answers are whole numbers of this many tokens.
STEP = 64


@dataclass(frozen=True)
class Curve:
    """Break-even density by length, never falling.

    Attributes:
        lengths: of queries and keys, in tokens, ascending.
        densities: break-even at each length, 0 where sparse attention was always slower.
        rows: heads over the whole batch from which on it holds.
        is_causal: whether about half the keys are visible.
        source: what was measured, as text.
    """

    lengths: tuple[int, ...]
    densities: tuple[float, ...]
    rows: int
    is_causal: bool
    source: str

    def break_even(self, length: float) -> float:
        """The density below which sparse attention is faster at ``length``."""
        after = bisect_right(self.lengths, length)
        if after == 0:
            return 0.0
        low = self.densities[after - 1]
        if after == len(self.lengths) or low == 0:
            return low
        begin, end = self.lengths[after - 1], self.lengths[after]
        part = math.log(length / begin) / math.log(end / begin)
        return low + (self.densities[after] - low) * part

    def density(self, length: int, share: float, always_kept: float) -> float:
        """Of a mask that keeps a share of the visible keys and ``always_kept`` keys on top."""
        visible = length / 2 if self.is_causal else length
        return min(1.0, share + always_kept / visible)

    def shortest(self, share: float, always_kept: float) -> int | None:
        """The shortest length at which such a mask beats dense attention; None if none does.

        Break-even rises with the length and the density falls, so it holds for all longer ones.
        """
        for length in range(STEP, self.lengths[-1] + 1, STEP):
            even = self.break_even(length)
            if even > 0 and self.density(length, share, always_kept) <= even:
                return length
        return None


@dataclass(frozen=True)
class Crossover:
    """From where on sparse attention pays, for one kind of call.

    Attributes:
        starts: (length, rows, least_rows) for each number of heads that was measured and with
            which sparse attention pays: from ``length`` tokens of queries and keys on, with
            ``rows`` heads over the whole batch. Fewer heads need more tokens, and at least
            ``least_rows`` it takes.
        reason: why a call that does not pay runs dense. It names no size of the call, so that
            calls can be counted by it, and torch.compile can trace it with dynamic sizes.
    """

    starts: tuple[tuple[int, int, int], ...]
    reason: str

    def pays(self, rows: int, q_len: int, kv_len: int) -> bool:
        return beats_dense(self.starts, rows, q_len, kv_len)


def beats_dense(
    starts: tuple[tuple[int, int, int], ...], rows: int, q_len: int, kv_len: int
) -> bool:
    """Whether sparse attention is expected to beat dense in a call. Its sizes may be symbolic.

    Args:
        starts: of a `Crossover`.
        rows: heads over the whole batch.
    """
    for length, measured_rows, least_rows in starts:
        enough = measured_rows * length**2
        if rows >= least_rows and work(rows, q_len, kv_len, measured_rows) >= enough:
            return True
    return False


def work(rows: int, q_len: int, kv_len: int, most_rows: int) -> int:
    """Pairs of queries and keys over all heads, as far as they make up for fixed costs."""
    return min(rows, most_rows) * min(q_len, kv_len) * kv_len


def find_crossover(
    device: torch.device, head_dim: int, is_causal: bool, share: float, always_kept: float
) -> Crossover | None:
    """From where on sparse attention pays on ``device``, or None where nothing was measured.

    Args:
        share: of the visible keys that the mask keeps.
        always_kept: number of keys that it keeps on top of them.
    """
    return _find_crossover(architecture(device), head_dim, is_causal, share, always_kept)


@cache
def _find_crossover(
    arch: str, head_dim: int, is_causal: bool, share: float, always_kept: float
) -> Crossover | None:
    curves = make_curves(measured(), arch, head_dim, is_causal)
    if not curves:
        return None
    starts, found = [], []
    for curve in curves:
        length = curve.shortest(share, always_kept)
        if length is not None:
            starts.append((length, curve.rows, 0 if curve is curves[0] else curve.rows))
            density = curve.density(length, share, always_kept)
            found.append(f"{length} keys on, with as many queries and {curve.rows} heads over the "
                         f"batch, at density {density:.2f}")  # fmt: skip
    source = curves[0].source
    if not starts:
        density = max(c.density(c.lengths[-1], share, always_kept) for c in curves)
        never = f"sparse attention is not known to pay at density {density:.2f}"
        return Crossover((), f"{never} ({source})")
    return Crossover(
        tuple(starts), f"sparse attention pays from {', or from '.join(found)} ({source})"
    )


def compare_with_dense(
    device: torch.device, head_dim: int, is_causal: bool, rows: int, q_len: int, kv_len: int
) -> str | None:
    """How sparse attention of these sizes compares with dense attention that leaves nothing out.

    None where nothing was measured.
    """
    curves = make_curves(measured(), architecture(device), head_dim, is_causal)
    if not curves:
        return None
    # The square call in as many heads as were measured that has as much work.
    density = max(
        curve.break_even(math.sqrt(work(rows, q_len, kv_len, curve.rows) / curve.rows))
        for curve in curves
        if curve is curves[0] or curve.rows <= rows
    )
    source = curves[0].source
    if density == 0:
        return f"dense attention without the mask would be faster at this size ({source})"
    faster = f"faster than dense attention without the mask up to density {density:.2f}"
    return f"{faster} at this size ({source})"


def make_curves(
    points: Sequence[dict[str, Any]], arch: str, head_dim: int, is_causal: bool
) -> tuple[Curve, ...]:
    """The curves for one kind of call from measured points, one for each number of heads over the
    batch, the fewest first; none if no point says anything."""
    points = [p for p in points if p["is_causal"] == is_causal]
    nearest = _nearest_architecture(arch, {p["arch"] for p in points})
    points = [p for p in points if p["arch"] == nearest]
    if not points:
        return ()
    dims = sorted({p["head_dim"] for p in points})
    below, above = [d for d in dims if d <= head_dim], [d for d in dims if d >= head_dim]
    used = sorted({*below[-1:], *above[:1]})
    source = (
        f"measured on {nearest}{_instead_of(arch, nearest)}, head_dim "
        + " and ".join(map(str, used))
        + _instead_of(head_dim, *used)
        + (", causal" if is_causal else ", not causal")
    )
    # More rows make up for narrower heads: as many products.
    narrower = max(1.0, used[0] / head_dim)
    curves = []
    for rows in sorted({p["batch"] * p["heads"] for p in points if p["head_dim"] in used}):
        mine = [p for p in points if p["batch"] * p["heads"] == rows and p["head_dim"] in used]
        if {p["head_dim"] for p in mine} == set(used):
            lengths, densities = _rising(mine)
            curves.append(Curve(lengths, densities, math.ceil(rows * narrower), is_causal, source))
    return tuple(curves)


def _rising(points: Sequence[dict[str, Any]]) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Lengths, and the least break-even density at each and beyond."""
    at: dict[int, float] = {}
    for point in points:
        worst = at.get(point["kv_len"], 1.0)
        at[point["kv_len"]] = min(worst, point["break_even_density"])
    lengths = sorted(at)
    rising = [*accumulate((at[n] for n in reversed(lengths)), min)][::-1]
    return tuple(lengths), tuple(rising)


def _instead_of(wanted: object, *used: object) -> str:
    return "" if wanted in used else f", nearest to {wanted}"


def _nearest_architecture(arch: str, among: set[str]) -> str | None:
    """``arch``, or the nearest NVIDIA one by number, the newer of two; AMD's have no such order."""
    if arch in among:
        return arch
    if not _is_nvidia(arch):
        return None
    wanted = _number(arch)
    others = [a for a in among if _is_nvidia(a)]
    return min(others, key=lambda a: (abs(_number(a) - wanted), -_number(a)), default=None)


def _is_nvidia(arch: str) -> bool:
    return arch.startswith("sm") and arch[2:].isdigit()


def _number(arch: str) -> int:
    return int(arch[2:])


@cache
def measured() -> tuple[dict[str, Any], ...]:
    """The points of crossover.json. Records say "sm_90"; here and in the kernels it is "sm90"."""
    text = files("entropy_attn.backend").joinpath("crossover.json").read_text(encoding="utf-8")
    return tuple(p | {"arch": p["arch"].replace("_", "")} for p in json.loads(text))


def smallest_block() -> int:
    """Tokens of the smallest blocks that were measured."""
    return min(point["block"] for point in measured())


def architecture(device: torch.device) -> str:
    """As `entropy_attn.kernels.launch.architecture`, which needs the kernels: "sm90", "gfx942"."""
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm{properties.major}{properties.minor}"
