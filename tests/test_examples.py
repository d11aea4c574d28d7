"""The examples run as their docstrings say, in small."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run(name: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / name, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_train_loop():
    said = run("train_loop.py", "--tiny", "--steps", "10", "--density", "0.6")
    assert len(re.findall(r"(?:before|after): density [01]\.\d+, perplexity \d+\.\d+", said)) == 2
    steps = re.findall(r"loss ([\d.]+) \| step (\d+), density (0\.\d+|1\.0000) \(target", said)
    assert [int(step) for _, step, _ in steps] == list(range(1, 11))
    assert "(target 0.6000)" in said


def test_train_trainer(tmp_path):
    said = run("train_trainer.py", "--steps", "20", "--output", str(tmp_path))
    weights = [float(w) for w in re.findall(r"'entropy_weight': '?([\d.e-]+)", said)]
    assert len(weights) == 10
    assert weights[-1] > weights[0]
    assert re.search(r"accuracy 0\.\d+ \| step 20, density 0\.\d+ \(target 0\.5000\)", said)
