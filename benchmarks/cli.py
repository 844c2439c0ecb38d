"""The command line of the benchmarks: `python -m benchmarks` and `python -m fastattn bench`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch

import fastattn
from fastattn.cli.arguments import parse_device

from .cases import DTYPES, Case
from .harness import run_cases
from .machine import header
from .measurements import C, CaseResult, Findings, Run
from .memory import method
from .models.cases import MODELS, ModelCase
from .models.harness import RIVALS as MODEL_RIVALS
from .models.harness import register, run_model_cases
from .models.measurements import OURS, ModelRun
from .peaks import measure_peaks
from .report.header import header_lines, model_header_lines
from .report.model_plot import plot_models
from .report.plot import has_curves, plot
from .report.summary import summary_lines
from .report.table import CallTable, ModelTable, Table
from .rivals import DEFAULT_RIVALS, RIVALS, Fastattn, Rival
from .suites import DEFAULT_SUITE, SUITES
from .timing import Effort, clock_for

MODEL_SUITE = "models"
MODEL_EFFORT = Effort(min_rounds=5)
AnyKind = TypeVar("AnyKind", Case, ModelCase)

OK, WRONG_RESULT, BAD_ARGUMENT = 0, 1, 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the benchmarks to a parser."""
    add = parser.add_argument
    add(
        "--list",
        action="store_true",
        help="print the suites with their cases, the rivals and the backends, and stop",
    )
    add(
        "--suite",
        metavar="NAMES",
        help=f"suites to run, separated by commas (default: {DEFAULT_SUITE}); {MODEL_SUITE}, alone: whole models",
    )
    add(
        "--family",
        metavar="NAMES",
        help="only cases of these families (of every suite, where no --suite is given)",
    )
    add("--dtype", metavar="NAMES", help=f"only cases of these dtypes: {', '.join(DTYPES)}")
    add(
        "--backend",
        metavar="NAMES",
        default="auto",
        help="fastattn's backends: auto (default), all, or names",
    )
    add(
        "--rivals",
        metavar="NAMES",
        default=",".join(DEFAULT_RIVALS),
        help=f"none, all, or some of {', '.join(RIVALS)} (default: %(default)s; flex compiles each shape)",
    )
    add("--device", default="cpu", help="cpu (default), cuda or cuda:N")
    add("--threads", type=int, metavar="N", help="CPU threads (default: torch's)")
    add(
        "--budget",
        "--min-time",
        type=float,
        default=Effort().budget,
        metavar="SECONDS",
        help="time to measure each case, all rivals together (default: %(default)s)",
    )
    add("--json", type=Path, metavar="PATH", help="write header, raw samples and results there")
    add(
        "--plot",
        type=Path,
        metavar="PATH",
        help="draw time and GFLOP/s over the sequence length there, of models the ratios (PNG)",
    )


@dataclass(frozen=True)
class _Common:
    """What all kinds of runs need."""

    device: torch.device
    effort: Effort

    def header(self) -> dict[str, Any]:
        """The machine, and the methods of measurement."""
        return {
            **header(self.device),
            "clock": clock_for(self.device).name,
            "memory_method": method(self.device),
            "budget_seconds": self.effort.budget,
        }


@dataclass(frozen=True)
class _Calls(_Common):
    """Attention calls, every suite but "models"."""

    cases: list[Case]
    rivals: list[Rival]
    plot = staticmethod(plot)

    def measure(self) -> Run:
        """Measures the machine's ceilings, then every case, and prints each result at once."""
        peaks = measure_peaks(self.device, {case.dtype for case in self.cases})
        found = Run(self.header(), peaks, [])
        table = CallTable(self.cases, [rival.name for rival in self.rivals], peaks)
        _print_lines([*header_lines(found.header, peaks), "", table.head()])
        _collect(found, run_cases(self.cases, self.rivals, self.device, self.effort), table)
        return found


@dataclass(frozen=True)
class _Models(_Common):
    """Whole models. transformers: the version of the library."""

    cases: list[ModelCase]
    rivals: list[str]
    transformers: str
    plot = staticmethod(plot_models)

    def measure(self) -> ModelRun:
        """Measures every case and prints each result at once."""
        found = ModelRun({**self.header(), "transformers": self.transformers}, [])
        table = ModelTable(self.cases, [OURS, *self.rivals])
        _print_lines([*model_header_lines(found.header, self.cases), "", table.head()])
        _collect(found, run_model_cases(self.cases, self.rivals, self.device, self.effort), table)
        return found


