"""The vision experiments: what is measured on a model, the suite, its tables and pictures."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

import entropy_attn as ea
from entropy_attn import cli
from entropy_attn.benchmarks import report, report_vision
from entropy_attn.benchmarks.images import Images
from entropy_attn.benchmarks.registry import Context
from entropy_attn.benchmarks.statistics import mean_interval, with_interval
from entropy_attn.benchmarks.store import Record, Store
from entropy_attn.benchmarks.suites import vision as suite
from entropy_attn.benchmarks.vision import (
    Geometry,
    TiledViT,
    best_overlap,
    blocks_at,
    natural_density,
    object_overlap,
    sparse,
    sparse_accuracy,
)

CPU = torch.device("cpu")
TINY = Geometry(hidden=16, layers=2, heads=1, mlp=16)
MACHINE = {"gpu": "G1", "cpu": "C", "arch": "sm_90", "commit": "abc", "dirty": False}


@pytest.fixture(scope="module")
def model() -> TiledViT:
    torch.manual_seed(0)
    return TiledViT(TINY, 64, 8).eval()


@pytest.fixture(scope="module")
def scenes() -> Images:
    return suite.makers(suite.Plan.of("small"), CPU)["scenes"]().test


# --- the model and what is measured on it -------------------------------------------------------


def test_blocks_of_tokens_are_squares_of_the_image(model):
    """A change of one square of 16 x 16 pixels changes the 16 patches of one run."""
    images = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    images[1, :, 16:32, 48:64] = 255  # the tile of row 1 and column 3 of 4 x 4
    seen = []
    patches = model.vit.vit.embeddings.patch_embeddings
    hook = patches.register_forward_hook(lambda module, args, out: seen.append(out))
    model(images)
    hook.remove()
    changed = (seen[0][0] != seen[0][1]).any(-1).nonzero().flatten()
    assert changed.tolist() == list(range(16 * 7, 16 * 8))


def test_places_start_different_and_follow_the_tiles(model):
    places = model._places()
    assert len(places.unique(dim=0)) == 256
    # Patches 0 and 1 share a row, patches 0 and 4 a column.
    half = TINY.hidden // 2
    assert torch.equal(places[0, :half], places[1, :half])
    assert torch.equal(places[0, half:], places[4, half:])


def test_everything_kept_is_dense_attention(model, scenes):
    with torch.inference_mode():
        dense = model(scenes.images)
        with sparse(model, model.blocks, ea.TrueMass()) as handle:
            torch.testing.assert_close(model(scenes.images), dense, atol=1e-5, rtol=1e-5)
            assert handle.stats().density == 1.0
        assert torch.equal(model(scenes.images), dense)


@pytest.mark.parametrize("sparsity", suite.SPARSITIES)
def test_densities_are_what_they_say(model, scenes, sparsity):
    found, density = sparse_accuracy(model, scenes, sparsity, ea.TrueMass())
    assert 0 <= found <= 1
    assert density == blocks_at(sparsity, 17) / 17
    assert density == pytest.approx(1 - sparsity, abs=0.03)
    assert blocks_at(0.99, 17) == 1


def test_uniform_attention_needs_all_blocks(scenes):
    torch.manual_seed(0)
    model = TiledViT(TINY, 64, 8).eval()
    for layer in model.vit.vit.modules():
        if isinstance(layer, torch.nn.Linear):
            torch.nn.init.zeros_(layer.weight)
    # 256 of 257 tokens lie in 16 blocks, the last of 17 holds one.
    assert natural_density(model, scenes.images) == 1.0


def test_overlap_is_that_of_exact_masks():
    covered = torch.tensor([[16.0, 8.0, 0.0, 0.0]] * 4)
    kept = torch.tensor([[1.0, 1.0, 0.0, 0.0]] * 4)
    assert best_overlap(kept, covered, 16) == pytest.approx(24 / 32)
    # One threshold serves all images: the best one of the first half, used on the second.
    heat = torch.tensor([[0.9, 0.5, 0.1, 0.0]] * 4)
    assert best_overlap(heat, covered, 16) == pytest.approx(24 / 32)
    assert best_overlap(torch.ones(4, 4), covered, 16) == pytest.approx(24 / 64)
    assert best_overlap(1 - kept, covered, 16) == pytest.approx(24 / 64)


def test_overlap_has_its_limits(model, scenes):
    found = object_overlap(model, scenes, 0.8)
    share = scenes.masks[8:].float().mean().item()
    assert found.everything == pytest.approx(share)
    assert found.everything < found.best_blocks < 0.8
    assert len(found.by_layer) == 2
    for value in (found.blocks, found.attention, *found.by_layer):
        assert 0 <= value <= 1


# --- the suite ----------------------------------------------------------------------------------


def test_the_small_suite_runs_and_is_not_run_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(cli.console, "width", 200)
    arguments = ["bench", "vision", "--out", str(tmp_path)]
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 0, done.output
    records = Store(tmp_path).load("vision", form="small")
    methods = [record.config["method"] for record in records]
    assert methods == ["plain", "density (ours)", "random weights"]
    assert all(record.result["status"] == "ok" for record in records)
    assert list(records[0].result["sparse"]["true mass"]) == ["0.5", "0.8", "0.9"]
    assert not list((tmp_path / "checkpoints").glob("*.pt"))
    again = CliRunner().invoke(cli.app, arguments)
    assert "3 of 3 runs are in the store" in again.output
    assert len(Store(tmp_path).load("vision")) == len(records)


def test_units_come_seed_by_seed():
    plan = suite.Plan.of("full")
    found = list(suite.units(plan, ("scenes", "digits")))
    assert [unit.seed for unit in found] == sorted(unit.seed for unit in found)
    names = [unit.name for unit in found]
    assert len(set(names)) == len(names)
    first = [unit.method for unit in found if unit.seed == 0 and unit.task == "scenes"]
    assert first == [*suite.METHODS, suite.UNTRAINED, *suite.ABLATION]
    configs = {json.dumps(u.config("full", plan), sort_keys=True) for u in found}
    assert len(configs) == len(found)


@pytest.mark.parametrize("method", [*suite.METHODS[2:], *suite.ABLATION], ids=lambda m: m.name)
def test_every_method_trains(method, tmp_path):
    plan = replace(suite.Plan.of("small"), geometry=TINY, steps={"other": 2})
    data = suite.makers(plan, CPU)["scenes"]().train
    unit = suite.Unit("scenes", method, 0)
    model, loss = suite.train_unit(unit, plan, data, tmp_path / "x.pt", unit.config("small", plan))
    assert math.isfinite(loss)
    # Nothing is left in the model that trained it.
    with torch.no_grad():
        model.train()(data.images[:2])


def test_own_data_sets_join_the_tasks(monkeypatch, tmp_path):
    from PIL import Image

    for split in ("train", "val"):
        folder = tmp_path / "photos" / split / "a"
        folder.mkdir(parents=True)
        Image.new("RGB", (80, 70), (9, 9, 9)).save(folder / "x.png")
    monkeypatch.setenv(suite.FOLDER_VARIABLE, str(tmp_path / "photos"))
    monkeypatch.setenv(suite.CIFAR_VARIABLE, str(tmp_path))
    makers = suite.makers(replace(suite.Plan.of("small"), corruptions=()), CPU)
    assert {"scenes", "photos", "CIFAR-100"} <= makers.keys()
    task = makers["photos"]()
    assert task.train.images.shape == task.test.images.shape == (1, 3, 64, 64)
    assert task.corrupted == {}


def test_progress_names_the_unit(tmp_path):
    said: list[str] = []
    rows = suite.run(Context(CPU, False, tmp_path, said.append))
    next(rows)
    rows.close()
    assert any(text.startswith("scenes, plain, seed 0: step 0 of") for text in said)


# --- statistics ---------------------------------------------------------------------------------


def test_intervals_are_students():
    mean, half = mean_interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half == pytest.approx(4.303 / math.sqrt(3), rel=1e-3)
    assert math.isnan(mean_interval([1.0])[1])
    many = [float(i % 2) for i in range(40)]
    assert mean_interval(many)[1] == pytest.approx(1.96 * 0.5064 / math.sqrt(40), rel=1e-3)
    with pytest.raises(ValueError, match="nothing"):
        mean_interval([])


def test_intervals_are_shown_where_there_are_any():
    assert with_interval([0.93, 0.94, 0.95], ".1f", 100) == "94.0 ± 2.5"
    assert with_interval([0.5], ".2f") == "0.50"
    assert with_interval([]) == "–"


def test_verdicts_go_by_the_interval():
    assert report_vision.verdict([0.1, 0.11, 0.12]) == "yes"
    assert report_vision.verdict([-0.1, -0.11, -0.12]) == "no, worse"
    assert report_vision.verdict([0.1, -0.1, 0.05]) == "not shown"
    assert report_vision.verdict([0.1]) == "not shown (one seed)"
    assert report_vision.verdict([]) == "–"


# --- report -------------------------------------------------------------------------------------


def result(accuracy: float, error: float, overlap: float | None) -> dict:
    sparse_results = {
        scorer: {
            name: {"accuracy": accuracy - loss, "density": density}
            for name, loss, density in (("0.5", 0.01, 8 / 17), ("0.8", 0.05, 3 / 17))
        }
        for scorer in ("true mass", "default")
    }
    found = {"status": "ok", "accuracy": accuracy, "natural_density": 0.3}
    found |= {"sparse": sparse_results, "errors": {"fog": [error] * 5}}
    if overlap is not None:
        known = {"everything": 0.1, "best_blocks": 0.5, "by_layer": [overlap, overlap / 2]}
        found["overlap"] = {"blocks": overlap, "attention": 0.4, **known}
    return found


def filled_store(path) -> Store:
    store = Store(path)
    for task in ("scenes", "digits"):
        for seed in range(3):
            for method, part, better in (
                ("plain", "methods", 0.0),
                ("density (ours)", "methods", 0.02),
                ("random weights", "reference", -0.5),
                ("density (ours), target 0.1", "ablation", -0.02),
            ):
                if part != "methods" and task != "scenes":
                    continue
                if part == "ablation" and seed > 0:
                    continue
                config = {"form": "full", "task": task, "method": method, "part": part}
                config |= {"seed": seed, "steps": 400, "batch": 256, "block": 16}
                config |= {"layers": 6, "hidden": 192, "patch": 4}
                overlap = 0.3 + better if task == "scenes" else None
                found = result(0.9 + better + seed / 1000, 0.4 - better, overlap)
                store.append(Record("vision", config, found, MACHINE))
    return store


def table(name: str, store: Store) -> str:
    return report.fill(f"<!-- begin:{name} -->\n<!-- end:{name} -->", store)


@pytest.mark.parametrize("name", report_vision.TABLES)
def test_tables_without_records_say_so(name, tmp_path):
    assert report.EMPTY in table(name, Store(tmp_path))


def test_accuracy_is_shown_with_intervals(tmp_path):
    found = table("vision-accuracy", filled_store(tmp_path))
    assert "| dense | needed density | 47% kept by true mass | 18% kept by true mass |" in found
    row = "| plain, pruned by magnitude | 90.1 ± 0.2 | 30.0 ± 0.0 | 89.1 ± 0.2 | 85.1 ± 0.2 |"
    assert row in found
    assert "6 layers of 192" in found
    assert "3 seeds" in found
    assert "random weights" not in found


def test_robustness_is_relative_to_plain_training(tmp_path):
    found = table("vision-robustness", filled_store(tmp_path))
    assert "| plain | 40.0 ± 0.0 | 100.0 ± 0.0 | 40.0 ± 0.0 | 100.0 ± 0.0 |" in found
    assert "| density (ours) | 38.0 ± 0.0 | 95.0 ± 0.0 |" in found


def test_overlap_has_its_references(tmp_path):
    found = table("vision-overlap", filled_store(tmp_path))
    assert "Keeping everything gives 0.100" in found
    assert "| density (ours) | 0.320 ± 0.000 | 0.320 ± 0.000 | 0.400 ± 0.000 |" in found
    assert "random weights" in found
    assert "target 0.1" not in found


def test_the_ablation_compares_the_same_seeds(tmp_path):
    found = table("vision-ablation", filled_store(tmp_path))
    assert "| density (ours) | 92.0 | 30.0 | 87.0 | 0.320 | 95.0 |" in found
    assert "| density (ours), target 0.1 | 88.0 | 30.0 | 83.0 | 0.280 | 105.0 |" in found


def test_claims_are_judged_by_paired_seeds(tmp_path):
    found = table("vision-claims", filled_store(tmp_path))
    overlap = "| scenes, IoU of kept blocks | 0.73 against 0.41 | density (ours) | 0.320 ± 0.000"
    assert f"{overlap} | 0.300 ± 0.000 | yes |" in found
    assert "| range entropy of keys (paper) | – |" in found


def test_the_last_setting_of_a_unit_counts(tmp_path):
    store = filled_store(tmp_path)
    old = store.load("vision")[0]
    newer = replace(
        old, config={**old.config, "steps": 500}, result=result(0.5, 0.4, 0.3),
        time="2999-01-01T00:00:00+00:00",
    )  # fmt: skip
    store.append(newer)
    runs = report_vision.runs_of(store.latest("vision"), "scenes")
    assert runs["plain"][0]["accuracy"] == 0.5


def test_pictures_are_drawn_for_each_task(tmp_path):
    drawn = report_vision.draw(filled_store(tmp_path), tmp_path / "images")
    assert [path.name for path in drawn] == ["vision_scenes.png", "vision_digits.png"]
    assert all(path.stat().st_size > 10_000 for path in drawn)
