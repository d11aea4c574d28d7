"""transformers: the attention function behind ``attn_implementation="entropy_attn"``.

This module does not import transformers before it is asked to.
"""

from __future__ import annotations

import functools
import inspect
import sys
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from entropy_attn.integrations import registration
from entropy_attn.integrations.call import AttentionCall
from entropy_attn.integrations.layer import Layer
from entropy_attn.integrations.packing import (
    Packing,
    PackingCache,
    packing_from_cumulative,
    packing_from_segments,
)
from entropy_attn.integrations.padding import codes_from_validity
from entropy_attn.integrations.transformers_masks import CAPTURED_PACKED
from entropy_attn.traced import is_capturing

NAME = "entropy_attn"
# Attribute of an attention module that holds its `Layer`.
ATTRIBUTE = "_entropy_attn_layer"
# And of the hook that shows the layer the cache.
HOOK = "_entropy_attn_hook"
REGISTRY = "ALL_ATTENTION_FUNCTIONS"
MODELING = "transformers.modeling_utils"

# Arguments that change what attention computes and that block-sparse attention does not know.
UNSUPPORTED = {
    "softcap": "a softcap on the scores (Gemma 2)",
    "s_aux": "learned attention sinks (GPT-OSS)",
    "sinks": "learned attention sinks",
    "position_bias": "a bias added to the scores (T5)",
    "alibi": "a bias added to the scores (ALiBi)",
    "indices": "a selection of keys of its own (DeepSeek V3.2)",
    "block_indices": "a selection of blocks of its own (MiniMax M3)",
    "head_mask": "a mask over heads",
    "cache": "a paged cache (generate_batch)",
}

_packings = PackingCache()


def attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that is registered with transformers; its arguments are theirs.

    Args:
        query: (B, Hq, Nq, D), a transposed view; key, value: (B, Hkv, Nk, D), not repeated.
        attention_mask: what `token_codes` returned, a plain 2D padding mask, or a user's 4D mask.

    Returns:
        out (B, Nq, Hq, D), contiguous, and None for the attention weights, which never exist.

    Raises:
        ValueError: an argument that this attention does not implement; nothing is ignored.
    """
    _check_supported(module, dropout, kwargs)
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    call = AttentionCall(
        query=query,
        key=key,
        value=value,
        is_causal=is_causal,
        scale=scaling,
        window=sliding_window,
        **_mask_arguments(module, attention_mask, query, key, kwargs),
    )
    layer = getattr(module, ATTRIBUTE, None)
    if layer is None:
        layer = _layer_without_model(module)
    return layer.attend(call).transpose(1, 2).contiguous(), None


def _check_supported(module: nn.Module, dropout: float, kwargs: dict[str, Any]) -> None:
    kind = type(module).__name__
    for name, meaning in UNSUPPORTED.items():
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{kind} passes {name}: {meaning}, which entropy_attn does not support. Load this "
                'model with attn_implementation="sdpa" or "eager"'
            )
    if dropout:
        raise ValueError(
            f"{kind} passes dropout={dropout}: entropy_attn has no attention dropout. Set the "
            "model's attention dropout to 0, or call model.eval()"
        )
    if kwargs.get("output_attentions"):
        raise ValueError(
            "output_attentions=True asks for attention weights, which entropy_attn never forms. "
            'Use ea.observe(model) for their entropies, or attn_implementation="eager"'
        )


def _mask_arguments(
    module: nn.Module, mask: Tensor | None, query: Tensor, key: Tensor, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """The fields of `AttentionCall` that say which keys are valid."""
    cumulative = kwargs.get("cu_seq_lens_q")
    if cumulative is not None:
        return {"packing": _packing_from_cumulative(cumulative, mask, query, kwargs)}
    if mask is None:
        return {}
    if not isinstance(mask, Tensor) or mask.ndim not in (2, 4) or mask.shape[-1] != key.shape[2]:
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"{type(module).__name__} passes attention_mask {got} for {key.shape[2]} keys; allowed "
            "are (batch, keys), (batch, heads, queries, keys), or None"
        )
    if mask.ndim == 2:
        return {"codes": codes_from_validity(mask, query.shape[2])}
    if mask.dtype == torch.int8:
        return {"codes": mask[:, 0, 0], "mask": mask}
    if mask.dtype == torch.int32:
        return {"packing": _packings.get(mask, lambda: packing_from_segments(mask[:, 0, 0]))}
    return {"explicit_mask": mask}


def _packing_from_cumulative(
    cumulative: Tensor, mask: Tensor | None, query: Tensor, kwargs: dict[str, Any]
) -> Packing:
    if torch.compiler.is_compiling():
        raise ValueError("cu_seq_lens_q is not supported under torch.compile")
    if is_capturing(cumulative.device):
        raise ValueError(CAPTURED_PACKED)
    keys = kwargs.get("cu_seq_lens_k")
    if keys is not None and keys is not cumulative and not torch.equal(keys, cumulative):
        raise ValueError("cu_seq_lens_k differs from cu_seq_lens_q; they must be equal")
    if mask is not None and mask.dtype != torch.int32:
        raise ValueError("attention_mask and cu_seq_lens_q are both given; pass one of them")
    tokens = query.shape[0] * query.shape[2]
    return _packings.get(cumulative, lambda: packing_from_cumulative(cumulative, tokens))


# --- where attention runs in a model ------------------------------------------------------------


@functools.cache
def uses_interface(cls: type[nn.Module]) -> bool:
    """Whether the code of a module class looks its attention up in transformers' registry."""
    for base in cls.__mro__:
        if base.__module__ == MODELING:  # PreTrainedModel itself lists what is registered
            continue
        for member in vars(base).values():
            code = getattr(inspect.unwrap(member), "__code__", None) if callable(member) else None
            if code is not None and REGISTRY in code.co_names:
                return True
    return False


