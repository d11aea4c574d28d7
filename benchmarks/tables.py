"""What all tables of the report share: Markdown, the records shown, and where those are from."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby

from entropy_attn.benchmarks.environment import machine_name
from entropy_attn.benchmarks.store import Record, Store

EMPTY = "*Not measured yet.*"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    lines = ["| " + " | ".join(header) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def full_records(store: Store, suite: str, **config) -> list[Record]:
    """The latest records of the full form that came out well, grouped by machine."""
    records = store.latest(suite, form="full", **config)
    return sorted((r for r in records if r.result["status"] == "ok"), key=lambda r: r.machine)


class Newest(Store):
    """The records of the machine that a suite was run on last."""

    def load(self, suite: str, **config) -> list[Record]:
        records = super().load(suite, **config)
        machine = max(records, key=lambda r: r.time).machine if records else None
        return [r for r in records if r.machine == machine]


def by_machine(records: list[Record]) -> Iterator[tuple[str, list[Record]]]:
    for machine, group in groupby(records, key=lambda r: r.machine):
        yield machine, list(group)


def provenance(records: list[Record]) -> str:
    """One line that says where and when the records were measured."""
    last = max(records, key=lambda r: r.time)
    found = last.environment
    parts = [machine_name(found)]
    parts += [f"{name} {found[name]}" for name in ("driver", "torch", "triton") if found.get(name)]
    commits = sorted({commit(r) for r in records})
    parts.append(("commit " if len(commits) == 1 else "commits ") + ", ".join(commits))
    parts.append(last.time[:10])
    return "*" + "; ".join(parts) + ".*"


def commit(record: Record) -> str:
    """Short, with a mark where the checkout had changes."""
    found = record.environment
    return (found["commit"] or "unknown")[:9] + ("+changes" if found["dirty"] else "")


def per_machine(store: Store, suite: str, table: Callable[[list[Record]], str], **config) -> str:
    """The table of each machine's full records, below a line that says where they are from."""
    parts = [
        f"{provenance(records)}\n\n{table(records)}"
        for _, records in by_machine(full_records(store, suite, **config))
    ]
    return "\n\n".join(parts) or EMPTY


def slug(machine: str) -> str:
    """For the name of a file."""
    return re.sub(r"\W+", "_", machine).strip("_").lower()
