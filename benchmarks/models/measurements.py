"""What a run on whole models found, as data: saved to JSON and read back without loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from typing_extensions import Self

from ..measurements import CaseResult, Findings, result_from_json, rounds_to_json
from .cases import ModelCase

FORMAT = "models 1"
OURS = "fastattn"
"""The attention implementation that the ratios compare with."""


@dataclass
class ModelRun(Findings[ModelCase]):
    """A whole run: the header with machine and versions, and the results."""

    header: dict[str, Any]
    results: list[CaseResult[ModelCase]]

    def to_json(self) -> dict[str, Any]:
        """Everything: raw samples and the derived figures."""
        results = []
        for result in self.results:
            entry = {"case": result.case.to_json(), "tokens": result.case.tokens, **rounds_to_json(result)}
            results.append(entry)
        return {"format": FORMAT, "header": self.header, "results": results}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        """The run that `to_json` described. Raises ValueError for a document of another format."""
        if document.get("format") != FORMAT:
            raise ValueError(f"expected a benchmark document of format {FORMAT!r}, got {document.get('format')!r}")
        results = [result_from_json(ModelCase.from_json(entry["case"]), entry) for entry in document["results"]]
        return cls(document["header"], results)
