"""EntropyCallback: the regularizer in transformers' Trainer."""

from __future__ import annotations

import pytest
import torch
from integration_models import build, tokens, transformers

import entropy_attn as ea
from entropy_attn.regularizer.trainer import STATE_FILE, EntropyCallback

OPTIONS = {"block_size": 16, "tile_fraction": 1.0, "layer_fraction": 1.0, "warmup_steps": 0}


class Sequences(torch.utils.data.Dataset):
    """Sixteen sequences of equal length, so that every batch weighs its tokens alike."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict:
        ids = tokens(1, 64, seed=index)[0]
        return {"input_ids": ids, "labels": ids}


def train(folder, callback, steps: int = 4, model=None, **arguments):
    model = model or build("llama")
    settings = {
        "max_steps": steps, "per_device_train_batch_size": 4, "learning_rate": 1e-2,
        "logging_steps": 1, "save_strategy": "no", "report_to": [], "use_cpu": True,
        "disable_tqdm": True, "dataloader_pin_memory": False, "optim": "sgd",
        "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "seed": 1,
    } | arguments  # fmt: skip
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(str(folder), **settings),
        train_dataset=Sequences(),
        callbacks=[] if callback is None else [callback],
    )
    resume = settings.get("resume_from_checkpoint")
    trainer.train(resume_from_checkpoint=resume)
    return model, trainer.state.log_history


def losses(history: list[dict]) -> list[float]:
    return [entry["loss"] for entry in history if "loss" in entry]


def parameters_close(first, second, **tolerance: float) -> None:
    pairs = zip(first.named_parameters(), second.named_parameters(), strict=True)
    for (name, one), (_, other) in pairs:
        torch.testing.assert_close(one, other, msg=lambda m, n=name: f"{n}: {m}", **tolerance)


def test_trains_and_logs(tmp_path):
    callback = EntropyCallback(target_density=0.3, **OPTIONS)
    model, history = train(tmp_path, callback)
    steps = [entry for entry in history if "loss" in entry]
    assert [entry["step"] for entry in steps] == [1, 2, 3, 4]
    weights = [entry["entropy_weight"] for entry in steps]
    assert weights == sorted(weights)
    assert weights[0] > 0
    assert all(0.3 < entry["attention_density"] < 1 for entry in steps)
    assert callback.regularizer.stats().step == 4
    assert model.config._attn_implementation == "sdpa"  # given back


def test_is_the_plain_loop(tmp_path):
    """One step of Trainer is one step by hand, however its batch is cut up."""
    found = []
    for per_device, accumulation in ((4, 1), (2, 2), (1, 4)):
        found.append(train(
            tmp_path, EntropyCallback(weight=0.5, **OPTIONS), steps=1,
            per_device_train_batch_size=per_device, gradient_accumulation_steps=accumulation,
            train_sampling_strategy="sequential",
        ))  # fmt: skip
    model = build("llama").train()
    batch = torch.stack([Sequences()[index]["input_ids"] for index in range(4)])
    with ea.EntropyRegularizer(model, weight=0.5, **OPTIONS) as regularizer:
        loss = model(batch, labels=batch, use_cache=False).loss + regularizer.penalty()
        loss.backward()
        torch.optim.SGD(model.parameters(), 1e-2).step()
    for trained, history in found:
        parameters_close(trained, model, rtol=1e-4, atol=1e-6)
        assert losses(history) == pytest.approx([float(loss.detach())], rel=1e-4)


def test_the_penalty_is_in_the_loss(tmp_path):
    plain = losses(train(tmp_path, None)[1])
    regularized = losses(train(tmp_path, EntropyCallback(weight=0.5, **OPTIONS))[1])
    assert all(low < high < low + 0.5 for low, high in zip(plain, regularized, strict=True))


def test_resumes(tmp_path):
    def callback():
        return EntropyCallback(target_density=0.3, **(OPTIONS | {"tile_fraction": 0.3}))

    whole, history = train(tmp_path / "whole", callback(), steps=4)
    train(tmp_path, callback(), steps=2, save_strategy="steps", save_steps=2)
    assert (tmp_path / "checkpoint-2" / STATE_FILE).is_file()
    resumed, later = train(
        tmp_path, callback(), steps=4, resume_from_checkpoint=str(tmp_path / "checkpoint-2")
    )
    assert losses(later)[-2:] == pytest.approx(losses(history)[-2:], rel=1e-4)
    parameters_close(resumed, whole, rtol=1e-4, atol=1e-6)

    (tmp_path / "checkpoint-2" / STATE_FILE).unlink()
    with pytest.warns(UserWarning, match="starts anew"):
        train(tmp_path, callback(), resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_what_hides_the_loss_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="label_smoothing_factor=0"):
        train(tmp_path, EntropyCallback(weight=1.0, **OPTIONS), label_smoothing_factor=0.1)
