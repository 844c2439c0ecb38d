"""Reports on the CUDA module: machine code of its kernels, and counts from a simulator. No GPU, no timing.

python -m benchmarks.inspect.compile_report --cuda

Counts of the main loop are per m16n8k16 of one warp (two m16n8k8 on compute capability 7.5):

* SASS instructions, and those of FP32, MUFU, LDSM and LDS
* wavefronts of shared memory

The main loop is the one over full blocks: of the innermost loops with tensor-core instructions, the one with the fewest
instructions per m16n8k16. Masked blocks only add instructions.

Whole kernels are counted in the PTX simulator `ptxsim`, if it is available: every block of every grid.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from fastattn.backends import Needs
from fastattn.backends.native.cuda import CudaBackend
from fastattn.problem import Inputs, Options, describe

from . import cuda_marks, cuda_module, cuda_simulator, pipes
from .cuda_marks import Counts, Mark
from .sass import Loop

SEQLEN = 1024
_WIDTH = 52  # of the longest name
MARKED = "sm_80"
GPUS = {"sm_75": "T4", "sm_80": "A100", "sm_90": "H100"}
"""The GPU whose limits are printed for the code of an architecture."""


class Name(NamedTuple):
    """What a kernel's name says. has_score_mod: for calls with softcap or ALiBi."""

    architecture: str
    kernel: str
    dtype: str
    has_score_mod: bool
    head_dim: int


def parsed(name: str) -> Name | None:
    """The parts of a name as fastattn_sm80_forward_bf16_score_mod_d64; None of kernels without tensor cores."""
    found = re.fullmatch(r"fastattn_sm(\d+)_(\w+)_(bf16|fp16)(_score_mod)?_d(\d+)", name)
    return Name(f"sm_{found[1]}", found[2], found[3], bool(found[4]), int(found[5])) if found else None


def main_loop(loops: Sequence[Loop]) -> Loop:
    """The loop over full blocks."""
    return min(loops, key=lambda loop: loop.total / pipes.products(loop))


class Static(NamedTuple):
    """A kernel's machine code. work: of its main loop, None if it has none."""

    name: str
    usage: cuda_module.Usage
    work: pipes.Work | None

    def __str__(self) -> str:
        numbers = "" if self.work is None else "".join(f"  {x:10.2f}" for x in self.work)
        return f"{self.name:{_WIDTH}} {self.usage.registers:4} {self.usage.stack:6}{numbers}"


def statics(architecture: str) -> list[Static]:
    """All kernels that have machine code for an architecture."""
    loops = cuda_module.loops(architecture)
    return [
        Static(name, usage, pipes.work(main_loop(loops[name])) if loops[name] else None)
        for name, usage in sorted(cuda_module.usage(architecture).items())
    ]


def static_marks(found: Sequence[Static], architecture: str) -> Iterator[Mark]:
    """No spills, and on compute capability 8.0 the limits of main loops."""
    spilled = max((x.usage.stack for x in found), default=0)
    yield Mark(f"{architecture}: bytes of stack, the largest of {len(found)} kernels", spilled, 0)
    for x in found:
        name = parsed(x.name)
        if name and architecture == MARKED and name.dtype == "bf16" and not name.has_score_mod and x.work:
            yield from cuda_marks.of_loop(name.kernel, name.head_dim, x.work.instructions)


def counts_of(counters: dict[str, Any], scores: int) -> Counts:
    """The simulator's counters of a launch, relative to its products and visible scores."""
    classes = counters["by_class"]
    products, instructions = classes["tensor"], counters["warp_instrs"] - counters["fused_mul_add_pairs"]
    return Counts(
        products,
        instructions / products,
        (instructions - classes["mov"]) / products,
        32 * classes["mufu"] / scores,
        counters["shared_wavefronts"] / products,
        counters["bank_conflicts"],
        counters["global_bytes"],
    )


