"""Comparing commits and machines by the result store."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from entropy_attn import cli
from entropy_attn.benchmarks.compare import choose, compare
from entropy_attn.benchmarks.registry import Row, Suite
from entropy_attn.benchmarks.store import Record, Store

OLD, NEW = "a" * 40, "b" * 40


def record(commit: str, ms: float, spread: float = 0.0, gpu: str = "GPU One", **config) -> Record:
    result = {"status": "ok", "median_ms": ms, "p20_ms": ms, "p80_ms": ms * (1 + spread)}
    return Record("s", config, result, {"gpu": gpu, "commit": commit})


@pytest.mark.parametrize(
    ("before", "after", "spread", "verdict"),
    [
        (1.0, 0.9, 0.0, "better"),
        (1.0, 1.1, 0.0, "worse"),
        (1.0, 1.04, 0.0, "same"),
        (1.0, 0.97, 0.0, "same"),
        (1.0, 1.1, 0.2, "same"),  # within the spread of the rounds
        (1.0, 1.3, 0.2, "worse"),
    ],
)
def test_a_change_counts_beyond_the_noise(before, after, spread, verdict):
    (change,) = compare([record(OLD, before)], [record(NEW, after, spread)])
    assert change.verdict == verdict
    assert change.gain == pytest.approx(before / after)


def test_another_way_to_empty_the_cache_is_no_change():
    def emptied(commit, ms, **result):
        old = record(commit, ms)
        return Record("s", {}, old.result | result, old.environment)

    for ms, verdict in ((0.05, "same"), (0.06, "same"), (0.1, "better")):
        (change,) = compare([emptied(OLD, ms)], [emptied(NEW, 0.9 * ms, emptied="read")])
        assert change.verdict == verdict
    (change,) = compare([emptied(OLD, 0.05, emptied="read")], [emptied(NEW, 0.045, emptied="read")])
    assert change.verdict == "better"


def test_quality_is_compared_by_its_own_direction():
    def quality(commit, **result):
        return Record("s", {}, {"status": "ok", **result}, {"gpu": "G", "commit": commit})

    (change,) = compare([quality(OLD, accuracy=0.9)], [quality(NEW, accuracy=0.8)])
    assert change.verdict == "worse"
    (change,) = compare([quality(OLD, perplexity=12.0)], [quality(NEW, perplexity=11.0)])
    assert change.verdict == "better"


def test_only_what_both_measured_well_is_compared():
    failed = Record("s", {"n": 3}, {"status": "failed"}, {"gpu": "GPU One", "commit": OLD})
    old = [record(OLD, 1.0, n=1), record(OLD, 1.0, n=2), failed]
    new = [record(NEW, 1.0, n=2), record(NEW, 1.0, n=3), record(NEW, 1.0, n=4)]
    assert [change.new.config for change in compare(old, new)] == [{"n": 2}]


def test_commits_are_compared_on_the_machine_that_both_ran_on():
    old = [record(OLD, 1.0), record(OLD, 9.0, gpu="GPU Two")]
    assert [c.gain for c in compare(old, [record(NEW, 1.0)])] == [1.0]
    assert [c.gain for c in compare(old[1:], [record(NEW, 1.0)])] == [9.0]  # two machines


def test_what_others_do_is_no_change_of_ours():
    pairs = [("entropy-attn", True), ("entropy-attn + row and block entropy", True)]
    for contestant, is_ours in [*pairs, ("FlexAttention", False)]:
        records = [record(c, 1.0, contestant=contestant) for c in (OLD, NEW)]
        assert compare(records[:1], records[1:])[0].is_ours is is_ours


def test_choice_by_commit_or_machine(tmp_path):
    records = [record(OLD, 1.0), record(OLD, 2.0), record(NEW, 3.0, gpu="GPU Two")]
    assert [r.result["median_ms"] for r in choose(records, OLD[:9], tmp_path)] == [2.0]
    assert [r.result["median_ms"] for r in choose(records, "two", tmp_path)] == [3.0]
    with pytest.raises(ValueError, match="commits aaaaaaaaa, bbbbbbbbb and the machines GPU One"):
        choose(records, "ccccccc", tmp_path)
    with pytest.raises(ValueError, match="no record is of 'aaa'"):  # too short for a hash
        choose(records, "aaa", tmp_path)


@pytest.fixture
def invoke(monkeypatch):
    monkeypatch.setattr(cli.console, "width", 200)
    return lambda *arguments: CliRunner().invoke(cli.app, [str(a) for a in arguments])


def test_compare_on_the_command_line(invoke, monkeypatch, tmp_path):
    monkeypatch.setattr("entropy_attn.benchmarks.registry.SUITES", {"s": Suite("s", "")})
    store = Store(tmp_path)
    for case in (record(OLD, 1.0, n=1), record(NEW, 2.0, n=1), record(OLD, 1.0), record(NEW, 1.0)):
        store.append(case)
    worse = invoke("compare", OLD[:8], NEW[:8], "--results", tmp_path)
    assert worse.exit_code == 1
    assert "0.500 x" in worse.output
    assert "2 measurements in both, 1 the same" in worse.output
    assert invoke("compare", NEW[:8], OLD[:8], "--results", tmp_path).exit_code == 0
    unknown = invoke("compare", "ccccccc", NEW[:8], "--results", tmp_path)
    assert unknown.exit_code == 2
    assert "no record is of" in unknown.output


@pytest.mark.parametrize(("ms", "code"), [(1.0, 0), (2.0, 1)])
def test_bench_against_a_commit_fails_if_slower(invoke, monkeypatch, tmp_path, ms, code):
    class Fake(Suite):
        def run(self, context):
            result = {"status": "ok", "median_ms": ms, "p20_ms": ms, "p80_ms": ms}
            yield Row({"n": 1}, result, "measured", is_ours=True)

    monkeypatch.setattr("entropy_attn.benchmarks.registry.SUITES", {"s": Fake("s", "")})
    Store(tmp_path).append(record(OLD, 1.0, n=1))
    done = invoke("bench", "s", "--against", OLD[:8], "--out", tmp_path)
    assert done.exit_code == code, done.output
    assert "1 measurements in both" in done.output
    missing = invoke("bench", "s", "--against", "ccccccc", "--out", tmp_path)
    assert missing.exit_code == 2  # told before anything is measured
