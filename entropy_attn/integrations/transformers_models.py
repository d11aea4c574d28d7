"""Registration with transformers, and settings for models that are built by its own means.

A model that is loaded with ``attn_implementation="entropy_attn"``, or switched to it, never passes
`ea.apply`. So three methods of PreTrainedModel are extended: one refuses models that would stay
dense without a word, two give the attention modules of a finished model their layers.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from entropy_attn.config import SparsityConfig
from entropy_attn.integrations.call import AttentionCall
from entropy_attn.integrations.handle import make_layers, saved_config
from entropy_attn.integrations.layer import Layer
from entropy_attn.integrations.sites import check_reach
from entropy_attn.integrations.transformers import (
    NAME,
    attention_function,
    find_sites,
    place,
    uses_interface,
)
from entropy_attn.integrations.transformers_masks import token_codes


def register() -> None:
    """Register with transformers; idempotent.

    Raises:
        ImportError: transformers is missing or too old.
    """
    try:
        from transformers import PreTrainedModel
        from transformers.masking_utils import AttentionMaskInterface
        from transformers.modeling_utils import AttentionInterface

        if getattr(PreTrainedModel, "_knows_entropy_attn", False):
            return
        _extend(PreTrainedModel, "get_correct_attn_implementation", before=_check_request)
        _extend(PreTrainedModel, "set_attn_implementation", before=_check_request, after=_settle)
        _extend(PreTrainedModel, "post_init", after=_settle_new)
    except (ImportError, AttributeError) as error:
        raise ImportError(f"transformers >= 4.56 is needed ({error})") from error
    AttentionInterface.register(NAME, attention_function)
    AttentionMaskInterface.register(NAME, token_codes)
    PreTrainedModel._knows_entropy_attn = True


def _extend(
    cls: type,
    method: str,
    before: Callable[..., None] | None = None,
    after: Callable[[Any], None] | None = None,
) -> None:
    """Let a method of a class call ``before`` with its arguments and ``after`` with its self."""
    own = getattr(cls, method)

    @functools.wraps(own)
    def extended(self, *args: Any, **kwargs: Any) -> Any:
        if before is not None:
            before(self, *args, **kwargs)
        result = own(self, *args, **kwargs)
        if after is not None:
            after(self)
        return result

    setattr(cls, method, extended)


def _check_request(model: nn.Module, requested: Any = None, *args: Any, **kwargs: Any) -> None:
    # transformers accepts any registered name for any model, also for one that never looks its
    # attention up.
    if kwargs.get("attn_implementation", kwargs.get("requested_attention", requested)) == NAME:
        check_model_class(type(model))


def check_model_class(cls: type[nn.Module]) -> None:
    """That the attention classes beside a model class use the registry.

    Raises:
        ValueError: names those that do not, if none does.
    """
    source = sys.modules.get(cls.__module__)
    attention = [
        member
        for name, member in vars(source).items()
        if inspect.isclass(member)
        and issubclass(member, nn.Module)
        and "Attention" in name
        and member.__module__ == cls.__module__
    ]
    if attention and not any(uses_interface(member) for member in attention):
        names = ", ".join(sorted(member.__name__ for member in attention))
        raise ValueError(
            f'{cls.__name__} cannot run with attn_implementation="{NAME}": its attention ({names}) '
            "does not go through transformers' AttentionInterface and would stay dense"
        )


class _Misconfigured:
    """Stands for a layer that got no settings, and says why when it is called."""

    def __init__(self, name: str, error: ValueError) -> None:
        self.name = name
        self.message = str(error)

    def attend(self, call: AttentionCall) -> Tensor:
        raise ValueError(self.message)


def _settle(model: nn.Module, new: bool = False) -> None:
    """Give layers to the attention modules that run NAME and have none, or to all if ``new``."""
    sites = find_sites(model)
    chosen = {id(site) for site in sites if _runs_here(site.module)}
    if not chosen:
        return
    check_reach(model, sites, partial=False)
    layers: tuple[Layer, ...]
    try:
        layers = make_layers(sites, saved_config(model) or SparsityConfig())
    except ValueError as error:
        # Perhaps this is a part of the model that the settings are meant for; that one comes later.
        layers = tuple(_Misconfigured(site.name, error) for site in sites)
    for site, layer in zip(sites, layers, strict=True):
        if id(site) in chosen and (new or site.installed() is None):
            place(site.module, layer)


def _runs_here(module: nn.Module) -> bool:
    return getattr(getattr(module, "config", None), "_attn_implementation", None) == NAME


def _settle_new(model: nn.Module) -> None:
    """Parts of a model are finished before the whole, whose names and settings count."""
    _settle(model, new=True)
