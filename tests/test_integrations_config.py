"""SparsityConfig: JSON and back, and friendly errors."""

from __future__ import annotations

import json

import pytest

import entropy_attn as ea
from entropy_attn.min_length import expected_blocks

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
        min_length=2048,
        expected_density=0.5,
    ),
    ea.SparsityConfig(
        reorder=ea.Reorder(cells=16, prefix=1), layers={0: {"reorder": None}, 1: {"sink": 3}}
    ),
    ea.SparsityConfig(layers={"encoder.*": {"reorder": ea.Reorder(sample=512)}}),
    ea.SparsityConfig(decode=ea.SparseDecoding(4096, block_size=16), layers={1: {"decode": None}}),
    ea.SparsityConfig(layers={0: {"decode": ea.SparseDecoding(1.0, min_length=0)}}),
    ea.SparsityConfig(min_length=0, layers={0: {"min_length": "auto", "expected_density": 0.1}}),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_round_trip(config):
    assert ea.SparsityConfig.from_json(config.to_json()) == config
    assert ea.SparsityConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert hash(ea.SparsityConfig.from_json(config.to_json())) == hash(config)


def test_missing_fields_take_their_defaults():
    assert ea.SparsityConfig.from_dict({"sink": 2}) == ea.SparsityConfig(sink=2)


def test_min_length_is_saved_as_it_was_given():
    assert ea.SparsityConfig().to_dict()["min_length"] == "auto"
    assert ea.SparsityConfig(min_length=4096).to_dict()["min_length"] == 4096
    assert ea.SparsityConfig.from_dict({"min_length": 4096}).min_length == 4096


@pytest.mark.parametrize(
    ("changes", "is_causal", "expected"),
    [
        # Half a block of rounding, and the sink, the diagonal and its neighbour as far as the
        # budget does not choose them anyway.
        ({"budget": ea.TopK(0.25)}, True, (0.25, 0.5 + 3 * 0.75)),
        ({"budget": ea.TopK(0.25)}, False, (0.25, 0.5 + 4 * 0.75)),
        ({"budget": ea.TopK(count=16)}, True, (0.0, 16 + 3)),
        ({"budget": ea.TopK(count=2, min_blocks=5)}, True, (0.0, 5 + 3)),
        ({"budget": ea.TopP(0.9), "expected_density": 0.5}, True, (0.5, 0.5 + 3 * 0.5)),
        ({"budget": ea.Perplexity(2.0)}, True, (0.25, 0.5 + 3 * 0.75)),
        ({"budget": ea.Perplexity(2.0, max_density=0.1)}, True, (0.1, 0.5 + 3 * 0.9)),
        ({"budget": ea.TopK(0.5), "sink": 0, "local": 0}, True, (0.5, 0.5)),
        # In another order neither the first blocks nor the diagonal are what they were.
        ({"budget": ea.TopK(0.5), "reorder": ea.Reorder()}, False, (0.5, 0.5)),
        ({"budget": ea.TopK(0.5), "reorder": ea.Reorder(prefix=65)}, False, (0.5, 0.5 + 2 / 2)),
        ({"budget": ea.TopK(0.5), "block_size": (128, 32), "sink": 0}, True, (0.5, 0.5 + 5 / 2)),
    ],
)
def test_expected_blocks(changes, is_causal, expected):
    config = ea.SparsityConfig(**changes)
    assert expected_blocks(config, is_causal) == pytest.approx(expected)


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
        ({"scorer": "pooled"}, TypeError, "scorer must be one of Pooled, Envelope, Antidiagonal"),
        ({"budget": 0.25}, TypeError, "budget must be one of TopK, TopP, Perplexity"),
        ({"reorder": 16}, TypeError, "reorder must be an entropy_attn.Reorder or None, got 16"),
        (
            {"decode": 0.25},
            TypeError,
            r"decode must be .* example SparseDecoding\(keep=0.25\), got",
        ),
        ({"sink": -1}, ValueError, "sink must be an int >= 0, got -1"),
        ({"min_length": 1.5}, ValueError, "min_length must be 'auto' or an int >= 0, got 1.5"),
        ({"min_length": -1}, ValueError, "min_length must be 'auto' or an int >= 0, got -1"),
        ({"min_length": True}, ValueError, "min_length must be 'auto' or an int >= 0, got True"),
        ({"min_length": "long"}, ValueError, "min_length must be 'auto' or .*, got 'long'"),
        (
            {"expected_density": 0},
            ValueError,
            r"expected_density must be a number in \(0, 1\], got 0",
        ),
        ({"expected_density": 1.1}, ValueError, r"expected_density must be .*\(0, 1\], got 1.1"),
        ({"expected_density": "auto"}, ValueError, "expected_density must be .*got 'auto'"),
        ({"layers": {0: {"min_length": "x"}}}, ValueError, "min_length must be 'auto'.*got 'x'"),
        ({"min_queries": 0}, ValueError, "min_queries must be an int >= 1, got 0"),
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
    with pytest.raises(ValueError, match="reorder has type 'Sort'"):
        ea.SparsityConfig.from_dict({"reorder": {"type": "Sort"}})
    with pytest.raises(ValueError, match="budget has type 'Best'"):
        ea.SparsityConfig.from_dict({"budget": {"type": "Best"}})
    custom = ea.SparsityConfig(scorer=lambda *args, **kwargs: None)
    assert not custom.is_serializable
    with pytest.raises(TypeError, match="cannot be saved"):
        custom.to_json()
