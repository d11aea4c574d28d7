"""EntropyRegularizer: its value and gradients, its samples, and everything one trains with."""

from __future__ import annotations

import copy
import inspect
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from integration_models import KEEP_ALL, build, inputs_of, padding_mask, tokens
from torch import Tensor, nn

import entropy_attn as ea
from entropy_attn.benchmarks.suites import train
from entropy_attn.regularizer.control import DualAscent, FixedWeight
from entropy_attn.regularizer.measure import measure_calls
from entropy_attn.regularizer.sampling import Sample
from entropy_attn.testing import assert_close_to_reference

BLOCK = 16
WHOLE = {"block_size": BLOCK, "tile_fraction": 1.0, "layer_fraction": 1.0, "warmup_steps": 0}
CPU = torch.device("cpu")


def trained(family: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    return build(family).to(dtype).train()


def loss_of(model: nn.Module, mask: Tensor | None = None, ids: Tensor | None = None) -> Tensor:
    ids = tokens(2, 100) if ids is None else ids
    labels = ids if mask is None else ids.masked_fill(mask == 0, -100)
    return model(ids, attention_mask=mask, labels=labels, use_cache=False).loss


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
    }


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], **tolerance: float) -> None:
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, expected[name], msg=lambda m, n=name: f"{n}: {m}",
                                   **tolerance)  # fmt: skip


def entropy_of(p: Tensor) -> Tensor:
    """Over the last dimension. A masked key has p = 0, where the slope of p log p is infinite."""
    return -(p * p.clamp(min=1e-300).log()).sum(-1)


