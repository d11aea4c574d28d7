"""Register the attention with transformers, as soon as transformers is imported.

`import entropy_attn` must not import transformers, and yet
``from_pretrained(..., attn_implementation="entropy_attn")`` has to work after it, whichever of
the two is imported first. So a finder on `sys.meta_path` waits for the one module of transformers
that holds the registry and registers right after it ran. This module needs the standard library
alone.
"""

from __future__ import annotations

import importlib.util
import sys
import warnings
from types import ModuleType

REGISTRY = "transformers.modeling_utils"


def register() -> None:
    """Register ``attn_implementation="entropy_attn"`` with transformers now; idempotent.

    Raises:
        ImportError: transformers is missing or too old (it needs >= 4.56).
    """
    from entropy_attn.integrations import transformers_models

    transformers_models.register()


def register_on_import() -> None:
    """Register now if transformers is loaded, else when it will be."""
    if REGISTRY in sys.modules:
        _register_or_warn()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register_or_warn() -> None:
    # An import of transformers must not fail because of this package.
    try:
        register()
    except ImportError as error:
        warnings.warn(f'attn_implementation="entropy_attn" is not available: {error}', stacklevel=2)


class _Finder:
    """Wraps the loader of REGISTRY once, and leaves."""

    def find_spec(self, name: str, path=None, target: ModuleType | None = None):
        if name != REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _register_or_warn()

            spec.loader.exec_module = exec_module
        return spec