def simulated(head_dim: int, causal: bool) -> tuple[dict[str, Counts], int]:
    """Runs forward and backward of one head in bfloat16. Returns counts by kernel, and the number of findings."""
    torch.manual_seed(0)
    machine = cuda_simulator.Simulator(80)
    backend = CudaBackend(machine)
    inputs = Inputs(*torch.randn(3, 1, 1, SEQLEN, head_dim).bfloat16().unbind())
    problem = describe("dense", inputs, Options(causal=causal))
    results = backend.forward(problem, inputs, for_backward=False)
    backend.backward(problem, inputs, results, results.out, None, Needs(True, True, True, False, False))
    scores = SEQLEN**2 // 2 if causal else SEQLEN**2
    pairs = zip(machine.kernels, machine.counters, strict=True)
    with_tensor = {name: counters for name, counters in pairs if "tensor" in counters["by_class"]}
    return {name: counts_of(counters, scores) for name, counters in with_tensor.items()}, len(machine.findings)


def _print_static(found: Sequence[Static], architecture: str) -> None:
    print(f"{architecture}: machine code, main loop per m16n8k16 of one warp")
    print(f"{'kernel':{_WIDTH}} {'regs':>4} {'stack':>6}", end="")
    print("".join(f"  {title:>10}" for title in ("SASS", "FP32", "MUFU", "LDSM", "LDS", "wavefronts")))
    print(*found, "", sep="\n")


def _print_pipes(found: Sequence[Static], architecture: str) -> None:
    if (gpu := GPUS.get(architecture)) is None:
        return
    works = {x.name: x.work for x in found}
    print(f"A model, not a measurement: cycles per m16n8k16 on a multiprocessor of {gpu}, main loop, {architecture}")
    print("(without fp16 where it counts as bf16 does; what bounds decoding is memory, not these)")
    print(f"{'kernel':{_WIDTH}} {'tensor':>7} {'FP32':>7} {'MUFU':>7} {'shared':>7} {'issue':>7}  bound by")
    for name, work in works.items():
        same = "fp16" in name and works.get(name.replace("fp16", "bf16")) == work
        if work is None or same:
            continue
        cycles = pipes.cycles(work, pipes.RATES[gpu])
        text = " ".join(f"{cycle:7.2f}" for cycle in cycles.values())
        print(f"{name:{_WIDTH}} {text}  {max(cycles, key=cycles.__getitem__)}")
    print()


def _print_simulated() -> list[Mark]:
    print(f"Simulated, bf16, {SEQLEN} queries and keys, one head, {MARKED}, all blocks. mma: m16n8k16 of warps.")
    print(
        "Per mma: PTX instructions of warps (fused, then without moves), wavefronts of shared memory. Per score (S^2;"
    )
    print("causal S^2 / 2): MUFU. In all: bank conflicts, bytes of global memory.")
    columns = ("mma", "instr/mma", "no moves", "MUFU/score", "wavefronts", "conflicts", "global B")
    print(f"{'kernel':{_WIDTH}} {'call':7}" + "".join(f" {title:>10}" for title in columns))
    marks: list[Mark] = []
    for head_dim, causal in cuda_marks.FLASH_ATTENTION_2:
        found, findings = simulated(head_dim, causal)
        call = "causal" if causal else "full"
        for name, counts in found.items():
            text = "".join(f" {x:10}" if isinstance(x, int) else f" {x:10.3f}" for x in counts)
            print(f"{name:{_WIDTH}} {call:7}{text}")
            kernel = parsed(name)
            assert kernel is not None, f"the kernel {name} has tensor-core instructions and no known name"
            marks += cuda_marks.of_whole(kernel.kernel, head_dim, causal, counts)
        marks.append(Mark(f"d{head_dim} {call}: races, reads of what nobody wrote and the like", findings, 0))
    print()
    return marks


def report(architectures: Sequence[str], simulate: bool) -> int:
    """Prints the report. Returns how many marks are not met, goals excluded."""
    if reason := CudaBackend(cuda_simulator.Simulator()).why_unavailable():
        print(reason)
        return 0
    marks: list[Mark] = []
    for architecture in architectures:
        found = statics(architecture)
        if not found:
            print(f"{architecture}: the module was built without machine code for it\n")
            continue
        _print_static(found, architecture)
        _print_pipes(found, architecture)
        marks += static_marks(found, architecture)
        if simulate and architecture == MARKED:
            if reason := cuda_simulator.missing():
                print(f"whole kernels are not counted, which {reason}\n")
            else:
                marks += _print_simulated()
    missed = sum(not (mark.met or mark.wish) for mark in marks)
    if marks:
        print("Marks", *marks, "", "all met" if missed == 0 else f"{missed} not met", sep="\n")
    return missed
