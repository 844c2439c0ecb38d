"""Every causal, masked and sequence-to-sequence class of Hugging Face Transformers, shrunk: eager against fastattn.

    python -m tests.integrations.zoo                     all, and the table in docs/huggingface.md anew
    python -m tests.integrations.zoo LlamaForCausalLM    these classes, to the terminal

Each class is built tiny, with random weights, from its own configuration, and runs in a process of its own: without
padding, padded on the right and on the left, forward and backward. Logits of the real tokens and the gradients of all
parameters are compared.
"""

from __future__ import annotations

import copy
import multiprocessing
import os
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers.models.auto import modeling_auto

from fastattn.integrations import huggingface
from fastattn.integrations.huggingface.classes import layers_of_its_own
from tests.integrations.huggingface_models import register_exact

PAGE = Path(__file__).parents[2] / "docs" / "huggingface.md"
BEGIN, END = "<!-- zoo: begin -->", "<!-- zoo: end -->"
MAPPINGS = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "masked": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "sequence-to-sequence": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
}
SIDES = ("none", "right", "left")
BATCH, SEQLEN, VOCABULARY, PAD = 2, 12, 64, 1
MOST_PARAMETERS = 20_000_000
SECONDS = 60
TOLERANCE = 1e-3
"""Largest difference, over the largest number of the same tensor, of what is equal, in float32.

Rounding makes 1e-6 of it, which a few layers with random weights amplify; a mask of another meaning makes 0.1.
"""


class Outcome(NamedTuple):
    """What came of a class, one of `OUTCOMES`, and a sentence on why."""

    name: str
    kind: str
    outcome: str
    why: str = ""


# --------------------------------------------------------------------------------------------------- configurations

WIDTH, HEADS, HEAD_DIM = 32, 4, 8
SIZES: dict[str, int] = {
    **dict.fromkeys(("vocab_size", "text_vocab_size", "n_vocab", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "embedding_size", "emb_dim"), WIDTH),
    **dict.fromkeys(("word_embed_proj_dim", "projection_dim", "decoder_hidden_size", "out_hidden_size"), WIDTH),
    **dict.fromkeys(("hidden_dim", "hidden_size_global"), WIDTH),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), HEADS),
    **dict.fromkeys(("decoder_attention_heads", "num_encoder_attention_heads", "attention_heads"), HEADS),
    **dict.fromkeys(("num_decoder_attention_heads", "linear_num_key_heads", "linear_num_value_heads"), HEADS),
    **dict.fromkeys(
        ("head_dim", "d_kv", "kv_channels", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), HEAD_DIM
    ),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "linear_key_head_dim", "linear_value_head_dim"), HEAD_DIM),
    **dict.fromkeys(
        ("intermediate_size", "d_ff", "d_inner", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim"), 2 * WIDTH
    ),
    **dict.fromkeys(("ffn_dim", "dim_ff", "moe_intermediate_size", "shared_expert_intermediate_size"), 2 * WIDTH),
    **dict.fromkeys(("intermediate_size_mlp", "dff", "num_encoder_ffn_dim", "expert_ffn_hidden_size"), 2 * WIDTH),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "ffn_hidden_size", "shared_intermediate_size"), 2 * WIDTH),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_encoder_layers", "num_decoder_layers", "depth", "num_mem_blocks"), 2),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "top_k", "moe_k", "moe_topk", "n_shared_experts"), 2),
    **dict.fromkeys(("num_experts_per_token",), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_source_positions", "max_seq_len"), 64),
    **dict.fromkeys(("max_target_positions", "max_sequence_length", "block_size"), 64),
    # Fewer than there are tokens, so that sparse and compressed attention leave something out.
    **dict.fromkeys(("index_topk", "index_topk_blocks", "index_block_size", "index_kpool"), 2),
    **dict.fromkeys(("local_radius", "global_block_size"), 3),
    **dict.fromkeys(("sliding_window", "attention_window_size", "window_size", "local_attention"), 4),
    **dict.fromkeys(("attention_chunk_size",), 8),
    **dict.fromkeys(("index_n_heads", "image_size", "mamba_n_heads", "mamba_num_heads"), HEADS),
    **dict.fromkeys(("index_head_dim", "hidden_size_per_layer_input", "o_lora_rank"), HEAD_DIM),
    **dict.fromkeys(("type_vocab_size",), 2),
    "image_size": 16,
    "patch_size": 4,
    "mamba_d_head": 16,
    "mamba_head_dim": 16,
    "mamba_d_state": 8,
    "num_mel_bins": 8,
    "expert_layer_period": 2,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
}
TOKENS = {
    "pad_token_id": PAD,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "sep_token_id": 3,
    "cls_token_id": 2,
    "decoder_start_token_id": 2,
}
RANDOM = re.compile(r"dropout|drop_|_pdrop$|layerdrop|jitter")
"""Names of numbers that make a model random in training; 0 here."""
KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads", "multi_query_group_num", "n_head_kv")
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def shrunk(config_class: type, depth: int = 0, **changes: Any) -> Any:
    """A configuration of this class with small sizes."""
    whole: Any = config_class()
    given = {**EXTRA.get(config_class.__name__, {}), **changes}
    kinds = getattr(whole, "layer_types", None)
    kept = _representatives(kinds) if kinds else []
    fields = {name: value for name, value in vars(whole).items() if not name.startswith("_")}
    small: dict[str, Any] = {}
    for name, value in fields.items():
        if name in whole.sub_configs:
            if value is not None and depth < 3:
                small[name] = shrunk(type(value), depth + 1).to_dict()
        elif name in TOKENS:
            small[name] = TOKENS[name]
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and RANDOM.search(name):
            small[name] = type(value)(0)
        elif isinstance(value, int) and not isinstance(value, bool):
            if name in KEY_VALUE_HEADS:
                small[name] = _grouped(whole, value)
            elif name in LAYERS and kept:
                small[name] = len(kept)
            elif name in SIZES:
                small[name] = min(SIZES[name], value)
            elif name.endswith("vocab_size"):
                small[name] = VOCABULARY
        elif value is None and name == "head_dim":
            small[name] = HEAD_DIM
        elif kept and isinstance(value, (list, tuple)) and len(value) == len(kinds):
            small[name] = [value[i] for i in kept]
    return config_class(**{**small, **given})


