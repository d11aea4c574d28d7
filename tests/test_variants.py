"""The table of a kernel's configurations."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("triton")

from entropy_attn.benchmarks import variants
from entropy_attn.benchmarks.cases import AttentionCase, make_inputs
from entropy_attn.benchmarks.suites import decode as decoding

SMALL = AttentionCase(16, 128, 0.5, block=32, batch=1, heads=2, dtype="float32")


def cells(table) -> list[list[str]]:
    return list(zip(*(column.cells for column in table.columns), strict=True))


def test_all_configurations_are_checked_and_timed(monkeypatch):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    forward, others = variants.KERNELS["portable"]

    def some(inputs):
        found = others(inputs)
        return {name: found[name] for name in list(found)[:2]}

    def broken(inputs, config):
        if config == others(inputs)[variants.DEFAULT]:
            return forward(inputs, config)
        return forward(inputs, config) * 1.5

    monkeypatch.setitem(variants.KERNELS, "portable", (broken, some))
    rows = cells(variants.compare("portable", SMALL, torch.device(device), 0.01))
    assert rows[0][0] == variants.DEFAULT
    assert float(rows[0][1]) > 0
    assert rows[1][1] == "–"
    assert "exceeds" in rows[1][3]


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("kernel", variants.KERNELS)
def test_configurations_differ_and_hold_the_default(kernel, block):
    case = AttentionCase(64, 256, 0.5, block=block, batch=1, heads=2, dtype="float16")
    found = variants.KERNELS[kernel][1](make_inputs(case, "cpu", 0))
    assert len(found) == len(set(found.values())) >= 3
    assert next(iter(found)) == variants.DEFAULT


@pytest.mark.parametrize("kernel", variants.DECODING)
def test_configurations_of_decoding(kernel, monkeypatch):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    others = variants.decode_variants

    def some(inputs, kernel):
        found = others(inputs, kernel)
        assert len(found) == len(set(found.values())) > 20
        return {name: found[name] for name in (variants.DEFAULT, list(found)[-1])}

    monkeypatch.setattr(variants, "decode_variants", some)
    case = decoding.cases("small")[0]
    rows = cells(variants.compare_decoding(kernel, case, device, 0.01))
    assert len(rows) == 2
    assert all(float(row[1]) > 0 for row in rows)
    monkeypatch.setattr(variants, "decode", lambda inputs, *_: inputs.query * 0)
    assert {row[1] for row in cells(variants.compare_decoding(kernel, case, device, 0.01))} == {"–"}