def by_definition(model: nn.Module, measure: str, batch: list[dict[str, Tensor]]) -> Tensor:
    """The measure from the attention weights that transformers' eager attention returns.

    Args:
        batch: sequences without padding, each by itself.
    """
    total = count = 0.0
    model.set_attn_implementation("eager")
    for inputs in batch:
        is_causal = "input_ids" in inputs
        for p in model(**inputs, output_attentions=True).attentions:
            _, heads, length, _ = p.shape
            starts = range(0, length, BLOCK)
            by_block = torch.stack([p[..., s : s + BLOCK].sum(-1) for s in starts], -1)
            tiles = torch.stack([by_block[..., s : s + BLOCK, :].mean(-2) for s in starts], -2)
            entropy = entropy_of(tiles)
            blocks = len(starts)
            if measure == "density":
                total = total + entropy.exp().sum()
                count += heads * (blocks * (blocks + 1) // 2 if is_causal else blocks**2)
            elif measure == "tile":
                total, count = total + entropy.sum(), count + entropy.numel()
            else:
                rows = p if measure == "row" else by_block
                total, count = total + entropy_of(rows).sum(), count + heads * length
    model.set_attn_implementation("sdpa")
    return total / count


@pytest.mark.parametrize("measure", ["density", "tile", "row", "block"])
@pytest.mark.parametrize("family", ["llama", "vit"])
def test_is_what_the_attention_weights_say(family, measure):
    model, inputs = trained(family), inputs_of(family, length=100)
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    ((name, tensors),) = inputs.items()
    batch = [{name: tensor[None]} for tensor in tensors]
    expected = 0.7 * by_definition(model, measure, batch)
    wanted = gradients(model, expected)
    with ea.EntropyRegularizer(model, weight=0.7, measure=measure, **WHOLE) as regularizer:
        model(**inputs)
        penalty = regularizer.penalty()
        torch.testing.assert_close(penalty.double(), expected, rtol=1e-6, atol=0)
        # transformers takes the softmax in fp32.
        assert_same(gradients(model, penalty), wanted, rtol=1e-4, atol=1e-6)


def measure_over(draws: int, fraction: float, model, run, monkeypatch) -> float:
    """The measure of all that ``run`` attends to, put together from samples of every draw."""
    sums = []

    def spy(*args):
        sums.extend(measure_calls(*args))
        return sums[-1:]

    monkeypatch.setattr("entropy_attn.regularizer.regularizer.measure_calls", spy)
    options = WHOLE | {"tile_fraction": fraction}
    with ea.EntropyRegularizer(model, weight=1.0, **options) as regularizer:
        for draw in range(draws):
            for layer in regularizer.layers:
                layer.draw = (draw + 0.5) / draws
            run()
            regularizer.penalty()
    return sum(s.measure.item() for s in sums) / sum(float(s.count) for s in sums)


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("fraction", [1.0, 1 / 14])
def test_padding_does_not_count(side, fraction, monkeypatch):
    model, mask = trained("llama"), padding_mask(side, 100)[:2]
    ids = tokens(*mask.shape)
    batch = [{"input_ids": i[m.bool()][None]} for i, m in zip(ids, mask, strict=True)]
    expected = by_definition(model, "density", batch)
    draws = 1 if fraction == 1.0 else 14  # two rows of seven blocks
    found = measure_over(draws, fraction, model, lambda: loss_of(model, mask, ids), monkeypatch)
    assert found == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("fraction", [1.0, 0.01])
def test_packed_sequences_are_measured_one_by_one(fraction, monkeypatch):
    model, ids, lengths = trained("llama"), tokens(1, 200), (70, 99, 31)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    expected = by_definition(model, "density", [{"input_ids": i} for i in ids.split(lengths, 1)])

    def run():
        model(ids, position_ids=positions, use_cache=False)

    draws = 1 if fraction == 1.0 else 70  # five, seven and two blocks
    found = measure_over(draws, fraction, model, run, monkeypatch)
    assert found == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("fraction", [1.0, 0.3])
def test_timm(fraction):
    from timm_or_stub import timm

    model = timm.models.vision_transformer.VisionTransformer(
        img_size=48, patch_size=4, embed_dim=64, depth=2, num_heads=4, num_classes=10
    ).train()
    images = torch.randn(2, 3, 48, 48)
    plain, found = model(images), []
    options = WHOLE | {"tile_fraction": fraction}
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        with ea.EntropyRegularizer(model, weight=2.0, **options) as regularizer:
            out = model(images)
            torch.testing.assert_close(out, plain, rtol=1e-5, atol=1e-5)
            found.append(gradients(model, out.square().sum() + regularizer.penalty()))
    assert_same(*found, rtol=1e-5, atol=1e-6)
    with ea.observe(model, block_size=BLOCK) as observation, torch.no_grad():
        model(images)
    if fraction == 1.0:
        effective = torch.cat([layer.effective_blocks for layer in observation.layers]).mean()
        assert regularizer.stats().measure == pytest.approx(float(effective) / 10, rel=1e-5)


@settings(deadline=None, max_examples=50)
@given(batch=st.integers(1, 12), tiles=st.integers(1, 12), fraction=st.floats(0.01, 1.0))
def test_every_block_is_as_likely(batch, tiles, fraction):
    """Over an even grid of draws each block of each row is taken equally often."""
    sample = Sample.of(fraction, batch, tiles)
    draws = 2 * batch * tiles * sample.size
    taken = torch.zeros(batch, tiles)
    for index in range(draws):
        draw = (index + 0.5) / draws
        first = sample.first_row(draw)
        chosen = sample.chosen_tiles([draw])
        rows = slice(first, first + sample.rows)
        taken[rows] += 1 if chosen is None else chosen
        if chosen is not None:
            assert (chosen.sum(1) == sample.size).all()
    torch.testing.assert_close(taken, torch.full_like(taken, draws / sample.scale), atol=1, rtol=0)
    assert sample.rows * sample.size <= max(fraction * batch * tiles + 0.5, 1)


def _measures_of_samples(model, fraction: float, draws: int) -> list[float]:
    found = []
    options = WHOLE | {"tile_fraction": fraction}
    with ea.EntropyRegularizer(model, weight=1.0, **options) as regularizer:
        for draw in range(draws):
            for layer in regularizer.layers:
                layer.draw = (draw + 0.5) / draws
            loss_of(model)
            found.append(regularizer.penalty().item())
    return found


@pytest.mark.parametrize("fraction", [0.5, 1 / 14, 3 / 14])
def test_samples_are_unbiased(fraction):
    """Two rows of seven blocks: over all fourteen draws, samples of any size average to all."""
    model = trained("llama")
    (whole,) = _measures_of_samples(model, 1.0, 1)
    samples = _measures_of_samples(model, fraction, 14)
    assert max(samples) - min(samples) > 1e-3
    assert sum(samples) / 14 == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "mistral", "vit", "bert"])
