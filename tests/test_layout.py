"""The layout and the dependency rule: arrows point one way, and `kernels` stays a free name."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"entropy_attn": "entropy_attn", "kernels": "entropy_attn.kernels"}
FOLDERS["benchmarks"] = "entropy_attn.benchmarks"
LONGEST_FILE = 600  # lines

# Packages that the core must work without.
OPTIONAL = (
    "accelerate", "einops", "flash_attn", "matplotlib", "numba", "rich", "scipy", "timm",
    "transformers", "triton", "typer",
)  # fmt: skip

HELPERS = (
    "entropy_attn.kernels.primitives", "entropy_attn.kernels.launch", "entropy_attn.kernels.plans",
    "entropy_attn.kernels.backward_config", "entropy_attn.kernels.range_primitives",
)  # fmt: skip
PLAIN = ("entropy_attn.reference",)
OP = ("entropy_attn.custom_ops",)
MASKS = (
    "entropy_attn.masks", "entropy_attn.block_lists", "entropy_attn.mask_formats",
    "entropy_attn.mask_patterns", "entropy_attn.plotting",
)  # fmt: skip
API = (
    "entropy_attn.api", "entropy_attn.paged", "entropy_attn.selection", "entropy_attn.config",
    "entropy_attn.entropy", "entropy_attn.decoding",
    "entropy_attn.min_length", "entropy_attn.partition", "entropy_attn.prefill",
    "entropy_attn.validation",
    "entropy_attn.errors", "entropy_attn.traced", "entropy_attn.autocast", "entropy_attn.reorder",
    *MASKS,
)  # fmt: skip
# The modules where the API meets the kernels.
BOUNDARY = (
    "entropy_attn.ops", "entropy_attn.prefill", "entropy_attn.selection.ops",
    "entropy_attn.partition.ops", "entropy_attn.geometry.ops", "entropy_attn.decoding.ops",
)  # fmt: skip

# What the modules below a name may import of this package; the longest name that fits counts.
ALLOWED: dict[str, tuple[str, ...]] = {
    "entropy_attn.kernels": HELPERS,
    "entropy_attn.kernels.primitives": (),
    "entropy_attn.kernels.launch": ("entropy_attn.kernels.plans",),
    "entropy_attn.kernels.plans": (),
    "entropy_attn.kernels.prefill": ("entropy_attn.kernels",),
    "entropy_attn.kernels.hopper": (*HELPERS, "entropy_attn.kernels.hopper"),
    "entropy_attn.kernels.hopper.backward": (
        *HELPERS,
        "entropy_attn.kernels.hopper",
        "entropy_attn.kernels.backward_statistics",
    ),
    "entropy_attn.kernels.hopper.primitives": (),
    "entropy_attn.reference": PLAIN,
    "entropy_attn.errors": (),
    "entropy_attn.traced": (),
    "entropy_attn.autocast": (),
    "entropy_attn.entropy": (),
    "entropy_attn.block_lists": (),
    "entropy_attn.custom_ops": (),
    "entropy_attn.testing": PLAIN,
    "entropy_attn.backend": ("entropy_attn.backend", "entropy_attn.errors"),
    "entropy_attn.ops": ("entropy_attn.kernels", "entropy_attn.block_lists", *MASKS, *OP, *PLAIN),
    "entropy_attn.prefill": ("entropy_attn.kernels", "entropy_attn.ops", *API, *OP),
    "entropy_attn.selection.ops": ("entropy_attn.kernels", *OP, *PLAIN),
    "entropy_attn.decoding.ops": ("entropy_attn.kernels", *OP, *PLAIN),
    "entropy_attn.partition.ops": ("entropy_attn.kernels", *OP, *PLAIN),
    "entropy_attn.geometry": (
        "entropy_attn.geometry",
        "entropy_attn.backend",
        "entropy_attn.partition",
        "entropy_attn.validation",
        "entropy_attn.errors",
    ),
    "entropy_attn.geometry.ops": ("entropy_attn.geometry", "entropy_attn.kernels", *PLAIN),
    "entropy_attn.validation": (*MASKS, "entropy_attn.errors"),
    "entropy_attn.integrations": ("entropy_attn.integrations", *API, *OP, *PLAIN),
    "entropy_attn.regularizer": ("entropy_attn.regularizer", "entropy_attn.integrations", *API),
    "entropy_attn": (*API, *BOUNDARY, *PLAIN, "entropy_attn.backend"),
    "entropy_attn.__init__": ("entropy_attn.integrations.registration",),
    "entropy_attn.cli": ("entropy_attn",),
    "entropy_attn.benchmarks": ("entropy_attn",),
}
MAY_VALIDATE = (
    "entropy_attn.api", "entropy_attn.paged", "entropy_attn.selection", "entropy_attn.config",
    "entropy_attn.min_length", "entropy_attn.prefill",
    "entropy_attn.masks", "entropy_attn.mask_formats", "entropy_attn.mask_patterns",
    "entropy_attn.integrations", "entropy_attn.partition", "entropy_attn.regularizer",
    "entropy_attn.reorder", "entropy_attn.geometry", "entropy_attn.decoding",
)  # fmt: skip


def modules() -> dict[str, Path]:
    """Every module of the package by the name it is imported by; "….__init__" for packages."""
    return {
        ".".join((package, *path.relative_to(ROOT / folder).with_suffix("").parts)): path
        for folder, package in FOLDERS.items()
        for path in sorted((ROOT / folder).rglob("*.py"))
    }


MODULES = modules()


def own_imports(name: str) -> set[str]:
    """Full names of this package's modules that a module imports, anywhere in its code.

    Imports under ``if TYPE_CHECKING`` count as well: a type is a dependency too.
    """
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import; write the full name"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if is_module(full) else str(node.module))
    return {module for module in found if module.split(".")[0] == "entropy_attn"}


def is_module(name: str) -> bool:
    return any(module == name or module.startswith(f"{name}.") for module in MODULES)


def below(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def rule_for(name: str) -> tuple[str, ...]:
    return ALLOWED[max((rule for rule in ALLOWED if below(name, (rule,))), key=len)]


def test_the_rule_knows_the_modules():
    unknown = [name for name in ALLOWED if not is_module(name)]
    assert not unknown, f"ALLOWED names modules that do not exist: {unknown}"


@pytest.mark.parametrize("name", MODULES)
def test_arrows_point_one_way(name):
    allowed = rule_for(name)
    wrong = sorted(module for module in own_imports(name) if not below(module, allowed))
    assert not wrong, f"{name} imports {wrong}; it may import {sorted(allowed) or 'nothing'}"


@pytest.mark.parametrize("name", MODULES)
def test_only_the_api_validates(name):
    if "entropy_attn.validation" in own_imports(name):
        assert below(name, MAY_VALIDATE), f"{name} validates; leave that to the API"


def test_only_the_boundary_imports_kernels():
    importers = {
        name
        for name in MODULES
        if not below(name, ("entropy_attn.kernels", "entropy_attn.benchmarks"))
        and any(below(module, ("entropy_attn.kernels",)) for module in own_imports(name))
    }
    assert importers == set(BOUNDARY)


def python_files() -> list[Path]:
    folders = ("entropy_attn", "kernels", "benchmarks", "tests")
    return [ROOT / "setup.py", *(p for f in folders for p in sorted((ROOT / f).rglob("*.py")))]


def test_nothing_imports_the_top_level_kernels():
    for path in python_files():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            top = {name.split(".")[0] for name in names}
            assert "kernels" not in top, f"{path}:{node.lineno} imports Hugging Face's kernels"


@pytest.mark.parametrize("folder", ["kernels", "benchmarks", "benchmarks/suites"])
def test_folders_are_no_regular_packages(folder):
    assert (ROOT / folder).is_dir()
    assert not (ROOT / folder / "__init__.py").exists()


def test_no_file_is_too_long():
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in python_files()}
    too_long = {str(path): lines for path, lines in lengths.items() if lines > LONGEST_FILE}
    assert not too_long


def text_files() -> list[Path]:
    named = ("Makefile", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", ".ci/run")
    pages = sorted((ROOT / "docs").rglob("*.md"))
    configs = [*ROOT.glob("*.toml"), *ROOT.glob("*.txt"), *ROOT.glob(".*.yaml")]
    return [*python_files(), *(ROOT / name for name in named), *pages, *configs]


def test_no_path_of_a_machine():
    """Nothing depends on where somebody's files lie."""
    folder = re.compile(r"(?<![\w.])/(work|home|root|Users|mnt|opt|data|scratch)" + "/")
    for path in text_files():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            found = folder.search(line)
            assert found is None, f"{path}:{number} names {found[0]}"


