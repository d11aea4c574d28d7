"""Real running prose without a network: what ships inside Python.

`pydoc_data.topics` is the language reference that ``help()`` prints. Headings, grammar, code and
tables are dropped and each paragraph is used once (topics repeat each other), so what is left
reads as a text. It is split by topic into a development part, on which ideas may be tuned, and a
held-out part. The docstrings of the standard library are a third part, for what was chosen after
looking at the other two. Models are trained on the first and the third, and the docstrings of
PyTorch, which are long.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

_EMPHASIS = re.compile(r"(?<![\w*])(\*{1,2})(\w[^*]*)\1(?![\w*])")
_CODE_SIGNS = re.compile(r"::=|>>>|\.\.\. |==|\+-|->|\(\)\s*$|^[\w.]+\(.*\)$")
_SHORTEST_PARAGRAPH = 80  # characters; shorter ones are headings and table cells
_PLAIN_SHARE = 0.93  # of a paragraph's characters that are letters, spaces or punctuation


@dataclass(frozen=True)
class Prose:
    """A text with a name that says where it comes from."""

    name: str
    text: str

    @property
    def digest(self) -> str:
        """Identifies the text in records: other Python versions ship other texts."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:12]


PARTS = {
    "development": "pydoc_data.topics, development half",
    "held-out": "pydoc_data.topics, held-out half",
    "docstrings": "docstrings of the standard library",
}


@cache
def prose(part: str) -> Prose:
    """One of `PARTS`; no paragraph is in two of them."""
    if part not in PARTS:
        raise ValueError(f"part must be one of {tuple(PARTS)}, got {part!r}")
    return Prose(PARTS[part], _docstrings() if part == "docstrings" else _halves()[part])


def prose_from_file(path: Path) -> Prose:
    """A text file of the user's."""
    return Prose(path.name, path.read_text(encoding="utf-8"))


def paragraphs(document: str) -> list[str]:
    """The paragraphs of running prose in a plain-text document, each on one line."""
    found = []
    for chunk in re.split(r"\n\s*\n", document):
        lines = [line.rstrip() for line in chunk.splitlines()]
        indents = {len(line) - len(line.lstrip()) for line in lines}
        # Bulleted text indents its later lines; any other change of indentation is layout.
        if len(indents) > 1 and not lines[0].lstrip().startswith("* "):
            continue
        paragraph = " ".join(line.strip() for line in lines).removeprefix("* ")
        paragraph = _EMPHASIS.sub(r"\2", paragraph)
        if _is_prose(paragraph):
            found.append(paragraph)
    return found


def _is_prose(paragraph: str) -> bool:
    if len(paragraph) < _SHORTEST_PARAGRAPH or _CODE_SIGNS.search(paragraph):
        return False
    if paragraph[-1] not in ".:)" or "  " in paragraph.replace(".  ", ". "):
        return False
    plain = sum(c.isalpha() or c in " ,.;:'\"()-" for c in paragraph)
    return plain >= _PLAIN_SHARE * len(paragraph)


@cache
def _halves() -> dict[str, str]:
    from pydoc_data.topics import topics

    # Whole topics go to the part that is shorter so far: equal halves, coherent passages.
    parts: dict[str, list[str]] = {"development": [], "held-out": []}
    length = dict.fromkeys(parts, 0)
    seen: set[str] = set()
    for topic in sorted(topics):
        fresh = [p for p in dict.fromkeys(paragraphs(topics[topic])) if p not in seen]
        seen.update(fresh)
        part = min(parts, key=lambda name: length[name])
        parts[part] += fresh
        length[part] += sum(map(len, fresh))
    return {part: "\n\n".join(found) for part, found in parts.items()}


def _docstrings() -> str:
    used = {p for half in _halves().values() for p in half.split("\n\n")}
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return "\n\n".join(_documented(files, used))


def _documented(files: Iterable[Path], used: set[str]) -> list[str]:
    """The paragraphs of prose in the docstrings of Python files, less those that are used."""
    found: dict[str, None] = {}
    for path in files:
        try:
            tree = ast.parse(path.read_bytes())
        except SyntaxError:  # written for a newer Python
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                documented = ast.get_docstring(node) or ""
                found |= dict.fromkeys(p for p in paragraphs(documented) if p not in used)
    return list(found)


def training_prose(*, packages: tuple[str, ...] = ("torch",)) -> Prose:
    """All prose at hand but the held-out half: some 2 MB with the docstrings of PyTorch."""
    parts = [prose("development").text, prose("docstrings").text]
    used = {p for text in (*parts, prose("held-out").text) for p in text.split("\n\n")}
    for package in packages:
        spec = find_spec(package)
        folders = (spec.submodule_search_locations if spec else None) or ()
        files = [file for folder in folders for file in sorted(Path(folder).rglob("*.py"))]
        parts.append("\n\n".join(_documented(files, used)))
    names = "development half, docstrings of the standard library"
    return Prose(", ".join((names, *(f"of {package}" for package in packages))), "\n\n".join(parts))
