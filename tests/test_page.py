"""The page of the report, from made records."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from entropy_attn.benchmarks import claims, figures, report
from entropy_attn.benchmarks.mask_pictures import decoded, encoded
from entropy_attn.benchmarks.page import write_page
from entropy_attn.benchmarks.plots import LEAST_MASS, HeadPicture
from entropy_attn.benchmarks.prose import PARTS
from entropy_attn.benchmarks.registry import Context
from entropy_attn.benchmarks.store import Record, Store
from entropy_attn.benchmarks.suites import masks

MACHINE = {"gpu": "GPU One", "arch": "sm_90", "commit": "0123456789", "dirty": False}
VOID = {"meta", "br", "img", "hr", "link"}


def attention(contestant: str, density: float, ms: float, gpu: str = "GPU One", **more) -> Record:
    config = {
        "form": "full", "contestant": contestant, "density": density, "direction": "forward",
        "head_dim": 128, "block": 128, "is_causal": False, "irregular": False, "batch": 2,
        "heads": 16, "length": 16384, "dtype": "bfloat16",
    }  # fmt: skip
    timing = {"median_ms": ms, "p20_ms": ms, "p80_ms": ms}
    flop = 4 * 2 * 16 * 16384**2 * 128 * density
    result = {"status": "ok", "tflops": flop / ms / 1e9, **timing}
    return Record("attention", config | more, result, MACHINE | {"gpu": gpu})


def quality(family: str, budget: str, density: float, change: float) -> Record:
    config = {
        "form": "full", "family": family, "budget": budget, "block": 64, "model": "M",
        "dtype": "float32", "windows": 2, "length": 8192, "text": PARTS["held-out"],
    }  # fmt: skip
    result = {"status": "ok", "density": density, "change": change, "kept_mass": 0.9}
    return Record("quality", config, result | {"perplexity": 14.0 + change}, MACHINE)


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "results")
    for contestant, ms in (("entropy-attn", 8.0), ("SDPA cuDNN", 6.0)):
        store.append(attention(contestant, 1.0, ms))
    for density, ms in ((0.5, 4.0), (0.25, 2.0)):
        store.append(attention("entropy-attn", density, ms))
        store.append(attention("SDPA cuDNN", density, 6.0))
    store.append(quality("dense", "", 1.0, 0.0))
    store.append(quality("envelope 8", "TopP(0.945)", 0.25, 0.08))
    store.append(quality("true mass", "Perplexity(1.0)", 0.18, 0.02))
    return store


class Tags(HTMLParser):
    """Fails where a tag is closed that was not open; collects what is loaded from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loaded: list[str] = []

    def handle_starttag(self, tag, attributes):
        self.loaded += [v for k, v in attributes if k == "src" or (k == "href" and tag == "link")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_nothing_else(store, tmp_path):
    path = tmp_path / "report.html"
    assert write_page(store, path)
    text = path.read_text()
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    assert tags.loaded == []
    assert "GPU One" in text
    assert "+0.08 at sparsity 75%" in text
    assert text.count("<svg") >= 3
    assert "#000000" not in text  # black would not show on a dark page
    write_page(store, path)
    assert path.read_text() == text  # the same records make the same file


def test_what_was_not_measured_is_not_shown(store, tmp_path):
    write_page(store, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    titles = re.findall(r"<h2[^>]*>([^<]+)", text)
    assert titles == ["The paper&#39;s claims", "Speed of attention", "Quality without training"]


def test_one_machine_a_page(store, tmp_path):
    store.append(attention("entropy-attn", 0.25, 1.0, gpu="GPU Two"))
    path = tmp_path / "report.html"
    assert write_page(store, path, "GPU One")
    assert "GPU Two" not in path.read_text()


def test_suites_that_ran_elsewhere_name_the_machine(store, tmp_path):
    config = {"form": "full", "batch": 8, "length": 65536, "heads": 32, "kv_heads": 8}
    config |= {"density": 1.0, "queries": 1, "contestant": "entropy-attn"}
    result = {"status": "ok", "median_ms": 1.0, "bandwidth": 0.5}
    path = tmp_path / "report.html"
    for gpu in ("GPU Two", "GPU One"):
        store.append(Record("decode", config, result, MACHINE | {"gpu": gpu}))
        write_page(store, path, "GPU One")
        text = path.read_text()
        assert "Decoding" in text
        assert ("GPU Two" in text) == (gpu == "GPU Two")


def test_no_page_without_records(tmp_path):
    path = tmp_path / "report.html"
    assert not write_page(Store(tmp_path / "nothing"), path)
    assert not path.exists()


def test_speedups_are_over_the_best_dense_attention(store):
    records = store.latest("attention")
    assert figures.speedups(records, 128) == {"entropy-attn, 128-blocks": [(0.5, 1.5), (0.25, 3.0)]}
    assert figures.speedups(records, 64) == {}


def test_roofline_counts_what_has_to_move():
    point = figures.roofline_points([attention("entropy-attn", 1.0, 8.0)], [])
    # 4 N^2 D FLOP over four tensors of N D entries of two bytes
    assert point["attention, forward"][0][0] == pytest.approx(16384 / 2)


def test_heads_are_shown_whichever_machine_saw_them(store, tmp_path):
    """The suite ``masks`` runs on a CPU, the page shows a GPU."""
    rng = np.random.default_rng(0)
    drawn = HeadPicture("layer 1, head 2", np.tril(rng.random((7, 7))), np.eye(7) > 0, 0.5, 0.9)
    config = {"form": "full", "number": 0}
    path = tmp_path / "report.html"
    write_page(store, path)
    assert "unknown to the predictor" not in path.read_text(encoding="utf-8")
    another = {**MACHINE, "gpu": "Another"}
    store.append(Record("masks", config, {"status": "ok", **encoded(drawn)}, another))
    write_page(store, path)
    assert "unknown to the predictor" in path.read_text(encoding="utf-8")


def test_claims_without_records_are_not_judged(tmp_path):
    for _, _, measured, _, verdict in claims.rows(Store(tmp_path)):
        assert (measured, verdict) == claims.NOT_YET


def test_pictures_of_heads_survive_the_store(tmp_path):
    rng = np.random.default_rng(0)
    mass = np.tril(rng.random((7, 7)) ** 12)
    kept = np.tril(rng.random((7, 7)) < 0.5)
    drawn = HeadPicture("layer 1, head 2\n3.0 effective blocks", mass, kept, 0.5, 0.9)
    config = {"form": "full", "number": 0}
    store = Store(tmp_path)
    for number in range(2):
        result = {"status": "ok", **encoded(drawn)}
        store.append(Record("masks", config | {"number": number}, result, MACHINE))
    found = report.heads(store)
    assert len(found) == 2
    assert np.array_equal(found[0].kept, kept)
    assert (found[0].title, found[0].density, found[0].kept_mass) == (drawn.title, 0.5, 0.9)
    shown = mass >= 1.1 * LEAST_MASS
    np.testing.assert_allclose(found[0].mass[shown], mass[shown], rtol=0.04)
    assert found[0].mass[mass < LEAST_MASS].max() == 0.0
    files = report.draw(store, tmp_path)
    assert [file.name for file in files] == ["masks.png"]
    assert files[0].stat().st_size > 10_000


def test_masks_of_a_small_model(monkeypatch, tmp_path):
    """The suite on a model of random weights: four heads, and what it says of them."""
    from integration_models import SIZES, transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES | {"max_position_embeddings": 512})
    model = transformers.LlamaForCausalLM(config).eval()
    monkeypatch.setattr(masks, "load_model", lambda device, dtype: (model, None))
    ids = torch.randint(SIZES["vocab_size"], (1, 512))
    monkeypatch.setattr(masks, "windows", lambda *args: ids)
    rows = list(masks.run(Context(torch.device("cpu"), True, tmp_path, measures_cpu=True)))
    assert len(rows) == 4
    for row in rows:
        picture = decoded(row.result)
        assert picture.mass.shape == (16, 16)
        visible = np.tril(np.ones((16, 16), dtype=bool))
        assert not picture.kept[~visible].any()
        assert picture.density == pytest.approx(picture.kept[visible].mean())
        # Masses are kept to a few percent; random weights spread them over all that is visible.
        sums = (picture.mass * picture.kept).sum(-1).mean()
        assert picture.kept_mass == pytest.approx(sums, rel=0.05)
