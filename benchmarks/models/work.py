"""Whole models of Hugging Face Transformers, small and with random weights, and the work that is timed on them."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..cases import DTYPES

if TYPE_CHECKING:
    from ..rivals import Call

WORKS = ("prefill", "decode", "encode", "train")
CLASSES = {
    "llama": ("LlamaConfig", "LlamaForCausalLM"),
    "mistral": ("MistralConfig", "MistralForCausalLM"),
    "bert": ("BertConfig", "BertForTokenClassification"),
}
"""The library's configuration and model of each family."""


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model, by the names of the library's configurations, and which family it is of."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    sliding_window: int | None = None


LLAMA = ModelShape("llama", 8192, 512, 1408, 4, 16, 4)
MISTRAL = ModelShape("mistral", 8192, 512, 1408, 4, 16, 4, sliding_window=256)
BERT = ModelShape("bert", 30522, 768, 3072, 4, 12, 12)  # BERT-base has 12 such layers


@dataclass(frozen=True)
class ModelCase:
    """One piece of work on one model.

    lengths: tokens of each sequence of the batch, padded on the right to the longest; for "decode" the tokens in the
    cache, beside which each sequence gets one more. work is one of

        prefill  forward that fills a new cache and gives the logits of the last tokens
        decode   forward of one token per sequence with a `DynamicCache`, which is then cut back
        encode   forward
        train    forward with loss, backward, and a step of AdamW

    Raises ValueError, naming the field, when the fields do not describe any.
    """

    shape: ModelShape
    work: str
    lengths: tuple[int, ...]
    dtype: str

    def __post_init__(self) -> None:
        for name, known in (("work", WORKS), ("dtype", tuple(DTYPES))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"lengths must hold positive numbers, got {self.lengths}")
        if self.work in ("prefill", "decode") and len(set(self.lengths)) > 1:
            raise ValueError(f"lengths must be equal for {self.work}, which has no padding, got {self.lengths}")

    @property
    def family(self) -> str:
        """The architecture."""
        return self.shape.family

    @property
    def seqlen(self) -> int:
        """Tokens of a sequence with its padding."""
        return max(self.lengths)

    @property
    def tokens(self) -> int:
        """Tokens that one call works through, without padding."""
        return len(self.lengths) if self.work == "decode" else sum(self.lengths)

    @property
    def name(self) -> str:
        """For tables; says all but the sizes of the model."""
        parts = [self.work, f"B{len(self.lengths)}", f"S{self.seqlen}", self.dtype]
        if self.shape.sliding_window is not None:
            parts.append(f"window {self.shape.sliding_window}")
        if len(set(self.lengths)) > 1:
            parts.append("padded " + "+".join(map(str, self.lengths)))
        return " ".join(parts)

    def to_json(self) -> dict[str, Any]:
        """The fields and the name, for people who read the file."""
        return {"name": f"{self.family}: {self.name}", **asdict(self)}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> ModelCase:
        """The case that `to_json` described."""
        return cls(ModelShape(**fields["shape"]), fields["work"], tuple(fields["lengths"]), fields["dtype"])


def _suite() -> Iterator[ModelCase]:
    padded = (512, 320, 192, 64)
    for dtype in ("float32", "bfloat16"):
        for seqlen in (512, 2048):
            yield ModelCase(LLAMA, "prefill", (seqlen,), dtype)
        for seqlen in (512, 2048):
            yield ModelCase(LLAMA, "decode", (seqlen,), dtype)
        yield ModelCase(MISTRAL, "prefill", (2048,), dtype)
        yield ModelCase(BERT, "encode", padded, dtype)
        yield ModelCase(LLAMA, "train", (512, 512), dtype)
        yield ModelCase(BERT, "train", padded, dtype)


MODELS = tuple(_suite())
"""The suite "models"."""


class Batch(NamedTuple):
    """tokens and labels (batch, seqlen), int64; real (batch, seqlen), int64, 1 = token, 0 = padding.

    Labels of padding are -100, which the library's losses leave out. For "decode" tokens fill the cache, and the last
    of each sequence is then the new one.
    """

    tokens: Tensor
    real: Tensor
    labels: Tensor


