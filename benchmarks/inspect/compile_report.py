"""Compiles every Triton kernel for any GPU, without one, and reports what the compiler made of it.

python -m benchmarks.inspect.compile_report --arch sm_80,sm_90

Columns of a kernel:

* the tile: queries x keys x warps, stages
* registers per thread, bytes of stack (spilled registers), shared memory in KiB

Columns of the loop over full blocks, and in brackets of the loop over masked blocks:

* instructions per m16n8k16 of tensor-core work and warp
* instructions per 32 scores
* MUFU instructions of a lane per score
* loads and stores of spilled registers

It exits with 1 if a kernel

* does not compile
* needs more stack than ALLOWED_STACK
* spills more than ALLOWED_SPILLS in its main loop
* needs more shared memory than the GPU has

With --cuda it reports on the CUDA C++ module instead, see cuda_report.py. Then it exits with 1 if a mark is not met.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fastattn.backends import Needs, empty_results

from . import cuda_report
from .sass import Code, Loop, disassemble, disassemble_amd
from .workloads import ALL, SHORT, Workload

try:
    import triton

    from fastattn.backends.triton import TritonBackend
    from fastattn.backends.triton import launches as triton_launches
    from fastattn.kernels.ahead import compile_ahead, target
    from fastattn.kernels.config import Architecture
    from fastattn.kernels.launch import Launch
    from fastattn.kernels.machine import Gpu, compiler, why_not_architecture
except ImportError as error:
    sys.exit(f"the compile report needs Triton ({error}); install it with pip install triton")

ARCHITECTURES = {
    "sm_75": Architecture("cuda", 75, 64 * 1024, 40, compiler()),
    "sm_80": Architecture("cuda", 80, 163 * 1024, 108, compiler()),
    "sm_86": Architecture("cuda", 86, 99 * 1024, 84, compiler()),
    "sm_89": Architecture("cuda", 89, 99 * 1024, 128, compiler()),
    "sm_90": Architecture("cuda", 90, 227 * 1024, 132, compiler()),
    "sm_100": Architecture("cuda", 100, 227 * 1024, 148, compiler()),
    "sm_120": Architecture("cuda", 120, 99 * 1024, 170, compiler()),
    "gfx942": Architecture("hip", 0, 64 * 1024, 304, compiler()),
}
"""Shared memory available to one program, and multiprocessors. Source: the vendors' programming guides."""

ALLOWED_STACK = {64: 640, 96: 640, 128: 640, 256: 1152, 512: 1152}
"""Bytes of stack per thread by head_dim, for values saved before the main loop. A tile that is too large needs
thousands."""

ALLOWED_SPILLS = {64: 32, 96: 80, 128: 64, 256: 128, 512: 256}
"""Loads and stores of spilled registers in the main loop by head_dim; almost none at 64 without other features."""


