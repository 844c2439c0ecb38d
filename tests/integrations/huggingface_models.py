"""Tiny random models of Hugging Face Transformers' own classes, and inputs for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers import masking_utils

VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
VOCABULARY, PAD, BATCH, SEQLEN = 48, 0, 3, 13

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.25,  # large enough for the scores to matter
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
}
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 8}
LAYER_TYPES = ["sliding_attention", "full_attention"]
VISION = {key: SIZES[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}


class Architecture(NamedTuple):
    """A model class and how to call it."""

    model: str
    config: Callable[[], Any]
    inputs: Callable[[str], dict[str, Any]]
    """From the side of the padding, "none", "left" or "right", to arguments of forward, labels included."""
    generates: bool = False
    needs: tuple[int, int] = (4, 57)
    """The first version that calls the attention interface in this architecture."""


def padding_mask(side: str, seqlen: int = SEQLEN) -> Tensor:
    """(BATCH, seqlen), 1 = a token, 0 = padding; the first sequence has none."""
    lengths = torch.tensor([seqlen, seqlen - 5, 2])[:, None]
    index = torch.arange(seqlen)
    real = {"none": index >= 0 * lengths, "right": index < lengths, "left": index >= seqlen - lengths}[side]
    return real.long()


def tokens(side: str, seqlen: int = SEQLEN) -> dict[str, Tensor]:
    """input_ids and attention_mask."""
    mask = padding_mask(side, seqlen)
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(2, VOCABULARY, (BATCH, seqlen), generator=generator)
    return {"input_ids": torch.where(mask == 1, ids, PAD), "attention_mask": mask}


def language(side: str) -> dict[str, Tensor]:
    """Labels are shifted by the model: none for the first token, which padding would predict."""
    inputs = tokens(side)
    real = inputs["attention_mask"] == 1
    predicted = real & torch.nn.functional.pad(real, (1, -1))
    return {**inputs, "labels": inputs["input_ids"].masked_fill(~predicted, -100)}


def sequence_to_sequence(side: str) -> dict[str, Tensor]:
    return {**tokens(side), "labels": tokens("none", 7)["input_ids"]}


def speech(side: str) -> dict[str, Tensor]:
    features = torch.randn(BATCH, 8, 24, generator=torch.Generator().manual_seed(6))
    return {"input_features": features, "labels": tokens("none", 7)["input_ids"]}


def images(side: str) -> dict[str, Tensor]:
    pixels = torch.randn(BATCH, 3, 16, 16, generator=torch.Generator().manual_seed(7))
    return {"pixel_values": pixels, "labels": torch.tensor([0, 2, 1])}


def images_and_texts(side: str) -> dict[str, Any]:
    """The text's end, which CLIP looks for, is its last token, and the largest."""
    texts = tokens(side)
    last = torch.nn.functional.pad(texts["attention_mask"], (0, 1)).diff(dim=1) == -1
    texts["input_ids"] = torch.where(last, VOCABULARY - 1, texts["input_ids"].clamp(max=VOCABULARY - 2))
    return {"pixel_values": images(side)["pixel_values"], **texts, "return_loss": True}


def _clip() -> Any:
    vision = transformers.CLIPVisionConfig(**VISION, image_size=16, patch_size=4, initializer_factor=8.0)
    text = transformers.CLIPTextConfig(**{**SIZES, "eos_token_id": VOCABULARY - 1}, initializer_factor=8.0)
    return transformers.CLIPConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16, initializer_factor=4.0
    )


ENCODER_DECODER = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 40,
    "dropout": 0.0,
    "init_std": 0.25,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}

