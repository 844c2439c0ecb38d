"""A decoder-only language model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .attention_checks import Window
from .blocks import Block, check_model_sizes, new_caches, position_options
from .checks import as_bool, check_token_ids, check_token_mask
from .embedding import TokenEmbedding
from .generate import (
    Cached,
    Recomputed,
    check_generation,
    check_not_empty,
    continue_prompts,
    evaluating,
    gather_prompts,
)
from .recorded import fx_leaf, is_recorded, is_scripting
from .sampling import Sampler


class TransformerLM(nn.Module):
    """Decoder only: predicts each token from those before it, in `num_layers` pre-norm layers.

        vocab_size, embedding_dim, hidden_dim (of the feed-forward), num_heads, num_layers
        dropout      of embeddings, attention probabilities, and both results of each layer; in training only
        max_length   number of positions, for positional="learned"; the other kinds have no limit
        positional   "rotary", "learned", "sinusoidal" or "alibi"
        num_kv_heads, window, softcap, sinks, qk_norm, scale, backend   as in MultiheadAttention;
                     backend="torch" computes the same model by PyTorch's own attention

    Train it with torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten()),
    with the targets that are padding set to its ignore_index.
    Raises TypeError or ValueError if an argument does not fit.
    """

    def __init__(
        self,
        vocab_size: int,
        embedding_dim: int,
        hidden_dim: int,
        num_heads: int,
        num_layers: int,
        *,
        dropout: float = 0.1,
        max_length: int = 1024,
        positional: str = "rotary",
        num_kv_heads: int | None = None,
        window: Window = None,
        softcap: float | None = None,
        sinks: bool = False,
        qk_norm: bool = False,
        scale: float | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_model_sizes(
            *(vocab_size, embedding_dim, hidden_dim, num_heads, num_layers, max_length, dropout, positional)
        )
        self.vocab_size, self.backend = vocab_size, backend
        self.embedding = TokenEmbedding(vocab_size, embedding_dim, positional, max_length, dropout)
        positions = position_options(positional, embedding_dim // num_heads)
        self.blocks = nn.ModuleList(
            Block(
                *(embedding_dim, hidden_dim, num_heads),
                dropout=dropout,
                num_kv_heads=num_kv_heads,
                window=window,
                softcap=softcap,
                sinks=sinks,
                qk_norm=qk_norm,
                scale=scale,
                backend=backend,
                **positions,
            )
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(embedding_dim)
        self.head = nn.Linear(embedding_dim, vocab_size)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits (batch, seqlen, vocab_size) of the token behind each one.

            input_ids        (batch, seqlen), int64 or int32
            attention_mask   (batch, seqlen), bool or integer, 1 = real token. Padding, on either side, does
                             not influence real tokens; its own logits mean nothing

        Raises TypeError or ValueError if an argument does not fit.
        """
        if not is_scripting():
            node = fx_leaf(self, input_ids, attention_mask)
            if node is not None:
                return node
            if not is_recorded():
                check_token_ids("input_ids", input_ids, self.vocab_size)
                check_token_mask("attention_mask", attention_mask, tuple(input_ids.shape))
        return self._run(input_ids, as_bool(attention_mask))

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        *,
        attention_mask: Tensor | None = None,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_token_id: int | None = None,
        use_cache: bool = True,
        page_size: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """input_ids followed by up to max_new_tokens new tokens: (batch, seqlen + n).

            input_ids, attention_mask   as in forward; prompts of different lengths are padded on the left
            do_sample       False: always the most probable token. True: drawn, see temperature, top_k and
                            top_p in `Sampler`, with `generator` (None = torch's default one)
            eos_token_id    ends a row, which is then filled with it; generation ends with the last row
            use_cache       keep keys and values; without, the same tokens take longer
            page_size       keep them in pages of so many keys, see KVCache; None = contiguously

        Runs in evaluation mode and restores the model's own.
        Raises TypeError or ValueError if an argument does not fit.
        """
        sampler = Sampler(do_sample, temperature, top_k, top_p)
        check_generation(max_new_tokens, eos_token_id, self.vocab_size, use_cache, self.backend)
        check_token_ids("input_ids", input_ids, self.vocab_size)
        check_not_empty("input_ids", input_ids)
        check_token_mask("attention_mask", attention_mask, tuple(input_ids.shape))
        ids, lengths = gather_prompts(input_ids, as_bool(attention_mask))
        total = ids.shape[1] + max(max_new_tokens - 1, 0)  # the last token is never an input
        self.embedding.check_length("input_ids with the new tokens", total)
        with evaluating(self):
            decoder: Cached | Recomputed = Recomputed(self._run)
            if use_cache:
                decoder = Cached(self._run, new_caches(self.blocks, len(ids), total, page_size))
            new = continue_prompts(decoder, ids, lengths, max_new_tokens, sampler, eos_token_id, generator)
        return torch.cat((input_ids, new), dim=1)

    def _run(self, ids: Tensor, real: Tensor | None, caches: Any = None) -> Tensor:
        """caches: a LayerCache for each block, or None."""
        start: Tensor | None = None
        if not is_scripting():
            start = None if caches is None else caches[0].own.lengths
        x = self.embedding("input_ids", ids, real, start)
        padding = None if real is None else ~real
        for i, block in enumerate(self.blocks):
            if is_scripting():
                x = block(x, True, padding)
            else:
                x = block(x, True, padding, cache=None if caches is None else caches[i])
        return self.head(self.norm(x))