def run(code: str, *, path: tuple[Path, ...] = (ROOT,), **variables: str) -> str:
    """Run code in a new process at the root of the repository; returns what it printed."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join(map(str, path)), **variables}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


CORE_ALONE = """
import sys

class Blocked:
    names = set({blocked!r})
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names:
            raise ModuleNotFoundError(f"blocked: {{name}}", name=name)

sys.meta_path.insert(0, Blocked())
import torch
# torch may look for Triton itself; what matters is that this package does without.
import entropy_attn as ea
query, key, value = torch.randn(3, 1, 2, 100, 32).unbind(0)
mask = ea.select_blocks(query, key, block_size=16, is_causal=True)
out = ea.block_sparse_attention(query, key, value, mask, is_causal=True)
dense, entropy = ea.attention_with_entropy(query, key, value, is_causal=True)
assert out.shape == dense.shape == query.shape
assert out.isfinite().all() and entropy.row.isfinite().all()
print(ea.explain(query, key, value, mask).backend)
print(sorted({{name.split(".")[0] for name in sys.modules}} & Blocked.names))
"""


def test_the_core_works_with_torch_alone():
    blocked = (*OPTIONAL, "kernels")
    backend, imported = run(CORE_ALONE.format(blocked=blocked)).splitlines()
    assert backend == "reference"
    assert imported == "[]"


def test_import_is_lazy():
    """`import entropy_attn` loads none of the optional packages, even where they are installed."""
    code = "import sys, torch; before = set(sys.modules); import entropy_attn; "
    code += "print(*{name.split('.')[0] for name in set(sys.modules) - before})"
    loaded = set(run(code).split())
    assert "entropy_attn" in loaded
    assert not loaded & {*OPTIONAL, "kernels", "numpy"}


# The names that transformers imports from Hugging Face's package `kernels` when it loads a model.
STAND_IN = '''
"""A stand-in for Hugging Face's kernels: only the names that transformers imports."""

