"""The one timing helper: all contestants take turns, so that each meets the same machine.

Clocks and temperature drift within seconds, so contestants that are timed one after the other
are not comparable. Here every round calls each contestant once, on the next of several input sets,
and medians are taken over the rounds. The order of a round is drawn anew: a contestant that always
came after the same other one would be timed at the clock that this one leaves behind.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

# Shorter GPU calls than this are timed with a cold L2 cache and a queue that never runs dry.
SHORT_CALL_MS = 2.0
# About 1 ms of waiting on the GPU, in which the host enqueues a whole short call.
COVER_CYCLES = 2_000_000


@dataclass(frozen=True)
class Timing:
    """Statistics of one contestant over the rounds, in milliseconds.

    Attributes:
        emptied: how the L2 cache was emptied before a call: "read"; None where it was not.
    """

    median_ms: float
    p20_ms: float
    p80_ms: float
    rounds: int
    emptied: str | None = None

    @classmethod
    def of(cls, samples: Sequence[float], emptied: str | None = None) -> Timing:
        ordered = sorted(samples)
        last = len(ordered) - 1
        return cls(
            median_ms=statistics.median(ordered),
            p20_ms=ordered[round(0.2 * last)],
            p80_ms=ordered[round(0.8 * last)],
            rounds=len(ordered),
            emptied=emptied,
        )

    def as_dict(self) -> dict[str, Any]:
        """For records, of which those up to a96b792 emptied the cache by writing and do not say."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def measure(
    contestants: Mapping[str, Sequence[Callable[[], object]]],
    *,
    seconds: float = 1.0,
    min_rounds: int = 5,
    max_rounds: int = 100,
    rounds: int | None = None,
    device: torch.device | str | None = None,
) -> dict[str, Timing]:
    """Time every contestant in interleaved rounds.

    Args:
        contestants: by name, the call once for each input set; round r uses set r modulo their
            number. All have the same number of sets.
        seconds: about how long to measure, warm-up not counted.
        min_rounds, max_rounds: bounds on the rounds that ``seconds`` gives.
        rounds: exactly so many, without warm-up, for calls that are warm and take seconds.
        device: "cuda" times on the GPU's own clock, others by wall clock; by default a GPU if
            there is one.

    Returns:
        The timing of each contestant, by name.
    """
    sets = {len(calls) for calls in contestants.values()}
    if len(sets) != 1 or 0 in sets:
        raise ValueError(f"contestants need the same number of input sets, at least 1, got {sets}")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    clock = _GpuClock() if torch.device(device).type == "cuda" else _WallClock()

    if rounds is None:
        total, shortest = _warm_up(contestants, clock)
        clock.choose_mode(shortest)
        rounds = max(min_rounds, min(max_rounds, int(seconds * 1e3 / max(total, 1e-6))))

    names = list(contestants)
    draw = random.Random(0)
    for turn in range(rounds):
        for name in draw.sample(names, len(names)):
            calls = contestants[name]
            clock.time(name, calls[turn % len(calls)])
    return {name: Timing.of(samples, clock.emptied) for name, samples in clock.collect().items()}


def _warm_up(
    contestants: Mapping[str, Sequence[Callable[[], object]]], clock: _WallClock | _GpuClock
) -> tuple[float, float]:
    """Milliseconds of a round and of its shortest call, once every call has compiled."""
    for name, calls in contestants.items():
        for call in calls:
            call()
        clock.time(name, calls[0])
    estimates = [samples[0] for samples in clock.collect().values()]
    return sum(estimates), min(estimates)


class _WallClock:
    """Times calls that have done their work when they return."""

    emptied: str | None = None

    def __init__(self) -> None:
        self._samples: dict[str, list[float]] = {}

    def choose_mode(self, shortest_ms: float) -> None:
        pass

    def time(self, name: str, call: Callable[[], object]) -> None:
        start = time.perf_counter()
        call()
        self._samples.setdefault(name, []).append((time.perf_counter() - start) * 1e3)

    def collect(self) -> dict[str, list[float]]:
        samples, self._samples = self._samples, {}
        return samples


class _GpuClock:
    """Times calls with CUDA events; the host runs ahead and waits once, in `collect`."""

    def __init__(self) -> None:
        self._events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {}
        self._flush: torch.Tensor | None = None

    @property
    def emptied(self) -> str | None:
        return None if self._flush is None else "read"

    def choose_mode(self, shortest_ms: float) -> None:
        if shortest_ms < SHORT_CALL_MS:
            cache_bytes = torch.cuda.get_device_properties(0).L2_cache_size
            self._flush = torch.zeros(cache_bytes, dtype=torch.float32, device="cuda")

    def time(self, name: str, call: Callable[[], object]) -> None:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if self._flush is not None:
            # Filled by reading: what a write leaves there, the timed call has to write back before
            # it can use the cache, which takes it up to 9 us on an H200.
            self._flush.amax()
            torch.cuda._sleep(COVER_CYCLES)
        start.record()
        call()
        end.record()
        self._events.setdefault(name, []).append((start, end))

    def collect(self) -> dict[str, list[float]]:
        torch.cuda.synchronize()
        events, self._events = self._events, {}
        return {
            name: [start.elapsed_time(end) for start, end in pairs]
            for name, pairs in events.items()
        }


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The most memory that one call adds to what was there; 0 where torch does not count."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
