"""Runs cases of whole models: correctness first, then interleaved timing, then memory."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from fastattn.cli.tolerance import bound, eager_error

from ..gate import Expected
from ..harness import admit, measure
from ..measurements import CaseResult
from ..timing import Clock, Effort, clock_for
from .cases import ModelCase
from .measurements import OURS
from .work import Batch, in_float64, make_batch, make_model, matrices, prepare, with_attention

RIVALS = ("sdpa", "eager")
"""The attention implementations of the library itself."""


def register() -> str:
    """Registers fastattn in transformers and returns the version of transformers.

    Raises ImportError, with a sentence, if transformers is missing or too old.
    """
    from fastattn.integrations import huggingface

    huggingface.register()
    return str(importlib.import_module("transformers").__version__)


def run_model_cases(
    cases: Sequence[ModelCase], rivals: Sequence[str], device: torch.device, effort: Effort
) -> Iterator[CaseResult[ModelCase]]:
    """Yields the result of each case as soon as it is known. Call `register` first."""
    clock = clock_for(device)
    for case in cases:
        yield run_model_case(case, rivals, device, effort, clock)


def run_model_case(
    case: ModelCase, rivals: Sequence[str], device: torch.device, effort: Effort, clock: Clock
) -> CaseResult[ModelCase]:
    """Measures fastattn and the rivals on the same weights, if their results are correct."""
    model, batch = make_model(case, device), make_batch(case, device)
    expected = expect_model(case, model, batch)
    verdicts = {
        name: admit(
            name,
            name == OURS,
            lambda name=name: [prepare(case, with_attention(model, name), batch)],  # type: ignore[misc]
            expected,
        )
        for name in (OURS, *rivals)
    }
    return measure(case, verdicts, device, effort, clock)


def expect_model(case: ModelCase, model: Any, batch: Batch) -> dict[str, Expected]:
    """The outputs of `prepare` in float64, with the limits of `fastattn.cli.tolerance`.

    The limits follow from the error of eager attention in the model's own dtype.
    """
    names = ("loss", *matrices(model)) if case.work == "train" else ("logits",)
    truths = prepare(case, in_float64(model), batch)()
    eager = prepare(case, with_attention(model, "eager"), batch)()
    return {
        name: Expected(truth, bound(truth, eager_error(other, truth), case.torch_dtype))
        for name, truth, other in zip(names, truths, eager, strict=True)
    }
