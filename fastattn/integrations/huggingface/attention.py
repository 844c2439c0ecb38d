"""Attention as the models of transformers call it."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ... import reference
from ...functional import attention, attention_varlen
from ...philox import draw_seed

if TYPE_CHECKING:
    from .masks import MaskPlan

# What models hand down to every attention implementation, and eager ignores: it is used elsewhere in the model, or is
# about something that the mask says as well.
HARMLESS = frozenset(
    (
        *("adapter_names", "cache", "past_key_value", "past_key_values", "use_cache", "cache_position"),
        *("position_ids", "position_embeddings", "seq_idx", "token_type_ids", "mm_token_type_ids", "layer_idx"),
        *("logits_to_keep", "num_items_in_batch", "output_hidden_states", "output_router_logits", "return_dict"),
        "deterministic",
    )
)
PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    sinks: Tensor | None = None,
    output_attentions: bool | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention as the library's models call it, with the meaning of its eager implementation.

        query           (batch, heads_q, seqlen_q, head_dim)
        key, value      (batch, heads_kv, seqlen_k, head_dim), (batch, heads_kv, seqlen_k, head_dim_v)
        attention_mask  what the mask function "fastattn" returned; or (batch or 1, heads_q or 1, seqlen_q, seqlen_k),
                        bool, True = attend, or floating point, added to the scores; or None
        s_aux, sinks    attention sinks under either name: (heads_q,), or one for each query, broadcastable to
                        (batch, heads_q, seqlen_q, 1); differentiable
        position_bias   broadcastable to (batch, heads_q, seqlen_q, seqlen_k), added to the scores; differentiable

    A mask says everything about which keys are seen, as in eager; is_causal or module.is_causal counts where there is
    none. Dropout is for training only. In a mask of floats the lowest finite number of its dtype, which the library
    writes for "hidden", means hidden, as -inf does: rows that see nothing give 0.

    Returns out, (batch, seqlen_q, heads_q, head_dim_v), and None; or, where output_attentions asks for them, the
    probabilities after dropout, (batch, heads_q, seqlen_q, seqlen_k), by `fastattn.reference`, in memory of that size.
    Raises ValueError if the call leaves open what is to be seen; TypeError for an argument that is not known.
    """
    _check_others(module, others, attention_mask)
    if scaling is None and (
        getattr(module, "scale_attn_by_inverse_layer_idx", False) or not getattr(module, "scale_attn_weights", True)
    ):
        raise ValueError(  # GPT-2 of transformers 4
            f"{type(module).__name__} has scale_attn_by_inverse_layer_idx or not scale_attn_weights, but passed no "
            "scaling: this version of transformers applies them in eager attention only"
        )
    if s_aux is not None and sinks is not None:
        raise TypeError(f"{type(module).__name__} passed both s_aux and sinks, expected one of the two names")
    sinks = s_aux if sinks is None else sinks
    weighted = bool(output_attentions) or _attentions_are_collected()
    dropout_p = float(dropout) if module.training else 0.0
    scoring: dict[str, Any] = {"scale": scaling, "softcap": softcap, "dropout_p": dropout_p}
    each_query = sinks is not None and sinks.ndim > 1
    if not each_query:
        scoring["sinks"] = sinks
    given: Any = attention_mask
    plan: MaskPlan | None = getattr(given, "plan", None)
    if plan is not None:
        made_for, asked = given.shape, (query.shape[0], 1, query.shape[2], key.shape[2])
        if made_for != asked:
            raise ValueError(
                f"attention_mask was made for (batch, seqlen_q, seqlen_k) = {(made_for[0], *made_for[2:])}, got query "
                f"{tuple(query.shape)} and key {tuple(key.shape)}"
            )
        if plan.cu_seqlens is not None:
            if position_bias is None and not each_query and not weighted:
                scoring |= {"causal": plan.causal, "window": plan.window}
                return _packed(plan.cu_seqlens, query, key, value, scoring), None
            plan = None  # a bias, for one, counts from the start of the row, not of the sequence
    seqlen_k = key.shape[2]
    if plan is None:
        given = given.seen() if hasattr(given, "plan") else given
        position_bias, options = _unplanned(module, query, key, given, position_bias, is_causal, sliding_window)
    else:
        n = plan.seqlen_k
        if n != seqlen_k:
            key, value = key[:, :, :n], value[:, :, :n]
            if position_bias is not None and position_bias.shape[-1] != 1:
                position_bias = position_bias[..., :n]
        options = plan.options
    if not (each_query or weighted):
        return _heads_last(attention(query, key, value, bias=position_bias, **scoring, **options)), None
    if weighted and dropout_p:
        scoring["seed"] = draw_seed()  # one for both
    options = {"bias": position_bias, **scoring, **options}
    out, lse = attention(query, key, value, return_lse=True, **options)
    weights = reference.attention_weights(query, key, **options) if weighted else None
    if each_query:
        assert sinks is not None
        # What a sink takes from a row: exp(lse) / (exp(lse) + exp(sink)) is left.
        left = torch.sigmoid(lse - sinks.to(lse.dtype).squeeze(-1))[..., None]
        out = (out * left).to(out.dtype)
        weights = None if weights is None else (weights * left).to(weights.dtype)
    if weights is not None and key.shape[2] != seqlen_k:  # the unused rest of a static cache
        weights = torch.nn.functional.pad(weights, (0, seqlen_k - key.shape[2]))
    return _heads_last(out), weights