def test_the_model_attends_as_before(family):
    model, inputs = trained(family, torch.float32), inputs_of(family)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    plain = model(**inputs).logits
    with ea.EntropyRegularizer(model, weight=1.0, block_size=BLOCK) as regularizer:
        assert torch.equal(model(**inputs).logits, plain)
        regularizer.penalty().backward()
    with ea.apply(model, KEEP_ALL) as handle:
        sparse = model(**inputs).logits
        with ea.EntropyRegularizer(model, weight=1.0, block_size=BLOCK) as regularizer:
            assert torch.equal(model(**inputs).logits, sparse)
            regularizer.penalty()
        assert handle.stats().density == 1.0
    assert torch.equal(model(**inputs).logits, plain)


def test_calls_are_measured_together_or_apart(monkeypatch):
    model, found = trained("llama"), []
    for chunk in (2**30, 1):
        monkeypatch.setattr("entropy_attn.regularizer.measure.CHUNK_BYTES", chunk)
        with ea.EntropyRegularizer(model, weight=2.0, block_size=BLOCK) as regularizer:
            loss = loss_of(model) + loss_of(model, padding_mask("left", 100)[:2])
            loss = loss + loss_of(model, ids=tokens(1, 60))
            found.append(gradients(model, loss + regularizer.penalty()))
    assert_same(*found, rtol=1e-6, atol=1e-9)


def test_evaluation_is_not_measured():
    model = build("llama")
    with ea.EntropyRegularizer(model, weight=1.0, **WHOLE) as regularizer:
        loss_of(model)
        model.train()
        with torch.no_grad():
            loss_of(model)
        with pytest.raises(RuntimeError, match="no attention was measured"):
            regularizer.penalty()


# --- how people train ---------------------------------------------------------------------------


@pytest.mark.parametrize(("fraction", "padded"), [(1.0, False), (0.3, False), (0.3, True)])
def test_checkpointing_changes_nothing(fraction, padded):
    model = trained("llama")
    mask = padding_mask("left", 100)[:2] if padded else None
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        options = WHOLE | {"tile_fraction": fraction}
        with ea.EntropyRegularizer(model, weight=2.0, **options) as regularizer:
            for _ in range(2):  # what the first backward runs again must not count in the second
                loss = loss_of(model, mask)
                found.append(gradients(model, loss + regularizer.penalty()))
    for later in found[1:]:
        assert_same(found[0], later, rtol=1e-6, atol=1e-9)


def test_reentrant_checkpointing_is_an_error():
    model = trained("llama")
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with ea.EntropyRegularizer(model, weight=1.0, **WHOLE) as regularizer:
        loss_of(model)
        with pytest.raises(RuntimeError, match="use_reentrant"):
            regularizer.penalty()


@pytest.mark.parametrize("fraction", [1.0, 0.3])
@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
def test_compiles_into_one_graph(padded, fraction):
    model = trained("llama", torch.float32)
    mask = padding_mask("left", 100)[:2] if padded else None
    options = WHOLE | {"tile_fraction": fraction}
    with ea.EntropyRegularizer(model, weight=2.0, **options) as regularizer:
        eager = gradients(model, loss_of(model, mask) + regularizer.penalty())
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for _ in range(2):
            again = gradients(model, loss_of(compiled, mask) + regularizer.penalty())
            assert_same(again, eager, rtol=1e-4, atol=1e-5)
        regularizer.step()
        with torch.compiler.set_stance("fail_on_recompile"):  # nor does a new sample compile anew
            loss_of(compiled, mask)
        regularizer.penalty()


