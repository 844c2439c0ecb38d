"""Multi-head attention as a module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import reference
from ..autograd import new_seed
from ..functional import attention
from .attention_checks import Window, check_cached, check_features, check_inputs, check_positions
from .cache import KVCache
from .checks import check_count, check_divides, check_probability
from .fast_path import NoFastPath
from .masks import check_mask, mask_and_bias, reveal_more_keys, spell_out_positions
from .nested import forward_nested
from .plain import HeadNorm
from .positional import slopes_of_heads
from .projections import ProjectedHeads, split_heads
from .recorded import fx_leaf, is_recorded, is_scripting
from .rotary import RotaryEmbedding, table_dtype
from .sdpa import torch_attention
from .table import Table


class MultiheadAttention(ProjectedHeads):
    """torch.nn.MultiheadAttention on fastattn: same constructor, forward and state_dict, and more options.

    As in torch: embed_dim, num_heads, dropout (of the attention probabilities, in training only), bias,
    add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype.
    What torch lacks is keyword-only, and everything combines with everything:

        num_kv_heads   key/value heads, a divisor of num_heads, each shared by a group of query heads (GQA)
        window         (left, right), None = open: query i sees keys i - left to i + right
        softcap        scores become softcap * tanh(scores / softcap)
        alibi          True subtracts slope * |i - j| from the scores, see `alibi_slopes`
        rotary         a RotaryEmbedding of dim embed_dim // num_heads, applied to queries and keys
        sinks          True learns one more logit per head in the softmax's denominator (parameter `sinks`)
        qk_norm        True normalises each head of queries and keys by RMSNorm (modules `q_norm`, `k_norm`)
        scale          of the scores; None = 1 / sqrt(head dimension)
        backend        a backend of `fastattn.attention`; None chooses; "torch" calls
                       torch.nn.functional.scaled_dot_product_attention instead, for comparison

    Without these the state_dict is torch's, and results and gradients equal torch's. Differences: a query
    that sees no key gives 0 where torch gives NaN; bool and float masks can be mixed; is_causal needs no
    attn_mask alone; the fused kernel of torch.nn.TransformerEncoderLayer in evaluation, which would bypass the
    module, is not taken (the child `fast_path` keeps it away).
    Raises TypeError or ValueError if an argument does not fit.
    """

    if TYPE_CHECKING:
        rotary: RotaryEmbedding | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        num_kv_heads: int | None = None,
        window: Window = None,
        softcap: float | None = None,
        alibi: bool = False,
        rotary: RotaryEmbedding | None = None,
        sinks: bool = False,
        qk_norm: bool = False,
        scale: float | None = None,
        backend: str | None = None,
    ) -> None:
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        sizes = {"embed_dim": embed_dim, "num_heads": num_heads, "num_kv_heads": num_kv_heads}
        widths = {name: width for name, width in (("kdim", kdim), ("vdim", vdim)) if width is not None}
        for name, size in {**sizes, **widths}.items():
            check_count(name, size)
        check_divides("embed_dim", embed_dim, "num_heads", num_heads)
        check_divides("num_heads", num_heads, "num_kv_heads", num_kv_heads)
        check_probability("dropout", dropout)
        torchs_own = (embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim)
        super().__init__(*torchs_own, batch_first, device, dtype)
        if num_kv_heads != num_heads:
            self._share_heads(num_kv_heads)
            self._qkv_same_embed_dim = False
        self.add_features(
            window=window,
            softcap=softcap,
            alibi=alibi,
            rotary=rotary,
            sinks=sinks,
            qk_norm=qk_norm,
            scale=scale,
            backend=backend,
        )

    def add_features(
        self,
        *,
        window: Window = None,
        softcap: float | None = None,
        alibi: bool = False,
        rotary: RotaryEmbedding | None = None,
        sinks: bool = False,
        qk_norm: bool = False,
        scale: float | None = None,
        backend: str | None = None,
    ) -> None:
        """Sets what torch.nn.MultiheadAttention lacks, except num_kv_heads; arguments as in the class."""
        check_features(self.head_dim, window, softcap, rotary, sinks, scale, backend)
        self.fast_path = NoFastPath()
        self._adopt_projections()
        self.window = None if window is None else (window[0], window[1])
        self.softcap, self.scale, self.backend = softcap, scale, backend
        self.rotary = rotary
        self.num_kv_heads = self._kv_width // self.head_dim
        weight = self.out_proj.weight
        factory: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        logits = nn.Parameter(torch.zeros(self.num_heads, **factory)) if sinks else None
        self.register_parameter("sinks", logits)
        self.q_norm = HeadNorm(self.head_dim, eps=1e-6, **factory) if qk_norm else None
        self.k_norm = HeadNorm(self.head_dim, eps=1e-6, **factory) if qk_norm else None
        # No buffer: load_state_dict(assign=True) would leave it on the meta device, a cast would round it.
        self.alibi, self._slopes = bool(alibi), Table(self._compute_slopes)

    @property
    def alibi_slopes(self) -> Tensor | None:
        """(num_heads,), float32, on the device of the weights; None without ALiBi."""
        return self._slopes_on(self.out_proj.weight.device)

    def extra_repr(self) -> str:
        """The sizes, and what is not torch's default; `rotary` and the norms are shown as modules."""
        shown: dict[str, tuple[Any, Any]] = {  # name: (value, default)
            "dropout": (self.dropout, 0.0),
            "bias": (self.in_proj_bias is not None, True),
            "add_bias_kv": (self.bias_k is not None, False),
            "add_zero_attn": (self.add_zero_attn, False),
            "kdim": (self.kdim, self.embed_dim),
            "vdim": (self.vdim, self.embed_dim),
            "batch_first": (self.batch_first, False),
            "num_kv_heads": (self.num_kv_heads, self.num_heads),
            "window": (self.window, None),
            "softcap": (self.softcap, None),
            "alibi": (self.alibi, False),
            "sinks": (self.sinks is not None, False),
            "qk_norm": (self.q_norm is not None, False),
            "scale": (self.scale, None),
            "backend": (self.backend, None),
        }
        changed = [f"{name}={value!r}" for name, (value, default) in shown.items() if value != default]
        return ", ".join([f"embed_dim={self.embed_dim}", f"num_heads={self.num_heads}", *changed])

    def forward(
        self,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        kv_cache: Any = None,  # a KVCache; TorchScript, which knows neither those nor keyword-only, reads this
        positions: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """(output, weights or None), as torch.nn.MultiheadAttention.forward.

            query               (L, N, embed_dim), batch_first (N, L, embed_dim), unbatched (L, embed_dim)
            key, value          (S, N, kdim), (S, N, vdim), or likewise
            key_padding_mask    (N, S), unbatched (S,): bool, True = padding, or float, added to the scores
            attn_mask           (L, S) or (N * num_heads, L, S): bool, True = not allowed, or float, added to
                                the scores
            need_weights        also return the probabilities (N, L, S), after dropout. The output comes from the
                                backend all the same, and the weights, of the same dropout, from
                                `fastattn.reference` (with backend "torch" and dropout both do, as torch's
                                kernel does not tell what it dropped). Costs that much memory; without them
                                nothing of that size is ever made
            average_attn_weights   False returns the weights of each head, (N, num_heads, L, S)
            is_causal           query i sees keys 0 to i. An attn_mask given as well should say just this. As in
                                torch, it is not read then, unless need_weights or a key_padding_mask is given:
                                with one of these it is what counts, and is_causal is not read
            kv_cache            a KVCache, for inference: keys and values are appended to it, and the queries,
                                standing behind the keys already there, see all of it. key and value None:
                                nothing is appended. S in the masks is then the cache's capacity. Needs
                                need_weights=False
            positions           (L,) or (N, L), integers: of queries and keys, for rotary; None = 0, 1, 2, ...

        query, key and value may also be NestedTensors (N, L, features) with batch_first and
        need_weights=False.
        Under torch.jit.script, torch.jit.trace and torch.onnx.export the module is plain PyTorch operations, without
        kv_cache; in a graph of torch.fx it is one node.
        Raises TypeError or ValueError if an argument does not fit.
        """
        if not is_scripting():
            arguments = (query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
            node = fx_leaf(self, *arguments, kv_cache, positions)
            if node is not None:
                return node
            if not is_recorded():
                return self._forward(*arguments, kv_cache, positions)
            if kv_cache is not None:
                raise ValueError("kv_cache must be None where the module is traced or exported, got a KVCache")
        return self._forward_plain(
            query,
            key,
            value,
            key_padding_mask,
            need_weights,
            attn_mask,
            average_attn_weights,
            is_causal,
            positions,
        )

    def _forward(
        self,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        key_padding_mask: Tensor | None,
        need_weights: bool,
        attn_mask: Tensor | None,
        average_attn_weights: bool,
        is_causal: bool,
        kv_cache: KVCache | None,
        positions: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """As forward, by our kernels."""
        if isinstance(query, Tensor) and query.is_nested:
            others: dict[str, Any] = {"need_weights": need_weights, "attn_mask": attn_mask}
            others.update(key_padding_mask=key_padding_mask, kv_cache=kv_cache, positions=positions)
            return self._forward_nested(query, key, value, is_causal, others)
        if kv_cache is not None:
            check_cached(self, kv_cache, key, value, need_weights, positions)
        check_inputs(self, query, key, value, kv_cache is not None)
        if positions is not None:
            check_positions(self, query, key)
        batched = query.dim() == 3
        if not batched:
            query, key, value = _add_batch(query, key, value)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        batch_first = self.batch_first or not batched
        q, k, v = self._heads(query, key, value, batch_first)
        if kv_cache is not None:
            options = self._options(q, kv_cache.capacity, key_padding_mask, attn_mask, is_causal, need_weights)
            out, weights = self._attend_cached(q, k, v, options, kv_cache), None
        else:
            assert k is not None
            assert v is not None
            options = self._options(q, k.shape[2], key_padding_mask, attn_mask, is_causal, need_weights)
            out, weights = self._attend(q, k, v, options, positions, need_weights)
        out = out.transpose(1, 2) if batch_first else out.permute(2, 0, 1, 3)
        out = self.out_proj(out.flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if not batched:
            out, weights = out[0], None if weights is None else weights[0]
        return out, weights

    def new_cache(self, batch: int, capacity: int, *, page_size: int | None = None) -> KVCache:
        """An empty KVCache that fits this module, in its dtype and on its device."""
        weight = self.out_proj.weight
        return KVCache(
            *(batch, self.num_kv_heads, capacity, self.head_dim),
            page_size=page_size,
            dtype=weight.dtype,
            device=weight.device,
        )

    # -------------------------------------------------------------------------------------------------- ALiBi

    def _compute_slopes(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """(1, num_heads): the one row of their table."""
        return slopes_of_heads(torch.arange(self.num_heads, device=rows.device), self.num_heads)[None].to(dtype)

    def _slopes_on(self, device: torch.device) -> Tensor | None:
        return self._slopes.rows(1, device, torch.float32)[0] if self.alibi else None

    # ---------------------------------------------------------------------------------------------- the steps

    def _options(
        self,
        q: Tensor,
        seqlen_k: int,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
        need_weights: bool,
    ) -> dict[str, Any]:
        """The keyword arguments of the attention call that calls with and without a cache share."""
        batch, heads, seqlen_q, _ = q.shape
        check_mask("key_padding_mask", key_padding_mask, ((batch, seqlen_k),))
        check_mask("attn_mask", attn_mask, ((seqlen_q, seqlen_k), (batch * heads, seqlen_q, seqlen_k)))
        if is_causal and attn_mask is not None:
            is_causal = key_padding_mask is None and not need_weights
            attn_mask = None if is_causal else attn_mask
        mask, bias = mask_and_bias(key_padding_mask, attn_mask, heads, q.dtype)
        return {
            "causal": is_causal,
            "window": self.window,
            "mask": mask,
            "bias": bias,
            "alibi_slopes": self._slopes_on(q.device),
            "softcap": self.softcap,
            "sinks": self.sinks,
            "scale": self.scale,
        }

    def _attend_cached(
        self, q: Tensor, k: Tensor | None, v: Tensor | None, options: dict[str, Any], kv_cache: KVCache
    ) -> Tensor:
        rotary = None
        if self.rotary is not None:
            rotary = self.rotary.tables(kv_cache.capacity, q.device, table_dtype(kv_cache.keys.dtype))
        return kv_cache.attend(q, k, v, **options, rotary=rotary, backend=self.backend)

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        options: dict[str, Any],
        positions: Tensor | None,
        need_weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        if self.rotary is not None:
            q, k = self.rotary(q, positions), self.rotary(k, positions)
        dropout_p = self.dropout if self.training else 0.0
        drops_all = dropout_p == 1  # no kernel takes that: its 1 / (1 - p) is infinite
        options = {**options, "causal_alignment": "top-left", "dropout_p": 0.0 if drops_all else dropout_p}
        if self.bias_k is not None or self.add_zero_attn:
            k, v, options = self._add_keys(q, k, v, options)
        out, weights = self._out_and_weights(q, k, v, options, need_weights)
        if drops_all:  # zeros, and zero gradients
            out, weights = 0 * out, None if weights is None else 0 * weights
        return out, weights

    def _out_and_weights(
        self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any], need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        if need_weights and options["dropout_p"] > 0:
            options = {**options, "seed": new_seed()}  # the dropout mask is a function of it alone
        weights = reference.attention_weights(q, k, **options) if need_weights else None
        if self.backend != "torch":
            return attention(q, k, v, backend=self.backend, **options), weights
        if weights is not None and options["dropout_p"] > 0:
            return weights @ v.repeat_interleave(q.shape[1] // v.shape[1], dim=1), weights
        return torch_attention(q, k, v, options), weights

    def _add_keys(
        self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Appends the learned key and the zero key, which have no position: every query sees them."""
        options = spell_out_positions(options, q.shape[2], k.shape[2], q.device)
        before = k.shape[2]
        one = (k.shape[0], -1, 1, -1)
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (
                torch.cat((x, split_heads(extra, self.head_dim, False).expand(one).to(x.dtype)), dim=2)
                for x, extra in ((k, self.bias_k), (v, self.bias_v))
            )
        if self.add_zero_attn:
            k, v = (torch.cat((x, torch.zeros_like(x[:, :, :1])), dim=2) for x in (k, v))
        return k, v, reveal_more_keys(options, k.shape[2] - before)

    def _forward_nested(
        self, query: Tensor, key: Any, value: Any, is_causal: bool, others: dict[str, Any]
    ) -> tuple[Tensor, None]:
        if not self.batch_first:
            raise ValueError("NestedTensor inputs need batch_first=True, got a module with batch_first=False")

        def attend(query: Tensor, key: Tensor, value: Tensor, padding: Tensor) -> Tensor:
            return self.forward(query, key, value, padding, need_weights=False, is_causal=is_causal)[0]

        return forward_nested(attend, query, key, value, others), None


def _add_batch(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Each with a leading dimension. A tensor that came twice stays one, as projections go by that."""
    batched = {id(x): None if x is None else x[None] for x in tensors}
    return tuple([batched[id(x)] for x in tensors])