used = []


def _decorator(name):
    used.append(name)
    return lambda cls: cls


def use_kernel_forward_from_hub(layer_name):
    return _decorator(layer_name)


def use_kernelized_func(*functions):
    return _decorator("functions")


def _unused(*args, **kwargs):
    raise NotImplementedError("the stand-in has no kernels")


class CUDAProperties: ...
class Device: ...
class KernelizeFallback: ...
class LayerRepository: ...
class LocalLayerRepository: ...
class Mode: ...
class ROCMProperties: ...


get_kernel = kernelize = register_kernel_mapping = _unused
replace_kernel_forward_from_hub = use_kernel_mapping = _unused
'''

LOAD_A_MODEL = """
import kernels, torch
import entropy_attn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.import_utils import is_kernels_available

assert is_kernels_available(), "transformers does not see Hugging Face's kernels"
config = LlamaConfig(
    vocab_size=50, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=1, attn_implementation="entropy_attn",
)
model = LlamaForCausalLM(config).eval()
assert model(torch.arange(20)[None]).logits.isfinite().all()
import entropy_attn.kernels.launch as launch
print(kernels.__file__)
print(launch.__file__)
print(len(kernels.used))
"""


def test_transformers_finds_hugging_faces_kernels_from_the_repository_root(tmp_path):
    """The repository's folder `kernels/` comes first on the path and must not hide the package."""
    from packaging.version import Version

    utils = pytest.importorskip("transformers.utils.import_utils")
    oldest = getattr(utils, "KERNELS_MIN_VERSION", "0.18.2")
    newest = getattr(utils, "KERNELS_MAX_VERSION", "0.19.0")
    assert Version(oldest) < Version(newest)
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text(STAND_IN)
    metadata = tmp_path / f"kernels-{oldest}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {oldest}\n")
    (metadata / "top_level.txt").write_text("kernels\n")

    found, ours, used = run(LOAD_A_MODEL, path=(ROOT, tmp_path)).splitlines()
    assert Path(found) == package / "__init__.py"
    assert Path(ours) == ROOT / "kernels" / "launch.py"
    assert int(used) > 0, "transformers did not use the stand-in"


def test_transformers_works_from_the_repository_root_without_hugging_faces_kernels():
    pytest.importorskip("transformers")
    code = """
import entropy_attn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.import_utils import is_kernels_available
print(is_kernels_available(), LlamaForCausalLM.__name__)
"""
    available, name = run(code).split()
    assert name == "LlamaForCausalLM"
    if not any((Path(folder) / "kernels" / "__init__.py").exists() for folder in sys.path):
        assert available == "False", "transformers takes the repository's folder for a package"
