"""MultiheadAttention in plain PyTorch operations, for what reads a module instead of running it.

torch.jit.script compiles this file; torch.jit.trace and torch.onnx.export record it. None of them can take our kernels
along. Only language that TorchScript knows, and no values of tensors that decide what is computed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .masks import mask_and_bias, positions_as_masks
from .positional import slopes_of_heads
from .recorded import is_recorded, is_scripting


def plain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    softcap: float | None,
    sinks: Tensor | None,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """(out, weights after dropout) of q, k and v (batch, heads, seqlen, head_dim), as many heads each.

    mask (True = attend) and bias broadcastable to the scores, sinks (heads,). A query that sees no key gives 0.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    scores = scale * (q.to(dtype) @ k.to(dtype).transpose(-2, -1))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.to(dtype)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        logits = sinks.to(dtype)[:, None, None].expand_as(scores[..., :1])
        scores = torch.cat((scores, logits), dim=-1)
    # softmax of nothing but -inf is NaN, and so is its gradient, whatever is put in its place afterwards.
    empty = (scores == -torch.inf).all(dim=-1, keepdim=True)
    weights = scores.masked_fill(empty, 0.0).softmax(dim=-1).masked_fill(empty, 0.0)
    if sinks is not None:
        weights = weights[..., :-1]
    if dropout_p > 0.0:
        weights = F.dropout(weights, dropout_p)
    return (weights @ v.to(dtype)).to(q.dtype), weights.to(q.dtype)


def _split_heads(x: Tensor, heads: int, head_dim: int, batch_first: bool) -> Tensor:
    """(N, L, heads * head_dim), or (L, N, ...), as (N, heads, L, head_dim); a view."""
    x = x.reshape(x.shape[0], x.shape[1], heads, head_dim)  # after unflatten torch.onnx takes L for a constant
    return x.transpose(1, 2) if batch_first else x.permute(1, 2, 0, 3)