def _heads_last(out: Tensor) -> Tensor:
    return out.transpose(1, 2).contiguous()


def _packed(bounds: Tensor, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> Tensor:
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    out: Tensor = attention_varlen(q, k, v, bounds, bounds, **options)
    return out.unflatten(0, (query.shape[0], query.shape[2]))


def _unplanned(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    is_causal: bool | None,
    sliding_window: int | None,
) -> tuple[Tensor | None, dict[str, Any]]:
    """The bias, and the options of `attention` that say what is seen, where there is a tensor or nothing."""
    if mask is None:
        return bias, _unmasked(module, query.shape[2], key.shape[2], is_causal, sliding_window)
    bias, seen = _mask_and_bias(mask, bias)
    return bias, {"mask": seen}


def _unmasked(
    module: torch.nn.Module, seqlen_q: int, seqlen_k: int, is_causal: bool | None, sliding_window: int | None
) -> dict[str, Any]:
    """The options where the model made no mask: the only thing left to go by is whether the module is causal."""
    who = type(module).__name__
    causal = getattr(module, "is_causal", None) if is_causal is None else is_causal
    if causal is None and (seqlen_q != seqlen_k or "Cross" in who):
        causal = False  # keys of another sequence have no order to keep
    if seqlen_q > 1 and causal is None:
        raise ValueError(
            f"{who} passed attention_mask=None, and neither is_causal nor module.is_causal says the rest; expected a "
            "mask made by transformers.masking_utils, or module.is_causal = True or False"
        )
    if sliding_window is not None and sliding_window < seqlen_k:
        raise ValueError(
            f"{who} passed attention_mask=None with sliding_window={sliding_window} for {seqlen_k} keys: where the "
            "queries stand is known from a mask only, expected one made by transformers.masking_utils"
        )
    if causal and 1 < seqlen_q != seqlen_k:
        raise ValueError(
            f"{who} passed attention_mask=None, causal, for {seqlen_q} queries and {seqlen_k} keys: where the queries "
            "stand is known from a mask only, expected one made by transformers.masking_utils"
        )
    return {"causal": bool(causal) and seqlen_q > 1}


def _mask_and_bias(mask: Tensor, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """(bias, mask) of a mask that is there as a tensor."""
    if mask.ndim != 4:
        raise ValueError(
            "attention_mask must have shape (batch or 1, heads or 1, seqlen_q, seqlen_k), 4 dimensions, got shape "
            f"{tuple(mask.shape)}"
        )
    if mask.dtype == torch.bool:
        return bias, mask
    if not mask.is_floating_point():
        raise TypeError(
            f"attention_mask must have dtype torch.bool (True = attend) or floating point (added), got {mask.dtype}"
        )
    seen = mask.detach() > torch.finfo(mask.dtype).min
    return mask if bias is None else bias + mask, seen


def _check_others(module: torch.nn.Module, others: dict[str, Any], attention_mask: Tensor | None) -> None:
    """Refuses arguments that would change the meaning of the call."""
    if others.keys() <= HARMLESS:
        return
    unknown = sorted(name for name, x in others.items() if x is not None and name not in (*HARMLESS, *PACKING))
    if unknown:
        raise TypeError(
            f"{type(module).__name__} passed {', '.join(unknown)}: unknown to fastattn, and what it means for the "
            'result cannot be ignored; use attn_implementation="eager" for this model'
        )
    packed = getattr(getattr(attention_mask, "plan", None), "cu_seqlens", None) is not None
    if not packed and any(others.get(name) is not None for name in PACKING):
        raise ValueError(
            f"{type(module).__name__} passed {PACKING[0]} and the like, but its mask is not one of packed sequences: "
            "expected position_ids that begin again with each sequence, without attention_mask and without a cache"
        )


def _attentions_are_collected() -> bool:
    """Whether transformers 5 collects attention probabilities from modules that do not pass output_attentions on."""
    if torch.compiler.is_compiling():
        return False
    collector = _collector()
    collected = () if collector is None else collector.get()
    return any("attentions" in key for key in collected) if collected else False


@cache
def _collector() -> Any:
    """The context variable of transformers 5 that holds what is collected; None in older versions."""
    try:
        from transformers.utils.output_capturing import _active_collector
    except ImportError:
        return None
    return _active_collector
