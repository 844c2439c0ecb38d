"""The report on the CUDA module: what it reads from the tools, and the arithmetic of its figures, limits and marks."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.inspect import cuda_marks, cuda_module, cuda_report, cuda_simulator, pipes, sass
from benchmarks.inspect.cuda_marks import Counts, Mark
from fastattn.backends.native import cuda

from ...cuda import simulator


def _code(name: str, *lines: str) -> str:
    """As nvdisasm prints a kernel: instructions at their addresses, and labels."""
    text = [f'\t.section\t.text.{name},"ax",@progbits', f".text.{name}:"]
    for i, line in enumerate(lines):
        text.append(f"{line}" if line.endswith(":") else f"        /*{16 * i:04x}*/                   {line} ;")
    return "\n".join(text)


PLAIN = _code(
    "fastattn_sm80_forward_bf16_d64",
    "MOV R1, c[0x0][0x28]",
    "@P0 BRA `(.L_x_4)",
    ".L_x_1:",
    ".L_x_2:",
    "LDGSTS.E.BYPASS.LTC128B.128 [R1], [R2.64]",
    "LDSM.16.M88.4 R4, [R1]",
    "HMMA.16816.F32.BF16 R4, R8, R12, R4",
    "HMMA.16816.F32.BF16 R4, R8, R13, R4",
    "FMNMX.FTZ R4, R4, R5, !PT",
    "@!P1 FFMA R4, R4, R5, R6",
    "MUFU.EX2 R4, R4",
    "@P2 BRA `(.L_x_2)",
    ".L_x_3:",
    "HMMA.16816.F32.BF16 R4, R8, R12, R4",
    "LDS.64 R4, [R1]",
    "LDL R4, [R1]",
    "FSEL R4, R4, -INF, P1",
    "@P2 BRA `(.L_x_3)",
    "@P3 BRA `(.L_x_1)",
    ".L_x_4:",
    "EXIT",
)
TURING = _code(
    "fastattn_sm75_forward_fp16_d64",
    ".L_x_9:",
    "HMMA.1688.F32 R4, R8, R12, R4",
    "HMMA.1688.F32 R4, R8, R13, R4",
    "LDSM.16.MT88.2 R4, [R1]",
    "STS.128 [R1], R4",
    "LDS R4, [R1]",
    "@P2 BRA `(.L_x_9)",
)


def test_loops_of_each_kernel() -> None:
    found = {name: sass.loops(text) for name, text in sass.kernels(f"{PLAIN}\n{TURING}").items()}
    assert {name: [loop.total for loop in loops] for name, loops in found.items()} == {
        "fastattn_sm80_forward_bf16_d64": [5, 8],  # the loop around both is not an innermost one
        "fastattn_sm75_forward_fp16_d64": [6],
    }
    assert [loop.spills for loop in found["fastattn_sm80_forward_bf16_d64"]] == [1, 0]


def test_the_main_loop_has_the_fewest_instructions_per_product() -> None:
    loop = cuda_report.main_loop(sass.loops(PLAIN))
    assert loop.total == 8  # the longer one: 4 for each product, against 5
    assert pipes.work(loop) == pipes.Work(instructions=4, fp32=1, mufu=0.5, ldsm=0.5, lds=0, wavefronts=4)


def test_two_products_of_turing_are_one() -> None:
    assert pipes.work(sass.loops(TURING)[0]) == pipes.Work(6, 0, 0, ldsm=1, lds=1, wavefronts=2 + 4 + 1)


# Of a pair of products: tensor, FP32, MUFU, shared, issue, as a study of FlashAttention-2 worked them out by hand.
@pytest.mark.parametrize(
    ("work", "pair"),
    [
        (pipes.Work(4.48, 1.86, 0.516, 0.281, 0, 1.375), (4, 1.86, 2.06, 2.75, 2.24)),
        (pipes.Work(3.56, 1.36, 0.266, 0.313, 0, 1.5), (4, 1.36, 1.06, 3.0, 1.78)),
    ],
)
def test_limits_of_an_a100(work: pipes.Work, pair: tuple[float, ...]) -> None:
    cycles = pipes.cycles(work, pipes.RATES["A100"])
    assert list(cycles) == ["tensor", "FP32", "MUFU", "shared", "issue"]
    assert [2 * x for x in cycles.values()] == pytest.approx(pair, abs=0.005)


def test_limits_follow_the_rates() -> None:
    work = pipes.Work(4, 2, 1, 0, 0, 3)
    assert list(pipes.cycles(work, pipes.RATES["T4"]).values()) == [4, 1, 2, 3, 1]
    assert list(pipes.cycles(work, pipes.RATES["H100"]).values()) == pytest.approx([1 / 0.6, 0.5, 2, 3, 1])


def test_registers_and_stack() -> None:
    line = "  REG:{} STACK:{} SHARED:128 LOCAL:0 CONSTANT[0]:1432 TEXTURE:0 SURFACE:0 SAMPLER:0\n"
    units = [
        f"\nFatbin elf code:\n================\narch = {arch}\ncode version = [1,8]\n\nResource usage:\n"
        f" Function fastattn_a:\n{line.format(registers, stack)} Function fastattn_b_d64:\n{line.format(7, 0)}"
        for arch, registers, stack in (("sm_80", 212, 8), ("sm_90", 99, 0))
    ]
    found = cuda_module.usage_in("".join(units), "sm_80")
    assert found == {"fastattn_a": (212, 8, 128), "fastattn_b_d64": (7, 0, 128)}
    assert cuda_module.usage_in("".join(units), "sm_75") == {}


def test_names() -> None:
    parsed = cuda_report.parsed
    assert parsed("fastattn_sm80_bwd_dkdv_bf16_d128") == ("sm_80", "bwd_dkdv", "bf16", False, 128)
    assert parsed("fastattn_sm75_forward_fp16_score_mod_d64") == ("sm_75", "forward", "fp16", True, 64)
    assert parsed("fastattn_bwd_preprocess_bf16") is None
    assert parsed("fastattn_sm80_append_kv_bf16") is None


def test_counts() -> None:
    counters: dict[str, Any] = {
        "by_class": {"tensor": 100, "mov": 30, "mufu": 16},
        "warp_instrs": 450,
        "fused_mul_add_pairs": 20,
        "shared_wavefronts": 140,
        "bank_conflicts": 3,
        "global_bytes": 77,
    }
    assert cuda_report.counts_of(counters, scores=256) == Counts(100, 4.3, 4.0, 2.0, 1.4, 3, 77)


def test_marks() -> None:
    assert [mark.met for mark in cuda_marks.of_loop("forward", 64, 3.9)] == [True, False]
    assert [mark.wish for mark in cuda_marks.of_loop("forward", 64, 3.9)] == [False, True]
    assert [mark.met for mark in cuda_marks.of_loop("forward", 128, 2.8004)] == [False, False]  # before rounding
    assert [mark.met for mark in cuda_marks.of_loop("bwd_dkdv", 64, 3.05)] == [True]
    assert cuda_marks.of_loop("bwd_dkdv", 128, 9.0) == []
    as_flash = Counts(0, 5.05, 0, 1.168, 1.46, 0, 1445888)
    assert all(mark.met for mark in cuda_marks.of_whole("forward", 64, True, as_flash))
    for field, value in {"instructions": 5.06, "mufu": 1.17, "wavefronts": 1.47, "conflicts": 1}.items():
        marks = cuda_marks.of_whole("forward", 64, True, as_flash._replace(**{field: value}))
        assert [mark.figure for mark in marks if not mark.met] == [value]
    assert [mark.met for mark in cuda_marks.of_whole("bwd_dkdv", 64, False, as_flash)] == [True]
    assert str(Mark("registers", 3, 2)).split() == ["registers", "3", "at", "most", "2", "not", "met"]


def _reported(monkeypatch: pytest.MonkeyPatch, stack: int, code: str = PLAIN) -> int:
    """Reports on a module of one kernel; returns how many marks it misses."""
    name = "fastattn_sm80_forward_bf16_d64"
    monkeypatch.setattr(cuda, "_cuda", object())
    monkeypatch.setattr(cuda_module, "usage", lambda architecture: {name: cuda_module.Usage(200, stack, 0)})
    monkeypatch.setattr(cuda_module, "loops", lambda architecture: {name: sass.loops(code)})
    return cuda_report.report(["sm_80"], simulate=False)


def test_report_counts_what_is_not_met(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert _reported(monkeypatch, stack=8) == 2  # 8 bytes of stack, and 4.0 instructions where 3.9 are allowed
    printed = capsys.readouterr().out
    assert "2 not met" in printed
    assert "A model, not a measurement: cycles per m16n8k16 on a multiprocessor of A100" in printed
    assert _reported(monkeypatch, stack=0, code=PLAIN.replace("FMNMX", "HMMA.16816.F32.BF16")) == 0  # 8 for 3 products
    assert "all met" in capsys.readouterr().out


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    reason = "needs the PTX simulator ptxsim, which is not here"
    monkeypatch.setattr(cuda_simulator, "missing", lambda: reason)
    _reported(monkeypatch, stack=0)
    assert reason not in capsys.readouterr().out  # not requested
    cuda_report.report(["sm_80"], simulate=True)
    assert reason in capsys.readouterr().out
    monkeypatch.setattr(cuda_module, "usage", lambda architecture: {})
    monkeypatch.setattr(cuda_module, "loops", lambda architecture: {})
    assert cuda_report.report(["sm_90"], simulate=True) == 0
    assert "sm_90: the module was built without machine code for it" in capsys.readouterr().out
    monkeypatch.setattr(cuda, "_cuda", None)
    monkeypatch.setattr(cuda, "_import_error", "no module", raising=False)
    assert cuda_report.report(["sm_80"], simulate=True) == 0
    assert "was not built" in capsys.readouterr().out


needs_module = pytest.mark.skipif(cuda._cuda is None, reason="fastattn was built without nvcc")


@needs_module
def test_kernels_of_the_module() -> None:
    """Machine code is found for each kernel, and loops in each that has tensor-core instructions."""
    found = cuda_report.statics("sm_75")
    if not found:
        pytest.skip("the module was built without machine code for sm_75 (FASTATTN_CUDA_ARCHITECTURES)")
    for x in found:
        assert (x.work is not None) == (cuda_report.parsed(x.name) is not None), x.name
    forward = next(x for x in found if x.name == "fastattn_sm75_forward_fp16_d64")
    assert forward.work is not None
    # A quad of lanes holds 16 x 8 scores after 4 products of 16, and 4 more are made of them: 1 exponential per score.
    assert forward.work.mufu == 0.5


@needs_module
@pytest.mark.skipif(simulator.missing() is not None, reason=str(simulator.missing()))
def test_simulated_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work that follows from sizes alone: three and four products of matrices in the two halves of a backward pass."""
    monkeypatch.setattr(cuda_report, "SEQLEN", 256)
    found, findings = cuda_report.simulated(64, causal=False)
    assert findings == 0
    product = 256 * 256 * 64 // (16 * 8 * 16)
    dq, dkv = (found[f"fastattn_sm80_{x}_bf16_d64"] for x in ("bwd_dq", "bwd_dkdv"))
    assert (dq.products, dkv.products) == (3 * product, 4 * product)
    assert (dq.mufu, dkv.mufu) == (1.0, 1.0)
    # q, k, v and out once per tile of 128 queries (two tiles: keys and values twice), and lse.
    assert found["fastattn_sm80_forward_bf16_d64"].global_bytes == 256 * 64 * 2 * (1 + 2 + 2 + 1) + 256 * 4
