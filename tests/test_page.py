"""The page of the report, from made records."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from entropy_attn.benchmarks import claims, figures
from entropy_attn.benchmarks.page import write_page
from entropy_attn.benchmarks.prose import PARTS
from entropy_attn.benchmarks.store import Record, Store

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


def test_claims_without_records_are_not_judged(tmp_path):
    for _, _, measured, _, verdict in claims.rows(Store(tmp_path)):
        assert (measured, verdict) == claims.NOT_YET
