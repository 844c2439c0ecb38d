"""The projections of multi-head attention: their parameters, which are torch's, and the heads that they give."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from .checks import check_dtype
from .plain import PlainForward
from .recorded import is_scripting


class ProjectedHeads(PlainForward):
    """What `MultiheadAttention` does before it attends.

    The parameters have torch's names and shapes, but for the rows of keys and values, of which there are num_kv_heads
    times head_dim.
    """

    __jit_unused_properties__ = ("alibi_slopes", "_kv_width")

    @property
    def _qkv_same_embed_dim(self) -> bool:
        """As torch's: True says that in_proj_weight is (3 * embed_dim, embed_dim).

        False in TorchScript, where `fast_path` does not keep torch.nn.TransformerEncoderLayer's kernel away.
        """
        return not is_scripting() and self._in_proj_is_torchs

    @_qkv_same_embed_dim.setter
    def _qkv_same_embed_dim(self, value: bool) -> None:
        self._in_proj_is_torchs = value

    def _adopt_projections(self) -> None:
        """Takes over the flag of a module that was torch's."""
        if "_qkv_same_embed_dim" in vars(self):
            self._in_proj_is_torchs = vars(self).pop("_qkv_same_embed_dim")

    @property
    def _kv_width(self) -> int:
        """Features of the projected keys: num_kv_heads * head_dim."""
        packed = self.in_proj_weight
        return self.k_proj_weight.shape[0] if packed is None else (packed.shape[0] - self.embed_dim) // 2

    def _reset_parameters(self) -> None:
        """As torch's, for projections of any number of key/value heads."""
        for weight in (self.in_proj_weight, self.q_proj_weight, self.k_proj_weight, self.v_proj_weight):
            if weight is not None:
                nn.init.xavier_uniform_(weight)
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)
            nn.init.zeros_(self.out_proj.bias)
        for extra in (self.bias_k, self.bias_v):
            if extra is not None:
                nn.init.xavier_normal_(extra)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        vars(self).pop("_qkv_same_embed_dim", None)  # torch's method puts it where we have a property

    def _share_heads(self, num_kv_heads: int) -> None:
        """Replaces the projections of keys and values by those of fewer heads."""
        width = num_kv_heads * self.head_dim
        if self.in_proj_weight is not None:
            self.in_proj_weight = nn.Parameter(
                self.in_proj_weight.new_empty(self.embed_dim + 2 * width, self.embed_dim)
            )
        else:
            self.k_proj_weight = nn.Parameter(self.k_proj_weight.new_empty(width, self.kdim))
            self.v_proj_weight = nn.Parameter(self.v_proj_weight.new_empty(width, self.vdim))
        if self.in_proj_bias is not None:
            self.in_proj_bias = nn.Parameter(self.in_proj_bias.new_empty(self.embed_dim + 2 * width))
        if self.bias_k is not None:
            self.bias_k = nn.Parameter(self.bias_k.new_empty(1, 1, width))
            self.bias_v = nn.Parameter(self.bias_k.new_empty(1, 1, width))
        self._reset_parameters()

    def _heads(
        self, query: Tensor, key: Tensor | None, value: Tensor | None, batch_first: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Projected and, if asked for, normalised: (N, heads, L, head_dim), as views."""
        q, k, v = (
            None if x is None else split_heads(x, self.head_dim, batch_first) for x in self._project(query, key, value)
        )
        assert q is not None
        if self.q_norm is not None:
            q = self.q_norm(q)
        if self.k_norm is not None and k is not None:
            k = self.k_norm(k)
        return q, k, v

    def _project(
        self, query: Tensor, key: Tensor | None, value: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Query, key and value through their projections, those of one tensor in one step."""
        packed, bias = self.in_proj_weight, self.in_proj_bias
        width = self._kv_width
        sizes = (self.embed_dim, width, width)
        check_dtype("query", query, self.q_proj_weight if packed is None else packed)
        if packed is not None and query is key and key is value:
            return F.linear(query, packed, bias).split(sizes, dim=-1)
        biases = (None, None, None) if bias is None else bias.split(sizes)
        if packed is None:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        else:
            weights = packed.split(sizes)
        q = F.linear(query, weights[0], biases[0])
        if key is None or value is None:
            return q, None, None
        check_dtype("key", key, weights[1])
        check_dtype("value", value, weights[2])
        if packed is not None and key is value:
            both = F.linear(key, packed[self.embed_dim :], None if bias is None else bias[self.embed_dim :])
            return q, *both.split(width, dim=-1)
        return q, F.linear(key, weights[1], biases[1]), F.linear(value, weights[2], biases[2])


def split_heads(x: Tensor, head_dim: int, batch_first: bool) -> Tensor:
    """(N, L, heads * head_dim), or (L, N, ...), as (N, heads, L, head_dim); a view."""
    x = x.unflatten(-1, (-1, head_dim))
    return x.transpose(1, 2) if batch_first else x.permute(1, 2, 0, 3)
