"""The command line of the benchmarks, on tiny suites."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import fastattn
from benchmarks import cli
from benchmarks.cases import Case
from benchmarks.measurements import RAN, Run
from benchmarks.rivals import sdpa
from benchmarks.suites import SUITES, dense

from .samples import PEAKS, tiny

BACKENDS = ", ".join(fastattn.available_backends())
TINY_SUITES = {
    "quick": [tiny(seqlen=16), tiny(seqlen=32), tiny(seqlen=16, dtype="bfloat16")],
    "long": [dense("long", seqlen=64, dtype="float32", causal=True)],
}


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The command line on tiny suites, on a machine whose ceilings are known."""
    monkeypatch.setattr(cli, "SUITES", TINY_SUITES)
    monkeypatch.setattr(cli, "measure_peaks", lambda *_: PEAKS)

    def run(*arguments: str) -> int:
        parser = argparse.ArgumentParser()
        cli.add_arguments(parser)
        return cli.run(parser.parse_args(arguments))

    return run


def test_the_command_prints_saves_and_plots(
    command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    threads = torch.get_num_threads()
    saved, picture = tmp_path / "run.json", tmp_path / "plot.png"
    arguments = ("--budget", "0.01", "--threads", "2", "--backend", "auto,reference", "--json", str(saved))
    assert command(*arguments, "--plot", str(picture)) == cli.OK
    assert torch.get_num_threads() == threads
    assert picture.stat().st_size > 10_000
    run = Run.load(saved)
    assert [result.case for result in run.results] == TINY_SUITES["quick"]
    assert run.header["threads"] == 2
    statuses = {m.rival: m.status for m in run.results[0].measurements}
    assert [name for name, status in statuses.items() if status == RAN] == [
        "fastattn",
        "fastattn:reference",
        "sdpa",
        "eager",
    ]
    printed = capsys.readouterr().out
    for words in (
        "geometric mean of the ratios",
        "worst cases",
        "not run",
        "tiny: forward B1 H2 S16 D16 float32",
    ):
        assert words in printed


@pytest.mark.parametrize(
    ("arguments", "cases"),
    [
        (("--suite", "long"), TINY_SUITES["long"]),
        (("--suite", "long,quick"), TINY_SUITES["long"] + TINY_SUITES["quick"]),
        (("--family", "long"), TINY_SUITES["long"]),
        (("--dtype", "bfloat16"), TINY_SUITES["quick"][2:]),
    ],
)
def test_the_command_chooses_cases(
    command: Callable[..., int], tmp_path: Path, arguments: tuple[str, ...], cases: list[Case]
) -> None:
    saved = tmp_path / "run.json"
    assert command(*arguments, "--budget", "0.001", "--rivals", "none", "--json", str(saved)) == cli.OK
    assert [result.case for result in Run.load(saved).results] == cases


def test_a_wrong_result_of_fastattn_fails_the_run(
    command: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    attention = fastattn.attention
    monkeypatch.setattr(fastattn, "attention", lambda *x, **options: 1.1 * attention(*x, **options))
    assert command("--suite", "long", "--budget", "0.001") == cli.WRONG_RESULT
    assert "FAILED: fastattn wrong on long: forward B1 H8 S64 D64 float32 causal" in capsys.readouterr().out


def test_a_wrong_rival_does_not_fail_the_run(
    command: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sdpa, "scaled_dot_product_attention", lambda q, k, v, **_: q)
    assert command("--suite", "long", "--rivals", "sdpa", "--budget", "0.001") == cli.OK
    assert "wrong: out is off by" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--suite", "fast"), "--suite knows quick, long, models; got 'fast'"),
        (("--family", "fast"), "--family knows tiny, long; got 'fast'"),
        (("--suite", "quick", "--family", "long"), "--family knows tiny; got 'long'"),
        (("--dtype", "int8"), "--dtype knows all, float32, bfloat16, float16, float64; got 'int8'"),
        (("--dtype", "float64"), "--dtype float64 leaves no case of those chosen"),
        (("--backend", "gpu"), f"--backend knows all, auto, {BACKENDS}; got 'gpu'"),
        (
            ("--rivals", "sdpa,keras"),
            f"--rivals knows all, {', '.join(cli.RIVALS)}; got 'keras'",
        ),
        (("--device", "tpu"), "--device must be cpu, cuda or cuda:N, got 'tpu'"),
        (("--device", "meta"), "--device must be cpu, cuda or cuda:N, got 'meta'"),
        (("--device", "cuda:99"), "--device cuda:99 does not exist"),
        (("--threads", "0"), "--threads must be at least 1, got 0"),
        (("--budget", "-1"), "--budget must be more than 0 seconds, got -1.0"),
        (("--budget", "nan"), "--budget must be more than 0 seconds, got nan"),
        (("--json", "missing_folder/x.json"), "--json names a file in a folder that does not exist"),
        (
            ("--suite", "long", "--plot", "x.png"),
            "--plot needs cases that differ in the sequence length alone",
        ),
    ],
)
def test_bad_values_give_a_sentence(
    command: Callable[..., int], arguments: tuple[str, ...], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(*arguments) == cli.BAD_ARGUMENT
    captured = capsys.readouterr()
    assert sentence in captured.err
    assert captured.out == ""


def test_the_list_names_every_suite_rival_and_backend() -> None:
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--list"], cwd=root, capture_output=True, text=True, check=True
    )
    for suite, cases in SUITES.items():
        assert f"{suite} ({len(cases)} cases)" in done.stdout
    for case in SUITES["sweep60"]:
        assert f"  sweep60: {case.name}\n" in done.stdout
    assert "rivals: sdpa, eager, flex, flash-attn, xformers" in done.stdout
    assert f"backends: auto, {BACKENDS}" in done.stdout