class HeadNorm(nn.RMSNorm):
    """torch.nn.RMSNorm, also for the older exporter of torch.onnx, which does not know its operator."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., head_dim) normalised, in its shape and dtype."""
        if not is_scripting():
            return self._forward(x)
        return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)

    def _forward(self, x: Tensor) -> Tensor:
        if not is_recorded():
            return super().forward(x)
        assert self.eps is not None
        y = x.to(torch.promote_types(x.dtype, torch.float32))
        return (y * torch.rsqrt(y.square().mean(dim=-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


def _real_rows(nested: Tensor) -> Tensor:
    """bool (batch, longest): where a NestedTensor (batch, seqlen, features) has rows."""
    return torch.ones_like(nested).to_padded_tensor(0.0)[:, :, 0] > 0


class PlainForward(nn.MultiheadAttention):
    """What MultiheadAttention computes, by `plain_attention`. The checks of arguments are left out."""

    if TYPE_CHECKING:  # TorchScript reads the annotations of a class, and looks at the attributes itself without them
        num_kv_heads: int
        alibi: bool
        window: tuple[int | None, int | None] | None
        softcap: float | None
        scale: float | None
        sinks: nn.Parameter | None
        q_norm: nn.Module | None
        k_norm: nn.Module | None
        rotary: nn.Module | None

    def _forward_plain(
        self,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        key_padding_mask: Tensor | None,
        need_weights: bool,
        attn_mask: Tensor | None,
        average_attn_weights: bool,
        is_causal: bool,
        positions: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """As forward, without a cache."""
        if key is None or value is None:
            raise ValueError("key and value must be given where the module is scripted, traced or exported")
        if query.is_nested:
            real = _real_rows(query)
            padding = ~real if key is query else ~_real_rows(key)
            same, same_value = key is query, value is key
            query = query.to_padded_tensor(0.0)
            key = query if same else key.to_padded_tensor(0.0)
            value = key if same_value else value.to_padded_tensor(0.0)
            out, _ = self._dense_plain(query, key, value, padding, False, None, False, is_causal, None)
            return torch._nested_tensor_from_mask(out, real, mask_check=False), None
        if query.dim() == 3:
            return self._dense_plain(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal, positions
            )
        batch_dim = 0 if self.batch_first else 1
        query, key, value = query.unsqueeze(batch_dim), key.unsqueeze(batch_dim), value.unsqueeze(batch_dim)
        if key_padding_mask is not None:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        out, weights = self._dense_plain(
            query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal, positions
        )
        return out.squeeze(batch_dim), None if weights is None else weights.squeeze(0)

    def _dense_plain(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        need_weights: bool,
        attn_mask: Tensor | None,
        average_attn_weights: bool,
        is_causal: bool,
        positions: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Of dense tensors with a batch."""
        q, k, v = self._heads_plain(query, key, value)
        if is_causal and attn_mask is not None:
            is_causal = key_padding_mask is None and not need_weights
            attn_mask = None if is_causal else attn_mask
        mask, bias = mask_and_bias(key_padding_mask, attn_mask, self.num_heads, q.dtype)
        left: int | None = None
        right: int | None = None
        if self.window is not None:
            left, right = self.window
        last: int | None = right  # TorchScript takes the type of `right` from the window, which may be None's
        if is_causal:
            last = 0
        slopes: Tensor | None = None
        if self.alibi:
            slopes = slopes_of_heads(torch.arange(self.num_heads, device=q.device), self.num_heads)
        mask, bias = positions_as_masks(mask, bias, q.shape[2], k.shape[2], left, last, slopes, q.device)
        if self.rotary is not None:
            q, k = self.rotary(q, positions), self.rotary(k, positions)
        bias_k, bias_v = self.bias_k, self.bias_v
        if bias_k is not None and bias_v is not None:
            one = (k.shape[0], -1, 1, -1)
            k = torch.cat(
                (k, _split_heads(bias_k, self.num_kv_heads, self.head_dim, False).expand(one).to(k.dtype)), dim=2
            )
            v = torch.cat(
                (v, _split_heads(bias_v, self.num_kv_heads, self.head_dim, False).expand(one).to(v.dtype)), dim=2
            )
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        more = (1 if bias_k is not None else 0) + (1 if self.add_zero_attn else 0)
        if more > 0:  # keys without a position, which every query sees
            mask = None if mask is None else ~F.pad(~mask, (0, more))
            bias = None if bias is None else F.pad(bias, (0, more))
        group = self.num_heads // self.num_kv_heads
        if group > 1:
            k = k[:, :, None].expand(-1, -1, group, -1, -1).flatten(1, 2)
            v = v[:, :, None].expand(-1, -1, group, -1, -1).flatten(1, 2)
        scale = float(self.head_dim) ** -0.5
        if self.scale is not None:
            scale = float(self.scale)
        softcap: float | None = None
        if self.softcap is not None:
            softcap = float(self.softcap)
        dropout_p = float(self.dropout) if self.training else 0.0
        out, weights = plain_attention(q, k, v, mask, bias, softcap, self.sinks, scale, dropout_p)
        out = out.transpose(1, 2) if self.batch_first else out.permute(2, 0, 1, 3)
        out = self.out_proj(out.flatten(2))
        if not need_weights:
            return out, None
        return out, weights.mean(dim=1) if average_attn_weights else weights

    def _heads_plain(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Projected and, if asked for, normalised: (N, heads, L, head_dim)."""
        width = self.num_kv_heads * self.head_dim
        if self.in_proj_weight is not None:
            w_q, w_k, w_v = self.in_proj_weight.split([self.embed_dim, width, width])
        else:
            w_q, w_k, w_v = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        if self.in_proj_bias is not None:
            b_q, b_k, b_v = self.in_proj_bias.split([self.embed_dim, width, width])
            q, k, v = F.linear(query, w_q, b_q), F.linear(key, w_k, b_k), F.linear(value, w_v, b_v)
        else:
            q, k, v = F.linear(query, w_q), F.linear(key, w_k), F.linear(value, w_v)
        q = _split_heads(q, self.num_heads, self.head_dim, self.batch_first)
        k = _split_heads(k, self.num_kv_heads, self.head_dim, self.batch_first)
        v = _split_heads(v, self.num_kv_heads, self.head_dim, self.batch_first)
        if self.q_norm is not None:
            q = self.q_norm(q)
        if self.k_norm is not None:
            k = self.k_norm(k)
        return q, k, v
