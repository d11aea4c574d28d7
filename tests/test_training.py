"""Training runs of the experiments: the same when they are cut off, and not done twice."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from entropy_attn.benchmarks import training
from entropy_attn.benchmarks.penalties import KeyRangeEntropy, make_penalty, outputs_penalty
from entropy_attn.benchmarks.registry import Context, Share
from entropy_attn.benchmarks.store import Record, Store
from entropy_attn.benchmarks.training import (
    Schedule,
    Trainee,
    batches,
    checkpoint_of,
    is_done,
    runs_to_do,
    train,
)

STEPS = 6


class CutOff(Exception):
    """Stands for the end of a run's time."""


def vision_model() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        image_size=32, patch_size=4, hidden_size=16, num_hidden_layers=2, num_attention_heads=1,
        intermediate_size=16, num_labels=3,
    )  # fmt: skip
    return ViTForImageClassification(config)


def run(path, penalty_name: str | None, cut_off_at: int | None = None, **identity) -> nn.Module:
    """Train a tiny ViT, to the end or until it is cut off."""
    model = vision_model().train()
    images = torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(12) % 3
    order = batches(12, 4, STEPS, seed=2)
    penalty = penalty_name and make_penalty(
        penalty_name, model, 0.3, block_size=16, steps=STEPS, seed=3
    )
    if isinstance(penalty, KeyRangeEntropy):
        model(images[order[0]])
        penalty.start()

    def loss(step: int) -> torch.Tensor:
        if step == cut_off_at:
            raise CutOff
        found = F.cross_entropy(model(images[order[step]]).logits, labels[order[step]])
        return found + penalty.penalty() if penalty else found

    parts = {"extra" if isinstance(penalty, nn.Module) else "stateful": {"penalty": penalty}}
    trainee = Trainee(model, loss, penalty.step, **parts) if penalty else Trainee(model, loss)
    train(trainee, Schedule(STEPS, 1e-2, 0.1), path, identity=identity)
    return model


@pytest.fixture
def save_each_step(monkeypatch):
    monkeypatch.setattr(training, "SAVE_EVERY", -1.0)


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach() for p in model.parameters()]


@pytest.mark.usefixtures("save_each_step")
@pytest.mark.parametrize("penalty", [None, "density", "L1 of scores", "range entropy of keys"])
def test_a_resumed_run_ends_bit_for_bit_as_an_uninterrupted_one(penalty, tmp_path):
    path = tmp_path / "run.pt"
    whole = weights(run(path, penalty))
    with pytest.raises(CutOff):
        run(path, penalty, cut_off_at=4)
    assert path.exists()
    resumed = weights(run(path, penalty))
    assert not path.exists()
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))


@pytest.mark.usefixtures("save_each_step")
def test_a_checkpoint_of_another_run_is_not_used(tmp_path):
    path = tmp_path / "run.pt"
    whole = weights(run(path, None, kind="a"))
    with pytest.raises(CutOff):
        run(path, None, cut_off_at=4, kind="b")
    # Were it used, the step 1 that cuts off would be past already.
    with pytest.raises(CutOff):
        run(path, None, cut_off_at=1, kind="a")
    resumed = weights(run(path, None, kind="a"))
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))


def test_batches_take_every_sample_once_an_epoch():
    found = batches(10, 4, 5, seed=0)
    assert [len(batch) for batch in found] == [4] * 5
    order = torch.cat(found)
    for epoch in order.split(10):
        assert sorted(epoch.tolist()) == list(range(10))
    assert not torch.equal(order[:10], order[10:])
    assert all(torch.equal(a, b) for a, b in zip(found, batches(10, 4, 5, seed=0), strict=True))


def test_the_rate_rises_for_a_tenth_and_falls_to_zero():
    schedule = Schedule(100, 1.0)
    rates = [schedule.rate_at(step) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[100] == pytest.approx(0.0)


def test_what_is_in_the_store_and_well_is_done(tmp_path):
    store = Store(tmp_path)
    config = {"seed": 0, "options": {"a": 1}}
    assert not is_done(store, "s", config)
    store.append(Record("s", config, {"status": "failed"}))
    assert not is_done(store, "s", config)
    store.append(Record("s", {**config, "more": 1}, {"status": "ok"}))
    assert not is_done(store, "s", config)
    elsewhere = {**Record("s", {}, {}).environment, "gpu": "another"}
    store.append(Record("s", config, {"status": "ok"}, elsewhere))
    assert not is_done(store, "s", config)
    store.append(Record("s", config, {"status": "ok"}))
    assert is_done(store, "s", config)


def test_penalties_of_outputs_are_least_where_they_should_be():
    even, sure = torch.zeros(1, 4), torch.tensor([[9.0, 0.0, 0.0, 0.0]])
    assert outputs_penalty(even, "label smoothing") == pytest.approx(torch.tensor(4.0).log())
    assert outputs_penalty(even, "confidence") == pytest.approx(-torch.tensor(4.0).log())
    for kind in ("label smoothing", "confidence"):
        assert outputs_penalty(even, kind) < outputs_penalty(sure, kind)
    with pytest.raises(ValueError, match="label smoothing"):
        outputs_penalty(even, "dropout")


def test_a_penalty_grows_in_its_warm_up():
    model = vision_model().train()
    penalty = make_penalty("range entropy of keys", model, 1.0, block_size=16, steps=8, seed=0)
    images = torch.randn(2, 3, 32, 32)
    found = []
    for _ in range(5):
        model(images)
        found.append(penalty.penalty().item())
        penalty.step()
    shares = [value / found[-1] for value in found]
    assert shares == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0], rel=1e-5)
    penalty.remove()
    model(images)
    with pytest.raises(RuntimeError, match="no attention was seen"):
        penalty.penalty()


def context(folder, share: str = "1/1") -> Context:
    return Context(torch.device("cpu"), False, folder, share=Share.parse(share))


def test_processes_share_the_runs_and_leave_out_what_is_done(tmp_path):
    runs = [(f"run {seed}", {"seed": seed}) for seed in range(7)]
    shares = [runs_to_do(context(tmp_path, f"{i}/3"), "s", runs) for i in (1, 2, 3)]
    assert sorted(run for share in shares for run in share) == runs
    assert {len(share) for share in shares} == {2, 3}
    Store(tmp_path).append(Record("s", {"seed": 3}, {"status": "ok"}))
    # What is done does not move the others to another process.
    assert runs_to_do(context(tmp_path, "1/3"), "s", runs) == [r for r in shares[0] if r != runs[3]]
    assert runs_to_do(context(tmp_path, "2/3"), "s", runs) == shares[1]


def test_every_run_has_its_own_checkpoint(tmp_path):
    paths = {checkpoint_of(context(tmp_path), "s", {"seed": seed, "b": 1}) for seed in range(5)}
    assert len(paths) == 5
    again = checkpoint_of(context(tmp_path), "s", {"b": 1, "seed": 0})  # in another order
    assert again in paths


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "1/0", "a/b", "-1/2", "1/2/3"])
def test_share_that_is_none(text):
    with pytest.raises(ValueError, match="written like 2/4"):
        Share.parse(text)
