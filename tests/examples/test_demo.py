"""The demo in a tiny setting: every part runs, checkpoints are whole, a resumed run is the uninterrupted one."""

from __future__ import annotations

import dataclasses
import datetime
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fastattn
from examples import checkpoint, dates, demo, seq2seq, text, train_lm
from examples.progress import Progress
from examples.training import Settings, Training, next_token_loss

TINY = [
    *("--batch=4", "--context=24", "--embedding-dim=16", "--hidden-dim=32", "--heads=2", "--layers=1"),
    *("--characters=200000", "--generate=8"),
]


@pytest.fixture(scope="module")
def corpus() -> text.Corpus:
    return text.standard_library(200_000)


def tiny(**changes: Any) -> Settings:
    sizes = {"batch": 4, "context": 24, "embedding_dim": 16, "hidden_dim": 32, "heads": 2, "layers": 1}
    return Settings(**{**sizes, **changes})


def lm(*argv: str | Path) -> int:
    return train_lm.main([*TINY, *map(str, argv)])


def assert_same_state(one: Any, other: Any, where: str = "state") -> None:
    """Equal bit for bit, but for the times that steps took."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one.keys() - {"seconds"}:
            assert_same_state(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same_state(a, b, f"{where}[{i}]")
    else:
        assert one == other, where


# ------------------------------------------------------------------------------------------------------------ text


def test_the_corpus_is_real_text_and_its_tokens_give_it_back(corpus: text.Corpus) -> None:
    written = corpus.decode(corpus.train)
    assert "import " in written
    assert "def " in written
    assert torch.equal(corpus.encode(written[:500]), corpus.train[:500])
    assert len(corpus.train) + len(corpus.validation) <= 200_000
    assert corpus.decode(corpus.validation) not in written


def test_the_corpus_is_the_same_every_time(corpus: text.Corpus) -> None:
    again = text.standard_library(200_000)
    assert torch.equal(again.train, corpus.train)
    assert again.fingerprint == corpus.fingerprint != text.standard_library(100_000).fingerprint


def test_losses_of_counting_against_counting() -> None:
    tokens = torch.tensor([0, 1, 0, 0, 1, 2])
    small = text.Corpus("abc", tokens, torch.tensor([0, 1, 1]), 1)
    # Counts plus one: characters 4, 3, 2 of 9; after 0: 0 twice, 1 three times; after 1: 0 twice, 2 twice, 1 once.
    counted = torch.tensor([4 / 9, 3 / 9, 3 / 9]).double().log().mean().neg().item()
    assert small.unigram_loss() == pytest.approx(counted)
    paired = torch.tensor([3 / 6, 1 / 5]).double().log().mean().neg().item()
    assert small.bigram_loss() == pytest.approx(paired)


def test_unknown_characters_and_too_little_text_get_a_sentence(corpus: text.Corpus) -> None:
    with pytest.raises(ValueError, match="characters of the corpus, got 'é'"):
        corpus.encode("é")
    with pytest.raises(ValueError, match="too few sources"):
        text.standard_library(10)


# -------------------------------------------------------------------------------------------------------- training


def mixed(corpus: text.Corpus) -> text.Corpus:
    """The same text, with every tenth piece of it held out.

    The few files that so small a corpus holds out differ from version to version of Python, and on some they are so
    unlike the others that a tiny model can learn nothing of use for them.
    """
    pieces = torch.cat([corpus.train, corpus.validation]).split(1000)
    train = torch.cat([piece for i, piece in enumerate(pieces) if i % 10])
    return dataclasses.replace(corpus, train=train, validation=torch.cat(pieces[::10]))


def test_the_model_learns_and_agrees_with_torch(corpus: text.Corpus) -> None:
    corpus = mixed(corpus)
    training = Training(tiny(steps=240, learning_rate=1e-2), corpus)
    before = training.validation_loss("fastattn")
    for _ in range(240):
        training.advance()
    after = training.validation_loss("fastattn")
    assert before > 4.0
    assert after < corpus.unigram_loss() - 0.3
    assert max(training.differences()[:20]) < 1e-5
    assert after == pytest.approx(training.validation_loss("torch"), abs=0.02)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what computed attention: fastattn's backends and "torch"."""
    names: list[str] = []

    def note(name: str, function: Any) -> Any:
        return lambda *args, **kwargs: (names.append(name), function(*args, **kwargs))[1]

    for backend in fastattn.backends.dispatch.BACKENDS:
        monkeypatch.setattr(backend, "forward", note(backend.name, backend.forward))
    theirs = torch.ops.aten.scaled_dot_product_attention
    monkeypatch.setattr(torch.ops.aten, "scaled_dot_product_attention", note("torch", theirs))
    return names


def test_each_arm_computes_on_its_own_attention(corpus: text.Corpus, ran: list[str]) -> None:
    """Otherwise their agreement would mean nothing."""
    training = Training(tiny(steps=1, backend="reference"), corpus)
    training.validation_loss("fastattn", batches=1)
    assert set(ran) == {"reference"}
    ran.clear()
    training.validation_loss("torch", batches=1)
    assert set(ran) == {"torch"}


