"""`python -m fastattn`: what it reports is so, a wrong backend is found, bad arguments get a sentence."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn.autograd import call
from fastattn.backends import Grads, Needs, Results, dispatch
from fastattn.backends.reference import ReferenceBackend
from fastattn.cli import main, tolerance
from fastattn.cli.validate import oracle
from fastattn.cli.validate.cases import CASES, Case
from fastattn.cli.validate.checks import compare, run_case
from fastattn.problem import Inputs, Problem

CPU = torch.device("cpu")
FLOAT32 = ["--dtype", "float32"]


# ------------------------------------------------------------------------------------------------------------ info


def test_info_names_versions_processor_and_every_backend(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert f"fastattn  {fastattn.__version__}" in text
    assert f"torch     {torch.__version__}" in text
    for backend in dispatch.BACKENDS:
        assert f"  {backend.name:<10}{backend.why_unavailable() or 'available'}" in text


def test_info_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["versions"]["python"] == platform.python_version()
    assert report["versions"]["torch"] == torch.__version__
    assert report["cpu"]["threads"] == torch.get_num_threads()
    assert report["backends"] == {backend.name: backend.why_unavailable() for backend in dispatch.BACKENDS}
    assert len(report["devices"]) == torch.cuda.device_count()


def test_info_says_why_a_backend_is_not_available(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use_backend(monkeypatch, Absent())
    assert main(["info"]) == 0
    assert "absent    there is no such machine." in capsys.readouterr().out


def run_with_bad_instruction_set(*argv: str) -> subprocess.CompletedProcess[str]:
    import fastattn._cpu  # noqa: F401 (no skip: a module that cannot be loaded is a failure)

    command = [sys.executable, "-m", "fastattn", *argv]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "FASTATTN_CPU_ISA": "bad"})


NO_INSTRUCTION_SET = "FASTATTN_CPU_ISA must name an instruction set of this processor"


def test_info_says_what_is_wrong_with_the_environment() -> None:
    ran = run_with_bad_instruction_set("info")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert f"  cpu       {NO_INSTRUCTION_SET}" in ran.stdout
    assert "  reference available" in ran.stdout


def test_validate_refuses_a_bad_environment() -> None:
    ran = run_with_bad_instruction_set("validate")
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.startswith(f"error: {NO_INSTRUCTION_SET}")
    assert len(ran.stderr.splitlines()) == 1


# -------------------------------------------------------------------------------------------------------- validate


def test_validate_passes_on_every_available_backend(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "--short"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for backend in fastattn.available_backends():
        for dtype in ("float32", "bfloat16", "float16", "float64"):
            assert f"{backend} on cpu, {dtype}" in lines
    assert lines[-1].startswith("ok: all ")
    assert not any("FAIL" in line for line in lines)


def test_validate_prints_our_error_beside_eagers_and_the_bound(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", *FLOAT32, "--backend", "reference", "--only", "forward and backward"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines if line.startswith("options")]
    assert [row[4] for row in rows] == ["out", "lse", "dq", "dk", "dv", "order"]
    for row in rows[:5]:
        error, eager, bound = map(float, row[5:8])
        assert 0 < error <= bound
        assert bound >= 2 * eager > 0


def test_validate_full_lists_every_result(capsys: pytest.CaptureFixture[str]) -> None:
    case = next(case for case in CASES if case.name == "softcap")
    checks, _ = run_case(case, "reference", torch.float32, CPU)
    assert main(["validate", *FLOAT32, "--backend", "reference", "--only", "softcap", "--full"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("options       softcap ") for line in lines) == len(checks) > 1


class Wrong(ReferenceBackend):
    """The reference with one thing changed."""

    name = "wrong"

    def __init__(
        self,
        problem: Callable[[Problem], Problem] = lambda p: p,
        inputs: Callable[[Inputs], Inputs] = lambda i: i,
        results: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = lambda out, lse: (out, lse),
        grads: Callable[[Grads], Grads] = lambda g: g,
        decoded: Callable[[Inputs], None] = lambda i: None,
    ) -> None:
        self.problem, self.inputs, self.results, self.grads, self.decoded = problem, inputs, results, grads, decoded

    def forward(self, problem: Problem, inputs: Inputs, for_backward: bool) -> Results:
        out, lse, low = super().forward(self.problem(problem), self.inputs(inputs), for_backward)
        return Results(*self.results(out, lse), low)

    def backward(
        self, problem: Problem, inputs: Inputs, results: Results, dout: Tensor, dlse: Tensor | None, needs: Needs
    ) -> Grads:
        problem, inputs = self.problem(problem), self.inputs(inputs)
        return self.grads(super().backward(problem, inputs, results, dout, dlse, needs))

    def decode(self, problem: Problem, inputs: Inputs) -> tuple[Tensor, Tensor]:
        result = super().decode(problem, inputs)
        self.decoded(inputs)
        return result


class Absent(ReferenceBackend):
    name = "absent"

    def why_unavailable(self) -> str | None:
        return "there is no such machine."


class Choosy(ReferenceBackend):
    """Does no varlen calls, and says so."""

    name = "choosy"

    def why_not(self, problem: Problem) -> str | None:
        return "it does no varlen." if problem.kind == "varlen" else None


class Broken(ReferenceBackend):
    name = "broken"

    def forward(self, problem: Problem, inputs: Inputs, for_backward: bool) -> Results:
        raise RuntimeError("out of luck")


def use_backend(monkeypatch: pytest.MonkeyPatch, backend: ReferenceBackend) -> None:
    """Makes it the only one. Choices are remembered by name, and backends here share theirs: so none is remembered."""
    monkeypatch.setattr(dispatch, "BACKENDS", (backend,))
    monkeypatch.setattr(call, "choose_cached", dispatch.choose)


def _drop(field: str) -> Callable[[Inputs], Inputs]:
    return lambda inputs: inputs._replace(**{field: None})


def _reorder_heads(inputs: Inputs) -> Inputs:
    return inputs._replace(k=inputs.k.roll(1, dims=1), v=inputs.v.roll(1, dims=1))


def _write_past_the_new_keys(inputs: Inputs) -> None:
    inputs.k[:, :, -1] = 1.0


def _problem(**changes: object) -> dict[str, Callable[[Problem], Problem]]:
    return {"problem": lambda problem: dataclasses.replace(problem, **changes)}


def _wider_window(problem: Problem) -> Problem:
    left = None if problem.window_left is None else problem.window_left + 1
    return dataclasses.replace(problem, window_left=left)


MUTANTS = [
    pytest.param({"results": lambda out, lse: (out * 1.001, lse)}, "forward and backward", "out", id="out"),
    pytest.param({"results": lambda out, lse: (out, lse + 1e-3)}, "forward and backward", "lse", id="lse"),
    pytest.param({"grads": lambda g: g._replace(q=-g.q)}, "forward and backward", "dq", id="dq"),
    pytest.param({"grads": lambda g: g._replace(k=g.k * 1.001)}, "forward and backward", "dk", id="dk"),
    pytest.param({"grads": lambda g: g._replace(v=g.v.roll(1, -1))}, "forward and backward", "dv", id="dv"),
    pytest.param({"grads": lambda g: g._replace(bias=g.bias * 2)}, "bias, one for all", "dbias", id="dbias"),
    pytest.param({"grads": lambda g: g._replace(sinks=-g.sinks)}, "sinks", "dsinks", id="dsinks"),
    pytest.param(_problem(window_right=1), "causal", "out", id="causal off by one"),
    pytest.param({"problem": _wider_window}, "window (7, 3)", "out", id="window off by one"),
    pytest.param(_problem(bottom_right=True), "causal, top-left", "out", id="alignment"),
    pytest.param(_problem(softcap=None), "softcap", "out", id="softcap"),
    pytest.param({"inputs": _drop("mask")}, "mask of keys", "out", id="mask"),
    pytest.param({"inputs": _drop("alibi_slopes")}, "ALiBi", "out", id="alibi"),
    pytest.param({"inputs": _drop("kv_lengths")}, "kv_lengths", "out", id="poison past kv_lengths"),
    pytest.param({"inputs": _reorder_heads}, "grouped queries, 6 on 2", "out", id="head order"),
    pytest.param(
        {"inputs": lambda i: i._replace(seed=i.seed + 1)}, "dense, bit for bit", "forward mask", id="dropout mask"
    ),
    pytest.param(
        {"results": lambda out, lse: (out.nan_to_num(), lse.nan_to_num())}, "rows masked out", "lse", id="-inf"
    ),
    pytest.param({"results": lambda out, lse: (out + 1e-9, lse)}, "rows masked out", "hidden out", id="hidden"),
    pytest.param(
        {"results": lambda out, lse: (out.contiguous(), lse)}, "(batch, seqlen,", "order in memory", id="order"
    ),
    pytest.param({"decoded": _write_past_the_new_keys}, "append, contiguous", "rest of k cache", id="cache"),
    pytest.param({"decoded": lambda i: i.v.mul_(1.001)}, "append, paged", "new v", id="new values"),
]


@pytest.mark.parametrize(("changed", "feature", "quantity"), MUTANTS)
def test_validate_finds_a_wrong_backend(
    changed: dict[str, object],
    feature: str,
    quantity: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    use_backend(monkeypatch, Wrong(**changed))  # type: ignore[arg-type]
    assert main(["validate", *FLOAT32, "--only", feature]) == 1
    lines = capsys.readouterr().out.splitlines()
    found = [line for line in lines if feature in line and f" {quantity} " in line and "FAIL" in line]
    assert found, "\n".join(lines)
    assert lines[-1].startswith("FAIL: ")


def test_validate_finds_results_that_change_from_run_to_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[int] = []

    def drift(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(0)
        return out * (1 + 1e-6 * len(calls)), lse

    use_backend(monkeypatch, Wrong(results=drift))
    assert main(["validate", *FLOAT32, "--only", "the same bits"]) == 1
    assert any("out again" in line and "FAIL" in line for line in capsys.readouterr().out.splitlines())


def test_validate_reports_a_call_that_raises_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use_backend(monkeypatch, Broken())
    assert main(["validate", *FLOAT32, "--only", "varlen"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert sum("FAIL  RuntimeError: out of luck" in line for line in lines) > 1


def test_a_refused_feature_is_named_and_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use_backend(monkeypatch, Choosy())
    assert main(["validate", *FLOAT32, "--only", "causal"]) == 0
    assert any(
        "varlen" in line and "not done: it does no varlen." in line for line in capsys.readouterr().out.splitlines()
    )


def test_validating_nothing_is_a_failure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    use_backend(monkeypatch, Choosy())
    assert main(["validate", *FLOAT32, "--short", "--only", "unused rows"]) == 1
    assert "FAIL: nothing was checked" in capsys.readouterr().out


def test_cases_have_names_of_their_own() -> None:
    names = [(case.section, case.name) for case in CASES]
    assert len(set(names)) == len(names)


def test_the_oracle_is_torchs_own_attention() -> None:
    """The yardstick itself, where torch can do the call."""
    from fastattn.cli.validate.data import make_data

    data = make_data(Case("oracle", "grouped", heads=(6, 2), mask="bhqk"), torch.float64, CPU)
    theirs = torch.nn.functional.scaled_dot_product_attention(
        data.q, data.k, data.v, attn_mask=data.options["mask"], enable_gqa=True
    )
    torch.testing.assert_close(oracle.attend(data)[0], theirs, rtol=1e-12, atol=1e-12)


def test_the_oracle_takes_a_scale_of_zero_at_its_word() -> None:
    from fastattn.cli.validate.data import make_data

    data = make_data(Case("oracle", "scale 0", options={"scale": 0.0}), torch.float64, CPU)
    out, lse = oracle.attend(data)
    torch.testing.assert_close(out, data.v.mean(dim=2, keepdim=True).expand_as(out))
    torch.testing.assert_close(lse, torch.full_like(lse, data.k.shape[2]).log())


def test_validate_and_bench_apply_one_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another floor moves the bound of both."""
    from benchmarks import gate
    from benchmarks.cases import Case as BenchCase
    from benchmarks.data import make_data

    monkeypatch.setitem(tolerance.FLOORS, torch.float32, 0.5)
    truth = torch.tensor([4.0, -2.0], dtype=torch.float64)
    assert compare("out", truth, truth, truth, torch.float32).bound == 2.0
    case = BenchCase("dense", 1, 1, 1, 4, 4, 8, 8, "float32")
    expected = gate.expect(case, make_data(case, CPU))["out"]
    largest = expected.values.abs().max().item()
    assert 0.5 * largest <= expected.limit < 0.51 * largest


