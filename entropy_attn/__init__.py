"""entropy-attn: measure the complexity of attention and turn it into speed.

``import entropy_attn as ea`` needs torch alone: no Triton, no GPU, no transformers.
Names are loaded when they are first used.
"""

from importlib import import_module
from pathlib import Path
from typing import Any

from entropy_attn.integrations.registration import register_on_import

__version__ = "0.1.0"

# In a checkout `kernels/` and `benchmarks/` lie beside this package; setup.py installs them
# inside it. Both have no __init__.py: the top-level name `kernels` belongs to Hugging Face.
_ROOT = Path(__file__).resolve().parent.parent
if (_ROOT / "kernels" / "primitives.py").exists():
    __path__.append(str(_ROOT))

_EXPORTS = {
    "BlockMask": "masks",
    "block_sparse_attention": "api",
    "attention_with_entropy": "api",
    "merge_attention": "api",
    "paged_attention": "paged",
    "explain": "api",
    "AttentionEntropy": "api",
    "select_blocks": "selection",
    "Envelope": "selection",
    "Pooled": "selection",
    "Antidiagonal": "selection",
    "TrueMass": "selection",
    "TopK": "selection",
    "TopP": "selection",
    "Perplexity": "selection",
    "Reorder": "reorder",
    "token_order": "reorder",
    "reorder_tokens": "reorder",
    "range_entropy": "partition",
    "halfspace_entropy": "partition",
    "partition_entropy": "partition",
    "entropy_interval": "partition",
    "RangeEntropy": "partition.module",
    "backends": "backend",
    "BackendUnavailable": "errors",
    "SparsityConfig": "config",
    "SparseDecoding": "decoding.settings",
    "apply": "integrations",
    "observe": "integrations",
    "EntropyRegularizer": "regularizer",
    "register": "integrations",
}

# Parts with names of their own, as `ea.geometry.convex_hull`.
_MODULES = ("geometry",)

__all__ = ["__version__", *_EXPORTS, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"entropy_attn.{name}")
    if name not in _EXPORTS:
        raise AttributeError(f"module 'entropy_attn' has no attribute {name!r}")
    found = getattr(import_module(f"entropy_attn.{_EXPORTS[name]}"), name)
    globals()[name] = found  # is found without this function from now on
    return found


def __dir__() -> list[str]:
    return sorted(__all__)


# attn_implementation="entropy_attn" works once both packages are imported, in either order.
register_on_import()
