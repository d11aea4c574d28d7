"""Sparse decoding in transformers' generate: right for every cache, and never by stale boxes."""

from __future__ import annotations

import contextlib
import copy
import gc
import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from integration_models import GROUPED, build, padding_mask, tokens, transformers
from torch.utils._python_dispatch import TorchDispatchMode

import entropy_attn as ea
from entropy_attn.decoding.boxes import KeyBoxes
from entropy_attn.integrations import cache as cache_module

EVERYTHING = ea.SparseDecoding(1.0, block_size=16, min_length=0)
FEW = replace(EVERYTHING, keep=0.2, local=1)
PLAIN = {"do_sample": False, "disable_compile": True, "max_new_tokens": 12, "min_new_tokens": 12}


def config(decode: ea.SparseDecoding | None) -> ea.SparsityConfig:
    return ea.SparsityConfig(decode=decode)


def prompt(batch: int = 2, length: int = 90, seed: int = 1) -> dict[str, torch.Tensor]:
    ids = tokens(batch, length, seed)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.fixture
def model():
    model = build("llama")
    model.generation_config.pad_token_id = 0
    return model


@pytest.fixture
def checked(monkeypatch) -> Iterator[list[tuple[int, int]]]:
    """Compare every choice of blocks with one by boxes made from scratch.

    Gives (keys whose boxes are trusted, all keys) of each; each layer's is an entry.
    """
    calls, choose = [], KeyBoxes.choose

    def compared(self, query, key, totals, **options):
        fresh = int(self.fresh[0])
        mask = choose(self, query, key, totals, **options)
        scratch = KeyBoxes(key, self.settings)
        other = choose(scratch, query, key, totals.clone(), **options)
        end = int(self.fresh[0])
        trusted = min(fresh, end - query.shape[2])
        blocks = -(-end // self.settings.block_size)
        assert torch.equal(self.boxes[:, :, :blocks], scratch.boxes[:, :, :blocks]), "stale boxes"
        assert mask.same_blocks(other)
        calls.append((trusted, end))
        return mask

    monkeypatch.setattr(KeyBoxes, "choose", compared)
    yield calls
    assert calls


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
@pytest.mark.parametrize("family", ["llama", "phi"])
def test_keeping_everything_generates_the_same_tokens(family, padded, cache, checked):
    model = build(family)
    model.generation_config.pad_token_id = 0
    inputs = prompt(3, 180)
    if padded:
        inputs["attention_mask"] = padding_mask("left", 180)
    options = PLAIN | {"cache_implementation": cache}
    expected = model.generate(**inputs, **options)
    with ea.apply(model, config(EVERYTHING)) as handle:
        assert torch.equal(model.generate(**inputs, **options), expected)
        stats = handle.stats()
    assert [layer.decoded for layer in stats.layers] == [11, 11]
    assert stats.decode_density == 1.0
    # One choice brings all boxes up to date, the others those of the new token.
    assert [trusted for trusted, _ in checked[::2]] == [0, *range(181, 191)]


@pytest.mark.parametrize("backend", ["reference", "triton"])
@torch.no_grad()
def test_keeping_few_is_sparse(model, backend, device, checked):
    model = model.to(device if backend == "triton" else "cpu")
    inputs = {name: x.to(model.device) for name, x in prompt(1).items()}
    options = PLAIN | {"max_new_tokens": 2, "min_new_tokens": 2}
    settings = replace(config(FEW), backend=backend)
    expected = model(**inputs, use_cache=False).logits
    with ea.apply(model, settings) as handle:
        past = model(**inputs).past_key_values
        past.crop(-1)
        sparse = model(inputs["input_ids"][:, -1:], past_key_values=past).logits[:, 0]
        assert (sparse - expected[:, -1]).abs().max() > 1e-3
        model.generate(**inputs, **options)
        # Two of six blocks by their mass, and the first and the last.
        assert 0.3 < handle.stats().decode_density < 0.7
        text = str(handle.stats())
        assert "decode density" in text
        handle.reset_stats()
        assert handle.stats().decode_density is None
        assert "decode density" not in str(handle.stats())


# --- caches that change where the layer does not see it -----------------------------------------


@pytest.mark.parametrize("decode", [EVERYTHING, FEW], ids=["everything", "few"])
@pytest.mark.parametrize("cache", [None, "static"])
def test_beam_search(model, cache, decode, checked):
    inputs = prompt()
    options = PLAIN | {"num_beams": 3, "cache_implementation": cache}
    expected = model.generate(**inputs, **options)
    with ea.apply(model, config(decode)):
        found = model.generate(**inputs, **options)
    if decode is EVERYTHING:
        assert torch.equal(found, expected)
    # The cache is gathered anew before each token, so its boxes are made anew.
    assert {trusted for trusted, _ in checked} == {0}


def test_another_prompt(model, checked):
    inputs, others = prompt(), prompt(seed=2)
    with ea.apply(model, config(FEW)):
        for each in (inputs, others, prompt(3, 100), inputs):
            model.generate(**each, **PLAIN)


def test_two_caches_take_turns(model, checked):
    ids, other = tokens(1, 90), tokens(1, 90, seed=2)
    with ea.apply(model, config(FEW)), torch.no_grad():
        pasts = [model(x[:, :80]).past_key_values for x in (ids, other)]
        for place in range(80, 86):
            for x, past in zip((ids, other), pasts, strict=True):
                model(x[:, place : place + 1], past_key_values=past)
    assert {trusted for trusted, _ in checked} == {0, *range(81, 86)}


def test_a_cache_that_was_filled_elsewhere(model, checked):
    ids = tokens(1, 100)
    with torch.no_grad():
        past = model(ids[:, :90]).past_key_values
        with ea.apply(model, config(FEW)):
            model(ids[:, 90:91], past_key_values=past)
            copied = copy.deepcopy(past)
            model(ids[:, 91:92], past_key_values=past)
            model(ids[:, 91:95], past_key_values=copied)
    assert [trusted for trusted, _ in checked[::2]] == [0, 91, 0]


@pytest.mark.parametrize("regularized", [False, True])
def test_cropping(model, checked, regularized):
    """Nor does it matter whether a regularizer's layers lie on top."""
    ids, other = tokens(1, 120), tokens(1, 120, seed=2)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(ea.apply(model, config(FEW)))
        if regularized:
            stack.enter_context(ea.EntropyRegularizer(model, weight=1.0))
        past = model(ids[:, :90]).past_key_values
        model(ids[:, 90:100], past_key_values=past)
        past.crop(-7)
        model(other[:, 93:99], past_key_values=past)
        past.crop(-40)
        past.crop(-1)
        model(other[:, 58:59], past_key_values=past)
    # What a crop leaves is trusted.
    assert [trusted for trusted, _ in checked[::2]] == [0, 93, 58]


@pytest.mark.parametrize("many", [6, 20])
def test_assisted_generation(model, many, checked):
    """Several tokens are appended, and the cache is cropped to those that were right."""
    inputs = prompt(1)
    options = PLAIN | {"prompt_lookup_num_tokens": many}
    expected = model.generate(**inputs, **PLAIN)
    assistant = copy.deepcopy(model)
    assistant.generation_config.num_assistant_tokens = many
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    with torch.no_grad():
        for parameter in assistant.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=1e-3)
    with ea.apply(model, config(EVERYTHING)):
        assert torch.equal(model.generate(**inputs, **options), expected)
        del options["prompt_lookup_num_tokens"]
        found = model.generate(**inputs, **options, assistant_model=assistant)
        assert torch.equal(found, expected)
    if many < 16:
        assert max(trusted for trusted, _ in checked) > 90


