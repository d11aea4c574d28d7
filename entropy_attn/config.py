"""SparsityConfig: how the attention of a whole model is made sparse, as JSON or as an object."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

from entropy_attn.decoding.settings import SparseDecoding
from entropy_attn.reorder import Reorder
from entropy_attn.selection import (
    DEFAULT_BUDGET,
    DEFAULT_SCORER,
    Antidiagonal,
    Envelope,
    Perplexity,
    Pooled,
    TopK,
    TopP,
    TrueMass,
)
from entropy_attn.validation import check_block_size, check_integer, check_share

SCORERS = {cls.__name__: cls for cls in (Pooled, Envelope, Antidiagonal, TrueMass)}
BUDGETS = {cls.__name__: cls for cls in (TopK, TopP, Perplexity)}
REGISTRIES: dict[str, Mapping[str, Any]] = {
    "scorer": SCORERS,
    "budget": BUDGETS,
    "reorder": {"Reorder": Reorder},
    "decode": {"SparseDecoding": SparseDecoding},
}
BACKENDS = ("auto", "triton", "reference")
EXPLICIT_MASK = ("raise", "dense")

# A layer is named by its index in the model (negative from the end) or by a pattern over the
# names of its attention module, such as "vision_tower.*".
LayerSelector = int | str


@dataclass(frozen=True)
class SparsityConfig:
    """Which blocks of keys each layer of a model keeps, and when a layer runs dense.

    Attributes:
        block_size: of queries and keys in tokens, or a pair (query, key).
        scorer: predicts the attention mass of each block; `Pooled`, `Envelope`,
            `Antidiagonal`, `TrueMass` or any callable with the signature that `select_blocks`
            documents.
        budget: how many blocks are kept; `TopK`, `TopP` or `Perplexity`.
        sink: blocks at the start of the keys that are always kept.
        local: the diagonal block and ``local - 1`` beside it are always kept; 0 for none.
            With ``reorder`` neither counts: only the blocks that hold its prefix are always kept.
        min_length: calls with fewer keys run dense. "auto": calls that sparse attention would not
            make faster, by what was measured on this GPU or the nearest one (the crossover table
            of docs/benchmarks.md), and where a model runs eager those of layers so small that they
            wait for the host; 4096 on other devices.
        expected_density: the share of the visible blocks that TopP and Perplexity are expected to
            keep, in (0, 1]; blocks that are always kept come on top. min_length="auto" counts on
            it: the real density is known only on the device. TopK states its share. The defaults
            keep 0.24 of SmolLM2's blocks at 8192 tokens, with those always kept.
        min_queries: calls with fewer queries run dense; this covers decoding token by token,
            unless ``decode`` is set.
        dense_layers: layers that always run dense, as indices or name patterns.
        layers: other values for single layers: {layer: {field: value}}; later entries win.
        explicit_mask: what to do with a mask that the user passes to the attention as a whole
            matrix (4D, boolean or additive): "raise", or run that call "dense" under it.
        backend: "auto", or "triton" or "reference" for the sparse calls.
        reorder: sort the tokens of each head by their content before blocks are chosen, and put
            the output back in order; None for not at all. For layers that are not causal: others
            raise. What sorting costs is not part of what min_length="auto" was measured with.
        decode: how causal calls of up to 16 queries to a longer cache choose blocks, as in
            ``generate`` of transformers; None runs them by the rules of all calls, which is dense.
    """

    block_size: int | tuple[int, int] = 64
    scorer: Callable[..., Any] = DEFAULT_SCORER
    budget: TopK | TopP | Perplexity = DEFAULT_BUDGET
    sink: int = 1
    local: int = 2
    min_length: int | Literal["auto"] = "auto"
    expected_density: float = 0.25
    min_queries: int = 64
    dense_layers: tuple[LayerSelector, ...] = ()
    layers: Mapping[LayerSelector, Mapping[str, Any]] = field(default_factory=dict, hash=False)
    explicit_mask: str = "raise"
    backend: str = "auto"
    reorder: Reorder | None = None
    decode: SparseDecoding | None = None

    def __post_init__(self) -> None:
        set_field = object.__setattr__  # the dataclass is frozen; this only normalises types
        if isinstance(self.block_size, list):
            set_field(self, "block_size", tuple(self.block_size))
        set_field(self, "dense_layers", _selectors("dense_layers", self.dense_layers))
        _selectors("layers", self.layers)
        layers = {key: dict(value) for key, value in dict(self.layers).items()}
        set_field(self, "layers", layers)

        check_block_size(self.block_size)
        if not callable(self.scorer):
            raise TypeError(
                f"scorer must be one of {', '.join(SCORERS)} or a callable, got {self.scorer!r}"
            )
        if not isinstance(self.budget, tuple(BUDGETS.values())):
            raise TypeError(f"budget must be one of {', '.join(BUDGETS)}, got {self.budget!r}")
        for name, least in (("sink", 0), ("local", 0), ("min_queries", 1)):
            check_integer(name, getattr(self, name), least)
        if not isinstance(self.reorder, (Reorder, type(None))):
            raise TypeError(
                f"reorder must be an entropy_attn.Reorder or None, got {self.reorder!r}"
            )
        if not isinstance(self.decode, (SparseDecoding, type(None))):
            raise TypeError(
                "decode must be an entropy_attn.SparseDecoding or None, for example "
                f"SparseDecoding(keep=0.25), got {self.decode!r}"
            )
        if self.min_length != "auto":
            check_integer("min_length", self.min_length, 0, besides="'auto'")
        check_share("expected_density", self.expected_density)
        for name, allowed in (("explicit_mask", EXPLICIT_MASK), ("backend", BACKENDS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        for selector, values in layers.items():
            self._override(selector, values)

    def _override(self, selector: LayerSelector, values: Mapping[str, Any]) -> SparsityConfig:
        allowed = {f.name for f in fields(self)} - {"layers", "dense_layers"}
        unknown = set(values) - allowed
        if unknown:
            raise ValueError(
                f"layers[{selector!r}] sets {sorted(unknown)}; allowed are {sorted(allowed)}"
            )
        return replace(self, dense_layers=(), layers={}, **values)

    def for_layer(self, index: int, name: str, count: int) -> tuple[SparsityConfig, bool]:
        """The settings of layer ``index`` of ``count``, and whether it always runs dense."""
        config = replace(self, dense_layers=(), layers={}) if self.is_per_layer else self
        for selector, values in self.layers.items():
            if selects(selector, index, name, count):
                config = config._override(selector, values)
        dense = any(selects(s, index, name, count) for s in self.dense_layers)
        return config, dense

    @property
    def always_kept(self) -> tuple[int, int]:
        """``sink`` and ``local`` as they hold for the order of the tokens."""
        if self.reorder is None:
            return self.sink, self.local
        return -(-self.reorder.prefix // check_block_size(self.block_size)[1]), 0

    @property
    def is_per_layer(self) -> bool:
        """Whether some layers differ from others."""
        return bool(self.dense_layers or self.layers)

    @property
    def is_serializable(self) -> bool:
        """Whether it can be saved: scorers that are not of this package cannot."""
        overridden = [v["scorer"] for v in self.layers.values() if "scorer" in v]
        return all(type(s) in SCORERS.values() for s in (self.scorer, *overridden))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types.

        Raises:
            TypeError: a scorer is not one of this package's.
        """
        encoded = {f.name: _encode(f.name, getattr(self, f.name)) for f in fields(self)}
        encoded["layers"] = {
            str(selector): {name: _encode(name, value) for name, value in values.items()}
            for selector, values in self.layers.items()
        }
        return encoded

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SparsityConfig:
        """The inverse of `to_dict`; fields that are left out take their defaults."""
        known = {f.name for f in fields(cls)}
        if unknown := set(values) - known:
            raise ValueError(
                f"SparsityConfig has no {sorted(unknown)}; allowed are {sorted(known)}"
            )
        decoded = {name: _decode(name, value) for name, value in values.items()}
        if "layers" in decoded:
            decoded["layers"] = {
                _int_if_number(selector): {n: _decode(n, v) for n, v in overrides.items()}
                for selector, overrides in decoded["layers"].items()
            }
        return cls(**decoded)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> SparsityConfig:
        return cls.from_dict(json.loads(text))


