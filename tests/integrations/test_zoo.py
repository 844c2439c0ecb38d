"""The zoo finds what differs, and its table in docs/huggingface.md is of the classes that there are."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
import transformers

from fastattn.integrations import huggingface
from tests.integrations import zoo
from tests.integrations.huggingface_models import VERSION

pytestmark = pytest.mark.skipif(VERSION < (5, 20), reason="the zoo is of the classes of transformers 5")

SAMPLE = {
    "AfmoeForCausalLM": zoo.EQUAL,
    "BambaForCausalLM": zoo.EQUAL,
    "BertForMaskedLM": zoo.EQUAL,
    "BltForCausalLM": zoo.EMPTY_ROWS,
    "DeepseekV3ForCausalLM": zoo.EQUAL,
    "DoryForCausalLM": zoo.EQUAL,  # saturated scores, nearest to the tolerance
    "FalconForCausalLM": zoo.REFUSED,
    "GPT2LMHeadModel": zoo.EQUAL,
    "GlmMoeDsaForCausalLM": zoo.REFUSED,
    "MBartForConditionalGeneration": zoo.EQUAL,
    "T5ForConditionalGeneration": zoo.EQUAL,
    "XLNetLMHeadModel": zoo.REFUSED,
}


@pytest.fixture(autouse=True)
def counted() -> Iterator[None]:
    zoo.count_calls()
    yield
    huggingface.register()


@pytest.mark.parametrize("name", SAMPLE)
def test_sample(name: str) -> None:
    outcome = zoo.compare(zoo.classes()[name], name)
    assert outcome.outcome == SAMPLE[name], outcome


def another(meaning: str) -> Any:
    """An attention function that does not mean what eager attention does."""

    def function(module: Any, q: Any, k: Any, v: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
        zoo.CALLS += 1
        if meaning == "sees everything":
            mask, kwargs["is_causal"] = None, False
        out, weights = huggingface.attention_forward(module, q, k, v, mask, *args, **kwargs)
        return (out * 1.01 if meaning == "larger by a hundredth" else out), weights

    return function


@pytest.mark.parametrize("meaning", ["sees everything", "larger by a hundredth"])
@pytest.mark.parametrize(
    "name", ["LlamaForCausalLM", "BartForConditionalGeneration", "BertForMaskedLM", "DoryForCausalLM"]
)
def test_differences_are_found(name: str, meaning: str) -> None:
    transformers.AttentionInterface.register("fastattn", another(meaning))
    outcome = zoo.compare(zoo.classes()[name], name)
    assert outcome.outcome == zoo.DIFFERENT, outcome


def test_what_changes_nothing_is_found() -> None:
    def uncounted(*args: Any, **kwargs: Any) -> Any:
        return huggingface.attention_forward(*args, **kwargs)

    transformers.AttentionInterface.register("fastattn", uncounted)
    outcome = zoo.compare("causal", "LlamaForCausalLM")
    assert outcome.outcome == zoo.DIFFERENT
    assert outcome.why == "accepted, and nothing changed"


def test_a_class_that_hangs_or_crashes_does_not_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert zoo.in_process("causal", "LlamaForCausalLM") == zoo.Outcome("LlamaForCausalLM", "causal", zoo.EQUAL)
    monkeypatch.setattr(zoo, "compare", lambda kind, name: os._exit(3))
    assert zoo.in_process("causal", "LlamaForCausalLM").why == "its process ended"
    monkeypatch.setattr(zoo, "SECONDS", 0.5)
    monkeypatch.setattr(zoo, "compare", lambda kind, name: time.sleep(20))
    assert zoo.in_process("causal", "LlamaForCausalLM").why == "over 0.5 seconds"


# ----------------------------------------------------------------------------------------------------------- the table


def listed() -> dict[str, str]:
    """The outcome of each class in the table of the page."""
    part = zoo.PAGE.read_text().split(zoo.BEGIN)[1].split(zoo.END)[0]
    rows = re.findall(r"^\| ([^|]+), \d+ \| [^|]* \| ([^|]+) \|$", part, flags=re.MULTILINE)
    return {name: outcome for outcome, names in rows for name in names.split(", ")}


def test_table_is_of_the_classes_that_there_are() -> None:
    of_version = re.search(r"Transformers ([\d.]+), (\d+) classes", zoo.PAGE.read_text())
    assert of_version is not None
    assert len(listed()) == int(of_version[2])
    assert set(listed().values()) <= set(zoo.OUTCOMES)
    if of_version[1] == transformers.__version__:
        assert listed().keys() == zoo.classes().keys()


def test_table_has_none_that_are_silently_different() -> None:
    outcomes = list(listed().values())
    assert zoo.DIFFERENT not in outcomes
    assert outcomes.count(zoo.EQUAL) >= 187
    assert outcomes.count(zoo.EQUAL) + outcomes.count(zoo.IN_PART) >= 200
    assert outcomes.count(zoo.NOT_RUN) <= 12


def test_table_says_what_the_sample_gives() -> None:
    assert {name: listed()[name] for name in SAMPLE} == SAMPLE


def test_writing_the_table(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{zoo.BEGIN}\nold\n{zoo.END}\nafter\n")
    monkeypatch.setattr(zoo, "PAGE", page)
    found = [zoo.Outcome("B", "causal", zoo.EQUAL), zoo.Outcome("C", "masked", zoo.REFUSED, "why")]
    zoo.write([*found, zoo.Outcome("A", "causal", zoo.EQUAL)])
    assert listed() == {"A": zoo.EQUAL, "B": zoo.EQUAL, "C": zoo.REFUSED}
    assert page.read_text().startswith("before\n")
    assert page.read_text().endswith("after\n")
