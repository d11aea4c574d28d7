"""SparsityConfig: JSON and back, and friendly errors."""

from __future__ import annotations

import json

import pytest

import entropy_attn as ea

CONFIGS = [
    ea.SparsityConfig(),
    ea.SparsityConfig(
        block_size=(64, 32),
        scorer=ea.Antidiagonal(16),
        budget=ea.TopK(count=4),
        dense_layers=(0, -1, "vision.*"),
        layers={3: {"budget": ea.TopP(0.9)}, "text.*": {"scorer": ea.TrueMass(), "local": 0}},
        backend="reference",
        explicit_mask="dense",
    ),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_round_trip(config):
    assert ea.SparsityConfig.from_json(config.to_json()) == config
    assert ea.SparsityConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert hash(ea.SparsityConfig.from_json(config.to_json())) == hash(config)


def test_missing_fields_take_their_defaults():
    assert ea.SparsityConfig.from_dict({"sink": 2}) == ea.SparsityConfig(sink=2)


def test_layers_are_resolved_in_order():
    config = ea.SparsityConfig(
        sink=1, layers={"*": {"sink": 2, "local": 3}, -1: {"sink": 4}}, dense_layers=(0,)
    )
    first, dense = config.for_layer(0, "a", 3)
    assert (first.sink, first.local, dense) == (2, 3, True)
    last, dense = config.for_layer(2, "c", 3)
    assert (last.sink, last.local, dense) == (4, 3, False)
    assert not last.is_per_layer


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"block_size": 48}, ValueError, "block_size must be a power of two"),
        ({"scorer": "pooled"}, TypeError, "scorer must be one of Pooled, Antidiagonal, TrueMass"),
        ({"budget": 0.25}, TypeError, "budget must be one of TopK, TopP, Perplexity"),
        ({"sink": -1}, ValueError, "sink must be an int of at least 0, got -1"),
        ({"min_length": 1.5}, ValueError, "min_length must be an int"),
        ({"min_queries": 0}, ValueError, "min_queries must be an int of at least 1"),
        ({"backend": "sdpa"}, ValueError, "backend must be one of"),
        ({"explicit_mask": "ignore"}, ValueError, "explicit_mask must be one of"),
        ({"dense_layers": 2}, TypeError, "dense_layers must be a tuple"),
        ({"dense_layers": (1.0,)}, TypeError, "names layers by index"),
        ({"layers": [{"sink": 2}]}, TypeError, "layers must be a dict"),
        ({"layers": {0: {"sinks": 2}}}, ValueError, r"layers\[0\] sets \['sinks'\]"),
        ({"layers": {0: {"sink": -2}}}, ValueError, "sink must be an int"),
    ],
)
def test_errors(values, error, message):
    with pytest.raises(error, match=message):
        ea.SparsityConfig(**values)


def test_errors_of_loading():
    with pytest.raises(ValueError, match=r"SparsityConfig has no \['blocksize'\]"):
        ea.SparsityConfig.from_dict({"blocksize": 64})
    with pytest.raises(ValueError, match="budget has type 'Best'"):
        ea.SparsityConfig.from_dict({"budget": {"type": "Best"}})
    custom = ea.SparsityConfig(scorer=lambda *args, **kwargs: None)
    assert not custom.is_serializable
    with pytest.raises(TypeError, match="cannot be saved"):
        custom.to_json()
