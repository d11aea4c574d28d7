"""Whole models by attention: what is checked, what is timed, and what a record says of it."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial

import pytest
import timm_or_stub  # noqa: F401  (timm, also where torchvision is not installed)
import torch

pytest.importorskip("transformers")

from transformers import AttentionInterface, ViTConfig, ViTForImageClassification

from entropy_attn.benchmarks import report_models, whole_models
from entropy_attn.benchmarks.registry import Context
from entropy_attn.benchmarks.report import fill
from entropy_attn.benchmarks.resume import among
from entropy_attn.benchmarks.store import Record, Store
from entropy_attn.benchmarks.suites import llm, vit
from entropy_attn.benchmarks.whole_models import (
    EAGER,
    FLASH,
    FLASH_ONLY,
    LIMIT,
    OURS,
    SDPA,
    Attention,
    ours,
)

SPARSE = {"min_length": 0, "block_size": 16, "min_queries": 1, "sink": 0, "local": 0}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=32, patch_size=4, hidden_size=32, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=64, num_labels=5, initializer_range=0.25,
    )  # fmt: skip
    return ViTForImageClassification(config).to(torch.bfloat16).eval()


@pytest.fixture(scope="module")
def inputs():
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": pixels.bfloat16()}


def contest(model, inputs, *attentions):
    found = whole_models.contest(
        attentions, model, inputs, inputs, "logits", seconds=0.01, progress=lambda text: None
    )
    return {attention.name: result for attention, result in found}


def test_all_right_ones_are_timed_and_the_model_is_left_alone(model, inputs):
    before = model(**inputs).logits
    found = contest(model, inputs, EAGER, SDPA, ours(0.75, **SPARSE), LIMIT)
    assert {result["status"] for result in found.values()} == {"ok"}
    assert all(result["median_ms"] > 0 for result in found.values())
    assert torch.equal(model(**inputs).logits, before)
    assert model.dtype == torch.bfloat16


def test_the_record_says_what_ran_sparse(model, inputs):
    sparse = contest(model, inputs, ours(0.75, **SPARSE))["entropy-attn"]
    assert sparse["sparse_calls"] == 1.0
    assert 0.3 < sparse["density"] < 0.5  # 2 of 5 blocks of 16 tokens, of 65
    dense = contest(model, inputs, ours(0.75))["entropy-attn"]
    assert dense["sparse_calls"] == 0.0
    assert "4096" in dense["why_dense"]


def test_wrong_attention_is_reported_and_not_timed(model, inputs):
    def uniform(module, query, key, value, attention_mask, **_):
        return value.mean(2, keepdim=True).expand_as(query).transpose(1, 2).contiguous(), None

    AttentionInterface.register("uniform", uniform)
    found = contest(model, inputs, SDPA, Attention("uniform", "uniform"))
    assert found["SDPA"]["status"] == "ok"
    assert found["uniform"]["status"] == "wrong"
    assert "exceeds" in found["uniform"]["reason"]
    assert "median_ms" not in found["uniform"]


def test_what_cannot_run_is_reported(model, inputs):
    def broken(*args, **kwargs):
        raise NotImplementedError("not on this machine\nand more")

    AttentionInterface.register("broken", broken)
    found = contest(model, inputs, SDPA, Attention("broken", "broken"))["broken"]
    assert found == {"status": "failed", "reason": "NotImplementedError: not on this machine"}


def test_the_limit_computes_no_attention(model, inputs):
    prepared = whole_models.prepare(LIMIT, model)
    value = torch.randn(1, 2, 3, 4)
    out, _ = whole_models._left_out(prepared.model, value.repeat(1, 2, 1, 1), value, value, None)
    assert torch.equal(out.transpose(1, 2), value.repeat_interleave(2, dim=1))


def test_in_a_capture_sdpa_gets_no_mask_either(tmp_path, monkeypatch):
    """transformers makes one where it cannot read position_ids; fast kernels take none."""
    from transformers import masking_utils

    context = Context(torch.device("cpu"), quick=True, out=tmp_path, progress=print)
    llama = llm.MODELS["LLaMA, tiny"](llm.Case("LLaMA, tiny", 48), context)
    tokens = {"input_ids": torch.arange(48)[None], "use_cache": False}
    sdpa, masks = torch.nn.functional.scaled_dot_product_attention, []

    def attend(*args, attn_mask=None, **options):
        masks.append(attn_mask is not None)
        return sdpa(*args, attn_mask=attn_mask, **options)

    expected = whole_models.prepare(SDPA, llama).call(tokens, "logits")
    monkeypatch.setattr(masking_utils, "is_tracing", lambda *args: True)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
    for attention in (SDPA, SDPA.in_capture(is_prefill=True)):
        logits = whole_models.prepare(attention, llama).call(tokens, "logits")
        torch.testing.assert_close(logits, expected)
    assert masks == [True, True, False, False]


def test_the_check_runs_on_the_first_layers(model):
    copied = whole_models.shared_copy(model)
    whole_models.cut(copied, 1)
    assert [len(m) for m in copied.modules() if isinstance(m, torch.nn.ModuleList)] == [1]
    assert [len(m) for m in model.modules() if isinstance(m, torch.nn.ModuleList)] == [3]


def test_flash_only_is_the_yardstick(model, inputs):
    found = contest(model, inputs, FLASH_ONLY, SDPA)
    if found[FLASH_ONLY.name]["status"] == "ok":  # torch's CPU build has that kernel too
        assert found[FLASH_ONLY.name]["over_flash"] == 1.0
        assert found["SDPA"]["over_flash"] > 0


@pytest.mark.parametrize(("suite", "models"), [(vit, 2), (llm, 2)])
def test_the_small_form_runs(suite, models, tmp_path):
    context = Context(torch.device("cpu"), quick=False, out=tmp_path)
    rows = list(suite.run(context))
    assert [row.result["status"] for row in rows] == ["ok"] * 4 * models
    done = replace(context, is_measured=among([row.config for row in rows]))
    assert list(suite.run(done)) == []
    mine = [row for row in rows if row.is_ours]
    assert len(mine) == models
    for each in mine:
        assert each.result["sparse_calls"] == 1.0
        assert each.result["density"] < 1.0
        assert each.config["sparsity"] > 0


def test_what_timm_measured_is_not_taken_for_transformers(tmp_path):
    context = Context(torch.device("cpu"), quick=False, out=tmp_path)
    config = {**vit.Case(64, 1, depth=2, library=vit.TIMM).config(), "form": "small"}
    measured = [{**config, "contestant": name} for name in (OURS, LIMIT.name)]
    timm_alone = replace(context, is_measured=among(measured))
    rows = list(vit.run(timm_alone))
    assert [row.config.get("library") for row in rows] == [None] * 4


def test_without_timm_its_model_is_unavailable(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    rows = list(vit.run(Context(torch.device("cpu"), quick=False, out=tmp_path)))
    assert [row.result["status"] for row in rows] == ["ok"] * 4 + ["unavailable"]
    assert "timm cannot be imported" in rows[-1].text


@pytest.fixture
def timm_model():
    return vit._of_timm(vit.Case(64, 1, depth=3, library=vit.TIMM)).to(torch.bfloat16).eval()


def test_graphs_of_timm_are_whole_and_each_its_own(timm_model, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    eager = [SDPA, ours(0.75, **SPARSE), LIMIT]
    found = contest(timm_model, {"x": pixels}, *eager, *(a.in_graph for a in eager))
    assert {result["status"] for result in found.values()} == {"ok"}, found
    assert found["entropy-attn, compiled"]["sparse_calls"] == 1.0
    assert found["entropy-attn, compiled"]["graph_breaks"] == 0
    outputs = [
        [whole_models.prepare(a, timm_model).call({"x": pixels}, "logits") for a in pair]
        for pair in ((a, a.in_graph) for a in eager)
    ]
    for plain, compiled in outputs:
        torch.testing.assert_close(plain, compiled)
    assert not torch.equal(outputs[0][1], outputs[1][1])


def test_a_graph_that_breaks_is_not_timed(timm_model, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    timm_model.blocks[0].register_forward_hook(lambda *args: torch._dynamo.graph_break())
    result = contest(timm_model, {"x": torch.randn(1, 3, 64, 64).bfloat16()}, SDPA.in_graph)
    assert result["SDPA, compiled"]["status"] == "failed"
    assert "median_ms" not in result["SDPA, compiled"]


@pytest.mark.parametrize("suite", [vit, llm])
def test_every_case_can_be_made(suite):
    for form in ("full", "quick", "small"):
        assert suite.cases(form)
        assert len({attention.name for attention in suite.attentions(form)}) > 3
    assert len({attention.name for attention in llm.decoding_attentions("full")}) == 5
    used = {case.model for form in ("full", "quick", "small") for case in llm.cases(form)}
    assert used == set(llm.MODELS)


# --- the report ---------------------------------------------------------------------------------

MACHINE = {"gpu": "G1", "cpu": "C", "arch": "sm_90", "commit": "abc", "dirty": False}


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path)
    times = {"eager": 20.0, FLASH: 10.0, OURS: 8.0, LIMIT.name: 5.0}
    times |= {"of an earlier version": 1.0}
    for name, ms in times.items():
        sparsity = 0.8 if name.startswith(OURS) else 0.0
        shared = {"form": "full", "contestant": name, "sparsity": sparsity, "dtype": "bfloat16"}
        result = {"status": "ok", "median_ms": ms}
        image = {**shared, "size": 1024, "batch": 8}
        store.append(Record("vit", image, {**result, "images_per_s": 8e3 / ms}, MACHINE))
        text = {**shared, "model": "LLaMA-2-7B", "tokens": 32768}
        store.append(Record("llm", text, {**result, "tokens_per_s": 32768e3 / ms}, MACHINE))
    return store


def test_tables_compare_with_flash_attention(store):
    page = fill("<!-- begin:vit -->\n<!-- end:vit -->\n<!-- begin:llm -->\n<!-- end:llm -->", store)
    assert "| attention | 8 x 1024 px |" in page
    assert "| entropy-attn (80% sparse) | 1,000 (1.25 x) |" in page
    assert "earlier version" not in page
    assert "| no attention | 1,600 (2.00 x) |" in page
    assert "| attention | LLaMA-2-7B, 32k |" in page
    assert "| entropy-attn (80% sparse) | 4,096,000 (1.25 x) |" in page


def test_compiled_ones_of_timm_stand_beside_the_eager_ones(store):
    """Also a baseline of a plugin; transformers' compiled ones were of an earlier version."""
    shared = {"form": "full", "sparsity": 0.0, "dtype": "bfloat16", "size": 1024, "batch": 8}
    for extra, result in (
        ({"contestant": "SDPA, compiled", "library": "timm"}, {"images_per_s": 111.0}),
        ({"contestant": "SDPA, compiled"}, {"images_per_s": 222.0}),
        ({"contestant": "mine"}, {"images_per_s": 333.0, "version": "1"}),
    ):
        result |= {"status": "ok", "median_ms": 5.0}
        store.append(Record("vit", {**shared, **extra}, result, MACHINE))
    page = fill("<!-- begin:vit -->\n<!-- end:vit -->", store)
    assert "| attention | 8 x 1024 px | 8 x 1024 px, timm |" in page
    assert "| SDPA, compiled | – | 111 |" in page
    assert "| mine | 333 (2.00 x) | – |" in page
    assert "222" not in page


