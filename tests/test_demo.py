"""The demo and what it measures with, on a tiny model of random weights in SmolLM2's place."""

from __future__ import annotations

import math
from contextlib import ExitStack

import pytest
import torch
from matplotlib.image import imread

import entropy_attn as ea
from entropy_attn.benchmarks import demo, model
from entropy_attn.benchmarks.model import KeptMass, LocalWindow, Setting, sparsify
from entropy_attn.benchmarks.store import Store

transformers = pytest.importorskip("transformers")

CONTEXT = 192
CPU = torch.device("cpu")


class Bytes:
    """A tokenizer of one token a byte."""

    def __call__(self, text: str, verbose: bool = True) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024,
    )  # fmt: skip
    return transformers.LlamaForCausalLM._from_config(config, attn_implementation="sdpa").eval()


@pytest.fixture
def ids():
    return torch.randint(256, (CONTEXT,))


def test_the_loss_in_chunks_is_the_loss(llama, ids, monkeypatch):
    monkeypatch.setattr(model, "LOSS_CHUNK", 50)
    with torch.no_grad():
        whole = llama(input_ids=ids[None], labels=ids[None]).loss.item()
    found = model.negative_log_likelihood(llama, ids)
    assert found == pytest.approx(whole, rel=4 * torch.finfo(torch.float32).eps)
    pair = torch.stack([ids, ids.flip(0)])
    mean = (found + model.negative_log_likelihood(llama, ids.flip(0))) / 2
    assert model.perplexity(llama, pair) == math.exp(mean)


def test_windows_lie_side_by_side_and_a_short_text_is_refused():
    found = model.windows(Bytes(), "abcdefgh", 3, 2, CPU)
    assert found.tolist() == [[97, 98, 99], [100, 101, 102]]
    with pytest.raises(ValueError, match="8 tokens, 3 x 3 are needed"):
        model.windows(Bytes(), "abcdefgh", 3, 3, CPU)


def test_a_shared_copy_has_the_weights_but_an_attention_of_its_own(llama, ids):
    copied = model.shared_copy(llama)
    for a, b in zip(llama.parameters(), copied.parameters(), strict=True):
        assert a.data_ptr() == b.data_ptr()
    before = model.negative_log_likelihood(llama, ids)
    setting = Setting("window", LocalWindow(), ea.TopK(count=1), block=16, sink=0, local=1)
    with sparsify(copied, setting) as handle:
        changed = model.negative_log_likelihood(copied, ids)
        assert model.negative_log_likelihood(llama, ids) == before
        assert handle.stats().sparse == 2
    assert changed != before
    assert model.negative_log_likelihood(copied, ids) == before


@pytest.mark.parametrize("lengths", [(), (CONTEXT, 20)], ids=["idle", "too few queries"])
def test_measuring_something_that_was_not_sparse_is_an_error(llama, ids, lengths):
    setting = Setting("window", LocalWindow(), ea.TopK(0.5), block=16)
    with ExitStack() as stack:
        stack.enter_context(pytest.raises(RuntimeError, match="did not run sparse"))
        stack.enter_context(sparsify(llama, setting))
        for length in lengths:
            model.negative_log_likelihood(llama, ids[:length])


def test_everything_is_kept_where_the_budget_allows_everything(llama, ids):
    probe = KeptMass(ea.TrueMass(), ea.TopK(1.0), keep_tiles=True)
    setting = Setting("all", ea.TrueMass(), ea.TopK(1.0), block=32)
    dense = model.negative_log_likelihood(llama, ids)
    with sparsify(llama, setting, scorer=probe):
        sparse = model.negative_log_likelihood(llama, ids)
    assert probe.density == 1.0
    assert probe.mass == pytest.approx(1.0, abs=CONTEXT * torch.finfo(torch.float32).eps)
    assert sparse == pytest.approx(dense, rel=CONTEXT * torch.finfo(torch.float32).eps)
    assert [tuple(m.shape) for m, _ in probe.tiles] == [(4, 6, 6)] * 2


