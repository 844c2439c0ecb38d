"""An encoder-decoder transformer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .attention_checks import Window
from .blocks import Block, LayerCache, check_model_sizes, new_caches, position_options
from .checks import as_bool, check_count, check_dtype, check_token_ids, check_token_mask
from .embedding import TokenEmbedding
from .generate import Cached, Recomputed, check_generation, check_not_empty, continue_prompts, evaluating
from .recorded import fx_leaf, is_recorded, is_scripting
from .sampling import Sampler


class Transformer(nn.Module):
    """Encoder and decoder: reads a sequence, or features of another modality, and predicts another sequence.

        vocab_size, embedding_dim, hidden_dim (of the feed-forward), num_heads
        num_layers       of the encoder, and of the decoder; pre-norm
        dropout          of embeddings, attention probabilities, and each layer's results; in training only
        max_length       number of positions, for positional="learned"; the other kinds have no limit
        positional       "learned", "sinusoidal", "rotary" or "alibi"
        memory_dim       width of `memory` features that replace the encoder; None = embedding_dim
        start_token_id   stands in front of what the decoder predicts
        num_kv_heads, window, softcap, sinks, qk_norm, scale, backend   as in MultiheadAttention;
                         window is for the self-attention of encoder and decoder

    Train it with torch.nn.functional.cross_entropy on the logits of
    forward(input_ids, decoder_input_ids=model.shift_right(target_ids)) against target_ids, with padding set
    to its ignore_index.
    Source: Vaswani et al., "Attention Is All You Need" (2017), with the normalisation in front of each step.
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
        positional: str = "learned",
        memory_dim: int | None = None,
        start_token_id: int = 0,
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
        check_count("start_token_id", start_token_id, least=0)
        if start_token_id >= vocab_size:
            raise ValueError(f"start_token_id must be less than vocab_size = {vocab_size}, got {start_token_id}")
        self.vocab_size, self.start_token_id, self.backend = vocab_size, start_token_id, backend
        self.memory_dim = embedding_dim if memory_dim is None else memory_dim
        check_count("memory_dim", self.memory_dim)
        self.embedding = TokenEmbedding(vocab_size, embedding_dim, positional, max_length, dropout)
        options: dict[str, Any] = {
            "dropout": dropout,
            "num_kv_heads": num_kv_heads,
            "window": window,
            "softcap": softcap,
            "sinks": sinks,
            "qk_norm": qk_norm,
            "scale": scale,
            "backend": backend,
            **position_options(positional, embedding_dim // num_heads),
        }
        sizes = (embedding_dim, hidden_dim, num_heads)
        self.encoder = nn.ModuleList(Block(*sizes, **options) for _ in range(num_layers))
        self.encoder_norm = nn.LayerNorm(embedding_dim)
        self.memory_projection = None if memory_dim is None else nn.Linear(memory_dim, embedding_dim)
        self.decoder = nn.ModuleList(Block(*sizes, cross_attention=True, **options) for _ in range(num_layers))
        self.decoder_norm = nn.LayerNorm(embedding_dim)
        self.head = nn.Linear(embedding_dim, vocab_size)

    def forward(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        memory: Tensor | None = None,
        memory_mask: Tensor | None = None,
    ) -> Tensor:
        """Logits (batch, target_seqlen, vocab_size): at each position, of the token behind it.

            input_ids                (batch, seqlen), int64 or int32; may be None if memory and
                                     decoder_input_ids are given
            attention_mask           (batch, seqlen), bool or integer, 1 = real token
            decoder_input_ids        (batch, target_seqlen); None = shift_right(input_ids): predicts input_ids
                                     themselves
            decoder_attention_mask   (batch, target_seqlen), likewise; None = all real, or attention_mask by
                                     default
            memory                   (batch, memory_seqlen, memory_dim), floating: takes the encoder's place
            memory_mask              (batch, memory_seqlen), 1 = real feature

        Padding, on either side, does not influence real tokens; its own logits mean nothing.
        Raises TypeError or ValueError if an argument does not fit.
        """
        if not is_scripting():
            node = fx_leaf(
                *(self, input_ids, attention_mask, decoder_input_ids, decoder_attention_mask, memory, memory_mask)
            )
            if node is not None:
                return node
        if decoder_input_ids is None:
            if input_ids is None:
                raise ValueError("decoder_input_ids must be given when input_ids is None")
            decoder_input_ids = self.shift_right(input_ids, attention_mask)
            if decoder_attention_mask is None:
                decoder_attention_mask = attention_mask
        encoded, encoded_real = self.encode(input_ids, attention_mask, memory, memory_mask)
        if not is_scripting():
            self._check_decoder_inputs(decoder_input_ids, decoder_attention_mask, encoded)
        return self._decode(decoder_input_ids, as_bool(decoder_attention_mask), encoded, encoded_real)

    def encode(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None = None,
        memory: Tensor | None = None,
        memory_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """(encoded, real): what the decoder attends to, (batch, n, embedding_dim); bool (batch, n) or None.

        Arguments as in forward: the encoder's result for input_ids, or the projected memory if it is given.
        """
        if memory is None:
            if memory_mask is not None:
                raise ValueError("memory_mask needs memory, got a mask without it")
            if input_ids is None:
                raise ValueError("input_ids must be given when memory is None")
            if not is_scripting():
                self._check_tokens("input_ids", input_ids, "attention_mask", attention_mask)
            real = as_bool(attention_mask)
            return self._encode(input_ids, real), real
        if not is_scripting():
            self._check_memory(memory, memory_mask)
        if self.memory_projection is not None:
            memory = self.memory_projection(memory)
        return memory, as_bool(memory_mask)

    def shift_right(self, target_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Decoder inputs that predict target_ids (batch, seqlen): each one's predecessor, first the start.

        attention_mask (batch, seqlen), 1 = real target: the start goes in front of the first real one.
        """
        if not is_scripting():
            self._check_tokens("target_ids", target_ids, "attention_mask", attention_mask)
        real = as_bool(attention_mask)
        if real is not None:
            target_ids = target_ids.masked_fill(~real, self.start_token_id)
        return nn.functional.pad(target_ids, (1, 0), value=float(self.start_token_id))[:, :-1]

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | None,
        max_new_tokens: int,
        *,
        attention_mask: Tensor | None = None,
        memory: Tensor | None = None,
        memory_mask: Tensor | None = None,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_token_id: int | None = None,
        use_cache: bool = True,
        page_size: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Up to max_new_tokens tokens per row, (batch, n), without the start token that they follow.

        input_ids, attention_mask, memory, memory_mask as in forward; everything else as in
        `TransformerLM.generate`.
        """
        sampler = Sampler(do_sample, temperature, top_k, top_p)
        check_generation(max_new_tokens, eos_token_id, self.vocab_size, use_cache, self.backend)
        self.embedding.check_length("the generated sequence", max_new_tokens)
        with evaluating(self):
            encoded, real = self.encode(input_ids, attention_mask, memory, memory_mask)
            check_not_empty("input_ids" if memory is None else "memory", encoded)

            def run(ids: Tensor, ids_real: Tensor | None, caches: Sequence[LayerCache] | None) -> Tensor:
                return self._decode(ids, ids_real, encoded, real, caches)

            batch, length = encoded.shape[:2]
            ids = torch.full((batch, 1), self.start_token_id, device=encoded.device)
            decoder: Cached | Recomputed = Recomputed(run)
            if use_cache:
                size = max(max_new_tokens, 1)
                decoder = Cached(run, new_caches(self.decoder, batch, size, page_size, length))
            lengths = torch.ones(batch, dtype=torch.int64, device=encoded.device)
            return continue_prompts(decoder, ids, lengths, max_new_tokens, sampler, eos_token_id, generator)

    def _encode(self, ids: Tensor, real: Tensor | None) -> Tensor:
        x = self.embedding("input_ids", ids, real)
        padding = None if real is None else ~real
        for block in self.encoder:
            x = block(x, causal=False, padding=padding)
        return self.encoder_norm(x)

    def _decode(
        self,
        ids: Tensor,
        real: Tensor | None,
        encoded: Tensor,
        encoded_real: Tensor | None,
        caches: Any = None,
    ) -> Tensor:
        """caches: a LayerCache for each block, or None."""
        start: Tensor | None = None
        if not is_scripting():
            start = None if caches is None else caches[0].own.lengths
        x = self.embedding("decoder_input_ids", ids, real, start)
        padding = None if real is None else ~real
        memory_padding = None if encoded_real is None else ~encoded_real
        for i, block in enumerate(self.decoder):
            if is_scripting():
                x = block(x, True, padding, encoded, memory_padding)
            else:
                cache = None if caches is None else caches[i]
                x = block(x, True, padding, encoded, memory_padding, cache)
        return self.head(self.decoder_norm(x))

    def _check_tokens(self, name: str, ids: Tensor, mask_name: str, mask: Tensor | None) -> None:
        if not is_recorded():
            check_token_ids(name, ids, self.vocab_size)
            check_token_mask(mask_name, mask, tuple(ids.shape))

    def _check_decoder_inputs(self, ids: Tensor, mask: Tensor | None, encoded: Tensor) -> None:
        if is_recorded():
            return
        check_token_ids("decoder_input_ids", ids, self.vocab_size)
        if ids.shape[0] != encoded.shape[0]:
            raise ValueError(f"decoder_input_ids must have batch {encoded.shape[0]}, got shape {tuple(ids.shape)}")
        check_token_mask("decoder_attention_mask", mask, tuple(ids.shape))

    def _check_memory(self, memory: Any, mask: Tensor | None) -> None:
        if is_recorded():
            return
        if not isinstance(memory, Tensor):
            raise TypeError(f"memory must be a torch.Tensor, got {type(memory).__name__}")
        if not memory.is_floating_point():
            raise TypeError(f"memory must have a floating point dtype, got {memory.dtype}")
        check_dtype("memory", memory, self.head.weight)
        if memory.ndim != 3 or memory.shape[-1] != self.memory_dim:
            raise ValueError(
                f"memory must have shape (batch, memory_seqlen, memory_dim = {self.memory_dim}), "
                f"got {tuple(memory.shape)}"
            )
        check_token_mask("memory_mask", mask, tuple(memory.shape[:2]))