def test_gradient_accumulation_and_a_scaled_loss():
    model, batches = trained("llama"), [tokens(1, 100, seed) for seed in (1, 2)]
    with ea.EntropyRegularizer(model, weight=2.0, **WHOLE) as regularizer:
        whole = gradients(model, 8 * (loss_of(model, ids=torch.cat(batches))
                                      + regularizer.penalty()))  # fmt: skip
        model.zero_grad()
        for ids in batches:
            (4 * (loss_of(model, ids=ids) + regularizer.penalty())).backward()
        parts = {name: p.grad for name, p in model.named_parameters()}
    assert_same(parts, whole, rtol=1e-5, atol=1e-7)


def test_autocast():
    model = trained("llama", torch.float32)
    found = []
    for enabled in (False, True):
        with (
            ea.EntropyRegularizer(model, weight=1.0, **WHOLE) as regularizer,
            torch.autocast("cpu", torch.bfloat16, enabled=enabled),
        ):
            loss_of(model)
            penalty = regularizer.penalty()
            assert penalty.dtype == torch.float32
            penalty.backward()
            found.append(float(penalty))
    assert found[1] == pytest.approx(found[0], rel=0.05)
    assert found[0] != found[1]


def test_half_of_the_layers():
    """Every step measures one of two layers; over the steps they average to the whole."""
    model = trained("llama")
    (whole,) = _measures_of_samples(model, 1.0, 1)
    options = WHOLE | {"layer_fraction": 0.5}
    with ea.EntropyRegularizer(model, weight=1.0, **options) as regularizer:
        measured = set()
        for _ in range(20):
            loss_of(model)
            measured.add(float(regularizer.penalty()))
            regularizer.step()
    assert len(measured) == 2
    assert sum(measured) / 2 == pytest.approx(whole, rel=1e-5)


# --- the weight ---------------------------------------------------------------------------------


def test_fixed_weight_warms_up():
    control = FixedWeight(3.0, warmup_steps=4)
    weights = [float(control.weight(step)) for step in range(6)]
    assert weights == pytest.approx([0.75, 1.5, 2.25, 3.0, 3.0, 3.0])
    assert float(FixedWeight(3.0, 0).weight(0)) == 3.0


def steer(control: DualAscent, response, steps: int) -> list[float]:
    """Densities of a model whose density follows the multiplier after a delay."""
    density, seen = response(0.0), []
    for step in range(steps):
        control.update(torch.tensor(density), step)
        wanted = response(float(control.state["multiplier"]))
        density += 0.05 * (wanted - density)
        seen.append(density)
    return seen


def make_ascent(target: float, largest: float = 10.0) -> DualAscent:
    return DualAscent(target, 0.01, 0.5, largest, warmup_steps=100, device=CPU)


@pytest.mark.parametrize("stiffness", [0.3, 1.0, 5.0])
def test_dual_ascent_settles_on_the_target(stiffness):
    control = make_ascent(0.1)
    seen = steer(control, lambda weight: 0.4 * math.exp(-stiffness * weight), 3000)
    assert seen[-1] == pytest.approx(0.1, rel=0.01)
    assert min(seen) > 0.07  # overshoots little
    assert float(control.state["multiplier"]) == pytest.approx(math.log(4) / stiffness, rel=0.02)


def test_dual_ascent_lets_go_of_a_target_that_is_met_anyway():
    control = make_ascent(0.5)
    steer(control, lambda weight: 0.4, 500)
    assert float(control.state["multiplier"]) == 0.0


def test_dual_ascent_does_not_diverge():
    """A density that cannot fall: the multiplier stops at its bound, and comes back at once."""
    control = make_ascent(0.1, largest=2.0)
    steer(control, lambda weight: 0.4, 5000)
    assert float(control.state["multiplier"]) == 2.0
    for step in range(5):
        control.update(torch.tensor(0.02), 5000 + step)
    assert float(control.state["multiplier"]) < 2.0


