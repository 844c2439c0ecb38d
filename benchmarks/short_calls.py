"""Times the shortest calls, which the host's work dominates, of this checkout and of another one by turns.

    python -m benchmarks.short_calls --other PATH [--rounds 7]

PATH: another checkout of fastattn with its native modules built. Each round runs every checkout in a process of its
own, on one thread; printed are the medians over the rounds, in microseconds. The harness is not used: a child imports
the other checkout, and would find that one's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parents[1]
CALLS = {
    "inference": "attention of q, k, v; one query, one key, head_dim 8, causal",
    "recorded": "the same, of tensors that require gradients",
    "training step": "the same, and the gradients",
    "inference, sinks": "a call with an option that is a tensor",
    "training step, sinks": "the same, and the gradients",
}


def main() -> None:
    """Runs the comparison; each child runs `once`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--other", type=Path, required=True, help="the checkout to compare with")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    checkouts = {"other": args.other.resolve(), "this": HERE}
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in checkouts}
    for _ in range(args.rounds):
        for name, path in checkouts.items():
            code = f"import runpy, sys; sys.path.insert(0, {str(path)!r}); runpy.run_path({__file__!r})['once']()"
            result = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True, check=True)
            samples[name].append(json.loads(result.stdout.splitlines()[-1]))
    print(f"{'microseconds':<22} {'other':>8} {'this':>8} {'ratio':>7}")
    for call, meaning in CALLS.items():
        other, this = (statistics.median(sample[call] for sample in samples[name]) for name in checkouts)
        print(f"{call:<22} {other:8.2f} {this:8.2f} {this / other:7.3f}   {meaning}")


def once() -> None:
    """Prints the times of the checkout that is first on the path, as JSON."""
    import torch

    import fastattn

    assert fastattn.__file__ is not None
    assert Path(fastattn.__file__).parents[1] == Path(sys.path[0]), "another installation is in the way"

    torch.set_num_threads(1)
    q, k, v = (torch.randn(1, 1, 1, 8) for _ in range(3))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    dout, sinks = torch.ones_like(q), torch.zeros(1)

    def step(sinks: torch.Tensor | None = None) -> None:
        torch.autograd.grad(fastattn.attention(*leaves, causal=True, sinks=sinks), leaves, dout)

    print(
        json.dumps(
            {
                "inference": _microseconds(lambda: fastattn.attention(q, k, v, causal=True)),
                "recorded": _microseconds(lambda: fastattn.attention(*leaves, causal=True)),
                "training step": _microseconds(step),
                "inference, sinks": _microseconds(lambda: fastattn.attention(q, k, v, causal=True, sinks=sinks)),
                "training step, sinks": _microseconds(lambda: step(sinks)),
            }
        )
    )


def _microseconds(call: Callable[[], object], samples: int = 7, seconds: float = 0.02) -> float:
    """The shortest of the samples, in microseconds per call."""
    for _ in range(100):
        call()
    start = time.perf_counter()
    call()
    repeats = max(10, int(seconds / (time.perf_counter() - start)))
    found = []
    for _ in range(samples):
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        found.append((time.perf_counter() - start) / repeats * 1e6)
    return min(found)


if __name__ == "__main__":
    main()
