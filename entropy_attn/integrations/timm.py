"""timm: attention modules whose scaled_dot_product_attention is routed to this package.

timm has no registry of attention functions, but its attention modules share a convention: an
attribute ``fused_attn`` decides whether forward calls `scaled_dot_product_attention`. So the
module keeps its own forward (projections, q and k norms, rotary embeddings, gates, class tokens)
and only that call is replaced, by a TorchFunctionMode that lives for one forward. Inside forward
it also holds when activation checkpointing runs the forward again.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from entropy_attn.integrations.call import AttentionCall
from entropy_attn.integrations.layer import Layer


class TimmSite:
    """An attention module of timm."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name = name
        self.module = module

    def install(self, layer: Layer, undo: ExitStack) -> None:
        module, attributes = self.module, self.module.__dict__
        before = {key: attributes[key] for key in ("forward", "fused_attn") if key in attributes}
        own_forward = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            reached: list[bool] = []
            with _Route(layer, reached):
                out = own_forward(*args, **kwargs)
            if not reached:
                raise RuntimeError(
                    f"{type(module).__name__} ({self.name}) did not call "
                    "scaled_dot_product_attention, so its attention was not replaced"
                )
            return out

        forward.layer = layer
        module.forward = forward
        module.fused_attn = True

        def take_out() -> None:
            for key in ("forward", "fused_attn"):
                del attributes[key]
            attributes.update(before)

        undo.callback(take_out)

    def installed(self) -> Layer | None:
        return getattr(self.module.__dict__.get("forward"), "layer", None)


def find_sites(model: nn.Module) -> list[TimmSite]:
    """The modules of ``model`` that follow timm's convention."""
    return [
        TimmSite(name, module)
        for name, module in model.named_modules()
        if isinstance(getattr(module, "fused_attn", None), bool)
    ]


class _Route(TorchFunctionMode):
    """Sends scaled_dot_product_attention to a layer."""

    def __init__(self, layer: Layer, reached: list[bool]) -> None:
        super().__init__()
        self.layer = layer
        self.reached = reached

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is not scaled_dot_product_attention:
            return function(*args, **kwargs)
        self.reached.append(True)
        return _attend(self.layer, *args, **kwargs)


def _attend(
    layer: Layer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention` through a layer; what it cannot do raises."""
    if dropout_p:
        raise ValueError(
            f"{layer.name} has attention dropout {dropout_p}, which entropy_attn does not support; "
            "build the model with attn_drop_rate=0 or call model.eval()"
        )
    if is_causal and attn_mask is not None:
        raise ValueError(f"{layer.name} passes both attn_mask and is_causal=True; pass one")
    if is_causal and query.shape[2] != key.shape[2]:
        raise ValueError(
            f"{layer.name} is causal with {query.shape[2]} queries and {key.shape[2]} keys, which "
            "SDPA aligns to the first key and entropy_attn to the last"
        )
    call = AttentionCall(
        query=query,
        key=key,
        value=value,
        is_causal=is_causal,
        scale=scale,
        explicit_mask=attn_mask,
    )
    return layer.attend(call)
