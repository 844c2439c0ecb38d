"""The work that is timed on whole models: random tokens, a model with random weights, and the call."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .cases import ModelCase

if TYPE_CHECKING:
    from ..rivals import Call

CLASSES = {
    "llama": ("LlamaConfig", "LlamaForCausalLM"),
    "mistral": ("MistralConfig", "MistralForCausalLM"),
    "bert": ("BertConfig", "BertForTokenClassification"),
}
"""The library's configuration and model of each family."""


class Batch(NamedTuple):
    """tokens and labels (batch, seqlen), int64; real (batch, seqlen), int64, 1 = token, 0 = padding.

    Labels of padding are -100, which the library's losses ignore. For "decode" the tokens fill the cache, except the
    last token of each sequence, which is the new one.
    """

    tokens: Tensor
    real: Tensor
    labels: Tensor


def make_batch(case: ModelCase, device: torch.device, seed: int = 0) -> Batch:
    """Random tokens, the same for the same case and seed on every device."""
    generator = torch.Generator().manual_seed(seed)
    size = (len(case.lengths), case.seqlen + (case.work == "decode"))
    # Starting at 5: the first few numbers are special tokens.
    tokens = torch.randint(5, case.shape.vocab_size, size, generator=generator)
    lengths = torch.tensor(case.lengths)[:, None] + (case.work == "decode")
    real = torch.arange(size[1]) < lengths
    classes = tokens % 2 if case.family == "bert" else tokens
    labels = torch.where(real, classes, -100)
    return Batch(tokens.where(real, 0).to(device), real.long().to(device), labels.to(device))


def make_model(case: ModelCase, device: torch.device, seed: int = 0) -> Any:
    """The model with random weights and eager attention, in training mode for "train".

    Raises ModuleNotFoundError if transformers is missing.
    """
    import transformers

    config_class, model_class = CLASSES[case.family]
    sizes = asdict(case.shape)
    del sizes["family"]
    # The usual 0.02 makes attention nearly uniform, which hides mistakes in it.
    rest: dict[str, Any] = {"initializer_range": 0.05, "max_position_embeddings": case.seqlen + 1}
    if case.family == "bert":  # no dropout: each implementation drops other entries, so results differ
        del sizes["num_key_value_heads"], sizes["sliding_window"]
        rest |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = getattr(transformers, config_class)(**sizes, **rest)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = getattr(transformers, model_class)._from_config(
            config, dtype=case.torch_dtype, attn_implementation="eager"
        )
    return made.to(device).train(case.work == "train")


def with_attention(model: Any, implementation: str) -> Any:
    """The same model with another attention implementation. The weights are shared, not copied."""
    twin = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    twin.set_attn_implementation(implementation)
    return twin


def in_float64(model: Any) -> Any:
    """A copy in float64. A few steps stay in float32, because the library computes them so in any dtype."""
    return copy.deepcopy(model).double()


def prepare(case: ModelCase, model: Any, batch: Batch) -> Call:
    """The call that is checked and timed.

    It returns

        prefill, decode  (logits,) of the last tokens, (batch, 1, vocabulary)
        encode           (logits,) of the tokens that are no padding, (tokens, classes)
        train            (loss, gradients of all matrices in the order of `matrices`)
    """
    makers: dict[str, Callable[[Any, Batch], Call]]
    makers = {"prefill": _prefill, "decode": _decode, "encode": _encode, "train": _train}
    return makers[case.work](model, batch)


def matrices(model: Any) -> dict[str, Tensor]:
    """The weights whose gradients are compared, by name.

    Vectors are excluded: the gradient of a key projection's bias, for example, is rounding noise around 0.
    """
    return {name: weight for name, weight in model.named_parameters() if weight.ndim == 2}


def _prefill(model: Any, batch: Batch) -> Call:
    def call() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (_logits_and_cache(model, batch).logits,)

    return call


def _decode(model: Any, batch: Batch) -> Call:
    known = batch.tokens.shape[1] - 1
    # Newer releases accept the old name of the argument, with a warning.
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    with torch.no_grad():
        cache = getattr(_logits_and_cache(model, Batch(*(x[:, :known] for x in batch))), name)
    arguments = {"input_ids": batch.tokens[:, known:], "attention_mask": batch.real, "use_cache": True, name: cache}

    def call() -> tuple[Tensor, ...]:
        with torch.no_grad():
            logits = model(**arguments).logits
        cache.crop(-1)  # removes the new token, so that every call finds the same cache
        return (logits,)

    return call


def _logits_and_cache(model: Any, batch: Batch) -> Any:
    """As generate() does it: the padding mask is passed even if it hides nothing."""
    return model(input_ids=batch.tokens, attention_mask=batch.real, use_cache=True, logits_to_keep=1)


def _encode(model: Any, batch: Batch) -> Call:
    real = batch.real.bool()

    def call() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (model(input_ids=batch.tokens, attention_mask=batch.real).logits[real],)

    return call


def _train(model: Any, batch: Batch) -> Call:
    # With a learning rate of 0 the step costs the same and leaves the weights unchanged for the next round.
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    compared = matrices(model).values()

    def call() -> tuple[Tensor, ...]:
        optimizer.zero_grad()
        loss = model(input_ids=batch.tokens, attention_mask=batch.real, labels=batch.labels).loss
        loss.backward()
        optimizer.step()
        return (loss.detach(), *(weight.grad for weight in compared if weight.grad is not None))

    return call
