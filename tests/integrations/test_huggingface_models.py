"""Models of Hugging Face Transformers give with fastattn what they give with the library's own eager attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from fastattn.integrations import huggingface
from tests.integrations import huggingface_models as models
from tests.integrations.huggingface_models import ARCHITECTURES, VERSION, build
from tests.tolerance import assert_close, to_numpy

huggingface.register()
models.register_exact()

SIDES = ("none", "left", "right")
HERE = [name for name, architecture in ARCHITECTURES.items() if architecture.needs <= VERSION]
GENERATING = [name for name in HERE if ARCHITECTURES[name].generates]


def run(name: str, implementation: str, side: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Logits of the real tokens, the loss, and the gradient of each parameter."""
    model = build(name, implementation, dtype)
    inputs = models.inputs(name, side, dtype)
    if name == "CLIP" and VERSION < (5, 0):
        # It makes its mask in the default dtype, which must hold the lowest number of the model's.
        with _default_dtype(dtype):
            output = model(**inputs)
    else:
        output = model(**inputs)
    logits = output.logits_per_text if name == "CLIP" else output.logits
    if "attention_mask" in inputs and logits.shape[:2] == inputs["attention_mask"].shape:
        logits = logits[inputs["attention_mask"] == 1]
    output.loss.backward()
    found = {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
    assert len(found) >= 10
    return {"logits": logits, "loss": output.loss, **found}


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(before)


def check(name: str, side: str, dtype: torch.dtype) -> None:
    exact, eager, found = (
        run(name, implementation, side, at)
        for implementation, at in (("exact", torch.float64), ("eager", dtype), ("fastattn", dtype))
    )
    assert found.keys() == exact.keys()
    # Gradients of biases to which the softmax is blind are noise around 0.
    largest = max(float(x.detach().abs().max()) for x in exact.values())
    for key, x in found.items():
        assert_close(f"{key}, {name}, {side}", x, to_numpy(exact[key]), eager[key], dtype, largest_term=largest)


@pytest.mark.parametrize(
    ("name", "side"),
    [(name, side) for name in HERE for side in SIDES if side == "none" or "attention_mask" in models.inputs(name)],
)
def test_logits_loss_and_gradients(name: str, side: str) -> None:
    check(name, side, torch.float32)


@pytest.mark.parametrize("name", ["Llama", "Gemma 2", "gpt-oss", "BART"])
def test_bfloat16(name: str) -> None:
    check(name, "right", torch.bfloat16)


WAYS = {
    "greedy": {},
    "beam": {"num_beams": 3},
    "static cache": {"cache_implementation": "static"},
    "static cache, beam": {"cache_implementation": "static", "num_beams": 2},
    "no cache": {"use_cache": False},
    "prefill in chunks": {"prefill_chunk_size": 5},
}


def generate(name: str, implementation: str, side: str, **options: Any) -> Tensor:
    model = build(name, implementation)
    inputs = {key: x for key, x in models.inputs(name, side).items() if key != "labels"}
    if name == "Whisper":  # whose own generate() is about languages and timestamps
        return transformers.GenerationMixin.generate(model, **inputs, do_sample=False, max_new_tokens=12, **options)
    return model.generate(**inputs, do_sample=False, max_new_tokens=12, **options)


@pytest.mark.parametrize(
    ("name", "way"),
    # The library prefills decoders alone in chunks.
    [(n, way) for n in GENERATING for way in WAYS if way != "prefill in chunks" or n not in ("T5", "BART", "Whisper")],
)
def test_generate_gives_the_same_tokens(name: str, way: str) -> None:
    for side in ("none", "left"):
        eager, found = (generate(name, implementation, side, **WAYS[way]) for implementation in ("eager", "fastattn"))
        assert torch.equal(eager, found), side