class Planned(Gpu):
    """A GPU that is not present. Launches are planned for it, and nothing runs."""

    def __init__(self, architecture: Architecture) -> None:
        self._architecture = architecture

    def architecture(self, device: torch.device) -> Architecture:
        """The architecture of the plans."""
        return self._architecture

    def why_not(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """See `Gpu`."""
        return why_not_architecture(self._architecture, dtype)

    def why_unavailable(self) -> str | None:
        """Always available, because nothing runs."""
        return None


def launches(workload: Workload, architecture: Architecture, dtype: torch.dtype) -> list[Launch]:
    """The launches of a workload, as the backend makes them on such a device."""
    machine = Planned(architecture)
    problem, given = workload.build(dtype)
    inputs = triton_launches.kernel_inputs(given)
    results = empty_results(problem, inputs.q, for_backward=False)
    if workload.backward:
        needs = Needs(True, True, True, inputs.bias is not None, False)
        return triton_launches.BackwardPass(problem, inputs, machine, results, results.out, None, needs).launches
    found = triton_launches.forward_launches(problem, inputs, machine, results)
    return [triton_launches.append_kv_launch(problem, inputs, machine), *found] if problem.kind == "cache" else found


@dataclass(frozen=True)
class Line:
    """One compiled kernel."""

    workload: Workload
    launch: Launch
    shared_memory: int
    code: Code
    seconds: float

    def per_loop(self, loop: Loop) -> tuple[float, float, float]:
        """Instructions per m16n8k16, and instructions and MUFU instructions per 32 scores, of one warp."""
        variant = self.launch.arguments["VARIANT"]
        scores = variant.BLOCK_M * variant.BLOCK_N / self.launch.num_warps
        products = {"forward": (1, 1), "bwd_dq": (2, 1), "bwd_dkdv": (2, 2)}
        of_k, of_v = products.get(self.launch.kernel.__name__, (1, 1))
        width = of_k * variant.BLOCK_D + of_v * variant.PART * variant.PARTS
        return (
            loop.total / (scores * width / (16 * 8 * 16)),
            loop.total / (scores / 32),
            loop.instructions["MUFU"] / (scores / 32),
        )

    def __str__(self) -> str:
        variant = self.launch.arguments.get("VARIANT")
        tile = "" if variant is None else f"{variant.BLOCK_M}x{variant.BLOCK_N}x{self.launch.num_warps}, "
        text = (
            f"{self.workload.name:22} {self.launch.kernel.__name__:20} {tile + str(self.launch.num_stages):14} "
            f"{self.code.registers:4} {self.code.stack:6} {self.shared_memory / 1024:7.1f}"
        )
        if variant is not None and self.code.loops:
            full, masked = self.code.loops[0], self.code.loops[-1]
            pairs = [*zip(self.per_loop(full), self.per_loop(masked), strict=True), (full.spills, masked.spills)]
            text += "".join(f"  {a:6.2f} ({b:6.2f})" for a, b in pairs[:3]) + f"  {pairs[3][0]:3} ({pairs[3][1]:3})"
        return text + f"  {self.seconds:4.1f} s"


def _dtype(workload: Workload, name: str) -> torch.dtype:
    return workload.dtype or (torch.float16 if name == "sm_75" else torch.bfloat16)


def compiled(workload: Workload, name: str) -> Iterator[Line]:
    """Compiles the kernels of a workload for an architecture."""
    architecture = ARCHITECTURES[name]
    for launch in launches(workload, architecture, _dtype(workload, name)):
        start = time.perf_counter()
        kernel = compile_ahead(launch, target(architecture.vendor, architecture.capability))
        if architecture.vendor == "cuda":
            code = disassemble(kernel.asm["cubin"], Path(triton.__file__).parent / "backends" / "nvidia" / "bin")
        else:
            code = disassemble_amd(kernel.asm["amdgcn"])
        yield Line(workload, launch, kernel.metadata.shared, code, time.perf_counter() - start)


def complaints(line: Line, name: str) -> Iterator[str]:
    """A sentence for each limit that a kernel exceeds."""
    head_dim = line.launch.arguments["VARIANT"].HEAD_DIM if "VARIANT" in line.launch.arguments else 64
    allowed = ALLOWED_STACK[head_dim]
    spills = 2 if line.workload.name == "head_dim 64" else ALLOWED_SPILLS[head_dim]
    limit = ARCHITECTURES[name].shared_memory
    if line.code.loops and line.code.loops[0].spills > spills:
        yield f"{line.code.loops[0].spills} spills in the main loop, of which {spills} are allowed"
    if line.code.stack > allowed:
        yield f"{line.code.stack} bytes of stack, of which {allowed} are allowed"
    if line.shared_memory > limit:
        yield f"{line.shared_memory} bytes of shared memory, of which there are {limit}"


def report(name: str, workloads: Sequence[Workload]) -> int:
    """Prints the report for one architecture; returns how many things are wrong."""
    failed = 0
    print(f"{name}, Triton {triton.__version__}")
    print(f"{'call':22} {'kernel':20} {'tile':14} {'regs':>4} {'stack':>6} {'shared':>7}", end="")
    print("  " + "  ".join(f"{title:15}" for title in ("instr/mma", "instr/32 sc.", "MUFU/score")) + "  spills")
    for workload in workloads:
        refusal = TritonBackend(Planned(ARCHITECTURES[name])).why_not(workload.build(_dtype(workload, name))[0])
        if refusal:
            print(f"{workload.name:22} not computed there: {refusal}")
            continue
        try:
            for line in compiled(workload, name):
                print(line)
                for complaint in complaints(line, name):
                    failed += 1
                    print(f"  WRONG: {complaint}")
        except Exception as error:  # an exception of the compiler is a result here
            failed += 1
            print(f"{workload.name}\n  WRONG: does not compile: {type(error).__name__}: {error}")
    print()
    return failed


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the report; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", help=f"separated by commas, of {', '.join(ARCHITECTURES)}; or see --cuda")
    parser.add_argument(
        "--short", action="store_true", help="only the most important kernels; with --cuda, not simulated"
    )
    parser.add_argument("--cuda", action="store_true", help="the CUDA module as built, by default for all GPUs")
    given = parser.parse_args(arguments)
    names = (given.arch or ("sm_75,sm_80,sm_90,sm_100,sm_120" if given.cuda else "sm_80,sm_90")).split(",")
    for name in names:
        if name not in ARCHITECTURES:
            parser.error(f"--arch must name some of {', '.join(ARCHITECTURES)}, got {name!r}")
    if given.cuda:
        return 1 if cuda_report.report(names, simulate=not given.short) else 0
    failed = sum(report(name, SHORT if given.short else ALL) for name in names)
    print("all as it must be" if failed == 0 else f"{failed} wrong")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
