"""Going on with a suite that was cut off: what this commit has measured on this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from entropy_attn.benchmarks.environment import environment
from entropy_attn.benchmarks.store import Record, Store


def why_not() -> str | None:
    """Why nothing in a store can be known to be of these sources, or None."""
    here = environment()
    if here["commit"] is None:
        return "the sources are in no git checkout and ENTROPY_ATTN_COMMIT is not set"
    if here["dirty"]:
        return "the sources differ from their commit"
    return None


def measured(store: Store, suite: str) -> Callable[[Mapping[str, Any]], bool]:
    """Whether a config has been measured here: by this commit, on this machine, with status ok."""
    if why_not() is not None:
        return lambda config: False
    here = Record(suite, {}, {})  # what is measured now
    found = [
        r.config
        for r in store.load(suite)
        if (r.machine, r.environment["commit"]) == (here.machine, here.environment["commit"])
        and not r.environment["dirty"]
        and r.result["status"] == "ok"
    ]
    return among(found)


def among(configs: Iterable[Mapping[str, Any]]) -> Callable[[Mapping[str, Any]], bool]:
    """Whether a config is one of these, or a part of one; None stands for what is not there."""
    known = list(configs)
    return lambda config: any(
        all(each.get(name) == value for name, value in config.items()) for each in known
    )