def make_batch(case: ModelCase, device: torch.device, seed: int = 0) -> Batch:
    """Random tokens, the same for the same case and seed on every device."""
    generator = torch.Generator().manual_seed(seed)
    size = (len(case.lengths), case.seqlen + (case.work == "decode"))
    # From 5 on: the first few numbers are special tokens.
    tokens = torch.randint(5, case.shape.vocab_size, size, generator=generator)
    lengths = torch.tensor(case.lengths)[:, None] + (case.work == "decode")
    real = torch.arange(size[1]) < lengths
    classes = tokens % 2 if case.family == "bert" else tokens
    labels = torch.where(real, classes, -100)
    return Batch(tokens.where(real, 0).to(device), real.long().to(device), labels.to(device))


def make_model(case: ModelCase, device: torch.device, seed: int = 0) -> Any:
    """The model with random weights and eager attention, in training mode for "train".

    Raises ModuleNotFoundError where transformers is missing.
    """
    import transformers

    config_class, model_class = CLASSES[case.family]
    sizes = asdict(case.shape)
    del sizes["family"]
    # The usual 0.02 makes scores so small that attention is near uniform, and mistakes in it are hard to see.
    rest: dict[str, Any] = {"initializer_range": 0.05, "max_position_embeddings": case.seqlen + 1}
    if case.family == "bert":  # no dropout: every implementation drops other entries, so that nothing could be compared
        del sizes["num_key_value_heads"], sizes["sliding_window"]
        rest |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = getattr(transformers, config_class)(**sizes, **rest)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = getattr(transformers, model_class)._from_config(
            config, dtype=case_dtype(case), attn_implementation="eager"
        )
    return made.to(device).train(case.work == "train")


def case_dtype(case: ModelCase) -> torch.dtype:
    """The dtype of weights and activations."""
    return DTYPES[case.dtype]


def with_attention(model: Any, implementation: str) -> Any:
    """The same model, on the very same weights, with another attention implementation."""
    twin = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    twin.set_attn_implementation(implementation)
    return twin


def in_float64(model: Any) -> Any:
    """A copy in float64; the few steps that the library takes in float32 whatever the dtype stay so."""
    return copy.deepcopy(model).double()


def prepare(case: ModelCase, model: Any, batch: Batch) -> Call:
    """The call that is checked and timed.

    It gives (logits,), for "encode" those of real tokens, (tokens, classes), else those of the last ones, (batch, 1,
    vocabulary); for "train" (loss, gradients of all matrices in the order of `matrices`).
    """
    makers: dict[str, Callable[[Any, Batch], Call]]
    makers = {"prefill": _prefill, "decode": _decode, "encode": _encode, "train": _train}
    return makers[case.work](model, batch)


def matrices(model: Any) -> dict[str, Tensor]:
    """The weights whose gradients are compared, by name.

    Vectors are left out: the gradient of a key projection's bias, for one, is rounding noise around 0.
    """
    return {name: weight for name, weight in model.named_parameters() if weight.ndim == 2}


def _prefill(model: Any, batch: Batch) -> Call:
    def call() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (_logits_and_cache(model, batch).logits,)

    return call


def _decode(model: Any, batch: Batch) -> Call:
    known = batch.tokens.shape[1] - 1
    # The older releases' name of the argument still works in the newer ones, which warn of it.
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    with torch.no_grad():
        cache = getattr(_logits_and_cache(model, Batch(*(x[:, :known] for x in batch))), name)
    arguments = {"input_ids": batch.tokens[:, known:], "attention_mask": batch.real, "use_cache": True, name: cache}

    def call() -> tuple[Tensor, ...]:
        with torch.no_grad():
            logits = model(**arguments).logits
        cache.crop(-1)  # the new token goes again: every call finds the same cache
        return (logits,)

    return call


def _logits_and_cache(model: Any, batch: Batch) -> Any:
    """As generate() does it: the padding mask is handed over even if it hides nothing."""
    return model(input_ids=batch.tokens, attention_mask=batch.real, use_cache=True, logits_to_keep=1)


def _encode(model: Any, batch: Batch) -> Call:
    real = batch.real.bool()

    def call() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (model(input_ids=batch.tokens, attention_mask=batch.real).logits[real],)

    return call


def _train(model: Any, batch: Batch) -> Call:
    # A learning rate of 0 takes the whole step and leaves the weights, so that all implementations and all rounds
    # compute on the same.
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    compared = matrices(model).values()

    def call() -> tuple[Tensor, ...]:
        optimizer.zero_grad()
        loss = model(input_ids=batch.tokens, attention_mask=batch.real, labels=batch.labels).loss
        loss.backward()
        optimizer.step()
        return (loss.detach(), *(weight.grad for weight in compared if weight.grad is not None))

    return call
