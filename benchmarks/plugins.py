"""Baselines of one's own: an attention that takes part in the suites beside the ones known here.

A file with these lines is all that ``entropy-attn bench attention --plugin FILE`` needs::

    from entropy_attn.benchmarks.plugins import register_baseline
    from my_package import my_attention

    register_baseline("mine", package="my-package")(my_attention)
"""

from __future__ import annotations

import runpy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from entropy_attn.benchmarks.baselines import CONTESTANTS, Contestant, Forward
from entropy_attn.benchmarks.cases import Inputs
from entropy_attn.benchmarks.environment import package_version

Attention = Callable[..., Tensor]


@dataclass(frozen=True)
class Baseline:
    """A registered attention; see `register_baseline`."""

    name: str
    attention: Attention
    version: str
    sparse: bool


REGISTERED: dict[str, Baseline] = {}


def register_baseline(
    name: str, *, package: str | None = None, version: str | None = None, sparse: bool = False
) -> Callable[[Attention], Attention]:
    """A decorator that makes a function a contestant of the suites ``attention``, ``vit``, ``llm``.

    The function is called as ``attention(query, key, value, is_causal=...)`` or, if sparse, as
    ``attention(query, key, value, block_mask, is_causal=...)``, with query (B, H, N, D), key and
    value (B, Hkv, N, D) of the case's dtype and an `ea.BlockMask`, and returns (B, H, N, D). Scores
    are scaled by D**-0.5. In the backward torch.autograd goes through it. Sparse ones take part in
    ``attention`` only: a whole model has no mask for them.

    Args:
        name: in tables and records.
        package: the installed distribution whose version goes into the records.
        version: what goes into the records for code that is in no distribution.
        sparse: visits only the blocks of the mask; others compute dense attention.

    Raises:
        ValueError: the name is taken, or there is not exactly one of package and version, or the
            package is not installed.
    """
    if name in CONTESTANTS:
        raise ValueError(f"a baseline is called {name!r} already; choose another name")
    if (package is None) == (version is None):
        raise ValueError(
            f"baseline {name!r}: give package, whose version is recorded, or a version, got "
            f"package={package!r} and version={version!r}"
        )
    found = version or package_version(package)
    if found is None:
        raise ValueError(f"baseline {name!r}: the package {package!r} is not installed")

    def register(attention: Attention) -> Attention:
        baseline = Baseline(name, attention, found, sparse)
        REGISTERED[name] = baseline
        CONTESTANTS[name] = Contestant(
            name, sparse, package or name, lambda case, device: None, _setup(baseline), found
        )
        return attention

    return register


def load_plugin(path: Path) -> list[str]:
    """Run a file that registers baselines; returns their names.

    Raises:
        ValueError: it registers none.
    """
    before = set(REGISTERED)
    runpy.run_path(str(path))
    names = [name for name in REGISTERED if name not in before]
    if not names:
        raise ValueError(f"{path} registers no baseline; call register_baseline in it")
    return names


def _setup(baseline: Baseline) -> Callable[[Inputs], Forward]:
    def setup(inputs: Inputs) -> Forward:
        tensors = [inputs.query, inputs.key, inputs.value]
        masks = [inputs.mask] if baseline.sparse else []
        return lambda: baseline.attention(*tensors, *masks, is_causal=inputs.case.is_causal)

    return setup
