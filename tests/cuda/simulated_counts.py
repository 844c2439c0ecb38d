"""Dynamic counts of the compiled kernels, one head of 1024 queries and keys: `python -m tests.cuda.simulated_counts`.

Per m16n8k16 of one warp: instructions (without moves, most of which vanish in machine code) and wavefronts of shared
memory; exponentials per visible score; bank conflicts.
"""

from __future__ import annotations

import torch

from fastattn.backends import Needs, empty_results
from fastattn.backends.triton.launches import BackwardPass, forward_launches, kernel_inputs
from fastattn.problem import Inputs, Options, describe

from .simulator import Simulator

SEQLEN = 1024


def main() -> None:
    """Prints one line per kernel. Needs the simulator."""
    torch.manual_seed(0)
    machine = Simulator(80)
    print(f"{'':32}  instr/mma  wavefronts/mma  MUFU/score  conflicts  findings")
    for head_dim in (64, 128):
        for causal in (False, True):
            q, k, v = torch.randn(3, 1, 1, SEQLEN, head_dim).bfloat16().unbind()
            inputs = Inputs(q, k, v)
            problem, given = describe("dense", inputs, Options(causal=causal)), kernel_inputs(inputs)
            results = empty_results(problem, q, for_backward=False)
            launches = forward_launches(problem, given, machine, results)
            needs = Needs(True, True, True, False, False)
            launches += BackwardPass(problem, given, machine, results, results.out, None, needs).launches
            scores = SEQLEN * (SEQLEN + 1) // 2 if causal else SEQLEN**2
            for launch in launches:
                counts = machine.launch(launch)
                of = counts["by_class"]
                if "tensor" in of:
                    title = f"{launch.kernel.__name__}, {head_dim}, {'causal' if causal else 'full'}"
                    print(
                        f"{title:32}  {(counts['warp_instrs'] - of['mov']) / of['tensor']:9.2f}  "
                        f"{counts['shared_wavefronts'] / of['tensor']:14.2f}  {of['mufu'] * 32 / scores:10.3f}  "
                        f"{counts['bank_conflicts']:9}  {len(machine.findings):8}"
                    )


if __name__ == "__main__":
    main()
