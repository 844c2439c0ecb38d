"""Options that all examples have."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import fastattn
from fastattn.cli.arguments import parse_device


def add_common(parser: argparse.ArgumentParser) -> None:
    """Adds --out, --seed, --threads, --backend and --device."""
    add = parser.add_argument
    add("--out", type=Path, default=Path("demo_output"), metavar="FOLDER", help="for files (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="of weights, batches and text (default: 0)")
    add("--threads", type=int, metavar="N", help="CPU threads (default: torch's)")
    add("--backend", metavar="NAME", help="fastattn's backend (default: it chooses)")
    add("--device", default="cpu", help="cpu (default), cuda or cuda:N")


def apply_common(args: argparse.Namespace) -> None:
    """Makes the folder and sets the threads. Raises ValueError with a sentence for a value that makes no sense."""
    if args.seed < 0:
        raise ValueError(f"--seed must not be negative, got {args.seed}")
    if args.threads is not None and args.threads < 1:
        raise ValueError(f"--threads must be at least 1, got {args.threads}")
    names = fastattn.available_backends()
    if args.backend is not None and args.backend not in names:
        raise ValueError(f"--backend must be one of {', '.join(names)}, got {args.backend!r}")
    parse_device(args.device)
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out must be a folder, got the file {args.out}")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
