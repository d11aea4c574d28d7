"""Two commits or two machines compared, from the result store: what became faster, what slower.

A difference counts where it is larger than the noise: the spread of both measurements, and at least
`TIME_NOISE` for times, as a GPU under a power limit gives no better within one run.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from entropy_attn.benchmarks.baselines import OURS
from entropy_attn.benchmarks.store import Record, latest

TIME_NOISE = 0.05
QUALITY_NOISE = 0.005
# Between records of which one emptied the cache by writing: see `timing`.
EMPTYING_MS = 0.009
SHORTEST_HASH = 7


@dataclass(frozen=True)
class Metric:
    """What of a result is compared.

    Attributes:
        name: its key in the result.
        is_less_better: as of times.
        noise: relative difference that means nothing.
    """

    name: str
    is_less_better: bool
    noise: float


# The first that a result has.
METRICS = (
    Metric("median_ms", True, TIME_NOISE),
    Metric("accuracy", False, QUALITY_NOISE),
    Metric("perplexity", True, QUALITY_NOISE),
    Metric("break_even_density", False, TIME_NOISE),
)


@dataclass(frozen=True)
class Change:
    """One measurement, old and new.

    Attributes:
        gain: how many times better the new one is; below 1 it is worse.
        noise: relative difference that means nothing.
    """

    old: Record
    new: Record
    metric: Metric
    gain: float
    noise: float

    @property
    def verdict(self) -> str:
        """ "better", "worse" or "same"."""
        if self.gain > 1 + self.noise:
            return "better"
        return "worse" if 1 / self.gain > 1 + self.noise else "same"

    @property
    def is_ours(self) -> bool:
        """Whether it is of this package; what others do is shown for the machine's sake."""
        return self.new.config.get("contestant", OURS).startswith(OURS)

    @property
    def name(self) -> str:
        config = {k: v for k, v in self.new.config.items() if k != "form" and v is not None}
        return ", ".join(f"{key}={value}" for key, value in config.items())


def choose(records: Sequence[Record], which: str, repository: Path = Path()) -> list[Record]:
    """The latest records of a commit (a hash, a branch, HEAD~3) or of a machine (part of its name).

    Raises:
        ValueError: there are none; the message says what there is.
    """
    commit = _resolve(which, repository)
    found = [r for r in records if commit and _is_of(r, commit)]
    if not found:
        found = [r for r in records if which.lower() in r.machine.lower()]
    if not found:
        commits = sorted({(r.environment["commit"] or "unknown")[:9] for r in records})
        machines = sorted({r.machine for r in records})
        raise ValueError(
            f"no record is of {which!r}; there are the commits {', '.join(commits) or 'none'} and "
            f"the machines {', '.join(machines) or 'none'}"
        )
    return latest(found)


def _resolve(which: str, repository: Path) -> str | None:
    """The hash that git knows a name by; a hash stays one without git."""
    try:
        command = ["git", "rev-parse", "--verify", "--quiet", f"{which}^{{commit}}"]
        done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    except OSError:
        done = None
    if done is not None and done.returncode == 0:
        return done.stdout.strip()
    is_hash = len(which) >= SHORTEST_HASH and set(which) <= set("0123456789abcdef")
    return which if is_hash else None


def _is_of(record: Record, commit: str) -> bool:
    mine = record.environment["commit"] or ""
    return len(mine) >= SHORTEST_HASH and (mine.startswith(commit) or commit.startswith(mine))


def compare(old: Sequence[Record], new: Sequence[Record]) -> list[Change]:
    """Of what both measured, in the order of ``new``; records that failed are left out.

    On the machines that both ran on; where there is none, one machine is compared with another.
    """
    shared = {r.machine for r in old} & {r.machine for r in new}

    def key(record: Record) -> str:
        return record.key if shared else str((record.suite, sorted(record.config.items())))

    before = {key(record): record for record in old}
    changes = []
    for record in new:
        other = before.get(key(record))
        if other is None or {record.result["status"], other.result["status"]} != {"ok"}:
            continue
        change = _change(other, record)
        changes += [] if change is None else [change]
    return changes


def _change(old: Record, new: Record) -> Change | None:
    for metric in METRICS:
        before, after = old.result.get(metric.name), new.result.get(metric.name)
        if before and after:
            gain = before / after if metric.is_less_better else after / before
            noise = max(metric.noise, _spread(old), _spread(new))
            ways = {record.result.get("emptied") for record in (old, new)}
            if metric.name == "median_ms" and len(ways) > 1:
                noise = max(noise, EMPTYING_MS / min(before, after))
            return Change(old, new, metric, gain, noise)
    return None


def _spread(record: Record) -> float:
    """Of the middle of the timed rounds, relative to their median."""
    result = record.result
    if "p80_ms" not in result:
        return 0.0
    return (result["p80_ms"] - result["p20_ms"]) / result["median_ms"]
