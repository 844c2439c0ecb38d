"""The suite of whole models, on tiny ones."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import cli
from benchmarks.measurements import RAN, WRONG, CaseResult, Measurement, Run
from benchmarks.models import harness
from benchmarks.models.cases import BERT, LLAMA, MISTRAL, MODELS, ModelCase
from benchmarks.models.measurements import ModelRun
from benchmarks.models.work import in_float64, make_batch, make_model, prepare, with_attention
from benchmarks.report import model_plot
from benchmarks.timing import Effort

from ..samples import CPU, ScriptedClock, sample_run

SMALL = {"vocab_size": 50, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 8}
TINY_LLAMA = dataclasses.replace(LLAMA, **SMALL, num_key_value_heads=2)
TINY_MISTRAL = dataclasses.replace(MISTRAL, **SMALL, num_key_value_heads=2, sliding_window=5)
TINY_BERT = dataclasses.replace(BERT, **SMALL, num_key_value_heads=8)
TINY = (
    ModelCase(TINY_LLAMA, "prefill", (24,), "float32"),
    ModelCase(TINY_LLAMA, "decode", (24,), "float32"),
    ModelCase(TINY_LLAMA, "train", (24, 24), "bfloat16"),
    ModelCase(TINY_MISTRAL, "prefill", (24,), "bfloat16"),
    ModelCase(TINY_BERT, "encode", (24, 9, 1), "float32"),
    ModelCase(TINY_BERT, "train", (24, 9, 1), "float32"),
)
EFFORT = Effort(budget=0.0, min_rounds=2)


@pytest.fixture(autouse=True)
def transformers() -> Any:
    found = pytest.importorskip("transformers")
    harness.register()
    return found


def run_tiny(case: ModelCase) -> dict[str, Measurement]:
    result = harness.run_model_case(case, harness.RIVALS, CPU, EFFORT, ScriptedClock())
    return {m.rival: m for m in result.measurements}


def bench(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return cli.run(parser.parse_args(("--suite", "models", "--budget", "0.001", *arguments)))


@pytest.mark.parametrize("case", TINY, ids=lambda case: f"{case.family} {case.name}")
def test_every_implementation_is_right_and_is_timed(case: ModelCase) -> None:
    found = run_tiny(case)
    assert {name: m.status for name, m in found.items()} == {"fastattn": RAN, "sdpa": RAN, "eager": RAN}
    assert [m.ours for m in found.values()] == [True, False, False]
    outputs = found["fastattn"].errors
    assert ("loss" in outputs) == (case.work == "train")
    if case.family == "llama" and case.work == "train":
        assert "model.layers.0.self_attn.k_proj.weight" in outputs


@pytest.mark.parametrize("case", TINY, ids=lambda case: f"{case.family} {case.name}")
def test_attention_that_ignores_what_is_hidden_or_seen_is_not_timed(
    case: ModelCase, transformers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sees_the_first_half(module: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> Any:
        some = slice(None, (key.shape[2] + 1) // 2)
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key[:, :, some], value[:, :, some], enable_gqa=True
        )
        return out.transpose(1, 2), None

    monkeypatch.setitem(transformers.AttentionInterface._global_mapping, "fastattn", sees_the_first_half)
    found = run_tiny(case)
    assert found["fastattn"].status == WRONG
    assert "is off by" in found["fastattn"].reason
    assert found["sdpa"].status == RAN


def test_implementations_share_the_weights_and_calls_leave_them_and_the_cache_alone() -> None:
    for case in TINY:
        model, batch = make_model(case, CPU), make_batch(case, CPU)
        twin = with_attention(model, "fastattn")
        assert twin.config._attn_implementation == "fastattn"
        assert model.config._attn_implementation == "eager"
        assert all(p is q for p, q in zip(model.parameters(), twin.parameters(), strict=True))
        before = [p.detach().clone() for p in model.parameters()]
        call = prepare(case, twin, batch)
        first = [x.clone() for x in call()]
        assert all(torch.equal(x, y) for x, y in zip(first, call(), strict=True))
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_a_decoding_step_is_the_last_token_of_the_whole() -> None:
    decode = TINY[1]
    model, batch = in_float64(make_model(decode, CPU)), make_batch(decode, CPU)
    (whole,) = prepare(dataclasses.replace(decode, work="prefill", lengths=(25,)), model, batch)()
    (step,) = prepare(decode, model, batch)()
    assert step.shape == (1, 1, 50)
    assert (whole - step).abs().max() < 1e-5 * whole.abs().max()


def test_padding_has_no_label_and_does_not_count() -> None:
    case = TINY[-1]
    batch = make_batch(case, CPU)
    assert batch.real.sum(1).tolist() == [24, 9, 1]
    assert ((batch.labels == -100) == (batch.real == 0)).all()
    assert case.tokens == 34
    assert TINY[1].tokens == 1
    assert prepare(TINY[4], make_model(TINY[4], CPU), batch)()[0].shape == (34, 2)


def test_the_suite_has_every_row_in_both_dtypes() -> None:
    assert len(set(MODELS)) == len(MODELS)
    rows = {(case.family, case.work, case.seqlen) for case in MODELS}
    assert rows == {
        *(("llama", work, seqlen) for work in ("prefill", "decode") for seqlen in (512, 2048)),
        *(("llama", "train", 512), ("mistral", "prefill", 2048), ("bert", "encode", 512), ("bert", "train", 512)),
    }
    assert {(case.dtype, case.family, case.work, case.seqlen) for case in MODELS} == {
        (dtype, *row) for dtype in ("float32", "bfloat16") for row in rows
    }


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"work": "chat"}, "work must be one of prefill, decode, encode, train, got 'chat'"),
        ({"dtype": "int8"}, "dtype must be one of float32, bfloat16, float16, float64, got 'int8'"),
        ({"lengths": ()}, r"lengths must hold positive numbers, got \(\)"),
        ({"lengths": (3, 2)}, r"lengths must be equal for prefill, which has no padding, got \(3, 2\)"),
    ],
)
def test_cases_that_make_no_sense_are_refused(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        dataclasses.replace(TINY[0], **fields)


def test_the_command_prints_saves_and_plots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    image = pytest.importorskip("matplotlib.image")
    monkeypatch.setattr(cli, "MODELS", TINY)
    saved, picture = tmp_path / "run.json", tmp_path / "models.png"
    assert bench("--dtype", "float32", "--json", str(saved), "--plot", str(picture)) == cli.OK
    run = ModelRun.load(saved)
    assert [result.case for result in run.results] == [case for case in TINY if case.dtype == "float32"]
    assert ModelRun.from_json(run.to_json()).to_json() == run.to_json()
    assert all(len(m.seconds) >= 5 for result in run.results for m in result.measurements)
    with pytest.raises(ValueError, match="expected a benchmark document of format 1, got 'models 1'"):
        Run.load(saved)
    with pytest.raises(ValueError, match="expected a benchmark document of format 'models 1', got 1"):
        ModelRun.from_json(sample_run().to_json())
    pixels = torch.from_numpy(image.imread(picture))[..., :3]
    for color in ("D55E00", "009E73"):
        rgb = torch.tensor([int(color[i : i + 2], 16) / 255 for i in (0, 2, 4)])
        assert ((pixels - rgb).abs().amax(dim=-1) < 0.01).sum() > 200
    printed = capsys.readouterr().out
    for words in (
        "tokens/s",
        "Transformers",
        "bert: encode B3 S24 float32 padded 24+9+1",
        "geometric mean of the ratios",
    ):
        assert words in printed


@pytest.mark.parametrize("finished", [0, 1])
def test_an_interrupted_run_keeps_what_it_found(
    finished: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def until_interrupted(*arguments: Any) -> Iterator[CaseResult[ModelCase]]:
        yield from list(harness.run_model_cases(TINY[:finished], *arguments[1:]))
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "MODELS", TINY)
    monkeypatch.setattr(cli, "run_model_cases", until_interrupted)
    assert bench("--json", str(tmp_path / "run.json")) == cli.OK
    assert [result.case for result in ModelRun.load(tmp_path / "run.json").results] == list(TINY[:finished])
    assert f"interrupted after {finished} of {len(TINY)} cases" in capsys.readouterr().err


def test_nothing_to_plot_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is nothing to plot"):
        model_plot.plot_models(ModelRun({}, []), tmp_path / "x.png")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--suite", "models,quick"), "--suite models measures whole models and stands alone, got 'models,quick'"),
        (("--backend", "cpu"), "--suite models has models choose the backend, expected --backend auto"),
        (("--family", "gpt"), "--family knows llama, mistral, bert; got 'gpt'"),
        (("--rivals", "none", "--plot", "x.png"), "--plot of --suite models shows ratios"),
        (("--threads", "0"), "--threads must be at least 1, got 0"),
    ],
)
def test_bad_values_give_a_sentence(
    arguments: tuple[str, ...], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(*arguments) == cli.BAD_ARGUMENT
    assert sentence in capsys.readouterr().err


def test_without_transformers_a_sentence_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert bench() == cli.BAD_ARGUMENT
    assert "--suite models: fastattn.integrations.huggingface needs transformers>=4.57" in capsys.readouterr().err
