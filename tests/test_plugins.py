"""Baselines of users: registered in three lines, checked, timed and named with their version."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

from entropy_attn import cli
from entropy_attn.benchmarks.baselines import CONTESTANTS, is_sparse
from entropy_attn.benchmarks.plugins import REGISTERED, load_plugin, register_baseline
from entropy_attn.benchmarks.store import Store

PLUGIN = """
from functools import partial

from torch.nn.functional import scaled_dot_product_attention

import entropy_attn as ea
from entropy_attn.benchmarks.plugins import register_baseline

sdpa = partial(scaled_dot_product_attention, enable_gqa=True)
register_baseline("mine", package="torch")(sdpa)
register_baseline("my lists", version="7", sparse=True)(ea.block_sparse_attention)


@register_baseline("off", version="1.2")
def off(query, key, value, is_causal):
    return sdpa(query, key, value, is_causal=is_causal) * 2
"""


@pytest.fixture
def plugin(tmp_path):
    path = tmp_path / "plugin.py"
    path.write_text(PLUGIN)
    yield path
    for name in list(REGISTERED):
        del REGISTERED[name], CONTESTANTS[name]


@pytest.fixture
def bench(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(cli.console, "width", 200)

    def run(suite, plugin):
        arguments = ["bench", suite, "--plugin", str(plugin), "--out", str(tmp_path / "results")]
        return CliRunner().invoke(cli.app, arguments)

    return run


def test_they_are_checked_timed_and_named_with_their_version(bench, plugin, tmp_path):
    result = bench("attention", plugin)
    assert result.exit_code == 0, result.output  # a wrong rival is no fault of this package
    assert "mine, my lists, off" in result.output
    found = Store(tmp_path / "results").load("attention")
    assert {r.config["density"] for r in found} == {1.0, 0.25}
    assert "backward" in {r.config["direction"] for r in found}
    for name, status, version in (
        ("mine", "ok", torch.__version__), ("my lists", "ok", "7"), ("off", "wrong", "1.2"),
    ):  # fmt: skip
        mine = [r for r in found if r.config["contestant"] == name]
        assert len(mine) == 3  # every case of the small form
        assert {r.result["status"] for r in mine} == {status}
        assert {r.result["version"] for r in mine} == {version}
        assert {"median_ms" in r.result for r in mine} == {status == "ok"}


def test_a_report_needs_no_plugin():
    assert "mine" not in CONTESTANTS
    assert is_sparse("my lists", {"sparse": True})
    assert not is_sparse("mine", {"sparse": False})
    assert is_sparse("entropy-attn", {})  # records of earlier versions do not say


def test_whole_models_attend_with_the_dense_ones(bench, plugin, tmp_path):
    pytest.importorskip("transformers")
    result = bench("llm", plugin)
    assert result.exit_code == 0, result.output
    found = {r.config["contestant"]: r.result for r in Store(tmp_path / "results").load("llm")}
    assert found["mine"]["status"] == "ok"
    assert found["mine"]["version"] == torch.__version__
    assert found["mine"]["tokens_per_s"] > 0
    assert found["off"]["status"] == "wrong"
    assert found["off"]["version"] == "1.2"
    assert "my lists" not in found


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("SDPA flash", {"version": "1"}, "'SDPA flash' already"),
        ("mine", {}, "package=None and version=None"),
        ("mine", {"package": "torch", "version": "1"}, "version='1'"),
        ("mine", {"package": "no-such-package"}, "'no-such-package' is not installed"),
    ],
)
def test_bad_registrations_are_errors(name, options, message):
    with pytest.raises(ValueError, match=message):
        register_baseline(name, **options)


def test_a_file_without_a_baseline_is_an_error(bench, tmp_path):
    path = tmp_path / "empty.py"
    path.write_text("x = 1\n")
    with pytest.raises(ValueError, match="registers no baseline"):
        load_plugin(path)
    result = bench("attention", path)
    assert result.exit_code == 2
    assert "registers no baseline" in result.output.replace("\n", " ")
