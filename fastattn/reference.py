"""Attention in plain PyTorch: the mathematics that every kernel is tested against.

Readable first: it builds the whole (batch, heads, seqlen_q, seqlen_k) matrix of scores. Everything is differentiable
by autograd, any number of times. Scores, sums and gradients are float32 (float64 for float64 inputs).

    scores = scale * q k^T             then softcap * tanh(scores / softcap)
    scores = scores - slope * |i + offset - j| + bias
    scores = -inf where query i does not see key j
    probs  = exp(scores) / (sum_j exp(scores) + exp(sink))
    out    = dropout(probs) v          lse = log(sum_j exp(scores) + exp(sink))
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Unpack  # a requirement of torch itself

from .philox import dropout_keep, seed_tensor
from .problem import (
    DIFFERENTIABLE,
    PER_SEQUENCE,
    AttentionOptions,
    Inputs,
    Options,
    Problem,
    check_keywords,
    check_values,
    describe,
    split_window,
    with_offset,
)


class _Softmax(NamedTuple):
    """A dense call up to the probabilities, each query head with its own keys and values.

    In the accumulator's dtype; rows of q, k and v that are part of no visible pair are zero, because they may hold
    anything, NaN too, and 0 * NaN is NaN.
    """

    q: Tensor  # (batch, heads_q, seqlen_q, head_dim)
    k: Tensor  # (batch, heads_q, seqlen_k, head_dim)
    v: Tensor  # (batch, heads_q, seqlen_k, head_dim_v)
    visible: Tensor  # bool, broadcastable to (batch, heads_q, seqlen_q, seqlen_k)
    tanh: Tensor | float  # of the raw scores over the softcap; 0 without
    probs: Tensor  # (batch, heads_q, seqlen_q, seqlen_k), before dropout
    dropout: Tensor | float  # what dropout multiplies them with: 0 or 1 / (1 - p)
    lse: Tensor  # (batch, heads_q, seqlen_q)
    empty: Tensor  # bool, likewise: rows that see no key
    sink_probs: Tensor | None  # likewise: what the sinks take of each row


def softmax_attention(problem: Problem, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """(out, lse) of a validated call; a cache is seen as the dense call over all of it."""
    with _autocast_off(problem.device):
        if problem.kind == "varlen":
            return _varlen(problem, inputs)
        return _dense(problem, inputs, range(problem.batch))


def _autocast_off(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast would compute the products of float32 matrices in a low precision after all."""
    on = device.type != "meta" and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else nullcontext()


def _dense(problem: Problem, inputs: Inputs, batches: range) -> tuple[Tensor, Tensor]:
    s = _softmax(problem, inputs, batches)
    return ((s.probs * s.dropout) @ s.v).to(problem.dtype), s.lse


def _softmax(problem: Problem, inputs: Inputs, batches: range) -> _Softmax:
    """Probabilities and lse of the sequences `batches` (their numbers decide the dropout mask)."""
    visible, distance = _visibility(problem, inputs)
    q, k, v = _operands(problem, visible, inputs.q, inputs.k, inputs.v)
    scores = problem.scale * (q @ k.transpose(-2, -1))
    tanh: Tensor | float = 0.0
    if problem.softcap is not None:
        tanh = torch.tanh(scores / problem.softcap)
        scores = problem.softcap * tanh
    if inputs.alibi_slopes is not None:
        slopes = inputs.alibi_slopes.to(scores.dtype)
        scores = scores - slopes[..., None, None] * distance.abs()
    if inputs.bias is not None:
        scores = scores + inputs.bias.to(scores.dtype)
    scores = scores.masked_fill(~visible, -torch.inf)
    sinks = None if inputs.sinks is None else inputs.sinks.to(scores.dtype)[:, None]
    probs, lse, empty, sink_probs = _normalise(scores, sinks)

    dropout: Tensor | float = 1.0
    if problem.dropout_p > 0.0 and inputs.seed is not None:
        size = (problem.heads_q, *scores.shape[-2:])
        keep = dropout_keep(
            inputs.seed, problem.dropout_threshold, batches, *size, device=problem.device, q_offset=inputs.q_offset
        )
        dropout = keep.to(scores.dtype) / (1.0 - problem.dropout_p)
    return _Softmax(q, k, v, visible, tanh, probs, dropout, lse, empty, sink_probs)


