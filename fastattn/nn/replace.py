"""Swapping torch's attention for ours in an existing model."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn
from torch.nn.utils import parametrize

from .attention import MultiheadAttention
from .attention_checks import Window, check_features
from .rotary import RotaryEmbedding

Model = TypeVar("Model", bound=nn.Module)


def replace_attention(
    model: Model,
    *,
    include_subclasses: bool = False,
    window: Window = None,
    softcap: float | None = None,
    alibi: bool = False,
    rotary: RotaryEmbedding | None = None,
    sinks: bool = False,
    qk_norm: bool = False,
    scale: float | None = None,
    backend: str | None = None,
) -> Model:
    """Turns every torch.nn.MultiheadAttention in the model, or the model itself, into fastattn's, in place.

    The modules stay the same objects, and only change their class: whatever belongs to them or refers to them
    stays (parameters and the optimizers that hold them, hooks, parametrizations, device, dtype, training
    mode, sharing).

        include_subclasses   also turn modules of classes derived from torch's, whose own forward is then lost
        all others           as in MultiheadAttention; sinks and qk_norm add parameters, unknown to existing
                             optimizers

    Returns the model. Modules that are fastattn's already stay as they are.
    Raises TypeError if the model is no torch.nn.Module; ValueError if there is nothing to replace (without
    options a model of fastattn's modules alone is left as it is), or a module's `forward` has been replaced on
    the instance; nothing has changed then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    features: dict[str, Any] = {
        "window": window,
        "softcap": softcap,
        "alibi": alibi,
        "rotary": rotary,
        "sinks": sinks,
        "qk_norm": qk_norm,
        "scale": scale,
        "backend": backend,
    }
    given = [name for name, value in features.items() if value is not None and value is not False]
    found = [module for module in model.modules() if isinstance(module, nn.MultiheadAttention)]
    chosen = [module for module in found if _is_torchs(module, include_subclasses)]
    if not chosen and not any(isinstance(module, MultiheadAttention) for module in found):
        raise ValueError(f"model must contain a torch.nn.MultiheadAttention, got a {type(model).__name__} without one")
    if not chosen and given:
        raise ValueError(
            f"the options {', '.join(given)} would reach no module: every attention of the {type(model).__name__} is "
            "fastattn's already; set them where the modules are built"
        )
    for module in chosen:
        if "forward" in vars(module):
            raise ValueError("model contains a torch.nn.MultiheadAttention whose forward was replaced on the instance")
        check_features(module.head_dim, window, softcap, rotary, sinks, scale, backend)
    for module in chosen:
        module.__class__ = _our_class(module)
        assert isinstance(module, MultiheadAttention)
        module.add_features(**features)
    return model


def _is_torchs(module: nn.Module, include_subclasses: bool) -> bool:
    kind = parametrize.type_before_parametrizations(module)
    if issubclass(kind, MultiheadAttention):
        return False
    return include_subclasses or kind is nn.MultiheadAttention


def _our_class(module: nn.Module) -> type:
    """Our class; for a parametrized module, which has a class of its own, the like of that on top of ours."""
    if not parametrize.is_parametrized(module):
        return MultiheadAttention
    kind = type(module)
    members = {name: member for name, member in vars(kind).items() if name not in ("__dict__", "__weakref__")}
    return type(kind.__name__, (MultiheadAttention,), members)
