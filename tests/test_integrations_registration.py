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
SCRIPTS = {
    "entropy_attn first": """
import sys, torch
import entropy_attn as ea
assert "transformers" not in sys.modules and "triton" not in sys.modules
import transformers
"""
    + BUILD,
    "transformers first": """
import torch, transformers
import entropy_attn as ea
"""
    + BUILD,
    "transformers loaded first, registered twice": """
import torch, transformers
transformers.LlamaForCausalLM
import entropy_attn as ea
ea.register()
ea.register()
"""
    + BUILD,
    "transformers missing": """
import sys
sys.modules["transformers"] = None
import entropy_attn as ea
try:
    ea.register()
except ImportError as error:
    assert "transformers >= 4.56 is needed" in str(error), error
else:
    raise SystemExit("no error")
""",
}


@pytest.fixture(scope="module")
def processes():
    """All scripts at once: most of their time is the import of torch."""
    command = [sys.executable, "-W", "error::UserWarning:entropy_attn", "-c"]
    started = {
        name: subprocess.Popen([*command, script], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        for name, script in SCRIPTS.items()
    }
    yield started
    for process in started.values():
        process.kill()
        process.wait()


@pytest.mark.parametrize("name", SCRIPTS)
def test_fresh_process(processes, name):
    _, errors = processes[name].communicate(timeout=300)
    assert processes[name].returncode == 0, errors