def test_nan_and_infinities_have_their_places() -> None:
    truth = torch.tensor([1.0, torch.nan, torch.inf], dtype=torch.float64)
    assert tolerance.max_error(truth, truth) == 0.0
    for place, value in ((0, torch.nan), (0, -torch.inf), (1, 1.0), (1, torch.inf), (2, 1.0), (2, -torch.inf)):
        result = truth.clone()
        result[place] = value
        assert tolerance.max_error(result, truth) == torch.inf


PHILOX_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), PHILOX_ANSWERS)
def test_the_oracles_generator_gives_the_published_words(
    counter: tuple[int, int, int, int], key: tuple[int, int], words: tuple[int, ...]
) -> None:
    assert oracle.philox4x32(counter, key) == words


# ----------------------------------------------------------------------------------------------------------- bench


def test_bench_is_the_benchmarks_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    from fastattn.benchmarks.suites import SUITES

    assert main(["bench", "--list"]) == 0
    text = capsys.readouterr().out
    for name, cases in SUITES.items():
        assert f"{name} ({len(cases)} cases)" in text


# ---------------------------------------------------------------------------------------------------- bad arguments


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["validate", "--backend", "nope"], "--backend knows all, "),
        (["validate", "--dtype", "int8"], "--dtype knows all, float32, bfloat16, float16, float64; got 'int8'"),
        (["validate", "--device", "tpu"], "--device must be cpu, cuda or cuda:N, got 'tpu'"),
        (["validate", "--device", "meta"], "--device must be cpu, cuda or cuda:N, got 'meta'"),
        (["validate", "--device", "cuda:99"], "--device cuda:99 does not exist"),
        (["validate", "--only", "nope"], "--only 'nope' names no feature"),
        (["bench", "--suite", "nope"], "--suite knows "),
    ],
)
def test_bad_values_get_a_sentence(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    streams = capsys.readouterr()
    assert streams.err.startswith(f"error: {message}")
    assert streams.out == ""


def test_a_backend_that_is_not_there_cannot_be_validated(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use_backend(monkeypatch, Absent())
    assert main(["validate", "--backend", "absent"]) == 2
    assert "--backend absent is not available here: there is no such machine." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "arguments are required: command"),
        (["nope"], "invalid choice: 'nope'"),
        (["info", "--nope"], "unrecognized arguments: --nope"),
        (["validate", "--short", "--full"], "not allowed with argument --short"),
    ],
)
def test_bad_usage_ends_with_status_2(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(argv)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_help_of_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("info", "validate", "bench"):
        with pytest.raises(SystemExit) as end:
            main([command, "--help"])
        assert end.value.code == 0
        assert f"usage: fastattn {command}" in capsys.readouterr().out


def test_as_a_program_of_its_own() -> None:
    command = [sys.executable, "-m", "fastattn"]
    ok = subprocess.run([*command, "validate", "--only", "softcap"], capture_output=True, text=True)
    assert (ok.returncode, ok.stderr) == (0, "")
    assert "ok: all " in ok.stdout
    bad = subprocess.run([*command, "validate", "--only", "nope"], capture_output=True, text=True)
    assert bad.returncode == 2


def test_a_reader_that_leaves_early_is_no_error() -> None:
    program = subprocess.Popen(
        [sys.executable, "-m", "fastattn", "validate", "--only", "options"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert program.stdout is not None
    assert program.stderr is not None
    program.stdout.readline()
    program.stdout.close()
    assert program.stderr.read() == ""
    assert program.wait() == 141
