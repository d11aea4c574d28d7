"""Wheel and source distribution build, and the installed wheel works outside the repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = (
    ".ci", ".gitignore", ".pre-commit-config.yaml", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE",
    "MANIFEST.in", "Makefile", "README.md", "benchmarks", "constraints.txt", "docs",
    "entropy_attn", "kernels", "pyproject.toml", "setup.py", "tests",
)  # fmt: skip

USE = """
from importlib.resources import files

import entropy_attn as ea
import torch
import entropy_attn.benchmarks.suites.quality
import entropy_attn.kernels.primitives as primitives
from entropy_attn.testing import assert_close_to_reference

query, key, value = torch.randn(3, 1, 2, 100, 32).unbind(0)
mask = ea.select_blocks(query, key, block_size=16, is_causal=True, backend="triton")
exact, plain, out = (
    ea.block_sparse_attention(*inputs, mask, is_causal=True, backend=backend)
    for inputs, backend in (
        ((query.double(), key.double(), value.double()), "reference"),
        ((query, key, value), "reference"),
        ((query, key, value), "triton"),
    )
)
assert_close_to_reference(out, plain, exact)
assert (files("entropy_attn.benchmarks") / "page.html.jinja").is_file()
print(ea.__file__, primitives.__file__, ea.__version__, sep="\\n")
"""


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=kept | variables, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution, and the wheel that was built from it."""
    pytest.importorskip("build")
    source = tmp_path_factory.mktemp("source")
    unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in SOURCES:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=unwanted)
        else:
            shutil.copy(path, source / name)
    # Without isolation nothing is downloaded: the environment has setuptools.
    run(sys.executable, "-m", "build", "--no-isolation", cwd=source)
    return source / "dist"


def modules_on_disk() -> set[str]:
    """Files that the wheel must have, by their place in it."""
    package = {p.relative_to(ROOT) for p in (ROOT / "entropy_attn").rglob("*.py")}
    others = {
        "entropy_attn" / path.relative_to(ROOT)
        for folder in ("kernels", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
    }
    return {path.as_posix() for path in package | others}


def test_the_wheel_has_all_modules_and_no_other_top_level_name(distributions):
    (wheel,) = distributions.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if name.endswith(".py")} == modules_on_disk()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"entropy_attn"}
    assert "entropy_attn/py.typed" in names
    assert "entropy_attn/geometry/entropy_net.safetensors" in names
    assert not [name for name in names if "benchmarks/results" in name]


def test_the_source_distribution_has_what_the_tests_need(distributions):
    (archive,) = distributions.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    tests = {f"tests/{path.name}" for path in (ROOT / "tests").glob("*.py")}
    assert {"Makefile", "LICENSE", "README.md", ".ci/run", "constraints.txt", *tests} <= names


def test_the_installed_wheel_works_outside_the_repository(distributions, tmp_path):
    (wheel,) = distributions.glob("*.whl")
    # torch comes from this environment through a .pth, so nothing is downloaded; an editable
    # install of this package in it does not come along.
    home = tmp_path / "environment"
    venv.create(home, symlinks=True)
    python = home / "bin" / "python"
    packages = Path(
        run(python, "-c", "import site; print(site.getsitepackages()[0])", cwd=tmp_path).strip()
    )
    (packages / "torch.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run(
        sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index",
        "--target", packages, wheel, cwd=tmp_path,
    )  # fmt: skip

    shown = run(python, "-c", USE, cwd=tmp_path, TRITON_INTERPRET="1").splitlines()
    package = packages / "entropy_attn"
    assert Path(shown[0]) == package / "__init__.py"
    assert Path(shown[1]) == package / "kernels" / "primitives.py"
    assert f"-{shown[2]}-" in wheel.name
    assert "Usage" in run(python, "-m", "entropy_attn.cli", "--help", cwd=tmp_path)
