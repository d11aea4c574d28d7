"""AttentionSite: a place in a model where attention runs and another can be put."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Protocol

from torch import nn

from entropy_attn.integrations.layer import Layer


class AttentionSite(Protocol):
    """An attention module of a model, found by an adapter.

    Attributes:
        name: of the module in the model.
        module: the module itself.
    """

    name: str
    module: nn.Module

    def install(self, layer: Layer, undo: ExitStack) -> None:
        """Let ``layer`` compute this attention; push onto ``undo`` what takes it out again."""
        ...

    def installed(self) -> Layer | None:
        """The layer that computes this attention now, None for the module's own."""
        ...


class Installation:
    """Layers put into the sites of a model, all or none.

    Attributes:
        undo: more that `remove` has to undo can be pushed here.
    """

    def __init__(self, sites: Sequence[AttentionSite], layers: Sequence[Layer]) -> None:
        self._pairs = tuple(zip(sites, layers, strict=True))
        with ExitStack() as undo:
            for site, layer in self._pairs:
                site.install(layer, undo)
            self.undo = undo.pop_all()

    def remove(self) -> None:
        """Give the model its own attention back, exactly; a second call does nothing.

        Raises:
            RuntimeError: other layers were put in since; nothing is changed.
        """
        for site, layer in self._pairs:
            if site.installed() is not layer:
                raise RuntimeError(
                    f"the attention of {site.name} was replaced again since; remove the later "
                    "handle first"
                )
        self._pairs = ()
        self.undo.close()


def find_sites(model: nn.Module) -> list[AttentionSite]:
    """The attention modules of a model in the order of its modules, of all adapters."""
    from entropy_attn.integrations import timm, transformers

    sites = [*transformers.find_sites(model), *timm.find_sites(model)]
    order = {name: index for index, (name, _) in enumerate(model.named_modules())}
    return sorted(sites, key=lambda site: order[site.name])


def bypassing_modules(model: nn.Module, sites: list[AttentionSite]) -> list[tuple[str, nn.Module]]:
    """Attention modules that no adapter reaches: neither sites nor around or inside a site."""
    inside = {id(m) for site in sites for m in site.module.modules()}
    candidates = [
        (name, module)
        for name, module in model.named_modules()
        if re.search(r"Attention|Attn", type(module).__name__)
        and not any(id(m) in inside for m in module.modules())
    ]
    # Of nested candidates the innermost computes the attention.
    return [
        (name, module)
        for name, module in candidates
        if not any(other.startswith(f"{name}.") for other, _ in candidates)
    ]


def check_reach(model: nn.Module, sites: list[AttentionSite], partial: bool) -> None:
    """That every attention module of the model is reached, or some if ``partial``.

    Raises:
        ValueError: names the classes whose attention would silently stay dense.
    """
    bypassing = bypassing_modules(model, sites)
    if sites and (partial or not bypassing):
        return
    classes = sorted({type(module).__name__ for _, module in bypassing})
    kind = type(model).__name__
    if not sites:
        what = f"its attention ({', '.join(classes)}) does" if classes else "its modules do"
        raise ValueError(
            f"no attention of {kind} can be replaced: {what} not go through transformers' "
            "AttentionInterface nor through scaled_dot_product_attention in a timm module with "
            "fused_attn. Call ea.select_blocks and ea.block_sparse_attention in the model's code"
        )
    raise ValueError(
        f"{kind} has attention that cannot be replaced: {', '.join(classes)} (for example "
        f"{bypassing[0][0]!r}). Pass partial=True to leave it as it is and replace the "
        f"{len(sites)} other attention modules"
    )