def _grouped(config: Any, kv_heads: int) -> int:
    """Heads of keys and values, as many to a query head as there were: all, one or half."""
    heads = getattr(config, "num_attention_heads", kv_heads)
    return HEADS if kv_heads == heads else 1 if kv_heads == 1 else HEADS // 2


def _representatives(kinds: list[str]) -> list[int]:
    """Indices of layers, two at least where there are two, such that each kind is among them."""
    first = sorted({kind: i for i, kind in reversed(list(enumerate(kinds)))}.values())
    return first if len(first) > 1 or len(kinds) == 1 else [*first, first[0] + 1]


EXTRA: dict[str, dict[str, Any]] = {
    "BambaConfig": {"attn_layer_indices": [1]},
    "BltConfig": {"encoder_hash_byte_group_vocab": VOCABULARY},
    "CodeGenConfig": {"rotary_dim": 4},
    "DeepseekV4Config": {
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 4},
    },
    "DeepseekV2Config": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "Dots1Config": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "EsmConfig": {"vocab_size": VOCABULARY, "pad_token_id": PAD, "mask_token_id": 4},
    "FalconH1Config": {"mamba_d_ssm": 2 * WIDTH, "mamba_d_head": 16},
    "GPTJConfig": {"rotary_dim": 4},
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 1]]},
    "Gemma3nTextConfig": {"num_kv_shared_layers": 0},
    "GraniteMoeHybridConfig": {"layer_types": ["linear_attention", "full_attention"]},
    "KimiLinearConfig": {"linear_num_heads": HEADS, "linear_head_dim": HEAD_DIM},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "Mamba2Config": {"num_heads": 8, "head_dim": 8},
    "MiniMaxM3VLTextConfig": {"layer_types": ["full_attention", "minimax_m3_sparse"]},
    "NemotronConfig": {"num_key_value_heads": 2, "head_dim": HEAD_DIM},
    "NemotronHConfig": {"n_groups": 1, "layers_block_type": ["mamba", "attention"]},
    "NeoMMEConfig": {"head_dim": 16},
    "PerceiverConfig": {"num_latents": 4, "d_latents": WIDTH, "num_self_attends_per_block": 1},
    "RecurrentGemmaConfig": {"num_hidden_layers": 3},
    "ReformerConfig": {"axial_pos_embds": False, "attention_head_size": HEAD_DIM},
    "XmodConfig": {"default_language": "en_XX"},
    "ZambaConfig": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2},
}
"""What the names alone do not say, by the name of the configuration's class."""

# ------------------------------------------------------------------------------------------------------------- inputs


def real_tokens(side: str, seqlen: int = SEQLEN) -> Tensor:
    """(BATCH, seqlen), bool: the second sequence is padded on this side."""
    lengths = torch.tensor([seqlen, seqlen if side == "none" else seqlen - 5])[:, None]
    index = torch.arange(seqlen)
    return index >= seqlen - lengths if side == "left" else index < lengths


def token_ids(real: Tensor, seed: int) -> Tensor:
    ids = torch.randint(4, VOCABULARY, real.shape, generator=torch.Generator().manual_seed(seed))
    return torch.where(real, ids, PAD)