def test_the_learning_rate_rises_and_then_falls_to_a_tenth() -> None:
    settings = tiny(steps=100, learning_rate=1.0)
    rates = [settings.rate(step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[10] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)


def test_the_loss_is_of_the_next_character() -> None:
    """A model that knows the next character has no loss, one that repeats the current one has."""
    tokens = torch.tensor([[1, 2, 3, 4]])

    def knows(shift: int) -> Any:
        return lambda ids: torch.nn.functional.one_hot((ids + shift) % 9, 9).float() * 100.0

    assert next_token_loss(knows(1), tokens).item() == pytest.approx(0.0)
    assert next_token_loss(knows(0), tokens).item() == pytest.approx(100.0)


# ------------------------------------------------------------------------------------------- checkpoint and resume


def test_an_interrupted_and_resumed_run_is_the_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = ["--steps=10", "--save-every=4", "--validate-every=2", "--dropout=0.1"]
    lm(*options, "--out", whole)

    advance = Training.advance

    def interrupted(training: Training) -> None:
        if training.step == 6:
            raise KeyboardInterrupt
        advance(training)

    monkeypatch.setattr(Training, "advance", interrupted)
    assert lm(*options, "--out", parts) == 130
    monkeypatch.setattr(Training, "advance", advance)
    torch.manual_seed(1234)  # whatever the state of this process, the checkpoint's counts
    capsys.readouterr()
    lm(*options, "--out", parts, "--resume")
    assert "resumed at step 4" in capsys.readouterr().out

    one, other = (torch.load(folder / train_lm.CHECKPOINT, weights_only=True) for folder in (whole, parts))
    assert one["step"] == 10
    assert len(one["arms"]["fastattn"]["losses"]) == 10
    assert_same_state(one, other)


def test_a_run_of_another_seed_differs(corpus: text.Corpus) -> None:
    """So the equality above is not empty."""
    one, other = Training(tiny(steps=1), corpus), Training(tiny(steps=1, seed=1), corpus)
    one.advance()
    other.advance()
    with pytest.raises(AssertionError):
        assert_same_state(one.state(), other.state())


@pytest.mark.parametrize("change", ["--learning-rate=0.1", "--dropout=0.2", "--characters=150000", "--steps=4"])
def test_resuming_with_other_settings_is_refused(
    change: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lm("--steps=2", "--out", tmp_path) == 0
    capsys.readouterr()
    assert lm("--steps=2", change, "--out", tmp_path, "--resume") == 2
    assert "but this run has" in capsys.readouterr().err


def test_resuming_from_nothing_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lm("--steps=2", "--out", tmp_path, "--resume") == 2
    assert "there is no checkpoint to resume from" in capsys.readouterr().err


def test_a_failed_save_leaves_the_former_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.pt"
    checkpoint.save({"settings": {}, "step": 1}, path)

    def half(state: Any, file: Any) -> None:
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save({"settings": {}, "step": 2}, path)
    assert checkpoint.load(path, {})["step"] == 1
    assert list(tmp_path.iterdir()) == [path]


# ----------------------------------------------------------------------------------------------------------- dates


def test_dates_are_written_as_they_are() -> None:
    written = {dates.write(datetime.date(2001, 3, 2), random.Random(n)) for n in range(60)}
    assert written >= {"2 march 2001", "march 2nd, 2001", "friday, 2 march 2001", "2.3.2001", "2-mar-2001"}


def test_every_date_is_either_trained_or_held_out() -> None:
    seen, unseen = dates.split(seed=3, held_out=500)
    assert len(unseen) == 500
    assert not set(seen) & set(unseen)
    assert len(set(seen) | set(unseen)) == dates.DATES


def test_batches_are_padded_and_masked() -> None:
    texts, days = ["2.3.2001", "friday, 2 march 2001"], [datetime.date(2001, 3, 2)] * 2
    batch = dates.make_batch(texts, days)
    assert batch.real.sum(dim=1).tolist() == [len(t) for t in texts]
    for row, real, written in zip(batch.sources, batch.real, texts, strict=True):
        assert dates.decode(row[real]) == written
    assert batch.targets.shape == (2, dates.TARGET_LENGTH)
    assert dates.decode(batch.targets[0]) == "2001-03-02"


def test_every_character_of_every_date_has_a_token_of_its_own() -> None:
    style = random.Random(0)
    for day in dates.split(seed=0, held_out=1000)[1]:
        written = dates.write(day, style)
        assert dates.decode(torch.tensor(dates.encode(written))) == written


def test_seq2seq_learns_and_measures_on_held_out_dates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--steps=150", "--batch=32", "--learning-rate=4e-3", "--held-out=20", "--out", str(tmp_path)]
    assert seq2seq.main(argv) == 0
    out = capsys.readouterr().out
    first, last = (float(found) for found in re.findall(r"loss ([\d.]+)", out)[::5])
    assert last < 1.3 < first
    matches = re.search(r"exact matches on held-out dates: (\d+) of 20, ([\d.]+)%", out)
    assert matches is not None
    assert float(matches[2]) == pytest.approx(5.0 * int(matches[1]))
    assert "not judged: 90% exact matches are required of runs of at least 400 steps" in out


@pytest.mark.parametrize(
    ("right", "steps", "ok"), [(0, 400, False), (89, 400, False), (90, 400, True), (0, 500, False), (0, 399, True)]
)
def test_a_full_run_must_read_nine_of_ten_dates(right: int, steps: int, ok: bool) -> None:
    verdict, sentence = seq2seq.judge(right, 100, steps)
    assert verdict == ok
    assert sentence.startswith("FAILED: ") != ok


def test_a_full_run_that_learnt_nothing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(seq2seq, "_train", lambda *args: None)
    assert seq2seq.main(["--held-out=20", "--out", str(tmp_path)]) == 1
    assert "FAILED: 0.0% exact matches, at least 90% are required" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------- the whole


def test_the_whole_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(["--quick", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    for part in demo.RUNNERS:
        assert re.search(rf"==== {part}: \d+ s, ok ====", out)
    assert "ok: all " in out
    assert "the training losses agree in the first 6 steps; the final validation losses agree" in out
    assert "tokens/s, median" in out
    assert "exact matches on held-out dates" in out
    picture = (tmp_path / train_lm.PICTURE).read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    assert picture.rstrip().endswith(b"IEND\xaeB`\x82")
    assert checkpoint.load(tmp_path / train_lm.CHECKPOINT, {})["step"] == 6


def test_a_failing_part_fails_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(demo.RUNNERS, "validate", lambda argv: 1)
    assert demo.main(["--parts=validate", "--out", str(tmp_path)]) == 1


def test_curves_that_part_are_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    advance = Training.advance

    def astray(training: Training) -> None:
        advance(training)
        training.arms["torch"].losses[-1] += 0.01

    monkeypatch.setattr(Training, "advance", astray)
    assert lm("--steps=2", "--out", tmp_path) == 1
    assert "the training losses DO NOT AGREE in the first 2 steps" in capsys.readouterr().out


def test_models_that_part_late_are_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    advance = Training.advance

    def astray(training: Training) -> None:
        advance(training)
        if training.step > train_lm.EARLY:
            with torch.no_grad():
                for parameter in training.arms["torch"].model.parameters():
                    parameter.mul_(1.5)

    monkeypatch.setattr(Training, "advance", astray)
    assert lm("--steps=22", "--out", tmp_path) == 1
    out = capsys.readouterr().out
    assert "the training losses agree in the first 20 steps; the final validation losses DO NOT AGREE" in out


def test_the_demo_as_a_program(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "examples.demo", "--quick", "--parts=seq2seq", "--threads=1", "--out"]
    ran = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, cwd=Path(demo.__file__).parents[1])
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "exact matches" in ran.stdout


def test_without_a_terminal_progress_is_a_few_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("work", total=100, start=40, lines=5) as progress:
        for _ in range(60):
            progress.advance(loss=1.0)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines] == [f"work: step {n} of 100" for n in (60, 80, 100)]


def test_on_a_terminal_progress_is_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with Progress("work", total=3) as progress:
        for _ in range(3):
            progress.advance(loss=1.0)
    streams = capsys.readouterr()
    assert "3/3" in streams.err
    assert streams.out == ""


@pytest.mark.parametrize(
    ("run", "argv", "message"),
    [
        (demo.main, ["--parts=nope"], "--parts knows validate, lm, seq2seq, got 'nope'"),
        (demo.main, ["--seed=-1"], "--seed must not be negative"),
        (demo.main, ["--threads=0"], "--threads must be at least 1"),
        (demo.main, ["--device=tpu"], "--device must be cpu, cuda or cuda:N"),
        (train_lm.main, ["--backend=nope"], "--backend must be one of "),
        (train_lm.main, ["--steps=0"], "--steps must be at least 1, got 0"),
        (train_lm.main, ["--save-every=0"], "--save-every must be at least 1, got 0"),
        (train_lm.main, ["--learning-rate=0"], "--learning-rate must be positive, got 0.0"),
        (train_lm.main, ["--generate=-1"], "--generate must not be negative, got -1"),
        (train_lm.main, [*TINY, "--heads=3"], "num_heads"),
        (train_lm.main, [*TINY, "--context=999999"], "--context must be less than the "),
        (seq2seq.main, ["--batch=0"], "--batch must be at least 1, got 0"),
        (seq2seq.main, ["--held-out=70000"], "--held-out must be at most 36524"),
    ],
)
def test_bad_values_get_a_sentence(
    run: Any, argv: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*argv, "--out", str(tmp_path)]) == 2
    streams = capsys.readouterr()
    assert streams.err.startswith("error: ")
    assert message in streams.err
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert demo.main(["--out", str(tmp_path / "file")]) == 2
    assert "--out must be a folder" in capsys.readouterr().err
