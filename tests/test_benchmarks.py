"""The benchmarks' own machinery: what it stores, how it times, what it refuses to time."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise, permutations

import pytest
import torch

from entropy_attn.benchmarks import cases, model_masks, report, timing
from entropy_attn.benchmarks import environment as environments
from entropy_attn.benchmarks.baselines import CONTESTANTS, OURS
from entropy_attn.benchmarks.cases import AttentionCase, make_inputs, random_blocks
from entropy_attn.benchmarks.check import expected
from entropy_attn.benchmarks.contest import contest
from entropy_attn.benchmarks.prose import paragraphs, prose
from entropy_attn.benchmarks.registry import SUITES, Context, short
from entropy_attn.benchmarks.resume import among
from entropy_attn.benchmarks.store import SCHEMA, Record, Store, default_directory
from entropy_attn.benchmarks.suites import attention
from entropy_attn.benchmarks.suites.crossover import break_even_density, write_crossover
from entropy_attn.selection import Antidiagonal, Perplexity, Pooled, TopK

CPU = torch.device("cpu")
MACHINE = {"gpu": "G1", "cpu": "C", "arch": "sm_90", "commit": "abc", "dirty": False}
TINY = AttentionCase(16, 128, 0.5, block=32, batch=2, heads=2, dtype="float32")


def record(value: float, suite: str = "s", gpu: str = "G1", **config) -> Record:
    return Record(suite, config, {"status": "ok", "value": value}, {**MACHINE, "gpu": gpu})


# --- store --------------------------------------------------------------------------------------


def test_records_come_back_as_they_were(tmp_path):
    store = Store(tmp_path)
    written = [record(1.5, kind="a", sizes=[1, 2]), record(2.5, kind="b", nested={"x": None})]
    for each in written:
        store.append(each)
    assert store.load("s") == written
    assert store.load("s", kind="b") == written[1:]
    assert store.load("other") == []


def test_the_store_only_grows(tmp_path):
    store = Store(tmp_path)
    store.append(record(1.0))
    before = store.path("s").read_bytes()
    Store(tmp_path).append(record(2.0))
    after = store.path("s").read_bytes()
    assert after.startswith(before)
    assert [r.result["value"] for r in store.load("s")] == [1.0, 2.0]


def test_the_latest_record_of_a_key_wins_per_machine(tmp_path):
    store = Store(tmp_path)
    for each in (record(1, k=1), record(2, k=2), record(3, k=1), record(4, gpu="G2", k=1)):
        store.append(each)
    assert [r.result["value"] for r in store.latest("s")] == [3, 2, 4]


@pytest.mark.parametrize("line", ["{", '{"suite": "s"}', json.dumps({"schema": SCHEMA + 1})])
def test_a_line_that_is_no_record_is_named(tmp_path, line):
    store = Store(tmp_path)
    store.append(record(1.0))
    with store.path("s").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=r"s\.jsonl:2 is not a record"):
        store.load("s")


def test_what_is_not_a_number_is_not_stored(tmp_path):
    store = Store(tmp_path)
    with pytest.raises(ValueError, match="JSON"):
        store.append(record(math.nan))
    assert store.load("s") == []


def test_where_results_go(tmp_path, monkeypatch):
    monkeypatch.setenv("ENTROPY_ATTN_RESULTS", str(tmp_path / "x"))
    assert default_directory() == tmp_path / "x"
    monkeypatch.delenv("ENTROPY_ATTN_RESULTS")
    assert default_directory().parts[-2:] == ("benchmarks", "results")


@pytest.mark.parametrize(("given", "found"), [("ab12", ("ab12", False)), ("a-dirty", ("a", True))])
def test_the_commit_can_be_given(monkeypatch, given, found):
    monkeypatch.setenv("ENTROPY_ATTN_COMMIT", given)
    environments.environment.cache_clear()
    try:
        record = environments.environment()
    finally:
        environments.environment.cache_clear()
    assert (record["commit"], record["dirty"]) == found
    assert record["torch"] == environments.package_version("torch")


# --- timing -------------------------------------------------------------------------------------


def test_contestants_take_turns_on_all_input_sets():
    seen = []
    names = ("a", "b", "c")
    calls = {n: [lambda n=n, s=s: seen.append((n, s)) for s in range(2)] for n in names}
    found = timing.measure(calls, rounds=60, device="cpu")
    rounds = [seen[i : i + 3] for i in range(0, len(seen), 3)]
    assert all(sorted(name for name, _ in each) == ["a", "b", "c"] for each in rounds)
    assert [{s for _, s in each} for each in rounds] == [{0}, {1}] * 30
    # Nobody always comes after the same other one.
    after = [(x, y) for (x, _), (y, _) in pairwise(seen)]
    assert all(after.count(pair) > 5 for pair in permutations(names, 2))
    assert {name: t.rounds for name, t in found.items()} == dict.fromkeys(names, 60)


def test_every_set_is_warm_before_it_is_timed_and_rounds_are_bounded():
    seen = []
    calls = {"a": [lambda s=s: seen.append(s) for s in range(3)]}
    found = timing.measure(calls, seconds=1.0, max_rounds=7, device="cpu")
    assert seen[:3] == [0, 1, 2]
    assert found["a"].rounds == 7
    slow = timing.measure(calls, seconds=0.0, min_rounds=5, device="cpu")
    assert slow["a"].rounds == 5


def test_statistics_of_samples():
    found = timing.Timing.of([5.0, 1.0, 2.0, 3.0, 4.0, 100.0])
    assert (found.median_ms, found.p20_ms, found.p80_ms) == (3.5, 2.0, 5.0)


def test_a_slow_call_takes_longer_on_the_wall_clock(monkeypatch):
    now = iter(range(1000))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(now) / 1000)
    calls = {"fast": [lambda: None], "slow": [lambda: [next(now) for _ in range(9)]]}
    found = timing.measure(calls, rounds=3, device="cpu")
    assert found["fast"].median_ms == pytest.approx(1)
    assert found["slow"].median_ms == pytest.approx(10)


@pytest.mark.parametrize("calls", [{"a": []}, {"a": [print], "b": [print, print]}, {}])
def test_uneven_input_sets_are_refused(calls):
    with pytest.raises(ValueError, match="same number of input sets"):
        timing.measure(calls, device="cpu")


@pytest.mark.gpu
def test_gpu_times_grow_with_the_work():
    small, large = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for n in (1024, 8192))
    calls = {"small": [lambda: small @ small], "large": [lambda: large @ large]}
    found = timing.measure(calls, seconds=0.2)
    # 512 times the work; the small product does not fill the GPU.
    assert found["large"].median_ms > 20 * found["small"].median_ms


# --- cases, check, contestants ------------------------------------------------------------------


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("irregular", [False, True])
def test_random_blocks_keep_the_density(is_causal, irregular):
    case = AttentionCase(16, 64 * 32, 0.25, 32, is_causal=is_causal, irregular=irregular)
    kept = random_blocks(case, torch.Generator().manual_seed(0), CPU)
    visible = torch.ones(64, 64, dtype=torch.bool)
    visible = visible.tril() if is_causal else visible
    assert not (kept & ~visible).any()
    assert (kept.sum(-1) >= 1).all()
    if is_causal:
        assert kept.diagonal(dim1=-2, dim2=-1).all()
    # 2048 rows: a standard error of at most 0.25 / sqrt(2048), and of rounding up to one block.
    assert kept.sum() / (visible.sum() * 32) == pytest.approx(0.25, abs=0.02)
    rows_differ = kept.sum(-1)[..., -1].unique().numel() > 1
    assert rows_differ == irregular


def test_patterns_of_blocks():
    case = AttentionCase(16, 64 * 32, 0.25, 32, pattern="banded")
    banded = random_blocks(case, torch.Generator().manual_seed(0), CPU)
    distance = (torch.arange(64)[:, None] - torch.arange(64)).abs()
    assert (banded.sum(-1) == 16).all()
    assert distance.where(banded[0, 0], 0).max() <= 16  # at the edges a band has one side
    clustered = replace(case, pattern="clustered")
    kept = random_blocks(clustered, torch.Generator().manual_seed(0), CPU).float()
    random = random_blocks(
        replace(case, pattern=None), torch.Generator().manual_seed(0), CPU
    ).float()
    # Rows of a cluster keep the same blocks: their overlap is far from that of random rows.
    overlaps = [(x @ x.mT / 16 > 0.6).float().mean() for x in (kept, random)]
    assert overlaps[0] > 0.1 > 0.03 > overlaps[1]


def test_blocks_of_a_model(monkeypatch):
    """The causal share of a layer's own scores; the model is left as it was."""
    from integration_models import SIZES, transformers

    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    before = model.config._attn_implementation
    ids = torch.randint(SIZES["vocab_size"], (2, 128))
    first, second = (model_masks.chosen_blocks(model, ids, layer, 16, 0.5) for layer in (0, 1))
    assert model.config._attn_implementation == before
    assert first.shape == (2, 4, 8, 8)
    assert not first.triu(1).any()
    assert first.diagonal(dim1=-2, dim2=-1).all()
    visible = torch.arange(1, 9)
    counts = first.sum(-1)
    assert ((counts >= visible / 2) & (counts <= visible // 2 + 2)).all()  # and the diagonal
    assert not torch.equal(first, second)

    blocks = first.repeat(1, 3, 1, 1)[:, :9]
    monkeypatch.setattr(cases, "smollm2_blocks", lambda *args: blocks)
    case = AttentionCase(16, 128, 0.5, 16, heads=9, is_causal=True, pattern=model_masks.SMOLLM2)
    assert torch.equal(make_inputs(case, CPU, 0).mask.to_dense(), blocks)


def test_cases_of_a_model_that_is_not_here_are_left_out(monkeypatch, tmp_path):
    monkeypatch.setenv("ENTROPY_ATTN_SMOLLM2", str(tmp_path / "missing.gguf"))
    case = AttentionCase(16, 128, 0.5, 16, heads=9, is_causal=True, pattern=model_masks.SMOLLM2)
    monkeypatch.setattr(attention, "cases", lambda form: [case, TINY])
    told = []
    context = Context(CPU, True, tmp_path, told.append)
    rows = list(attention.run(context))
    assert any("missing.gguf" in text for text in told)
    assert rows
    assert all(row.config.get("pattern") is None for row in rows)


def test_work_counts_visited_tiles_only():
    inputs = make_inputs(TINY, CPU, 0)
    tiles = inputs.mask.to_dense().sum().item()
    assert tiles == 2 * 2 * 4 * 2  # half of the 4 blocks in each of 4 rows, 4 heads
    assert inputs.flops(sparse=True) == tiles * 2 * (2 * 32 * 32 * 16)
    assert inputs.flops(sparse=False) == 2 * inputs.flops(sparse=True)
    backward = make_inputs(AttentionCase(16, 128, 1.0, 32, 1, 1, direction="backward"), CPU, 0)
    assert backward.flops(sparse=True) == 16 * 5 * (2 * 32 * 32 * 16)


def test_blocks_need_not_be_square():
    case = replace(TINY, block_k=16)
    inputs = make_inputs(case, CPU, 0)
    assert inputs.mask.block_size == (32, 16)
    assert inputs.kept.shape == (2, 2, 4, 8)
    tiles = inputs.kept.sum().item()
    assert tiles == 2 * 2 * 4 * 4
    assert inputs.flops(sparse=True) == tiles * 2 * (2 * 32 * 16 * 16)
    assert inputs.flops(sparse=False) == 2 * inputs.flops(sparse=True)
    ours = CONTESTANTS[OURS].call(inputs)()
    assert expected(inputs, sparse=True).verdict((ours,)) is None
    assert "0.5 of 32 x 16-blocks" in str(case)
    assert report.case_name({**case.config()}) == "D=16, 0.5 of 32 x 16-blocks"
    assert report.case_name({**TINY.config()}) == "D=16, 0.5 of 32-blocks"
    with pytest.raises(ValueError, match="block_k is 16"):
        make_inputs(replace(case, is_causal=True), CPU, 0)


def test_inputs_are_reproducible_and_sets_differ():
    first, again, other = (make_inputs(TINY, CPU, seed) for seed in (0, 0, 1))
    assert torch.equal(first.query, again.query)
    assert torch.equal(first.kept, again.kept)
    assert not torch.equal(first.kept, other.kept)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_the_check_passes_what_is_right_and_catches_a_missing_mask(direction, is_causal):
    case = AttentionCase(16, 128, 0.5, 32, 1, 2, "float32", is_causal, direction=direction)
    inputs = make_inputs(case, CPU, 0)
    ours = CONTESTANTS[OURS].call(inputs)()
    ours = ours if isinstance(ours, tuple) else (ours,)
    assert expected(inputs, sparse=True).verdict(ours) is None
    assert "exceeds" in expected(inputs, sparse=False).verdict(ours)
    late = [t.clone() for t in ours]
    late[-1][-1, -1, -1, -1] += 1e-3
    assert "head 1" in expected(inputs, sparse=True).verdict(late)


def test_every_contestant_runs_or_says_why_not():
    names = list(CONTESTANTS)
    outcomes = {o.contestant.name: o for o in contest(TINY, names, CPU, seconds=0.0)}
    assert list(outcomes) == names
    status = {name: o.result["status"] for name, o in outcomes.items()}
    assert status[OURS] == status["SDPA math"] == status["SDPA flash"] == "ok"
    for name, outcome in outcomes.items():
        assert status[name] in ("ok", "unavailable"), outcome.result
        if status[name] == "unavailable":
            assert outcome.result["reason"]
            assert "median_ms" not in outcome.result
    assert "GPU" in outcomes["FlexAttention, block lists"].result["reason"]
    # Dense attention visits twice the tiles of a mask of density 0.5.
    ours, dense = outcomes[OURS].result, outcomes["SDPA math"].result
    work = [r["tflops"] * r["median_ms"] for r in (ours, dense)]
    assert work[1] == pytest.approx(2 * work[0])


def test_a_wrong_or_broken_contestant_is_not_timed(monkeypatch):
    def broken(inputs):
        raise RuntimeError("no kernel\nfor this")

    table = {
        "right": CONTESTANTS[OURS],
        "wrong": replace(CONTESTANTS[OURS], setup=lambda i: lambda: i.value * 1.001),
        "broken": replace(CONTESTANTS[OURS], setup=broken),
    }
    monkeypatch.setattr("entropy_attn.benchmarks.contest.CONTESTANTS", table)
    right, wrong, failed = contest(TINY, table, CPU, seconds=0.0)
    assert right.result["status"] == "ok"
    assert wrong.result["status"] == "wrong"
    assert failed.result["status"] == "failed"
    assert failed.result["reason"] == "RuntimeError: no kernel"
    assert not {"median_ms", "tflops"} & (wrong.result.keys() | failed.result.keys())


# --- suites -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "suite", ["attention", "select", "crossover", "reorder", "entropy", "train", "hull"]
)
def test_small_suites_run_on_a_cpu(suite, tmp_path):
    said = []
    context = Context(CPU, False, tmp_path, said.append)
    rows = list(SUITES[suite].run(context))
    assert said
    ours = [row for row in rows if row.is_ours and row.result["status"] != "unavailable"]
    assert ours
    assert all(row.result["status"] == "ok" for row in ours), [row.text for row in ours]
    assert all(row.config["form"] == "small" for row in rows)
    keys = {json.dumps(row.config, sort_keys=True) for row in rows}
    assert len(keys) == len(rows)
    assert_resumed(suite, context, rows)


def assert_resumed(suite, context, rows):
    """Once all is measured there is nothing left, but what cannot be measured here."""
    measured = [json.loads(json.dumps(r.config)) for r in rows if r.result["status"] == "ok"]
    again = SUITES[suite].run(replace(context, is_measured=among(measured)))
    assert {row.result["status"] for row in again} <= {"unavailable"}


def test_choices_are_named_as_they_are_written():
    assert short(TopK(0.25)) == "TopK(0.25)"
    assert short(TopK(0.25, min_blocks=4)) == "TopK(0.25, min_blocks=4)"
    assert short(Pooled(8, reduce="max")) == "Pooled(8, max)"
    assert short(Antidiagonal(16)) == "Antidiagonal(16)"
    assert short(Perplexity(2.0)) == "Perplexity(2.0)"


def test_break_even_is_between_the_points_and_never_beyond():
    points = {"0.1": 1.0, "0.5": 3.0}
    assert break_even_density(points, 2.0) == pytest.approx(0.3)
    assert break_even_density(points, 0.5) == 0.0
    assert break_even_density(points, 9.0) == 0.5


def test_crossover_data_replace_one_architecture_and_keep_others(tmp_path):
    config = {"form": "full", "head_dim": 64, "dtype": "bfloat16", "block": 64, "length": 512}
    config |= {"is_causal": True, "batch": 1, "heads": 16}
    result = {"status": "ok", "dense_ms": 1.0, "sparse_ms": {"0.1": 0.5}}
    result["break_even_density"] = 0.1
    store = Store(tmp_path)
    for each in (config, {**config, "form": "quick"}):
        times = "2020-01-01T00:00:00+00:00", "2021-01-01T00:00:00+00:00"
        for gpu, time in zip(("another of this architecture", MACHINE["gpu"]), times, strict=True):
            store.append(Record("crossover", each, result, {**MACHINE, "gpu": gpu}, time))
    # What the last GPU has not measured stays from the one before.
    longer, environment = {**config, "length": 1024}, {**MACHINE, "gpu": "another"}
    store.append(Record("crossover", longer, result, environment, times[0]))
    path = tmp_path / "data" / "crossover.json"
    path.parent.mkdir()
    old = [{"arch": "sm_90", "kv_len": 1}, {"arch": "sm_100", "kv_len": 2}]
    path.write_text(json.dumps(old))
    assert write_crossover(store, path) == 2
    other, fresh, earlier = json.loads(path.read_text())
    assert other == old[1]
    assert earlier["kv_len"] == 1024
    assert (fresh["arch"], fresh["kv_len"], fresh["break_even_density"]) == ("sm_90", 512, 0.1)
    assert write_crossover(Store(tmp_path / "empty"), path) == 0
    assert json.loads(path.read_text()) == [other, fresh, earlier]


# --- report -------------------------------------------------------------------------------------


def filled_store(path) -> Store:
    store = Store(path)
    case = AttentionCase(128, 16384, 0.25)
    # Dense attention visits four times the tiles: more TFLOP/s, but not faster.
    for name, ms, work in (("entropy-attn", 4.0, 1000), ("SDPA flash", 8.0, 4000)):
        config = {"form": "full", **case.config(), "contestant": name}
        result = {"status": "ok", "median_ms": ms, "tflops": work / ms}
        store.append(Record("attention", config, result, MACHINE))
    return store


def test_marked_tables_are_filled_from_the_store(tmp_path):
    page = (
        "before\n<!-- begin:attention-forward -->\nstale\n<!-- end:attention-forward -->\nafter\n"
    )
    filled = report.fill(page, filled_store(tmp_path))
    assert "stale" not in filled
    assert filled.startswith("before\n")
    assert filled.endswith("\nafter\n")
    assert "| D=128, 0.25 of 128-blocks | **250 (4.00 ms)** | 500 (8.00 ms) |" in filled
    assert "G1" in filled
    assert report.fill(filled, Store(tmp_path)) == filled


def test_a_table_may_show_the_newest_machine_alone(tmp_path):
    store = filled_store(tmp_path)
    for old in store.load("attention"):
        newer = Record(
            old.suite, old.config, old.result, {**MACHINE, "gpu": "G2"}, "2999-01-01T00:00:00+00:00"
        )
        store.append(newer)
    page = "<!-- begin:attention-forward{} -->\n<!-- end:attention-forward -->\n"
    everything = report.fill(page.format(""), store)
    assert "*G1;" in everything
    assert "*G2;" in everything
    newest = report.fill(page.format(":newest"), store)
    assert "*G1;" not in newest
    assert "*G2;" in newest


def test_a_table_without_records_says_so(tmp_path):
    page = "<!-- begin:quality -->\n<!-- end:quality -->"
    assert report.EMPTY in report.fill(page, Store(tmp_path))


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("<!-- begin:nothing -->\n<!-- end:nothing -->", "no table is called 'nothing'"),
        ("<!-- begin:quality -->\ntext", "has no <!-- end:NAME -->"),
    ],
)
def test_bad_markers_are_errors(tmp_path, page, message):
    with pytest.raises(ValueError, match=message):
        report.fill(page, Store(tmp_path))


