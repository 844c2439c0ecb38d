"""What a run found, as data. It is saved to JSON and read back without loss."""

from __future__ import annotations

import json
import math
import statistics
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from typing_extensions import Self

from .cases import Case
from .costs import bytes_moved, flops
from .peaks import Peaks

RAN, WRONG, FAILED, SKIPPED = "ran", "wrong", "failed", "skipped"
FORMAT = 1


class AnyCase(Protocol):
    """What reports need of a case. It is an attention call (`Case`) or work on a model (`ModelCase`), and hashable."""

    @property
    def family(self) -> str:
        """Cases of a family are averaged."""

    @property
    def name(self) -> str:
        """Unique within its family."""


C = TypeVar("C", bound=AnyCase)


@dataclass
class Measurement:
    """One rival on one case.

    status: "ran", "wrong" (did not pass the gate), "failed" (raised) or "skipped" (does not support the case).
    reason: a sentence for the last three.
    errors: largest absolute error per output.
    seconds: time per call, one sample per round.
    peak_bytes: memory beyond the inputs, None if not measured.
    """

    rival: str
    ours: bool
    status: str
    reason: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None

    @property
    def median(self) -> float:
        """Median of the seconds per call."""
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile of the seconds per call."""
        if len(self.seconds) < 2:
            return self.seconds[0], self.seconds[0]
        first, _, third = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return first, third


@dataclass
class CaseResult(Generic[C]):
    """All rivals on one case. Ratios compare with the first of ours that ran.

    dropped_rounds: rounds excluded because other processes disturbed them.
    quiet: False if so many rounds were disturbed that they are included, which makes the figures doubtful.
    """

    case: C
    measurements: list[Measurement]
    dropped_rounds: int = 0
    quiet: bool = True

    @property
    def baseline(self) -> Measurement | None:
        """The measurement of ours that the others are compared with. None if none of ours ran."""
        return next((m for m in self.measurements if m.ours and m.status == RAN), None)

    def ratio(self, measurement: Measurement) -> float | None:
        """Time of the rival over time of ours: the median over the rounds of the ratio within a round.

        Above 1 ours is faster. Both samples of a round are taken in direct succession, so a slow moment of the machine
        cancels out.
        """
        ours = self.baseline
        if ours is None or measurement.status != RAN:
            return None
        return statistics.median(theirs / mine for theirs, mine in zip(measurement.seconds, ours.seconds, strict=True))


class Comparison(NamedTuple):
    """Ours against one rival on one case. A ratio above 1 means that ours is faster."""

    case: AnyCase
    rival: str
    ratio: float


class Findings(ABC, Generic[C]):
    """The results of a run: statistics over them, and the JSON document that holds them."""

    results: list[CaseResult[C]]

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """Everything: raw samples and the derived figures."""

    @classmethod
    @abstractmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        """The run that `to_json` described. Raises ValueError for a document of another format."""

    def save(self, path: Path) -> None:
        """Writes the JSON document."""
        path.write_text(json.dumps(self.to_json(), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Reads a JSON document back."""
        return cls.from_json(json.loads(path.read_text()))

    def comparisons(self) -> Iterator[Comparison]:
        """Ours against every rival that ran, case by case."""
        for result in self.results:
            for measurement in result.measurements:
                ratio = None if measurement.ours else result.ratio(measurement)
                if ratio is not None:
                    yield Comparison(result.case, measurement.rival, ratio)

    def worst(self, count: int = 10) -> list[Comparison]:
        """The cases with the lowest ratio of ours to its fastest rival, lowest first."""
        fastest: dict[AnyCase, Comparison] = {}
        for found in self.comparisons():
            if found.case not in fastest or found.ratio < fastest[found.case].ratio:
                fastest[found.case] = found
        return sorted(fastest.values(), key=lambda found: found.ratio)[:count]

    def geometric_means(self) -> dict[tuple[str, str], tuple[float, int]]:
        """(family, rival) -> (geometric mean of the ratios, number of cases)."""
        ratios: dict[tuple[str, str], list[float]] = {}
        for found in self.comparisons():
            ratios.setdefault((found.case.family, found.rival), []).append(found.ratio)
        return {key: (geometric_mean(values), len(values)) for key, values in ratios.items()}

    def failures(self) -> list[tuple[C, Measurement]]:
        """Where ours was wrong or raised."""
        return [
            (result.case, m)
            for result in self.results
            for m in result.measurements
            if m.ours and m.status in (WRONG, FAILED)
        ]


@dataclass
class Run(Findings[Case]):
    """A whole run: the header with machine and versions, the measured ceilings, the results."""

    header: dict[str, Any]
    peaks: Peaks
    results: list[CaseResult[Case]]

    def to_json(self) -> dict[str, Any]:
        """Everything: raw samples and the derived figures."""
        return {
            "format": FORMAT,
            "header": self.header,
            "peaks": asdict(self.peaks),
            "results": [_result_to_json(result) for result in self.results],
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        """The run that `to_json` described. Raises ValueError for a document of another format."""
        if document.get("format") != FORMAT:
            raise ValueError(f"expected a benchmark document of format {FORMAT}, got {document.get('format')!r}")
        results = [result_from_json(Case.from_json(entry["case"]), entry) for entry in document["results"]]
        return cls(document["header"], Peaks(**document["peaks"]), results)


def _result_to_json(result: CaseResult[Case]) -> dict[str, Any]:
    return {
        "case": result.case.to_json(),
        "flops": flops(result.case),
        "bytes": bytes_moved(result.case),
        **rounds_to_json(result),
    }


def rounds_to_json(result: CaseResult[Any]) -> dict[str, Any]:
    """A result without its case: raw samples and the derived figures."""
    rivals = []
    for m in result.measurements:
        derived = {} if m.status != RAN else {"median_seconds": m.median, "ratio": result.ratio(m)}
        rivals.append({**asdict(m), **derived})
    return {"dropped_rounds": result.dropped_rounds, "quiet": result.quiet, "rivals": rivals}


def result_from_json(case: C, entry: Mapping[str, Any]) -> CaseResult[C]:
    """The result of that case that `rounds_to_json` described."""
    fields = Measurement.__dataclass_fields__
    measurements = [Measurement(**{key: m[key] for key in fields}) for m in entry["rivals"]]
    return CaseResult(case, measurements, entry["dropped_rounds"], entry["quiet"])


def geometric_mean(values: Iterable[float]) -> float:
    """The n-th root of the product of n positive numbers."""
    logs = [math.log(value) for value in values]
    return math.exp(math.fsum(logs) / len(logs))