t = transformers
ARCHITECTURES: dict[str, Architecture] = {
    "Llama": Architecture("LlamaForCausalLM", lambda: t.LlamaConfig(**GROUPED), language, True),
    "Mistral": Architecture("MistralForCausalLM", lambda: t.MistralConfig(**GROUPED, sliding_window=4), language, True),
    "Gemma 2": Architecture(
        "Gemma2ForCausalLM",
        lambda: t.Gemma2Config(
            **GROUPED, layer_types=LAYER_TYPES, sliding_window=4, attn_logit_softcapping=2.0, query_pre_attn_scalar=8
        ),
        language,
        True,
    ),
    "Gemma 3": Architecture(
        "Gemma3ForCausalLM",
        lambda: t.Gemma3TextConfig(**GROUPED, layer_types=LAYER_TYPES, sliding_window=4, query_pre_attn_scalar=8),
        language,
        True,
    ),
    "Qwen 3": Architecture(
        "Qwen3ForCausalLM",
        lambda: t.Qwen3Config(
            **GROUPED, layer_types=LAYER_TYPES, sliding_window=4, use_sliding_window=True, max_window_layers=1
        ),
        language,
        True,
    ),
    "gpt-oss": Architecture(
        "GptOssForCausalLM",
        lambda: t.GptOssConfig(
            **GROUPED, layer_types=LAYER_TYPES, sliding_window=4, num_local_experts=2, num_experts_per_tok=1
        ),
        language,
        True,
    ),
    "GPT-2": Architecture(
        "GPT2LMHeadModel",
        lambda: t.GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=64,
            initializer_range=0.25,
            scale_attn_by_inverse_layer_idx=VERSION >= (5, 0),
            pad_token_id=PAD,
            bos_token_id=1,
            eos_token_id=None,
            **{name: 0.0 for name in ("attn_pdrop", "embd_pdrop", "resid_pdrop")},
        ),
        language,
        True,
    ),
    "GPT-NeoX": Architecture("GPTNeoXForCausalLM", lambda: t.GPTNeoXConfig(**SIZES), language, True),
    "BERT": Architecture(
        "BertForMaskedLM",
        lambda: t.BertConfig(**SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
        language,
        needs=(5, 0),
    ),
    "ModernBERT": Architecture(
        "ModernBertForMaskedLM",
        lambda: t.ModernBertConfig(
            **{**SIZES, "eos_token_id": 2},
            local_attention=6,
            global_attn_every_n_layers=2,
            cls_token_id=1,
            sep_token_id=2,
        ),
        language,
        needs=(5, 0),
    ),
    "T5": Architecture(
        "T5ForConditionalGeneration",
        lambda: t.T5Config(
            vocab_size=VOCABULARY,
            d_model=32,
            d_kv=8,
            d_ff=40,
            num_layers=2,
            num_decoder_layers=2,
            num_heads=4,
            relative_attention_num_buckets=8,
            relative_attention_max_distance=12,
            dropout_rate=0.0,
            initializer_factor=2.0,
            pad_token_id=PAD,
            eos_token_id=2,
            decoder_start_token_id=1,
        ),
        sequence_to_sequence,
        True,
        needs=(5, 0),
    ),
    "BART": Architecture(
        "BartForConditionalGeneration",
        lambda: t.BartConfig(**ENCODER_DECODER, max_position_embeddings=64),
        sequence_to_sequence,
        True,
    ),
    "Whisper": Architecture(
        "WhisperForConditionalGeneration",
        lambda: t.WhisperConfig(
            **ENCODER_DECODER, num_mel_bins=8, max_source_positions=12, max_target_positions=40, num_hidden_layers=2
        ),
        speech,
        True,
    ),
    "ViT": Architecture(
        "ViTForImageClassification",
        lambda: t.ViTConfig(
            **VISION, image_size=16, patch_size=4, num_labels=3, initializer_range=0.25, hidden_dropout_prob=0.0
        ),
        images,
    ),
    "CLIP": Architecture("CLIPModel", _clip, images_and_texts),
}


def inputs(name: str, side: str = "none", dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Arguments of the model's forward, the floating ones in this dtype."""
    given = ARCHITECTURES[name].inputs(side)
    floating = {key: x.to(dtype) for key, x in given.items() if isinstance(x, Tensor) and x.is_floating_point()}
    return given | floating


def build(name: str, implementation: str = "eager", dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """The model with the same random weights at each call, in evaluation mode; `changes` go into its config."""
    architecture = ARCHITECTURES[name]
    config = architecture.config()
    for key, value in changes.items():
        setattr(config, key, value)
    config._attn_implementation = implementation
    config._experts_implementation = "eager"  # the others have no float64
    torch.manual_seed(11)
    return getattr(transformers, architecture.model)(config).to(dtype).eval()


def register_exact() -> None:
    """Registers "exact": the formula, on masks that the library spells out; a row that sees nothing gives 0."""

    def mask(**arguments: Any) -> Tensor:
        skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        return masking_utils.sdpa_mask(**{**arguments, **skips})

    transformers.AttentionInterface.register("exact", _exact)
    transformers.AttentionMaskInterface.register("exact", mask)


def _exact(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if position_bias is not None:
        scores = scores + position_bias
    if attention_mask is not None:
        seen = attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0
        scores = scores.masked_fill(~seen, -torch.inf)
    if s_aux is not None:
        scores = torch.cat([scores, s_aux.reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    probs = torch.softmax(scores, -1).nan_to_num(0.0)[..., : key.shape[2]]
    return (probs @ value).transpose(1, 2).contiguous(), None