def test_kept_mass_is_the_attention_on_the_kept_blocks():
    """By hand: the first 16 queries attend evenly, the others 1/4 and 3/4 to the two blocks."""
    query, key = torch.zeros(2, 1, 1, 32, 16)
    query[0, 0, 16:, 0] = 1.0
    key[0, 0, 16:, 0] = math.log(3.0)
    probe = KeptMass(LocalWindow(), ea.TopK(count=1), sink=0, local=0)
    options = {"scale": 1.0, "kv_lens": None, "q_lens": None, "window": None}
    probe(query, key, block_size=(16, 16), is_causal=False, backend="reference", **options)
    # Both tiles keep their own block only: masses 1/2 and 3/4.
    assert probe.mass == pytest.approx((0.5 + 0.75) / 2, rel=1e-6)
    assert probe.density == 0.5


def test_a_local_window_keeps_the_nearest_blocks():
    tokens = torch.zeros(1, 2, 128, 16)
    mask = ea.select_blocks(
        tokens, tokens, block_size=16, scorer=LocalWindow(), budget=ea.TopK(count=3),
        is_causal=True, sink=0, local=0,
    )  # fmt: skip
    rows, columns = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    near = (columns <= rows) & (rows - columns < 3)
    assert torch.equal(mask.to_dense(), near.expand(1, 2, 8, 8))


@pytest.fixture
def small_demo(llama, monkeypatch):
    monkeypatch.setattr(demo, "CONTEXT_CPU", CONTEXT)
    monkeypatch.setattr(demo, "load_model", lambda device, dtype: (llama, Bytes()))


def test_the_demo_measures_draws_and_records(small_demo, tmp_path):
    steps = []
    found = demo.run_demo(device=CPU, quick=False, out=tmp_path, progress=steps.append)
    settings = demo.demo_settings(on_gpu=False, quick=False)
    assert [row.name for row in found.rows] == [demo.DENSE, *(s.name for s in settings)]
    dense, *sparse = found.rows
    assert dense.perplexity > 1
    for row in sparse:
        assert 0 < row.density <= 1
        assert 0 < row.kept_mass <= 1 + 1e-5
        assert row.change == row.perplexity - dense.perplexity
        assert (row.milliseconds is None) == (row.family == demo.ORACLE)
    assert found.sparse_calls == 2 * sum(s.family != demo.ORACLE for s in settings)
    budgets = [row.density for row in sparse if row.family == "predicted"]
    assert budgets == sorted(budgets)
    assert len(found.pictures) == 2
    assert all(imread(path).std() > 0 for path in found.pictures)
    assert [r.config["name"] for r in Store(tmp_path).load("demo")] == [r.name for r in found.rows]
    assert any("1 of 5" in step for step in steps)


def test_the_table_fits_a_terminal(small_demo, tmp_path):
    from rich.console import Console

    found = demo.run_demo(device=CPU, quick=True, out=tmp_path)
    console = Console(width=80, record=True, file=(tmp_path / "out").open("w"))
    console.print(found.table())
    text = console.export_text()
    assert "…" not in text
    for row in found.rows:
        assert row.name in text


def test_a_text_of_the_user_is_read(small_demo, tmp_path):
    text = tmp_path / "mine.txt"
    text.write_text("word " * 200)
    assert demo.run_demo(device=CPU, quick=True, out=tmp_path, text=text).text == "mine.txt"


def test_pictures_go_from_simple_to_complex_heads():
    focused, spread = torch.eye(8)[None], torch.ones(8, 8).tril()[None]
    spread = spread / spread.sum(-1, keepdim=True)
    layers = [(torch.cat([spread, focused]), torch.ones(2, 8, 8, dtype=torch.bool))]
    first, last = demo.heads_to_show(layers, count=2)
    assert first.title == "layer 0, head 1\n1.0 effective blocks"
    assert last.title.startswith("layer 0, head 0")