@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
@torch.no_grad()
def test_autocast(model, padded, checked):
    """Keys stay in fp32, as the rotation makes them; attention is in the dtype of autocast."""
    inputs = prompt(3, 180)
    if padded:
        inputs["attention_mask"] = padding_mask("left", 180)
    logits = []
    for decode in (EVERYTHING, None):
        with ea.apply(model, config(decode)), torch.autocast("cpu", torch.bfloat16):
            past = model(**inputs).past_key_values
            valid = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
            out = model(tokens(3, 1), attention_mask=valid, past_key_values=past).logits
            logits.append(out.float())
    torch.testing.assert_close(*logits, atol=2**-5, rtol=2**-5)


def test_a_batch_that_is_selected_from(model, checked):
    ids = tokens(3, 100)
    with torch.no_grad(), ea.apply(model, config(FEW)):
        past = model(ids[:, :90]).past_key_values
        model(ids[:, 90:91], past_key_values=past)
        past.batch_select_indices(torch.tensor([2, 0, 1]))
        model(ids[[2, 0, 1], 91:92], past_key_values=past)
        for layer in past.layers:  # a view of the same memory, of fewer rows
            layer.keys, layer.values = layer.keys[:2], layer.values[:2]
        model(ids[[2, 0], 92:93], past_key_values=past)
        past.batch_repeat_interleave(2)
        model(ids[[2, 2, 0, 0], 93:94], past_key_values=past)
    assert {trusted for trusted, _ in checked} == {0}


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_keys_that_are_written_to(model, kind, checked):
    ids = tokens(1, 120)
    static = transformers.StaticCache(config=model.config, max_cache_len=128)
    with torch.no_grad(), ea.apply(model, config(FEW)):
        past = static if kind == "static" else transformers.DynamicCache(config=model.config)
        model(ids[:, :90], past_key_values=past)
        model(ids[:, 90:91], past_key_values=past)
        for layer in past.layers:
            layer.keys[:, :, 3] = 9.0
        model(ids[:, 91:92], past_key_values=past)
    assert [trusted for trusted, _ in checked] == [0] * 4


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_static_cache_that_is_reset(model, mode, checked):
    """In inference mode a write has no trace on the host; the place of the queries tells."""
    ids, other = tokens(1, 120), tokens(1, 120, seed=2)
    past = transformers.StaticCache(config=model.config, max_cache_len=128)
    with mode(), ea.apply(model, config(FEW)):
        for x, length in ((ids, 90), (other, 10), (ids, 12), (other, 70)):
            model(x[:, :length], past_key_values=past)
            for place in range(length, length + 3):
                model(x[:, place : place + 1], past_key_values=past)
            past.reset()


