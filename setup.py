"""Where the packages lie: `kernels/` and `benchmarks/` are installed inside `entropy_attn`.

`kernels/` stays at the top of the repository, where kernel authors look for it, and must not be
installed under that name: it belongs to Hugging Face's package, which transformers imports.
Neither folder has an __init__.py, so each is listed here. All else is in pyproject.toml.
"""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
FOLDERS = {
    "entropy_attn.kernels": "kernels",
    "entropy_attn.kernels.hopper": "kernels/hopper",
    "entropy_attn.benchmarks": "benchmarks",
    "entropy_attn.benchmarks.suites": "benchmarks/suites",
}


def missing_folders() -> list[str]:
    """Folders with modules below `kernels/` and `benchmarks/` that `FOLDERS` does not list."""
    listed = set(FOLDERS.values())
    with_modules = {
        path.parent.relative_to(ROOT).as_posix()
        for top in ("kernels", "benchmarks")
        for path in (ROOT / top).rglob("*.py")
    }
    return sorted(with_modules - listed)


if missing := missing_folders():
    raise SystemExit(f"setup.py does not list {missing}: add them to FOLDERS")

setup(
    packages=[*find_packages(include=["entropy_attn", "entropy_attn.*"]), *FOLDERS],
    package_dir=FOLDERS,
    package_data={
        "entropy_attn": ["py.typed", "**/*.json", "**/*.safetensors"],
        "entropy_attn.benchmarks": ["*.jinja"],
    },
    include_package_data=False,
)
