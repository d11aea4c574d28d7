"""apply: replace the attention of a model, and the handle that gives it back."""

from __future__ import annotations

import warnings
from contextlib import ExitStack

from torch import nn

from entropy_attn.config import SparsityConfig, selects
from entropy_attn.integrations.layer import SparseLayer
from entropy_attn.integrations.reordering import check_can_reorder
from entropy_attn.integrations.sites import (
    AttentionSite,
    Installation,
    check_reach,
    find_sites,
)
from entropy_attn.integrations.statistics import Statistics

# Where transformers' config object carries the SparsityConfig, as a dict; saved with the model.
CONFIG_FIELD = "entropy_attn"


class Handle:
    """A model whose attention was replaced; also a context manager that gives it back at the end.

    Attributes:
        model: the model.
        config: its SparsityConfig.
        layers: one `SparseLayer` an attention module, in the order of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        config: SparsityConfig,
        layers: tuple[SparseLayer, ...],
        installation: Installation,
    ) -> None:
        self.model = model
        self.config = config
        self.layers = layers
        self._installation = installation

    def stats(self) -> Statistics:
        """What each layer did since `apply` or the last `reset_stats`. Waits for the device."""
        return Statistics(tuple(layer.recorder.read(layer.name) for layer in self.layers))

    def reset_stats(self) -> None:
        for layer in self.layers:
            layer.recorder.reset()

    def remove(self) -> None:
        """Give the model its own attention back, exactly; a second call does nothing.

        Raises:
            RuntimeError: the attention was replaced again since; remove the later handle first.
                Nothing is changed then.
        """
        self._installation.remove()

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"Handle({type(self.model).__name__}, {len(self.layers)} attention layers)"


def apply(
    model: nn.Module, config: SparsityConfig | None = None, *, partial: bool = False
) -> Handle:
    """Make the attention of a transformers or timm model sparse, in place.

    Args:
        model: a model of transformers or timm, or a module that contains one.
        config: None takes the config that was saved with the model, else the defaults.
        partial: allow attention modules that cannot be replaced; they stay as they are.

    Returns:
        A handle with ``.stats()`` and ``.remove()``; as a context manager it removes at the end.

    Raises:
        TypeError: ``model`` is not a module or ``config`` not a SparsityConfig.
        ValueError: some attention of the model cannot be replaced, or ``config`` names layers
            that the model lacks. The model is left as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if config is None:
        config = saved_config(model) or SparsityConfig()
    if not isinstance(config, SparsityConfig):
        raise TypeError(
            f"config must be an entropy_attn.SparsityConfig, got {type(config).__name__}; "
            "SparsityConfig.from_dict takes a dict"
        )
    sites = find_sites(model)
    check_reach(model, sites, partial)
    layers = make_layers(sites, config)
    installation = Installation(sites, layers)
    _save_config(model, config, installation.undo)
    return Handle(model, config, layers, installation)


def make_layers(sites: list[AttentionSite], config: SparsityConfig) -> tuple[SparseLayer, ...]:
    """One layer a site.

    Raises:
        ValueError: ``config`` names a layer that is not among the sites, or reorders one that is
            known to be causal.
    """
    names, count = [site.name for site in sites], len(sites)
    for argument, selectors in (("dense_layers", config.dense_layers), ("layers", config.layers)):
        for selector in selectors:
            if not any(selects(selector, i, name, count) for i, name in enumerate(names)):
                raise ValueError(
                    f"{argument} names {selector!r}, but the model has {count} attention layers, "
                    f"{names[0]!r} to {names[-1]!r}"
                )
    layers = []
    for index, site in enumerate(sites):
        own, dense = config.for_layer(index, site.name, count)
        if own.reorder is not None and not dense:
            # What transformers' modules say of themselves; others are asked when they are called.
            check_can_reorder(site.name, getattr(site.module, "is_causal", False))
        layers.append(SparseLayer(site.name, own, dense))
    return tuple(layers)


def saved_config(model: nn.Module) -> SparsityConfig | None:
    """The config that the model carries in its transformers config, or None."""
    values = getattr(getattr(model, "config", None), CONFIG_FIELD, None)
    return None if values is None else SparsityConfig.from_dict(values)


def _save_config(model: nn.Module, config: SparsityConfig, undo: ExitStack) -> None:
    """Put the config where `save_pretrained` saves it."""
    carrier = getattr(model, "config", None)
    if not hasattr(carrier, "to_json_string"):
        return
    if not config.is_serializable:
        warnings.warn(
            f"the scorer {config.scorer!r} cannot be saved, so save_pretrained will not carry this "
            "SparsityConfig; pass it to ea.apply again after loading",
            stacklevel=3,
        )
        return
    had, before = hasattr(carrier, CONFIG_FIELD), getattr(carrier, CONFIG_FIELD, None)
    setattr(carrier, CONFIG_FIELD, config.to_dict())
    undo.callback(setattr, carrier, CONFIG_FIELD, before) if had else undo.callback(
        delattr, carrier, CONFIG_FIELD
    )