def inputs(model: Any, side: str) -> tuple[dict[str, Any], Tensor]:
    """Arguments of forward, and which of the logits are of real tokens, (batch, seqlen)."""
    real = real_tokens(side)
    given: dict[str, Any] = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
    main, generator = model.main_input_name, torch.Generator().manual_seed(3)
    sequence = getattr(model.config, "is_encoder_decoder", False)
    if main == "input_ids":
        given |= {"input_ids": token_ids(real, 1), "attention_mask": real.long()}
    else:
        sizes = {"input_features": (8, 128), "flattened_patches": (SEQLEN, 3 * 16 + 2), "input_values": (2000,)}
        given[main] = torch.randn(BATCH, *sizes[main], generator=generator)
    if sequence:
        real = real_tokens(side, 9)
        given |= {"decoder_input_ids": token_ids(real, 2), "decoder_attention_mask": real.long()}
    return given, real


# ----------------------------------------------------------------------------------------------------------- running


def configuration(kind: str, name: str) -> Any:
    """The small configuration of a class; encoders that can be decoders are."""
    config = shrunk(getattr(transformers, name).config_class)
    if kind == "causal" and hasattr(config, "is_decoder"):
        config.is_decoder = True
    config._experts_implementation = "eager"
    return config


def build(name: str, config: Any, implementation: str) -> Any:
    """The model as the library makes it, with the same random weights at each call."""
    torch.manual_seed(11)
    return getattr(transformers, name)._from_config(copy.deepcopy(config), attn_implementation=implementation)


def randomised(model: Any) -> Any:
    """The model in evaluation mode, with weights for which its scores matter, the same ones at each call."""
    generator = torch.Generator().manual_seed(12)
    with torch.no_grad():
        for x in model.parameters():
            noise = torch.randn(x.shape, generator=generator)
            if x.ndim == 2:  # initial ones are small, and attention almost uniform
                x.copy_(noise * x.shape[1] ** -0.5)
            elif x.ndim != 1 or (x.numel() and (x == x[0]).all()):  # sinks and gates of 0, which hide what they are of
                x.add_(0.3 * noise)
    return model.float().eval()


def run(model: Any, side: str) -> dict[str, Tensor]:
    """Logits of the real tokens and the gradient of each parameter."""
    given, real = inputs(model, side)
    model.zero_grad(set_to_none=True)
    torch.manual_seed(13)
    logits = model(**given).logits
    if logits.shape[:2] == real.shape:
        logits = logits[real]
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(4))
    (logits * weight).sum().backward()
    return {"logits": logits.detach(), **{n: x.grad for n, x in model.named_parameters() if x.grad is not None}}


def difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """The largest, over the largest number of its tensor, and in which; gradients that are only noise count less."""
    gradients = [float(x.abs().max()) for name, x in expected.items() if name != "logits" and x.numel()]
    floor = 0.01 * max(gradients, default=0.0)
    worst = (0.0, "")
    if found.keys() != expected.keys():
        return float("inf"), "gradients of other parameters"
    for name, x in expected.items():
        if not x.numel():
            continue
        largest = float(x.abs().max())
        d = float((found[name] - x).abs().max()) / max(largest, 1e-30 if name == "logits" else floor, 1e-30)
        if not d <= worst[0]:
            worst = (d, name)
    return worst


def compare(kind: str, name: str) -> Outcome:
    """Eager against fastattn in this class, built on it and switched to it; raises nothing."""
    global CALLS
    CALLS = 0
    try:
        config = configuration(kind, name)
        with torch.device("meta"):
            size = sum(x.numel() for x in build(name, config, "eager").parameters())
            refusal = _refusal(lambda: build(name, config, "fastattn"))
        if refusal:
            return Outcome(name, kind, REFUSED, refusal)
        if size > MOST_PARAMETERS:
            return Outcome(name, kind, NOT_RUN, f"not shrunk below {size / 1e6:.0f} million parameters")
        model = randomised(build(name, config, "eager"))
        expected = {side: run(model, side) for side in SIDES}
        if not all(x.isfinite().all() for result in expected.values() for x in result.values()):
            return Outcome(name, kind, NOT_RUN, "eager gives numbers that are not finite")
        again = max(difference(run(model, side), expected[side])[0] for side in SIDES)
    except Exception as error:
        return Outcome(
            name, kind, NOT_RUN, f"{type(error).__name__.removeprefix('StrictDataclass')}: {_sentence(error)}"
        )
    if again > TOLERANCE:
        return Outcome(name, kind, NOT_RUN, "eager differs from run to run")
    found: dict[str, dict[str, Tensor]] = {}
    try:
        model.set_attn_implementation("fastattn")
        refusal = _refusal(lambda: found.update({side: run(model, side) for side in SIDES}))
    except Exception as error:
        return Outcome(name, kind, DIFFERENT, f"{type(error).__name__}: {_sentence(error)}")
    if refusal:
        return Outcome(name, kind, REFUSED, refusal)
    if CALLS == 0:
        return Outcome(name, kind, DIFFERENT, "accepted, and nothing changed")
    worst = max((*difference(found[side], expected[side]), side) for side in SIDES)
    if worst[0] <= TOLERANCE:
        own = ", ".join(sorted({type(layer).__name__ for layer in layers_of_its_own(model)}))
        return Outcome(name, kind, IN_PART, f"{own}: eager as before") if own else Outcome(name, kind, EQUAL)
    model.config._attn_implementation = "exact"
    expected = {side: run(model, side) for side in SIDES}
    if max(difference(found[side], expected[side])[0] for side in SIDES) <= TOLERANCE:
        return Outcome(name, kind, EMPTY_ROWS, "its tokens mix with padding, whose rows see no key; those are 0 here")
    return Outcome(name, kind, DIFFERENT, f"{worst[0]:.1e} in {worst[1]}, padding: {worst[2]}")


