"""The Triton backend around its kernels: what it refuses and in which words, how it chooses, how much it compiles."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import fastattn
from fastattn.backends import Needs, empty_results
from fastattn.backends.triton import TritonBackend
from fastattn.backends.triton.machine import Machine
from fastattn.kernels import config
from fastattn.kernels.config import Architecture, Config, Shape
from fastattn.kernels.launch import Launch
from fastattn.kernels.machine import Gpu, Interpreter
from fastattn.kernels.tuning import Tuner, asked_for, default_file
from fastattn.problem import Inputs, Options, describe

pytest.importorskip("triton", reason="Triton is not installed")

from benchmarks.inspect.compile_report import Planned

AMPERE = Architecture("cuda", 80, 163 * 1024, 108, (3, 9))
ARCHITECTURES = (
    AMPERE,
    *(
        Architecture("cuda", capability, kib * 1024, 100, compiler)
        for compiler in ((3, 6), (3, 9))
        for capability, kib in ((75, 64), (86, 99), (89, 99), (90, 227), (100, 227), (120, 99))
    ),
    Architecture("hip", 0, 64 * 1024, 304, (3, 9)),
)


# ------------------------------------------------------------------------------------------------------ what it refuses


TURING = Planned(Architecture("cuda", 75, 64 * 1024, 40, (3, 9)))


@pytest.mark.parametrize(
    ("machine", "dtype", "head_dim", "words"),
    [
        (Gpu(), torch.float16, 64, "tensors are on the CPU, where Triton runs only in its interpreter"),
        (Interpreter(), torch.bfloat16, 64, "torch.bfloat16, which Triton's interpreter does not compute right"),
        (Interpreter(), torch.float64, 64, "torch.float64, and these kernels compute in float32"),
        (Interpreter(), torch.float16, 513, "head_dim is 513, and this backend takes at most 512"),
        (TURING, torch.bfloat16, 64, "torch.bfloat16, which a GPU of compute capability 7.5 lacks"),
        (TURING, torch.float16, 512, r"head_dim 512 .* need \d+ bytes of shared memory, and the GPU has 65536"),
        (Planned(AMPERE), torch.float32, 512, "head_dim 512 .* in float32 need more registers than a GPU has"),
        (
            Planned(AMPERE._replace(capability=70)),
            torch.float16,
            64,
            "the GPU has compute capability 7.0, and Triton's kernels need at least 7.5",
        ),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, Gpu | Interpreter) else str(x),
)
def test_refusals(machine: Machine, dtype: torch.dtype, head_dim: int, words: str) -> None:
    q = torch.empty(1, 1, 4, head_dim, dtype=dtype)
    reason = TritonBackend(machine).why_not(describe("dense", Inputs(q, q, q), Options()))
    assert reason is not None
    assert reason.endswith(".")
    assert re.search(words, reason), reason


@pytest.mark.parametrize("head_dim", [1, 64, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_it_takes(dtype: torch.dtype, head_dim: int) -> None:
    q = torch.empty(1, 1, 4, head_dim, dtype=dtype)
    assert TritonBackend(Planned(AMPERE)).why_not(describe("dense", Inputs(q, q, q), Options())) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_named_without_a_gpu() -> None:
    q = torch.randn(1, 1, 4, 8)
    if isinstance(fastattn.kernels.machine.machine(), Interpreter):
        pytest.skip("the interpreter is on")
    with pytest.raises(ValueError, match="'triton' cannot compute this call: there is no GPU here"):
        fastattn.attention(q, q, q, backend="triton")
    assert "no GPU" in fastattn.explain(q, q, q).reasons["triton"]


def test_without_triton() -> None:
    """fastattn and its kernels package import without Triton, and the backend says what is missing."""
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import fastattn, torch\n"
        "import fastattn.kernels.config, fastattn.kernels.machine\n"
        "assert 'triton' not in fastattn.available_backends()\n"
        "q = torch.randn(1, 1, 4, 8)\n"
        "print(fastattn.explain(q, q, q).reasons['triton'])\n"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1"}  # as if there were something to run it on
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, env=environment)
    assert run.returncode == 0, run.stderr
    assert "Triton could not be imported" in run.stdout
    assert "pip install triton" in run.stdout


def test_calls_on_a_cpu_do_not_import_triton() -> None:
    program = (
        "import sys, fastattn, torch\n"
        "q = torch.randn(1, 1, 4, 8)\n"
        "fastattn.attention(q, q, q); fastattn.explain(q, q, q)\n"
        "assert 'triton' not in sys.modules, 'imported'\n"
    )
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)


# ------------------------------------------------------------------------------------------------------ how it chooses


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: f"{a.vendor}{a.capability}-{a.compiler}")
def test_configurations_fit(architecture: Architecture) -> None:
    """Whatever is not refused gets tiles that are powers of two and fit into shared memory."""
    choosers = {
        config.choose_forward: config.forward_memory,
        config.choose_bwd_dq: config.bwd_dq_memory,
        config.choose_bwd_dkdv: config.bwd_dkdv_memory,
        config.choose_bwd_dbias: config.bwd_dq_memory,
    }
    for size in (2, 4):
        for dims in ((1, 1), (64, 64), (96, 96), (128, 128), (192, 128), (256, 256), (512, 512), (16, 512)):
            for rows in (1, 20, 1000):
                for flags in ((False, False, False), (True, False, False), (True, True, False), (False, False, True)):
                    shape = Shape(size, *dims, rows, 1000, 8, *flags)
                    if config.why_not(shape, architecture) is not None:
                        assert max(dims) == 512 or (size == 4 and max(dims) > 128)
                        continue
                    for choose, memory in choosers.items():
                        chosen = choose(shape, architecture)
                        assert chosen == choose(shape, architecture)
                        assert all(n >= 16 and n & (n - 1) == 0 for n in chosen[:2])
                        assert memory(chosen, shape, architecture) <= architecture.shared_memory


def test_splits() -> None:
    """As many as keep the device busy, none where there are queries enough or too few keys to share."""

    def splits(rows: int, keys: int, programs: int) -> int:
        shape = Shape(2, 128, 128, rows, keys, programs, False, False, False)
        return config.choose_splits(shape, config.choose_forward(shape, AMPERE), AMPERE)

    assert splits(1, 65536, 8) == 27  # 216 programs on 108 multiprocessors
    assert splits(1, 65536, 1) == config.MAX_SPLITS
    assert splits(1, 65536, 4000) == 1
    assert splits(1, 256, 1) == 1
    assert splits(1, 0, 1) == 1
    assert splits(1000, 65536, 1) == 1
    assert splits(0, 65536, 1) == 1


def test_tensor_descriptors() -> None:
    """Only where they pay, and where rows and heads lie at multiples of 16 bytes."""
    from fastattn.backends.triton.launches import forward_launches, kernel_inputs

    hopper = Planned(Architecture("cuda", 90, 227 * 1024, 132, (3, 9)))

    def mapped(machine: Machine, k: torch.Tensor, **given: Any) -> bool:
        q = torch.empty(1, 2, 300, k.shape[3], dtype=k.dtype)
        inputs = kernel_inputs(Inputs(q, k, k, **given))
        problem = describe("dense", inputs, Options(causal=True))
        values = forward_launches(problem, inputs, machine, empty_results(problem, q, False))[0].arguments
        assert (values["k_map"] is None) == (values["v_map"] is None)
        return values["k_map"] is not None

    k = torch.empty(1, 2, 300, 128, dtype=torch.bfloat16)
    assert mapped(hopper, k)
    assert mapped(hopper, k.view(1, 300, 2, 128).transpose(1, 2))
    assert not mapped(Planned(AMPERE), k)
    assert not mapped(hopper, torch.empty(1, 2, 300, 64, dtype=torch.bfloat16))
    assert not mapped(hopper, torch.empty(1, 2, 300, 128))
    assert not mapped(hopper, torch.empty(1, 2, 300, 132, dtype=torch.bfloat16)[..., 1:129])  # an odd address
    assert not mapped(hopper, torch.empty(1, 2, 300, 132, dtype=torch.bfloat16)[..., :128])  # rows of 264 bytes
    assert not mapped(hopper, torch.empty(1, 1, 300, 128, dtype=torch.bfloat16).expand(1, 2, 300, 128))
    assert not mapped(hopper, k.transpose(2, 3).contiguous().transpose(2, 3))
    assert not mapped(hopper, k, bias=torch.empty(300, 300))


# -------------------------------------------------------------------------------------------------------------- tuning

SHAPE = Shape(2, 64, 64, 1000, 1000, 8, False, False, False)


def test_tuning_takes_the_fastest_and_remembers(tmp_path: Path) -> None:
    found = config.candidates("forward", SHAPE, AMPERE)
    assert found[0] == config.choose("forward", SHAPE, AMPERE)
    assert len(set(found)) == len(found) > 5
    timed: list[Config] = []

    def build(chosen: Config) -> list[Launch]:
        return [Launch(None, 1, {"chosen": chosen})]

    def seconds(launches: Sequence[Launch]) -> float:
        chosen = launches[0].arguments["chosen"]
        timed.append(chosen)
        if chosen == found[1]:
            raise RuntimeError("out of resources")
        return 1.0 if chosen == found[3] else 2.0

    file = tmp_path / "new folder" / "autotune.json"
    tuner = Tuner("a GPU", file, seconds)
    assert tuner.choose("forward", SHAPE, found, build) == found[3]
    assert timed == found
    assert tuner.choose("forward", SHAPE._replace(rows=999), found, build) == found[3]  # the same bucket
    assert Tuner("a GPU", file, seconds).choose("forward", SHAPE, found, build) == found[3]
    assert timed == found
    Tuner("another GPU", file, seconds).choose("forward", SHAPE, found, build)
    Tuner("a GPU", file, seconds).choose("forward", SHAPE._replace(rows=64), found, build)
    assert len(timed) == 3 * len(found)


@pytest.mark.parametrize("content", ["", "[1]", '{"a GPU|forward|x": [1, 2]}'])
def test_tuning_survives_a_spoiled_file(content: str, tmp_path: Path) -> None:
    file = tmp_path / "autotune.json"
    file.write_text(content)
    found = config.candidates("forward", SHAPE, AMPERE)
    tuner = Tuner("a GPU", file, lambda launches: 1.0)
    assert tuner.choose("forward", SHAPE, found, lambda chosen: []) == found[0]
    nowhere = Tuner("a GPU", tmp_path / "autotune.json" / "a file is no folder", lambda launches: 1.0)
    assert nowhere.choose("forward", SHAPE, found, lambda chosen: []) == found[0]


def test_tuning_is_off_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTATTN_AUTOTUNE", raising=False)
    assert not asked_for()
    monkeypatch.setenv("FASTATTN_AUTOTUNE", "1")
    assert asked_for()
    monkeypatch.setenv("FASTATTN_CACHE_DIR", "/somewhere")
    assert default_file() == Path("/somewhere/autotune.json")


# ------------------------------------------------------------------------------------------------ how much it compiles


def _specialisations(kind: str, inputs: Inputs, options: Options, *, train: bool = False) -> set[str]:
    """What the compiler would be asked for by a call, in all that makes it compile anew."""
    from fastattn.backends.triton.launches import BackwardPass, append_kv_launch, forward_launches, kernel_inputs
    from fastattn.kernels import ahead

    problem, given = describe(kind, inputs, options), kernel_inputs(inputs)
    results = empty_results(problem, inputs.q, for_backward=train)
    launches = forward_launches(problem, given, Planned(AMPERE), results)
    if inputs.k_new is not None:
        launches.append(append_kv_launch(problem, given, Planned(AMPERE)))
    if train:
        needs = Needs(True, True, True, False, False)
        work = BackwardPass(problem, given, Planned(AMPERE), results, results.out, None, needs)
        launches += work.launches
    return {
        str((x.kernel.__name__, ahead.specialisation(x, ahead.target("cuda", 80)), ahead.options(x))) for x in launches
    }


def test_a_model_needs_few_kernels() -> None:
    """Training, prefill and decoding with all kinds of lengths and batches: under 10 kernels."""

    def normal(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16)

    found: set[str] = set()
    for batch, seqlen in ((1, 2048), (4, 1000), (3, 77), (2, 333), (8, 512)):
        q, (k, v) = normal(batch, 32, seqlen, 128), normal(2, batch, 8, seqlen, 128).unbind()
        found |= _specialisations("dense", Inputs(q, k, v), Options(causal=True), train=True)
    for batch, seqlen, capacity in ((1, 2000, 4096), (4, 333, 4096), (4, 1, 4096), (1, 1, 4096), (16, 1, 8192)):
        q, (k_new, v_new) = normal(batch, 32, seqlen, 128), normal(2, batch, 8, seqlen, 128).unbind()
        k, v = normal(2, batch, 8, capacity, 128).unbind()
        lengths = torch.zeros(batch, dtype=torch.int32)
        given: dict[str, Any] = {"kv_lengths": lengths, "k_new": k_new, "v_new": v_new}
        found |= _specialisations("cache", Inputs(q, k, v, **given), Options(causal=True))
    names = sorted(text.split("'")[1] for text in found)
    assert len(names) == 9, names


def test_seeds_need_one_kernel() -> None:
    q = torch.empty(1, 2, 64, 64, dtype=torch.bfloat16)
    seeds = (0, 1, 16, 2**32, 2**32 + 1, 2**63 - 1)
    found = [
        _specialisations("dense", Inputs(q, q, q, seed=torch.tensor(seed)), Options(dropout_p=0.5), train=True)
        for seed in seeds
    ]
    assert all(one == found[0] for one in found[1:])


def test_no_group_of_arguments_holds_another() -> None:
    """Triton 3.6 takes the strides of a group within a group for those of another."""
    inputs = Inputs(
        torch.empty(1, 4, 300, 64, dtype=torch.bfloat16),
        *torch.empty(2, 1, 2, 400, 64, dtype=torch.bfloat16).unbind(),
        mask=torch.ones(300, 400, dtype=torch.bool),
        bias=torch.empty(4, 300, 400, dtype=torch.bfloat16),
        alibi_slopes=torch.empty(4),
        sinks=torch.empty(4),
        seed=torch.tensor(5),
    )
    from fastattn.backends.triton.launches import BackwardPass, forward_launches, kernel_inputs

    problem = describe("dense", inputs, Options(causal=True, dropout_p=0.1))
    given, results = kernel_inputs(inputs), empty_results(problem, inputs.q, for_backward=True)
    launches = forward_launches(problem, given, Planned(AMPERE), results)
    needs = Needs(True, True, True, True, True)
    launches += BackwardPass(problem, given, Planned(AMPERE), results, results.out, None, needs).launches
    assert len(launches) == 5
    groups = [value for launch in launches for value in launch.arguments.values() if isinstance(value, tuple)]
    assert groups
    assert not [group for group in groups if any(isinstance(member, tuple) for member in group)]