def selects(selector: LayerSelector, index: int, name: str, count: int) -> bool:
    """Whether a layer selector means layer ``index``, called ``name``, of ``count``."""
    if isinstance(selector, str):
        return fnmatchcase(name, selector)
    return index == (selector + count if selector < 0 else selector)


def _selectors(argument: str, selectors: Any) -> tuple[LayerSelector, ...]:
    if isinstance(selectors, (str, int)) or (
        argument == "layers" and not isinstance(selectors, Mapping)
    ):
        wanted = "a dict {layer: {field: value}}" if argument == "layers" else "a tuple"
        raise TypeError(f"{argument} must be {wanted}, got {selectors!r}")
    for selector in selectors:
        if isinstance(selector, bool) or not isinstance(selector, (int, str)):
            raise TypeError(
                f"{argument} names layers by index (int) or name pattern (str), got {selector!r}"
            )
    return tuple(selectors)


def _encode(name: str, value: Any) -> Any:
    if name == "scorer" and type(value) not in SCORERS.values():
        raise TypeError(
            f"scorer {value!r} cannot be saved; only {', '.join(SCORERS)} can. Pass it again with "
            "ea.apply(model, config) after loading"
        )
    if name in REGISTRIES and is_dataclass(value) and not isinstance(value, type):
        return {"type": type(value).__name__} | asdict(value)
    return list(value) if isinstance(value, tuple) else value


def _decode(name: str, value: Any) -> Any:
    classes = REGISTRIES.get(name)
    if classes is not None and isinstance(value, Mapping):
        arguments = dict(value)
        kind = arguments.pop("type", None)
        if kind not in classes:
            raise ValueError(f"{name} has type {kind!r}; allowed are {sorted(classes)}")
        return classes[kind](**arguments)
    return tuple(value) if isinstance(value, list) else value


def _int_if_number(selector: str) -> LayerSelector:
    try:
        return int(selector)
    except ValueError:
        return selector
