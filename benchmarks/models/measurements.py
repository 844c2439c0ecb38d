"""What a run on whole models found: its JSON document and its table."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..measurements import CaseResult, Findings, Measurement, result_from_json, rounds_to_json
from ..report.table import RATIO_LINE, Table, machine_lines, memory_cell, time_cells
from .work import ModelCase

FORMAT = "models 1"
OURS = "fastattn"
"""The attention implementation that the ratios compare with."""


@dataclass
class ModelRun(Findings[ModelCase]):
    """A whole run: where and with what it was made, and the results."""

    header: dict[str, Any]
    results: list[CaseResult[ModelCase]]

    def to_json(self) -> dict[str, Any]:
        """Everything, raw samples included, with the derived figures beside them."""
        results = []
        for result in self.results:
            entry = {"case": result.case.to_json(), "tokens": result.case.tokens, **rounds_to_json(result)}
            results.append(entry)
        return {"format": FORMAT, "header": self.header, "results": results}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> ModelRun:
        """The run that `to_json` described. Raises ValueError for a document of another format."""
        if document.get("format") != FORMAT:
            raise ValueError(f"expected a benchmark document of format {FORMAT!r}, got {document.get('format')!r}")
        results = [result_from_json(ModelCase.from_json(entry["case"]), entry) for entry in document["results"]]
        return cls(document["header"], results)

    def save(self, path: Path) -> None:
        """Writes the JSON document."""
        path.write_text(json.dumps(self.to_json(), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> ModelRun:
        """Reads a JSON document back."""
        return cls.from_json(json.loads(path.read_text()))


class ModelTable(Table[ModelCase]):
    """Work on models: tokens per second, padding not counted."""

    columns = ("ms", "quartiles", "ratio", "tokens/s", "MiB")
    widths = (8, 17, 7, 9, 8)

    def figures(self, result: CaseResult[ModelCase], m: Measurement) -> tuple[str, ...]:
        """Time, ratio, rate, memory."""
        return (*time_cells(result, m), f"{result.case.tokens / m.median:.0f}", memory_cell(m))


def model_header_lines(header: Mapping[str, Any], cases: Iterable[ModelCase]) -> Iterator[str]:
    """Machine, versions, sizes of the models, and how to read the table."""
    yield from machine_lines(header)
    yield f"models    random weights, Transformers {header['transformers']}, attn_implementation as named"
    for shape in dict.fromkeys(case.shape for case in cases):
        heads = f"{shape.num_attention_heads}/{shape.num_key_value_heads} heads"
        yield f"          {shape.family}: {shape.num_hidden_layers} layers, hidden {shape.hidden_size}, {heads}"
    yield RATIO_LINE