def place(module: nn.Module, layer: Layer) -> None:
    """Let ``layer`` compute the attention of a module, and see its cache if it follows caches."""
    module.__dict__[ATTRIBUTE] = layer
    if getattr(layer, "follower", None) is not None and HOOK not in module.__dict__:
        hook = module.register_forward_pre_hook(_show_cache, with_kwargs=True)
        module.__dict__[HOOK] = hook


def _show_cache(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Attention functions get the keys alone; the cache that they come from is seen here."""
    if torch.compiler.is_compiling():
        return
    follower = getattr(module.__dict__.get(ATTRIBUTE), "follower", None)
    if follower is not None:
        follower.before(_cache_layer(module, (*args, *kwargs.values())))


def _cache_layer(module: nn.Module, arguments: tuple[Any, ...]) -> Any:
    """The part of a cache that a module appends to; None if there is none yet."""
    from transformers import Cache

    cache = next((argument for argument in arguments if isinstance(argument, Cache)), None)
    layers, index = getattr(cache, "layers", ()), getattr(module, "layer_idx", None)
    return layers[index] if isinstance(index, int) and index < len(layers) else None


class TransformersSite:
    """An attention module of transformers."""

    def __init__(self, name: str, module: nn.Module, configs: list[Any]) -> None:
        self.name = name
        self.module = module
        self._configs = configs

    def install(self, layer: Layer, undo: ExitStack) -> None:
        for config in self._configs:
            before = config._attn_implementation_internal
            if before != NAME:
                config._attn_implementation_internal = NAME
                undo.callback(setattr, config, "_attn_implementation_internal", before)
        attributes = self.module.__dict__
        before_layer, hooked_before = attributes.get(ATTRIBUTE), HOOK in attributes
        place(self.module, layer)

        def take_out() -> None:
            if before_layer is None:
                del attributes[ATTRIBUTE]
            else:
                attributes[ATTRIBUTE] = before_layer
            if HOOK in attributes and not hooked_before:
                attributes.pop(HOOK).remove()

        undo.callback(take_out)

    def installed(self) -> Layer | None:
        return self.module.__dict__.get(ATTRIBUTE)


def find_sites(model: nn.Module) -> list[TransformersSite]:
    """The attention modules of every transformers model in ``model``, itself included."""
    if MODELING not in sys.modules:
        return []
    from transformers import PreTrainedModel

    registration.register()
    roots = {n: m for n, m in model.named_modules() if isinstance(m, PreTrainedModel)}
    sites = []
    for name, module in model.named_modules():
        if not uses_interface(type(module)):
            continue
        # The registry is asked with the module's config, masks are made with the models' configs.
        around = [m for n, m in roots.items() if not n or name == n or name.startswith(f"{n}.")]
        configs = {id(c): c for c in (getattr(m, "config", None) for m in (module, *around))}
        kept = [c for c in configs.values() if hasattr(c, "_attn_implementation_internal")]
        sites.append(TransformersSite(name, module, kept))
    return sites


def _layer_without_model(module: nn.Module) -> Layer:
    """The layer of an attention module that was built on its own, outside a model."""
    if torch.compiler.is_compiling():
        raise RuntimeError(
            f"{type(module).__name__} has no settings yet: call ea.apply, or run it once, before "
            "torch.compile"
        )
    from entropy_attn.config import SparsityConfig
    from entropy_attn.integrations.handle import make_layers, saved_config

    site = TransformersSite(type(module).__name__, module, [])
    (layer,) = make_layers([site], saved_config(module) or SparsityConfig())
    place(module, layer)
    return layer