def test_reaches_its_target_and_sparse_attention_then_costs_less():
    """Two layers that learn eight sequences by heart, at 0.6 of the density they began with.

    The density rises for a while whenever they have learnt something, and when that is depends on
    how a CPU rounds: so it has to have been at the target, and may be a little above it at the end.
    """
    torch.manual_seed(0)
    model = trained("llama", torch.float32)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    options = WHOLE | {"warmup_steps": 40, "rate": 0.05}
    densities = []
    with ea.EntropyRegularizer(model, target_density=0.5, **options) as regularizer:
        for step in range(200):
            (loss_of(model, ids=tokens(2, 100, step % 4)) + regularizer.penalty()).backward()
            optimizer.step()
            optimizer.zero_grad()
            regularizer.step()
            densities.append(regularizer.stats().density)
        stats = regularizer.stats()
    assert densities[0] > 0.75
    assert min(densities) == pytest.approx(0.5, rel=0.1)
    assert stats.density == pytest.approx(0.5, rel=0.2)
    assert stats.target == pytest.approx(0.5)
    assert stats.penalty == pytest.approx(stats.weight * stats.measure)
    model.eval()
    with ea.observe(model, block_size=BLOCK) as observation:
        loss_of(model)
    effective = torch.cat([layer.effective_blocks for layer in observation.layers]).mean()
    assert float(effective) == pytest.approx(0.5 * 28 / 7, rel=0.2)


def test_a_target_out_of_reach_is_reported():
    model = trained("llama", torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    options = WHOLE | {"block_size": 64, "max_weight": 0.5}
    with ea.EntropyRegularizer(model, target_density=0.1, **options) as regularizer:

        def train(steps: int) -> None:
            for _ in range(steps):
                (loss_of(model, ids=tokens(1, 100)) + regularizer.penalty()).backward()
                optimizer.step()
                regularizer.step()

        with pytest.warns(UserWarning, match=r"it cannot be less than 0\.6667.*smaller blocks"):
            train(100)
        assert regularizer.stats().weight <= 0.5 / 0.1 + 1e-6
        assert "target 0.1000" in str(regularizer.stats())


def test_continues_from_its_state():
    def run(steps: int, state: dict | None, model: nn.Module) -> tuple[list[float], dict]:
        found = []
        options = {"block_size": BLOCK, "tile_fraction": 0.3, "warmup_steps": 5}
        with ea.EntropyRegularizer(model, target_density=0.3, **options) as regularizer:
            if state is not None:
                regularizer.load_state_dict(json.loads(json.dumps(state)))
            for _ in range(steps):
                loss_of(model)
                found.append(float(regularizer.penalty()))
                regularizer.step()
            return found, regularizer.state_dict()

    model = trained("llama")
    whole, _ = run(9, None, model)
    first, state = run(4, None, model)
    second, _ = run(5, state, model)
    assert first + second == pytest.approx(whole, rel=1e-6)
    with (
        ea.EntropyRegularizer(model, weight=1.0) as other,
        pytest.raises(ValueError, match="target_density"),
    ):
        other.load_state_dict(state)


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "one of them"),
        ({"weight": 1.0, "target_density": 0.1}, "one of them"),
        ({"weight": 0.0}, "weight must be"),
        ({"weight": float("nan")}, "weight must be"),
        ({"target_density": 1.0}, "less than 1"),
        ({"target_density": 0.0}, "target_density must be"),
        ({"target_density": 0.1, "measure": "row"}, "does not tell the density"),
        ({"weight": 1.0, "measure": "rows"}, "measure must be one of"),
        ({"weight": 1.0, "tile_fraction": 0.0}, "tile_fraction must be"),
        ({"weight": 1.0, "layer_fraction": 2.0}, "layer_fraction must be"),
        ({"weight": 1.0, "block_size": 12}, "block_size"),
        ({"weight": 1.0, "warmup_steps": -1}, "warmup_steps must be"),
        ({"target_density": 0.1, "rate": 0.0}, "rate must be"),
        ({"target_density": 0.1, "damping": -1.0}, "damping must be"),
    ],
)
def test_arguments_are_checked(arguments, message):
    model = build("llama")
    with pytest.raises(ValueError, match=message):
        ea.EntropyRegularizer(model, **arguments)
    assert model.config._attn_implementation == "sdpa"


def test_a_model_without_attention_is_an_error():
    with pytest.raises(ValueError, match="no attention of Sequential can be replaced"):
        ea.EntropyRegularizer(nn.Sequential(nn.Linear(3, 3)), weight=1.0)
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module"):
        ea.EntropyRegularizer("model", weight=1.0)


