"""The demo: `python -m examples.demo`, or `make demo`. Everything that it prints is measured in that run.

validate   every feature of every backend against float64
lm         a language model trained on fastattn, and on PyTorch's own attention beside it
seq2seq    an encoder-decoder that learns to read dates
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence

import fastattn.cli as command_line

from . import seq2seq, train_lm
from .arguments import add_common, apply_common

QUICK = {
    "validate": ["--dtype=float32", "--only=options"],
    "lm": ["--steps=6", "--batch=2", "--context=16", "--embedding-dim=16", "--hidden-dim=32", "--generate=20"],
    "seq2seq": ["--steps=4", "--batch=8", "--held-out=8"],
}
"""Options that show in seconds that everything runs; nothing is learnt in so few steps."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the parts; returns 0, or the first exit status of a part that is not."""
    args = _parser().parse_args(argv)
    try:
        apply_common(args)
        parts = _parts(args.parts)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    command_line.main(["info"])
    status, start = 0, time.perf_counter()
    for part in parts:
        print(f"\n==== {part} ====", flush=True)
        began = time.perf_counter()
        result = RUNNERS[part]([*_forwarded(args, part), *(QUICK[part] if args.quick else [])])
        print(f"==== {part}: {time.perf_counter() - began:.0f} s, {'ok' if result == 0 else 'FAILED'} ====")
        status = status or result
    print(f"\nthe whole demo took {time.perf_counter() - start:.0f} s; files are in {args.out}")
    return status


def _validate(argv: list[str]) -> int:
    return command_line.main(["validate", "--short", *argv])


RUNNERS: dict[str, Callable[[list[str]], int]] = {
    "validate": _validate,
    "lm": train_lm.main,
    "seq2seq": seq2seq.main,
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="examples.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common(parser)
    parser.add_argument(
        "--parts", default=",".join(RUNNERS), metavar="NAMES", help="with commas (default: %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="only to see that everything runs")
    return parser


def _parts(given: str) -> list[str]:
    names = [name.strip() for name in given.split(",")]
    for name in names:
        if name not in RUNNERS:
            raise ValueError(f"--parts knows {', '.join(RUNNERS)}, got {name!r}")
    return names


def _forwarded(args: argparse.Namespace, part: str) -> list[str]:
    """The common options that were given, as the part's own."""
    options = ["--device", args.device]
    if args.backend is not None:
        options += ["--backend", args.backend]
    if part != "validate":  # whose data has seeds of its own; threads are already set
        options += ["--out", str(args.out), "--seed", str(args.seed)]
    return options


if __name__ == "__main__":
    sys.exit(main())