def test_the_headline_sets_gains_beside_their_limit(store, tmp_path):
    shared = {"form": "full", "sparsity": 0.0, "dtype": "bfloat16"}
    config = {**shared, "model": "LLaMA-2-7B", "tokens": 32768, "contestant": "cuDNN"}
    result = {"status": "ok", "median_ms": 9.0, "tokens_per_s": 7.0}
    store.append(Record("llm", config, result, MACHINE))
    page = fill("<!-- begin:models-headline -->\n<!-- end:models-headline -->", store)
    gains = "1.25 x, limit 2.00 x | 1.12 x, limit 1.80 x"
    assert f"| LLaMA-2-7B, 32k | 3,276,800 | 7 | 4,096,000 | 6,553,600 | {gains} |" in page
    assert "| 8 x 1024 px | 800 | – | 1,000 | 1,600 | 1.25 x, limit 2.00 x | 1.25 x" in page
    (llm_panel, vit_panel) = report_models.panels(store)["G1"].values()
    assert llm_panel[OURS] == [(32768, 1.25)]
    assert llm_panel["the fastest dense"] == [(32768, pytest.approx(10 / 9))]
    assert vit_panel[LIMIT.name] == [(1024, 2.0)]
    (path,) = report_models.draw(store, tmp_path)
    assert path.stat().st_size > 0
    assert [value for value, _ in report_models.cards(store)] == ["1.25 x", "1.25 x"]


def test_what_ran_dense_says_so(store):
    for record in store.load("vit", contestant=OURS):
        store.append(Record("vit", record.config, {**record.result, "sparse_calls": 0.0}, MACHINE))
    assert "1,000 dense (1.25 x) |" in fill("<!-- begin:vit -->\n<!-- end:vit -->", store)


def test_the_papers_claims_are_judged(store, tmp_path):
    text, verdict = report_models.judge_vit(store)
    assert text == "1024 px: 2.50 x eager, 1.25 x FlashAttention-2 (G1)"
    assert verdict == "does not hold"  # of FlashAttention's 1.63 x the paper makes 2.07 x
    text, verdict = report_models.judge_llm(store)
    assert text == "LLaMA-2-7B, 32k: 1.25 x FlashAttention-2 (G1)"
    assert verdict == "does not hold"
    assert report_models.judge_vit(Store(tmp_path / "none")) is None
    assert report_models.judge_llm(Store(tmp_path / "none")) is None
