"""attn_implementation="entropy_attn" in fresh processes, whatever is imported first."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
ROOT = Path(__file__).resolve().parent.parent

BUILD = """
config = transformers.LlamaConfig(
    hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=17
)
model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="entropy_attn")
ids = torch.ones(1, 20, dtype=torch.int64)
model(ids)
layer = model.model.layers[0].self_attn._entropy_attn_layer
assert sum(layer.recorder.calls.values()) == 1
"""
ORDERS = {
    "entropy_attn first": """
import sys, torch
import entropy_attn as ea
assert "transformers" not in sys.modules and "triton" not in sys.modules
import transformers
""",
    "transformers first": """
import torch, transformers
import entropy_attn as ea
""",
    "transformers loaded first": """
import torch, transformers
transformers.LlamaForCausalLM
import entropy_attn as ea
""",
    "twice and by hand": """
import torch
import entropy_attn as ea, transformers
ea.register()
ea.register()
""",
}


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-W", "error::UserWarning:entropy_attn", "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("order", ORDERS)
def test_import_order(order):
    done = run(ORDERS[order] + BUILD)
    assert done.returncode == 0, done.stderr


def test_missing_transformers_is_named():
    code = """
import sys
sys.modules["transformers"] = None
import entropy_attn as ea
try:
    ea.register()
except ImportError as error:
    assert "transformers >= 4.56 is needed" in str(error), error
else:
    raise SystemExit("no error")
"""
    done = run(code)
    assert done.returncode == 0, done.stderr