def test_dense_calls_in_between(model, checked):
    """What other calls appended is taken in, whatever they were."""
    ids = tokens(1, 130)
    static = transformers.StaticCache(config=model.config, max_cache_len=144)
    with torch.no_grad(), ea.apply(model, config(FEW)):
        for past in (transformers.DynamicCache(config=model.config), static):
            bounds = (0, 50, 51, 90, 91, 93, 120, 124)
            for begin, end in itertools.pairwise(bounds):
                model(ids[:, begin:end], past_key_values=past)
    trusted = [trusted for trusted, _ in checked[::2]]
    assert trusted[:4] == [0, 51, 91, 93]


def test_the_check_finds_stale_boxes(model, checked, monkeypatch):
    """The tests above would fail if nothing was compared."""
    monkeypatch.setattr(cache_module._Seen, "compare", lambda self, keys: None)
    with ea.apply(model, config(FEW)), pytest.raises(AssertionError, match="stale boxes"):
        model.generate(**prompt(), **PLAIN, num_beams=3)


class Waiting(TorchDispatchMode):
    """Refuses what would wait for a GPU, where the tensors are on one."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "equal", "item"), name
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def test_a_step_reads_no_value_on_the_host(model):
    ids, mask = tokens(2, 100), padding_mask("left", 100)[:2]
    static = transformers.StaticCache(config=model.config, max_cache_len=128)
    calls = ((static, mask), (transformers.DynamicCache(config=model.config), None))
    with ea.apply(model, config(FEW)) as handle:
        for past, valid in calls:
            for begin, end in ((0, 90), (90, 91), (91, 92), (92, 95)):
                given = {} if valid is None else {"attention_mask": valid[:, :end]}
                # Several tokens at once: transformers reads a static cache's length then.
                step = end - begin == 1 or (past is not static and begin > 0)
                with Waiting() if step else contextlib.nullcontext():
                    model(ids[:, begin:end], past_key_values=past, **given)
        assert handle.stats().decoded == 12


def test_boxes_die_with_their_cache(model):
    with ea.apply(model, config(FEW)) as handle, torch.no_grad():
        past = model(tokens(1, 90)).past_key_values
        model(tokens(1, 1), past_key_values=past)
        assert [len(layer.follower._seen) for layer in handle.layers] == [1, 1]
        del past
        gc.collect()
        assert [len(layer.follower._seen) for layer in handle.layers] == [0, 0]


# --- calls that run dense, and say why ----------------------------------------------------------


@torch.no_grad()
def test_an_attention_mask_that_changes(model, checked):
    """Boxes hold padding too, so that it may become valid; the mask of the call is what counts."""
    ids = tokens(2, 93)
    hidden = torch.ones(2, 93, dtype=torch.int64)
    hidden[1, 3:40] = 0

    def logits(decode):
        with ea.apply(model, config(decode)):
            past = model(ids[:, :90]).past_key_values
            masks = (hidden[:, :91], None, hidden)
            return torch.cat([
                model(ids[:, n : n + 1], attention_mask=mask, past_key_values=past).logits
                for n, mask in zip((90, 91, 92), masks, strict=True)
            ])  # fmt: skip

    torch.testing.assert_close(logits(EVERYTHING), logits(None))


def decoded_densely(model, settings, **options) -> dict[str, int]:
    with ea.apply(model, settings) as handle:
        past = model(tokens(1, 90)).past_key_values
        model(tokens(1, 2), past_key_values=past, **options)
        assert handle.stats().decoded == 0
        dense = handle.stats().dense
        return {reason: n for reason, n in dense.items() if "min_length='auto'" not in reason}


@torch.no_grad()
def test_calls_without_a_cache_are_what_they_were(model):
    ids = tokens(2, 90)
    expected = model(ids, use_cache=False).logits
    few = ea.SparsityConfig(decode=FEW, min_length=0, block_size=16, budget=ea.TopK(1.0))
    lazy = transformers.DynamicCache()  # its layers come with the first call
    with ea.apply(model, few) as handle:
        torch.testing.assert_close(model(ids, use_cache=False).logits, expected)
        torch.testing.assert_close(model(ids, past_key_values=lazy).logits, expected)
        model(ids[:, :1], past_key_values=lazy)
        assert [layer.sparse for layer in handle.stats().layers] == [2, 2]
        assert handle.stats().decoded == 2


def test_reasons(model):
    with torch.no_grad():
        assert decoded_densely(model, config(replace(FEW, min_length=93))) == {
            "fewer than decode.min_length=93 keys": 2
        }
        dense_layers = replace(config(FEW), dense_layers=(0, 1))
        assert decoded_densely(model, dense_layers) == {"the layer is in dense_layers": 4}
        assert decoded_densely(model, config(None)) == {"fewer than min_queries=64 queries": 2}
    (reason,) = decoded_densely(model, config(FEW))
    assert reason == "decoding with gradients: run it under torch.no_grad()"
    with torch.no_grad():
        (reason,) = decoded_densely(build("mistral"), config(FEW))
        assert reason == "decoding with a sliding window, which bounds the keys already"


class Widened(transformers.DynamicCache):
    """A cache that hands out other tensors than it holds."""

    def update(self, *args, **kwargs):
        return tuple(x.clone() for x in super().update(*args, **kwargs))


@torch.no_grad()
def test_a_cache_that_cannot_be_followed(model):
    ids = tokens(1, 92)
    expected = model(ids).logits[:, 90:]
    with ea.apply(model, config(FEW)) as handle:
        past = Widened(config=model.config)
        model(ids[:, :90], past_key_values=past)
        torch.testing.assert_close(model(ids[:, 90:], past_key_values=past).logits, expected)
        (reason, count) = handle.stats().dense.popitem()
    assert reason == "decoding with keys that are not those of a cache that can be followed"
    assert count == 2


@torch.no_grad()
def test_graphs_of_torch_compile_decode_dense(model, checked):
    ids = tokens(2, 90)
    dense = model(ids).logits
    past = transformers.StaticCache(config=model.config, max_cache_len=128)
    with ea.apply(model, config(EVERYTHING)) as handle:
        model(ids[:, :79], past_key_values=past)
        model(ids[:, 79:80], past_key_values=past)
        step = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
        logits = [step(ids[:, i : i + 1], past_key_values=past).logits for i in range(80, 83)]
        for layer in handle.stats().layers:
            (reason,) = layer.compiled
            assert reason.startswith("decoding in a graph of torch.compile, which cannot")
        # After what the graph appended.
        logits.append(model(ids[:, 83:84], past_key_values=past).logits)
    torch.testing.assert_close(torch.cat(logits, 1), dense[:, 80:84])


# --- models --------------------------------------------------------------------------------------


def test_hooks_go_with_the_handle(model):
    before = {name: dict(module._forward_pre_hooks) for name, module in model.named_modules()}
    keys = {name: set(module.__dict__) for name, module in model.named_modules()}
    with ea.apply(model, config(None)):
        assert not any(m._forward_pre_hooks for m in model.modules())
        with ea.apply(model, config(FEW)):
            assert sum(bool(m._forward_pre_hooks) for m in model.modules()) == 2
        assert not any(m._forward_pre_hooks for m in model.modules())
    after = {name: dict(module._forward_pre_hooks) for name, module in model.named_modules()}
    assert after == before
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == keys


def test_a_loaded_model_decodes_sparsely(model, tmp_path, checked):
    with ea.apply(model, config(FEW)):
        expected = model.generate(**prompt(), **PLAIN)
        model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="entropy_attn")
    loaded.generation_config.pad_token_id = 0
    assert torch.equal(loaded.generate(**prompt(), **PLAIN), expected)
    copied = copy.deepcopy(loaded)
    assert torch.equal(copied.generate(**prompt(), **PLAIN), expected)


def test_settings_by_layer(model):
    settings = ea.SparsityConfig(decode=FEW, layers={1: {"decode": None}})
    with ea.apply(model, settings) as handle:
        model.generate(**prompt(), **PLAIN)
        assert [layer.decoded for layer in handle.stats().layers] == [11, 0]


@pytest.mark.gpu
@torch.no_grad()
def test_decoding_waits_for_nothing_and_replays(forbid_waiting):
    """A captured step is right at every later length, and after the cache was reset."""
    sizes = GROUPED | {"hidden_size": 512, "max_position_embeddings": 8192}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    model = model.to("cuda", torch.bfloat16).eval()
    ids = torch.randint(1, 97, (2, 5000), device="cuda")
    past = transformers.StaticCache(config=model.config, max_cache_len=6144)
    settings = replace(EVERYTHING, keep=0.25, block_size=32)
    with ea.apply(model, config(settings)) as handle:
        model(ids[:, :4000], past_key_values=past)
        token = ids[:, 4000:4001].clone()
        for _ in range(2):
            model(token, past_key_values=past)
        with forbid_waiting():
            model(token, past_key_values=past)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(token, past_key_values=past).logits
        for length in (4000, 200):
            past.reset()
            model(ids[:, :length], past_key_values=past)
            for place in range(length, length + 70):
                token.copy_(ids[:, place : place + 1])
                graph.replay()
                replayed = out.clone()
            boxes = [next(iter(layer.follower._seen.values())).boxes for layer in handle.layers]
            for each, layer in zip(boxes, past.layers, strict=True):
                end = length + 70
                scratch = KeyBoxes(layer.keys, settings)
                scratch.choose(
                    layer.keys[:, :, :1].repeat_interleave(2, 1), layer.keys,
                    torch.zeros(2, dtype=torch.int64, device="cuda"),
                    kv_lens=torch.full((2,), end, dtype=torch.int32, device="cuda"),
                )  # fmt: skip
                rows = -(-end // 32)
                assert torch.equal(each.boxes[:, :, :rows], scratch.boxes[:, :, :rows])
            assert torch.isfinite(replayed).all()
        assert handle.stats().decode_density < 0.5