def run(args: argparse.Namespace) -> int:
    """Runs the command.

    Returns 0 if all is well, 1 if a result of fastattn was wrong or missing, 2 for bad arguments. The reason for 2 is
    a sentence on stderr.
    """
    try:
        plan = _plan_models(args) if args.suite == MODEL_SUITE else _plan_calls(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_ARGUMENT
    if args.list:
        _print_lines(_listing())
        return OK
    threads = torch.get_num_threads()
    torch.set_num_threads(args.threads or threads)
    try:
        found: Any = plan.measure()
    finally:
        torch.set_num_threads(threads)
    _print_lines(["", *summary_lines(found)])
    if args.json is not None:
        found.save(args.json)
    if args.plot is not None:
        plan.plot(found, args.plot)
    return WRONG_RESULT if found.failures() else OK


def _collect(found: Findings[C], results: Iterable[CaseResult[C]], table: Table[C]) -> None:
    """Adds each result at once. An interrupt (Ctrl-C) ends the run and keeps the results so far."""
    try:
        for result in results:
            found.results.append(result)
            _print_lines(table.rows(result))
    except KeyboardInterrupt:
        print(f"interrupted after {len(found.results)} of {table.count} cases", file=sys.stderr)


def _plan_calls(args: argparse.Namespace) -> _Calls:
    """The run that the arguments describe. Raises ValueError with a sentence for an invalid value."""
    _check(args)
    cases = _cases(args.suite, args.family, args.dtype)
    if args.plot is not None and not has_curves(cases):
        raise ValueError("--plot needs cases that differ in the sequence length alone, and none of those chosen do")
    backends = _names("--backend", args.backend, {"auto": None, **dict.fromkeys(fastattn.available_backends())})
    ours = [Fastattn(None if name == "auto" else name) for name in backends]
    others = [] if args.rivals == "none" else [RIVALS[name]() for name in _names("--rivals", args.rivals, RIVALS)]
    return _Calls(parse_device(args.device), Effort(budget=args.budget), cases, [*ours, *others])


def _plan_models(args: argparse.Namespace) -> _Models:
    """The same for the suite "models"."""
    _check(args)
    cases = _narrowed(MODELS, args.family, args.dtype)
    if args.backend != "auto":
        raise ValueError(f"--suite {MODEL_SUITE} has models choose the backend, expected --backend auto")
    rivals = _model_rivals(args.rivals)
    if args.plot is not None and not rivals:
        raise ValueError(f"--plot of --suite {MODEL_SUITE} shows ratios, and --rivals {args.rivals} leaves no rival")
    try:
        transformers = register()
    except ImportError as missing:
        raise ValueError(f"--suite {MODEL_SUITE}: {missing}") from missing
    device = parse_device(args.device)
    return _Models(device, MODEL_EFFORT._replace(budget=args.budget), cases, rivals, transformers)


def _model_rivals(given: str) -> list[str]:
    """The library's own implementations among the chosen rivals. The others support attention calls only."""
    if given == "none":
        return []
    return [name for name in _names("--rivals", given, RIVALS) if name in MODEL_RIVALS]


def _check(args: argparse.Namespace) -> None:
    """Raises ValueError for a value that is invalid in every suite."""
    if args.threads is not None and args.threads < 1:
        raise ValueError(f"--threads must be at least 1, got {args.threads}")
    if not args.budget > 0:
        raise ValueError(f"--budget must be more than 0 seconds, got {args.budget}")
    for option, path in (("--json", args.json), ("--plot", args.plot)):
        if path is not None and not path.absolute().parent.is_dir():
            raise ValueError(f"{option} names a file in a folder that does not exist: {path}")
    if args.plot is not None and find_spec("matplotlib") is None:
        raise ValueError("--plot needs the package matplotlib, which is not installed")


def _cases(suites: str | None, families: str | None, dtypes: str | None) -> list[Case]:
    """The cases of the suites that have one of the families and one of the dtypes, without duplicates."""
    everything = suites is None and families is not None
    names = _names("--suite", suites or DEFAULT_SUITE, {**SUITES, MODEL_SUITE: None}, groups=())
    if MODEL_SUITE in names:
        raise ValueError(f"--suite {MODEL_SUITE} measures whole models and stands alone, got {suites!r}")
    chosen = list(SUITES) if everything else names
    return _narrowed((case for suite in chosen for case in SUITES[suite]), families, dtypes)


def _narrowed(cases: Iterable[AnyKind], families: str | None, dtypes: str | None) -> list[AnyKind]:
    """The cases that have one of the families and one of the dtypes, without duplicates."""
    found = list(dict.fromkeys(cases))
    if families is not None:
        wanted = _names("--family", families, dict.fromkeys(case.family for case in found), groups=())
        found = [case for case in found if case.family in wanted]
    if dtypes is not None:
        wanted = _names("--dtype", dtypes, DTYPES)
        found = [case for case in found if case.dtype in wanted]
    if not found:
        raise ValueError(f"--dtype {dtypes} leaves no case of those chosen")
    return found


def _names(option: str, given: str, known: Mapping[str, object], groups: Sequence[str] = ("all",)) -> list[str]:
    """The names in a list separated by commas. "all" means every name, if it is one of the groups."""
    names = [name.strip() for name in given.split(",")]
    if names == ["all"] and "all" in groups:
        return list(known)
    for name in names:
        if name not in known:
            raise ValueError(f"{option} knows {', '.join([*groups, *known])}; got {name!r}")
    return list(dict.fromkeys(names))


def _listing() -> Iterator[str]:
    for suite, cases in SUITES.items():
        yield f"{suite} ({len(cases)} cases)"
        for case in cases if suite != "all" else ():
            yield f"  {case.family}: {case.name}"
    yield "  every case of the suites above except quick and sweep60"
    yield f"{MODEL_SUITE} ({len(MODELS)} cases, stands alone)"
    for model_case in MODELS:
        yield f"  {model_case.family}: {model_case.name}"
    yield f"rivals: {', '.join(RIVALS)}"
    yield f"backends: auto, {', '.join(fastattn.available_backends())}"


def _print_lines(lines: Iterable[str]) -> None:
    for line in lines:
        print(line, flush=True)
