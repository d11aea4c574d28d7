"""Train a vision transformer with transformers' Trainer and one callback more.

    python examples/train_trainer.py [--steps 400] [--density 0.5]

The task is made up here, so that nothing is downloaded: which of four corners holds the bright
square. Few patches matter for that, and the regularizer finds it out.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

from entropy_attn.regularizer.trainer import EntropyCallback

IMAGE, PATCH, BLOCK = 64, 4, 32  # 256 patches and the class token: nine blocks


class Corners(Dataset):
    """Noise with a bright square near one of four corners."""

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self.seed = seed

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        image = 0.5 * torch.randn(3, IMAGE, IMAGE, generator=generator)
        label = index % 4
        row, column = torch.randint(2, 14, (2,), generator=generator).tolist()
        row, column = row + IMAGE // 2 * (label // 2), column + IMAGE // 2 * (label % 2)
        image[:, row : row + 12, column : column + 12] += 1.5
        return {"pixel_values": image, "labels": torch.tensor(label)}


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--density", type=float, default=0.5, help="share of the blocks to need")
    parser.add_argument("--output", default="trainer_output")
    options = parser.parse_args()
    config = ViTConfig(
        image_size=IMAGE, patch_size=PATCH, hidden_size=64, intermediate_size=128,
        num_hidden_layers=3, num_attention_heads=4, num_labels=4,
    )  # fmt: skip
    arguments = TrainingArguments(
        options.output,
        max_steps=options.steps,
        per_device_train_batch_size=32,
        learning_rate=1e-3,
        logging_steps=max(1, options.steps // 10),
        save_strategy="no",
        report_to=[],
    )
    callback = EntropyCallback(
        target_density=options.density, block_size=BLOCK, warmup_steps=options.steps // 2
    )
    trainer = Trainer(
        ViTForImageClassification(config),
        arguments,
        train_dataset=Corners(32 * options.steps, seed=0),
        eval_dataset=Corners(256, seed=1),
        compute_metrics=accuracy,
        callbacks=[callback],
    )
    trainer.train()
    print(f"accuracy {trainer.evaluate()['eval_accuracy']:.3f} | {callback.regularizer.stats()}")


if __name__ == "__main__":
    main()
