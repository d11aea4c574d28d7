"""The README's Python lines run as printed, and its commands and links exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def poisoned_memory() -> None:
    """The lines build transformers models, whose memory is their own business."""


def test_python_blocks_run_in_order(capsys):
    pytest.importorskip("transformers")
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", README, re.DOTALL | re.MULTILINE))
    assert len(blocks) >= 3
    namespace: dict[str, object] = {"__name__": "readme"}
    for block in blocks:
        # Leading newlines make a traceback show the README's own line numbers.
        source = "\n" * README[: block.start(1)].count("\n") + block[1]
        exec(compile(source, str(ROOT / "README.md"), "exec"), namespace)
    assert namespace["logits"].isfinite().all()
    assert namespace["handle"].stats().sparse > 0, "the first lines show no sparse attention"
    assert "reference" in capsys.readouterr().out


def test_commands_are_targets_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", README, re.MULTILINE))
    assert {"demo", "test"} <= named <= targets


def test_links_lead_to_files():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
    for page in pages:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"
