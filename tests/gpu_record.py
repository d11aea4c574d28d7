"""`make test-gpu`: run the GPU tests on this machine's GPU and append the outcome to the results.

It fails unless there is a GPU, at least one test ran, all passed and none was skipped: a record
says what was proved, so a test that did not run must not look like one that passed.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from entropy_attn.benchmarks.environment import package_version
from entropy_attn.benchmarks.store import Record, Store

TESTS = Path(__file__).resolve().parent
SUITE = "test_gpu"


@dataclass
class Outcome:
    """A pytest plugin that counts outcomes and collects the kernels that ran on the GPU."""

    counts: Counter[str] = field(default_factory=Counter)
    kernels: set[str] = field(default_factory=set)
    skipped: list[str] = field(default_factory=list)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # A test counts once: by its call, or by a setup or teardown that did not pass.
        if report.when == "call" or not report.passed:
            self.counts[report.outcome] += 1
        if report.skipped:
            self.skipped.append(report.nodeid)
        if report.when == "teardown":  # the fixture launched_kernels notes them
            for name, value in report.user_properties:
                if name == "kernels":
                    self.kernels.update(value)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        # A module that skips or breaks while it is collected hides all its tests.
        if not report.passed:
            self.counts[report.outcome] += 1
        if report.skipped:
            self.skipped.append(report.nodeid)

    def problems(self, exit_code: int) -> list[str]:
        """Why this run proves nothing, or not enough; empty if it does."""
        found = []
        if not self.counts["passed"]:
            found.append("no GPU test passed")
        if self.counts["failed"]:
            found.append(f"{self.counts['failed']} failed")
        if self.skipped:
            found.append(f"skipped, though there is a GPU: {', '.join(self.skipped)}")
        if not self.kernels:
            found.append("no Triton kernel ran")
        if exit_code and not found:
            found.append(f"pytest ended with exit code {exit_code}")
        return found


def record(outcome: Outcome, seconds: float, problems: list[str]) -> Record:
    """What a run proved, for the result store."""
    counts = {name: outcome.counts[name] for name in ("passed", "failed", "skipped")}
    return Record(
        SUITE,
        {"tests": "gpu", "pytest": package_version("pytest")},
        {
            "status": "failed" if problems else "ok",
            "problems": problems,
            **counts,
            "seconds": round(seconds, 1),
            "kernels": sorted(outcome.kernels),
        },
    )


def main(arguments: list[str]) -> int:
    if not torch.cuda.is_available():
        print("make test-gpu: torch sees no GPU on this machine", file=sys.stderr)
        return 1
    outcome = Outcome()
    start = time.perf_counter()
    code = pytest.main(["-m", "gpu", str(TESTS), *arguments], plugins=[outcome])
    problems = outcome.problems(int(code))
    done = record(outcome, time.perf_counter() - start, problems)
    store = Store()
    store.append(done)
    print(f"record: {store.path(SUITE)}")
    print(", ".join(f"{done.result[name]} {name}" for name in ("passed", "failed", "skipped")))
    for problem in problems:
        print(f"make test-gpu: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
