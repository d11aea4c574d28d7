"""The regularizer in transformers' Trainer, as a callback."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback

from entropy_attn.regularizer.regularizer import EntropyRegularizer

STATE_FILE = "entropy_regularizer.json"


class EntropyCallback(TrainerCallback):
    """Adds an `EntropyRegularizer` to the loss of a `transformers.Trainer`.

        trainer = Trainer(model, ..., callbacks=[EntropyCallback(target_density=0.1)])

    The penalty is added to the loss that the model itself returns, so the data must have labels,
    and `compute_loss_func` and label smoothing, which ignore that loss, cannot be used. The logs
    get attention_density, entropy_weight and entropy_penalty; checkpoints get a small file, from
    which a resumed run continues.

    Args:
        arguments: of `EntropyRegularizer`, all but the model.

    Attributes:
        regularizer: while training and after it; None before.
    """

    def __init__(self, **arguments: Any) -> None:
        self._arguments = arguments
        self._hook: Any = None
        self.regularizer: EntropyRegularizer | None = None
        self._accumulation = 1

    def on_train_begin(self, args, state, control, **kwargs: Any) -> None:
        model = kwargs["model"]
        if args.label_smoothing_factor:
            raise ValueError("EntropyCallback needs label_smoothing_factor=0, see its docstring")
        self._accumulation = args.gradient_accumulation_steps
        self.regularizer = EntropyRegularizer(model, **self._arguments)
        self._hook = model.register_forward_hook(self._add_penalty, with_kwargs=True)
        if state.global_step:
            self._resume(Path(args.output_dir) / f"checkpoint-{state.global_step}" / STATE_FILE)

    def on_step_end(self, args, state, control, **kwargs: Any) -> None:
        self.regularizer.step()

    def on_log(self, args, state, control, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if "loss" not in logs or self.regularizer is None:  # of an evaluation
            return
        stats = self.regularizer.stats()
        found = {"entropy_weight": stats.weight, "entropy_penalty": stats.penalty}
        if stats.density is not None:
            found["attention_density"] = stats.density
        logs.update(found)
        state.log_history[-1].update(found)

    def on_save(self, args, state, control, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            text = json.dumps(self.regularizer.state_dict())
            (folder / STATE_FILE).write_text(text, encoding="utf-8")

    def on_train_end(self, args, state, control, **kwargs: Any) -> None:
        self._hook.remove()
        self.regularizer.remove()

    def _add_penalty(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any):
        if not model.training:
            return None
        loss = getattr(output, "loss", None)
        if loss is None:
            raise ValueError(
                f"{type(model).__name__} returned no loss to add the penalty to: EntropyCallback "
                "needs labels in the batches"
            )
        penalty = self.regularizer.penalty()
        # Trainer divides the loss by the accumulation steps itself, unless the model was told how
        # many items the whole batch has.
        if kwargs.get("num_items_in_batch") is not None:
            penalty = penalty / self._accumulation
        output.loss = loss + penalty.to(loss.device)
        return output

    def _resume(self, path: Path) -> None:
        if path.is_file():
            self.regularizer.load_state_dict(json.loads(path.read_text(encoding="utf-8")))
        else:
            warnings.warn(f"{path} is missing: the regularizer starts anew", stacklevel=2)