def _normalise(scores: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(probs, lse, empty, sink_probs); `empty` rows, whose scores are all -inf, give 0, and the sink or -inf."""
    # Any finite shift gives the same result. The maximum keeps exp from overflowing; 0 stands in where no score is
    # finite, so that -inf - (-inf) = NaN never arises.
    shape = scores.shape
    row_max = scores.detach().amax(dim=-1) if shape[-1] > 0 else scores.new_full(shape[:-1], -torch.inf)
    empty = row_max == -torch.inf
    if sinks is not None:
        row_max = torch.maximum(row_max, sinks.detach())
    row_max = row_max.masked_fill(row_max == -torch.inf, 0.0)
    weights = torch.exp(scores - row_max[..., None])
    row_sum = weights.sum(dim=-1)
    sink_weights = None if sinks is None else torch.exp(sinks - row_max)
    if sink_weights is not None:
        row_sum = row_sum + sink_weights
    nothing = row_sum == 0.0
    row_sum = row_sum.masked_fill(nothing, 1.0)
    probs = (weights / row_sum[..., None]).masked_fill(empty[..., None], 0.0)  # a sink may be NaN
    lse = (row_max + torch.log(row_sum)).masked_fill(nothing, -torch.inf)
    if sinks is None or sink_weights is None:
        return probs, lse, empty, None
    return probs, torch.where(empty, sinks, lse), empty, sink_weights / row_sum


def _visibility(problem: Problem, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """(visible, distance): bool and int64, broadcastable to (batch, heads_q, seqlen_q, seqlen_k).

    Query i stands at position i + offset among the keys; distance = i + offset - j.
    """
    seqlen_q, seqlen_k = inputs.q.shape[2], inputs.k.shape[2]
    i = torch.arange(seqlen_q, device=problem.device)[:, None]
    j = torch.arange(seqlen_k, device=problem.device)
    if inputs.kv_lengths is None:
        length = torch.full((1, 1, 1, 1), seqlen_k, device=problem.device)
    else:
        length = inputs.kv_lengths.to(torch.int64)[:, None, None, None]
    if inputs.q_offset is not None:
        offset = inputs.q_offset.to(torch.int64)[:, None, None, None]
    else:
        offset = length - seqlen_q if problem.bottom_right else torch.zeros_like(length)
    distance = i + offset - j
    visible = (j < length).expand_as(distance)
    if problem.window_left is not None:
        visible = visible & (distance <= problem.window_left)
    if problem.window_right is not None:
        visible = visible & (distance >= -problem.window_right)
    if inputs.mask is not None:
        visible = visible & inputs.mask
    return visible, distance


def _operands(problem: Problem, visible: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as `_Softmax` has them."""
    unused_rows, unused_keys = ~visible.any(dim=-1), ~visible.any(dim=-2)
    q = q.to(problem.accumulator).masked_fill(unused_rows[..., None], 0.0)
    k, v = (_per_query_head(x, problem).masked_fill(unused_keys[..., None], 0.0) for x in (k, v))
    return q, k, v


def _per_query_head(x: Tensor, problem: Problem) -> Tensor:
    """Key/value heads in the accumulator's dtype, repeated so that each query head has its own."""
    x = x.to(problem.accumulator)
    return x if problem.group == 1 else x.repeat_interleave(problem.group, dim=1)


# ------------------------------------------------------------------------------------------------------- gradients


def softmax_attention_backward(
    problem: Problem, inputs: Inputs, dout: Tensor, dlse: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Gradients for q, k, v, bias and sinks, in the accumulator's dtype; None for an absent bias or sinks."""
    with _autocast_off(problem.device):
        if problem.kind == "varlen":
            return _varlen_backward(problem, inputs, dout, dlse)
        return _dense_backward(problem, inputs, range(problem.batch), dout, dlse)


def _dense_backward(
    problem: Problem, inputs: Inputs, batches: range, dout: Tensor, dlse: Tensor | None
) -> tuple[Tensor | None, ...]:
    s = _softmax(problem, inputs, batches)
    dout, dprobs, delta, sink_delta = _bwd_preprocess(problem, s, dout, dlse)
    dscores = s.probs * (dprobs - delta[..., None])
    dbias = dsinks = None
    if inputs.bias is not None:
        dbias = dscores.sum_to_size(inputs.bias.shape)
    if s.sink_probs is not None:
        dsinks = -(s.sink_probs * sink_delta).sum(dim=(0, 2))
    draw = problem.scale * dscores * (1.0 - s.tanh * s.tanh)
    dk = draw.transpose(-2, -1) @ s.q
    dv = (s.probs * s.dropout).transpose(-2, -1) @ dout
    return draw @ s.k, _sum_groups(dk, problem), _sum_groups(dv, problem), dbias, dsinks


def _bwd_preprocess(
    problem: Problem, s: _Softmax, dout: Tensor, dlse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dout, dprobs, delta, sink_delta): what the gradients of scores and sinks are made of.

    dout and delta are 0 in rows that see no key, whatever came; sink_delta is -dlse there, as the sink is all of lse.
    """
    dout = dout.to(problem.accumulator).masked_fill(s.empty[..., None], 0.0)
    dprobs = ((dout @ s.v.transpose(-2, -1)) * s.dropout).masked_fill(~s.visible, 0.0)
    delta = (s.probs * dprobs).sum(dim=-1)
    if dlse is None:
        return dout, dprobs, delta, delta
    # d lse / d scores = probs, so it takes part as a shift of delta.
    sink_delta = delta - dlse.to(delta.dtype).masked_fill(s.lse == -torch.inf, 0.0)
    return dout, dprobs, sink_delta.masked_fill(s.empty, 0.0), sink_delta


def _sum_groups(x: Tensor, problem: Problem) -> Tensor:
    """The transpose of `_per_query_head`."""
    return x if problem.group == 1 else x.unflatten(1, (problem.heads_kv, problem.group)).sum(dim=2)


# ---------------------------------------------------------------------------------------------- second derivatives


def softmax_attention_double_backward(
    problem: Problem,
    inputs: Inputs,
    dout: Tensor,
    dlse: Tensor | None,
    tangents: tuple[Tensor | None, ...],
) -> tuple[Tensor | None, ...]:
    """The vector-Jacobian product of `softmax_attention_backward`.

    tangents: gradients of the loss by the gradients of q, k, v, bias and sinks; None = 0, and for an absent tensor.
    Returns the gradients for dout, dlse, q, k, v, bias and sinks in these tensors' dtypes, None for absent ones.

    The gradients are those of <dout, out> + <dlse, lse>. Its second derivative is symmetric, so the product is the
    change of out, lse and the gradients when the inputs move along `tangents`. A formula, not autograd inside of a
    backward pass, so that whatever transforms tensors (vmap, a further derivative) sees ordinary operators alone.
    """
    given = zip(DIFFERENTIABLE, inputs.differentiable, tangents, strict=True)
    filled: dict[str, Any] = {n: torch.zeros_like(x) if x is not None and t is None else t for n, x, t in given}
    moves = inputs._replace(**filled)
    run = _varlen_double_backward if problem.kind == "varlen" else _dense_double_backward
    with _autocast_off(problem.device):
        found = run(problem, inputs, moves, range(problem.batch), dout, dlse)
    like = (dout, dlse, *inputs.differentiable)
    return tuple([None if x is None or y is None else y.to(x.dtype) for x, y in zip(like, found, strict=True)])


def _dense_double_backward(
    problem: Problem, inputs: Inputs, moves: Inputs, batches: range, dout: Tensor, dlse: Tensor | None
) -> tuple[Tensor | None, ...]:
    """A name with t_ is the change of that quantity of the forward or backward pass."""
    s = _softmax(problem, inputs, batches)
    dout, dprobs, delta, sink_delta = _bwd_preprocess(problem, s, dout, dlse)
    dscores = s.probs * (dprobs - delta[..., None])
    slope = 1.0 - s.tanh * s.tanh
    curvature = 0.0 if problem.softcap is None else -2.0 / problem.softcap * s.tanh * slope

    t_q, t_k, t_v = _operands(problem, s.visible, moves.q, moves.k, moves.v)
    t_raw = problem.scale * (t_q @ s.k.transpose(-2, -1) + s.q @ t_k.transpose(-2, -1))
    t_scores = slope * t_raw
    if moves.bias is not None:
        t_scores = t_scores + moves.bias.to(t_scores.dtype)
    t_scores = t_scores.masked_fill(~s.visible, 0.0)
    t_lse = (s.probs * t_scores).sum(dim=-1)
    if s.sink_probs is not None and moves.sinks is not None:
        t_sinks = moves.sinks.to(t_lse.dtype)[:, None]
        t_lse = t_lse + s.sink_probs * t_sinks
    t_probs = s.probs * (t_scores - t_lse[..., None])
    t_out = (t_probs * s.dropout) @ s.v + (s.probs * s.dropout) @ t_v

    t_dprobs = ((dout @ t_v.transpose(-2, -1)) * s.dropout).masked_fill(~s.visible, 0.0)
    t_delta = (t_probs * dprobs + s.probs * t_dprobs).sum(dim=-1)
    t_dscores = t_probs * (dprobs - delta[..., None]) + s.probs * (t_dprobs - t_delta[..., None])
    t_dbias = t_dsinks = None
    if inputs.bias is not None:
        t_dbias = t_dscores.sum_to_size(inputs.bias.shape)
    if s.sink_probs is not None:
        t_dsinks = -(s.sink_probs * ((t_sinks - t_lse) * sink_delta + t_delta)).sum(dim=(0, 2))
    draw, t_draw = problem.scale * slope * dscores, problem.scale * (slope * t_dscores + curvature * t_raw * dscores)
    t_dk = t_draw.transpose(-2, -1) @ s.q + draw.transpose(-2, -1) @ t_q
    t_dv = (t_probs * s.dropout).transpose(-2, -1) @ dout
    grads = t_draw @ s.k + draw @ t_k, _sum_groups(t_dk, problem), _sum_groups(t_dv, problem), t_dbias, t_dsinks
    return t_out, t_lse, *grads


# ---------------------------------------------------------------------------------------------------------- varlen


def _varlen(problem: Problem, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Each sequence by itself; tokens behind the last sequence see nothing and have no sink."""
    ends_q, ends_k = _ends(inputs)
    outs, lses = [], []
    for b in range(problem.batch):
        out, lse = _dense(problem, _sequence(inputs, b, ends_q, ends_k), range(b, b + 1))
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    rest = problem.seqlen_q - ends_q[-1]
    outs.append(inputs.q.new_zeros(rest, problem.heads_q, problem.head_dim_v))
    lses.append(inputs.q.new_full((problem.heads_q, rest), -torch.inf, dtype=problem.accumulator))
    return torch.cat(outs), torch.cat(lses, dim=1)


def _varlen_backward(problem: Problem, inputs: Inputs, dout: Tensor, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    ends_q, ends_k = _ends(inputs)
    found = []
    for b in range(problem.batch):
        cotangents = _results_of(b, ends_q, dout, dlse)
        found.append(_dense_backward(problem, _sequence(inputs, b, ends_q, ends_k), range(b, b + 1), *cotangents))
    return _packed_grads(problem, inputs, found)


def _varlen_double_backward(
    problem: Problem, inputs: Inputs, moves: Inputs, batches: range, dout: Tensor, dlse: Tensor | None
) -> tuple[Tensor | None, ...]:
    ends_q, ends_k = _ends(inputs)
    found = []
    for b in batches:
        own, own_moves = (_sequence(x, b, ends_q, ends_k) for x in (inputs, moves))
        cotangents = _results_of(b, ends_q, dout, dlse)
        found.append(_dense_double_backward(problem, own, own_moves, range(b, b + 1), *cotangents))
    t_out = _packed_tokens(dout, [x[0] for x in found], problem)
    lses = [x[1][..., None] for x in found if x[1] is not None]
    t_lse = _packed_tokens(dout.new_empty(*dout.shape[:2], 1), lses, problem)
    return t_out, t_lse[..., 0].transpose(0, 1), *_packed_grads(problem, inputs, [x[2:] for x in found])


def _results_of(b: int, ends_q: list[int], dout: Tensor, dlse: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Gradients of the results of sequence b, as of a dense call."""
    queries = slice(ends_q[b], ends_q[b + 1])
    return _one_dense(dout, queries), None if dlse is None else dlse[None, :, queries]


def _packed_grads(
    problem: Problem, inputs: Inputs, found: list[tuple[Tensor | None, ...]]
) -> tuple[Tensor | None, ...]:
    """The gradients of q, k, v, bias and sinks from those of each sequence by itself; nothing is written in place."""
    dq, dk, dv, dbias, dsinks = (
        [part for part in parts if part is not None] for parts in (zip(*found, strict=True) if found else [()] * 5)
    )
    tokens = [_packed_tokens(x, parts, problem) for x, parts in zip(inputs[:3], (dq, dk, dv), strict=True)]
    bias = None if inputs.bias is None else _whole_bias(inputs.bias, dbias, problem)
    sinks = None if inputs.sinks is None else sum(dsinks, torch.zeros_like(inputs.sinks, dtype=problem.accumulator))
    return *tokens, bias, sinks


def _packed_tokens(like: Tensor, parts: list[Any], problem: Problem) -> Tensor:
    """(total, heads, dim) from (1, heads, seqlen, dim) of each sequence; 0 for tokens that are in none."""
    tokens = [part[0].transpose(0, 1) for part in parts]
    rest = like.shape[0] - sum(len(x) for x in tokens)
    return torch.cat([*tokens, like.new_zeros(rest, *like.shape[1:], dtype=problem.accumulator)])


def _whole_bias(bias: Tensor, parts: list[Tensor], problem: Problem) -> Tensor:
    """The transpose of how `_sequence` cuts it."""
    shape = (*(1,) * (4 - bias.ndim), *bias.shape)
    whole = [F.pad(x, (0, shape[3] - x.shape[3], 0, shape[2] - x.shape[2])) for x in parts]
    zeros = bias.new_zeros(shape, dtype=problem.accumulator)
    return (torch.cat(whole) if shape[0] > 1 else sum(whole, zeros)).reshape(bias.shape)


def _ends(inputs: Inputs) -> tuple[list[int], list[int]]:
    assert inputs.cu_seqlens_q is not None
    assert inputs.cu_seqlens_k is not None
    return inputs.cu_seqlens_q.tolist(), inputs.cu_seqlens_k.tolist()


def _one_dense(x: Tensor, tokens: slice) -> Tensor:
    """Rows of (total, heads, dim) as (1, heads, seqlen, dim); a view."""
    return x[tokens].transpose(0, 1)[None]


def _sequence(inputs: Inputs, b: int, ends_q: list[int], ends_k: list[int]) -> Inputs:
    """Sequence b as a dense call of batch 1; all views."""
    queries, keys = slice(ends_q[b], ends_q[b + 1]), slice(ends_k[b], ends_k[b + 1])

    def cut(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        x = x[(None,) * (4 - x.ndim)]
        x = x[b : b + 1] if x.shape[0] > 1 else x
        x = x[:, :, : queries.stop - queries.start] if x.shape[2] > 1 else x
        return x[..., : keys.stop - keys.start] if x.shape[3] > 1 else x

    slopes = inputs.alibi_slopes
    numbers: dict[str, Any] = {name: getattr(inputs, name) for name in PER_SEQUENCE}
    return inputs._replace(
        q=_one_dense(inputs.q, queries),
        k=_one_dense(inputs.k, keys),
        v=_one_dense(inputs.v, keys),
        mask=cut(inputs.mask),
        bias=cut(inputs.bias),
        alibi_slopes=slopes[b] if slopes is not None and slopes.ndim == 2 else slopes,
        **{name: None if x is None else x[b : b + 1] for name, x in numbers.items()},
    )


# ------------------------------------------------------------------------------------------------------ public API


def attention(q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool = False, **options: Unpack[AttentionOptions]) -> Any:
    """`fastattn.attention` in plain, differentiable PyTorch: same arguments (but no `backend`), same meaning.

    Needs O(batch * heads_q * seqlen_q * seqlen_k) memory.
    """
    out, lse = softmax_attention(*_prepare("dense", Inputs(q, k, v), options))
    return (out, lse) if return_lse else out


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    return_lse: bool = False,
    **options: Unpack[AttentionOptions],
) -> Any:
    """`fastattn.attention_varlen` in plain, differentiable PyTorch: same arguments (but no `backend`)."""
    inputs = Inputs(q, k, v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    out, lse = softmax_attention(*_prepare("varlen", inputs, options))
    return (out, lse) if return_lse else out


def attention_weights(q: Tensor, k: Tensor, **options: Unpack[AttentionOptions]) -> Tensor:
    """The probabilities that multiply v, after dropout: (batch, heads_q, seqlen_q, seqlen_k) in q's dtype.

    Same keyword arguments as `fastattn.attention`, but for return_lse and backend.
    """
    problem, inputs = _prepare("dense", Inputs(q, k, k), options)
    with _autocast_off(problem.device):
        s = _softmax(problem, inputs, range(problem.batch))
        return (s.probs * s.dropout).to(problem.dtype)


def _prepare(kind: str, inputs: Inputs, given: AttentionOptions) -> tuple[Problem, Inputs]:
    """Sorts a call's keyword arguments into tensors and options, and validates them."""
    check_keywords("fastattn.reference", given)
    arguments: dict[str, Any] = dict(given)
    seed = arguments.pop("seed", None)
    tensors = {name: arguments.pop(name) for name in list(arguments) if name in Inputs._fields}
    inputs = with_offset(inputs, tensors.pop("q_offset", None))
    left, right = split_window(arguments.pop("window", None))
    options = Options(**arguments, window_left=left, window_right=right)
    if seed is not None or options.dropout_p:
        seed = seed_tensor(seed)
    inputs = inputs._replace(**tensors, seed=seed if options.dropout_p else None)
    problem = describe(kind, inputs, options, cached=False)
    check_values(problem, inputs)
    return problem, inputs