def test_masks_of_the_user_are_an_error():
    model, mask = trained("llama", torch.float32), torch.ones(2, 1, 100, 100).tril().bool()
    with (
        ea.EntropyRegularizer(model, weight=1.0, **WHOLE),
        pytest.raises(ValueError, match="pass a 2D padding mask"),
    ):
        model(tokens(2, 100), attention_mask=mask, use_cache=False)


def test_forgotten_calls_are_errors():
    model = trained("llama", torch.float32)
    ids = tokens(1, 8)
    with ea.EntropyRegularizer(model, weight=1.0, **WHOLE) as regularizer:
        with pytest.raises(RuntimeError, match=r"call penalty\(\)"):
            regularizer.step()
        for _ in range(256):
            model(ids, use_cache=False)
        with pytest.raises(RuntimeError, match=r"without a call of EntropyRegularizer\.penalty"):
            model(ids, use_cache=False)


def test_survives_what_becomes_of_the_model():
    """A copy of the model attends on its own, and the original is left as it was."""
    model = trained("llama")
    ea.EntropyRegularizer(model, weight=1.0, **WHOLE).remove()
    assert model.config._attn_implementation == "sdpa"
    copied = copy.deepcopy(model)
    assert torch.equal(loss_of(copied), loss_of(model))


# --- on a GPU -----------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
@pytest.mark.parametrize("fraction", [1.0, 0.3])
def test_kernels_compute_what_the_reference_does(fraction, padded):
    """Penalty and gradients in fp32 on a GPU, against fp32 and fp64 on the CPU.

    The errors of plain fp32 themselves differ by such a factor from one order of sums to another:
    two layers with fifteen times the usual weights amplify them.
    """
    mask = padding_mask("left")[:2] if padded else torch.ones(2, 200, dtype=torch.int64)
    ids, found = tokens(2, 200), []
    options = WHOLE | {"block_size": 32, "tile_fraction": fraction}
    for device, dtype in (("cuda", torch.float32), ("cpu", torch.float32), ("cpu", torch.float64)):
        model = trained("llama", dtype).to(device)
        with ea.EntropyRegularizer(model, weight=2.0, **options) as regularizer:
            loss_of(model, mask.to(device), ids.to(device))
            penalty = regularizer.penalty()
            gradient = gradients(model, penalty)
            found.append({"penalty": penalty.detach(), **gradient})
    for name, got in found[0].items():
        references = (found[1][name], found[2][name])
        size = references[1].abs().max().item()
        assert_close_to_reference(got.cpu(), *references, name, 8.0, magnitude=size)


@pytest.mark.gpu
@pytest.mark.parametrize("fraction", [1.0, 0.125])
def test_training_does_not_wait_for_the_device(fraction, forbid_waiting):
    model = trained("vit", torch.bfloat16).cuda()  # for Llama transformers itself waits
    inputs = {"pixel_values": torch.randn(2, 3, 48, 48, device="cuda", dtype=torch.bfloat16)}
    with ea.EntropyRegularizer(model, target_density=0.1, tile_fraction=fraction) as regularizer:

        def step() -> None:
            out = model(**inputs).logits
            (out.float().square().mean() + regularizer.penalty()).backward()
            regularizer.step()

        step()
        with forbid_waiting():
            step()
        assert 0 < regularizer.stats().density <= 1


@pytest.mark.gpu
def test_a_step_takes_no_memory_of_all_pairs():
    """At 32,768 tokens one head's scores alone would be 2 GiB."""
    model = trained("llama", torch.bfloat16).cuda()
    ids = tokens(1, 32768).cuda()
    with ea.EntropyRegularizer(model, weight=1.0) as regularizer:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        hidden = model.model(ids, use_cache=False).last_hidden_state
        (hidden.float().square().mean() + regularizer.penalty()).backward()
        assert torch.cuda.max_memory_allocated() - before < 2**30


def test_the_suite_times_what_is_measured_by_default():
    defaults = inspect.signature(ea.EntropyRegularizer).parameters
    for name, value in train.settings("full")[train.DEFAULT].items():
        assert defaults[name].default == value
