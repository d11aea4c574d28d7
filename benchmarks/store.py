"""The result store: one append-only JSON-lines file per suite, the source of every figure."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from entropy_attn.benchmarks.environment import environment

SCHEMA = 1
DIRECTORY_VARIABLE = "ENTROPY_ATTN_RESULTS"


@dataclass(frozen=True)
class Record:
    """One measurement.

    Attributes:
        suite: the suite that measured it.
        config: what was measured; together with the machine it is the record's key.
        result: what came out.
        environment: where; see `environment.environment`.
        time: when, UTC, ISO 8601.
        schema: of the record.
    """

    suite: str
    config: dict[str, Any]
    result: dict[str, Any]
    environment: dict[str, Any] = field(default_factory=environment)
    time: str = field(
        default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds")
    )
    schema: int = SCHEMA

    @property
    def machine(self) -> str:
        """The GPU, or the CPU where there is none."""
        return self.environment.get("gpu") or self.environment["cpu"]

    @property
    def key(self) -> str:
        """Records with the same key measure the same thing on the same kind of machine."""
        return json.dumps([self.suite, self.config, self.machine], sort_keys=True)


def default_directory() -> Path:
    """ENTROPY_ATTN_RESULTS, else benchmarks/results of the checkout, else ./benchmark_results."""
    given = os.environ.get(DIRECTORY_VARIABLE)
    if given:
        return Path(given)
    benchmarks = Path(__file__).resolve().parent
    if (benchmarks.parent / "pyproject.toml").exists():
        return benchmarks / "results"
    return Path("benchmark_results")


class Store:
    """The records below a directory, ``<suite>.jsonl`` each; records are only ever added."""

    def __init__(self, directory: Path | str | None = None) -> None:
        self.directory = Path(directory) if directory is not None else default_directory()

    def path(self, suite: str) -> Path:
        return self.directory / f"{suite}.jsonl"

    def append(self, record: Record) -> None:
        """Add one record; a number that is not finite raises ValueError, JSON has none."""
        line = json.dumps(asdict(record), sort_keys=True, allow_nan=False)
        self.directory.mkdir(parents=True, exist_ok=True)
        with self.path(record.suite).open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def load(self, suite: str, **config: Any) -> list[Record]:
        """The records of a suite in the order of writing, those whose config has these values.

        Raises:
            ValueError: a line is not a record of this schema; the message names it.
        """
        path = self.path(suite)
        if not path.exists():
            return []
        records = []
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                fields = json.loads(line)
                if fields["schema"] != SCHEMA:
                    raise ValueError(f"schema {fields['schema']}, this version reads {SCHEMA}")
                records.append(Record(**fields))
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"{path}:{number} is not a record: {error}") from error
        return [r for r in records if r.config.items() >= config.items()]

    def latest(self, suite: str, **config: Any) -> list[Record]:
        """The last record of every key, in the order in which the keys first appeared."""
        return latest(self.load(suite, **config))


def latest(records: Iterable[Record]) -> list[Record]:
    """The last record of every key, in the order in which the keys first appeared."""
    return list({record.key: record for record in records}.values())
