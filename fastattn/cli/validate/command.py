"""`python -m fastattn validate`: every feature on every backend of this machine against float64.

Each line sets the error of a backend beside the error that plain eager attention makes in the same dtype, and
the bound that follows from it (see `fastattn.cli.validate.checks`). Everything printed was computed in that run.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

import torch

from ...backends import dispatch
from ..arguments import parse_device
from .cases import CASES, Case
from .checks import Check, run_case

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
OK, FAILED, BAD_ARGUMENT = 0, 1, 2

_COLUMNS = "{:<14}{:<30}{:<17}{:>9}{:>10}{:>10}  {}"


@dataclass(frozen=True)
class Target:
    """One column of the matrix backend x device x dtype."""

    backend: str
    device: torch.device
    dtype: str

    def __str__(self) -> str:
        return f"{self.backend} on {self.device}, {self.dtype}"


@dataclass(frozen=True)
class Row:
    """A case as run on a target. refusal: the backend's reason where it does not do such calls."""

    case: Case
    checks: list[Check]
    refusal: str | None

    @property
    def worst(self) -> Check:
        """The check that comes nearest to its bound, or passes it farthest."""
        return max(self.checks, key=lambda check: check.share)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command to a parser."""
    add = parser.add_argument
    add(
        "--backend",
        metavar="NAMES",
        default="all",
        help="backends, with commas (default: all available)",
    )
    add("--dtype", metavar="NAMES", default="all", help=f"some of {', '.join(DTYPES)} (default: all)")
    add(
        "--device",
        metavar="NAMES",
        default="all",
        help="cpu, cuda, cuda:N (default: cpu, and cuda if there)",
    )
    add("--only", metavar="TEXT", help="only features with this text in their section or name")
    layout = parser.add_mutually_exclusive_group()
    layout.add_argument("--short", action="store_true", help="one line for each section, its worst result")
    layout.add_argument("--full", action="store_true", help="one line for each result")


def run(args: argparse.Namespace) -> int:
    """Validates what the arguments ask for and prints the table.

    Returns 0; 1 if a result was wrong or nothing could be checked; 2, with a sentence on stderr, for bad
    values.
    """
    try:
        targets, cases = _plan(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_ARGUMENT
    total = failed = 0
    for target in targets:
        rows = _print_target(target, cases, short=args.short, full=args.full)
        checks = [check for row in rows for check in row.checks]
        total, failed = total + len(checks), failed + sum(not check.ok for check in checks)
    if total == 0:
        print("FAIL: nothing was checked")
    elif failed:
        print(f"FAIL: {failed} of {total} results are out of bounds")
    else:
        print(f"ok: all {total} results are within their bounds")
    return OK if total and not failed else FAILED


# -------------------------------------------------------------------------------------------------- arguments


def _plan(args: argparse.Namespace) -> tuple[list[Target], list[Case]]:
    """What is to be run. Raises ValueError with a sentence for a value that makes no sense."""
    known = {backend.name: backend.why_unavailable() for backend in dispatch.BACKENDS}
    available = dispatch.available_backends()
    backends = available if args.backend == "all" else _names("--backend", args.backend, known)
    for name in backends:
        if known[name] is not None:
            raise ValueError(f"--backend {name} is not available here: {known[name]}")
    dtypes = list(DTYPES) if args.dtype == "all" else _names("--dtype", args.dtype, DTYPES)
    everywhere = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    names = everywhere if args.device == "all" else args.device.split(",")
    devices = [parse_device(name.strip()) for name in names]
    text = (args.only or "").lower()
    cases = [case for case in CASES if text in case.section.lower() or text in case.name.lower()]
    if not cases:
        raise ValueError(f"--only {args.only!r} names no feature; sections are {', '.join(_sections())}")
    return [Target(b, d, t) for b in backends for d in devices for t in dtypes], cases


def _names(option: str, given: str, known: Iterable[str]) -> list[str]:
    known = list(known)
    names = [name.strip() for name in given.split(",")]
    for name in names:
        if name not in known:
            raise ValueError(f"{option} knows all, {', '.join(known)}; got {name!r}")
    return list(dict.fromkeys(names))


def _sections() -> list[str]:
    return list(dict.fromkeys(case.section for case in CASES))


# ------------------------------------------------------------------------------------------------------ table


def _print_target(target: Target, cases: list[Case], *, short: bool, full: bool) -> list[Row]:
    """Runs the cases and prints their lines as they come."""
    print(f"{target}\n{_COLUMNS.format('section', 'feature', 'worst result', 'error', 'eager', 'bound', '')}")
    start, rows = time.perf_counter(), []
    for section, group in groupby(cases, key=lambda case: case.section):
        found = []
        for case in group:
            checks, refusal = run_case(case, target.backend, DTYPES[target.dtype], target.device)
            found.append(Row(case, checks, refusal))
            if not short:
                _print_lines(_case_lines(found[-1], full=full))
        if short:
            _print_lines(_section_lines(section, found))
        rows += found
    _print_lines([_summary(rows, time.perf_counter() - start), ""])
    return rows


def _case_lines(row: Row, *, full: bool) -> Iterator[str]:
    if row.refusal is not None:
        yield f"{row.case.section:<14}{row.case.name:<30}not done: {row.refusal}"
        return
    for check in row.checks:
        if full or row.case.detail or check is row.worst or not check.ok:
            yield _line(row.case.section, row.case.name, check)


def _section_lines(section: str, rows: list[Row]) -> Iterator[str]:
    """The worst result of a section, and whatever failed in it."""
    done = [row for row in rows if row.refusal is None]
    if not done:
        yield f"{section:<14}{len(rows)} features, not done: {rows[0].refusal}"
        return
    worst = max(done, key=lambda row: row.worst.share)
    for row in done:
        for check in row.checks:
            if not check.ok or (row is worst and check is row.worst):
                yield _line(section, row.case.name, check)


def _line(section: str, feature: str, check: Check) -> str:
    eager = "-" if check.eager is None else f"{check.eager:.1e}"
    bound = "exact" if check.eager is None else f"{check.bound:.1e}"
    verdict = ("ok" if check.ok else "FAIL") + (f"  {check.note}" if check.note else "")
    error = f"{check.error:.1e}" if check.eager is not None else f"{check.error:g}"
    return _COLUMNS.format(section, feature, check.quantity, error, eager, bound, verdict)


def _summary(rows: list[Row], seconds: float) -> str:
    checks = [check for row in rows for check in row.checks]
    done = sum(row.refusal is None for row in rows)
    failed = sum(not check.ok for check in checks)
    verdict = f"{failed} FAIL" if failed else "all ok"
    return f"{done} of {len(rows)} features, {len(checks)} results, {verdict}, {seconds:.1f} s"


def _print_lines(lines: Iterable[str]) -> None:
    for line in lines:
        print(line, flush=True)