# --- prose --------------------------------------------------------------------------------------


def test_the_texts_are_long_and_have_no_paragraph_in_common():
    development, held_out = prose("development"), prose("held-out")
    halves = [set(p.text.split("\n\n")) for p in (development, held_out)]
    assert not halves[0] & halves[1]
    assert min(len(development.text), len(held_out.text)) > 90_000
    docstrings = prose("docstrings")
    assert len(docstrings.text) > 90_000
    assert not (halves[0] | halves[1]) & set(docstrings.text.split("\n\n"))
    # Halves of equal length, to within one topic.
    assert abs(len(development.text) - len(held_out.text)) < 0.15 * len(held_out.text)


def test_prose_is_the_same_each_time():
    first = prose("held-out")
    prose.cache_clear()
    assert prose("held-out") == first
    assert len(first.digest) == 12
    with pytest.raises(ValueError, match="held-out"):
        prose("test")


def test_only_running_text_is_prose():
    document = """
Heading of a section
********************

A paragraph of *emphasised* and **strong** text which is wrapped over two
lines, names "__init__" and is long enough to be counted as prose.

   assert_stmt ::= "assert" expression ["," expression], a line of the grammar of the language

   >>> print("a line of an interactive session that is long enough to be taken for prose")

   An indented description of a method is running text as well, if all of its lines
   are indented by the same number of characters, as they are here.

Short one.
"""
    found = paragraphs(document)
    assert [p.split()[0] for p in found] == ["A", "An"]
    assert (
        'of emphasised and strong text which is wrapped over two lines, names "__init__"'
        in (found[0])
    )
