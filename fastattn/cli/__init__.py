"""The command line: `python -m fastattn {info,validate,bench}`, installed as `fastattn` too."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

COMMANDS = {
    "info": (".info", "versions, devices and backends of this machine, and why a backend is not available"),
    "validate": (".validate", "check every feature of every backend against float64"),
    "bench": ("..benchmarks.cli", "time fastattn beside other attention, correctness first"),
}
"""Each command's module, which has add_arguments(parser) and run(arguments) -> exit status, and its help."""

BROKEN_PIPE = 128 + 13  # as shells report SIGPIPE


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit status: 0, 1 for a wrong result, 2 for bad arguments."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="fastattn", description="Exact fused attention for PyTorch.")
    parsers = parser.add_subparsers(dest="command", metavar="command", required=True)
    for name, (module, text) in COMMANDS.items():
        command = parsers.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        if name in argv[:1]:  # the others need not be imported
            command.set_defaults(run=import_module(module, __name__).run)
            import_module(module, __name__).add_arguments(command)
    arguments = parser.parse_args(argv)
    try:
        status: int = arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    return status