def _refusal(call: Callable[[], Any]) -> str:
    """The sentence with which fastattn refuses what is called; empty if it does not."""
    try:
        call()
    except (TypeError, ValueError) as error:
        if "fastattn" not in str(error):
            raise
        return _sentence(error)
    return ""


OUTCOMES = EQUAL, IN_PART, EMPTY_ROWS, REFUSED, DIFFERENT, NOT_RUN = (
    *(
        "equal",
        "equal, in part on fastattn",
        "equal to eager attention in which rows that see no key are 0",
        "refused",
        "different",
        "not run",
    ),
)
CALLS = 0


def _sentence(error: Exception) -> str:
    """What an error says, without what is particular to the class, and without markup."""
    text = " ".join(str(error).split()).replace("|", "/").replace("`", "").replace("<", "")
    text = re.sub(r"Class validation error for validator '\w+': ", "", text)
    text = re.sub(r"^(The model of )?\w+ (computes|has)", r"The model \2", text)
    text = re.sub(r"^\w+ passed", "Its attention passed", text)
    return text if "fastattn" in text else text[:100].strip()


def count_calls() -> None:
    """Registers fastattn such that its calls are counted, and "exact", in which rows that see no key give 0."""
    huggingface.register()
    register_exact()

    def counted(*args: Any, **kwargs: Any) -> Any:
        global CALLS
        CALLS += 1
        return huggingface.attention_forward(*args, **kwargs)

    transformers.AttentionInterface.register("fastattn", counted)


def classes() -> dict[str, str]:
    """Every class in question, and what kind it is of."""
    found: dict[str, str] = {}
    for kind, mapping in MAPPINGS.items():
        for name in getattr(modeling_auto, mapping).values():
            for each in [name] if isinstance(name, str) else name:
                found.setdefault(each, kind)
    return dict(sorted(found.items()))


def in_process(kind: str, name: str) -> Outcome:
    """`compare` in a process of its own, so that neither memory nor a crash outlives it."""
    context: Any = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)

    def work() -> None:
        torch.set_num_threads(1)  # those of the parent are not here
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        there.send(compare(kind, name))

    process = context.Process(target=work)
    process.start()
    there.close()
    try:
        return Outcome(*here.recv()) if here.poll(SECONDS) else Outcome(name, kind, NOT_RUN, f"over {SECONDS} seconds")
    except EOFError:
        return Outcome(name, kind, NOT_RUN, "its process ended")
    finally:
        process.kill()
        process.join()


def table(outcomes: list[Outcome]) -> str:
    """The outcomes as a table in Markdown, those that say the same in one row."""
    rows: dict[tuple[str, str], list[str]] = {}
    for each in sorted(outcomes, key=lambda x: (OUTCOMES.index(x.outcome), x.why, x.name)):
        rows.setdefault((each.outcome, each.why), []).append(each.name)
    lines = [
        f"Transformers {transformers.__version__}, {len(outcomes)} classes, by `python -m tests.integrations.zoo`.",
        "",
        "| outcome | sentence or reason | classes |",
        "|---|---|---|",
        *(f"| {outcome}, {len(names)} | {why} | {', '.join(names)} |" for (outcome, why), names in rows.items()),
    ]
    return "\n".join(lines)


def write(outcomes: list[Outcome]) -> None:
    """Puts the table into the page."""
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{table(outcomes)}\n{END}{rest.split(END)[1]}")


def main(names: list[str]) -> None:
    """Runs the classes of these names, or all of them, which writes the table."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    count_calls()
    outcomes = []
    for name, kind in classes().items():
        if not names or name in names:
            outcomes.append(in_process(kind, name))
            print(*outcomes[-1], sep=" | ", flush=True)
    if not names:
        write(outcomes)
    if any(each.outcome == DIFFERENT for each in outcomes):
        raise SystemExit("some are silently different")


if __name__ == "__main__":
    main(sys.argv[1:])
