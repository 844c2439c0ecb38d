"""The tables of docs/migration.md: the calls of each row give the same output and the same gradients."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import fastattn
from tests.docs import xformers_formulas

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "migration.md").read_text()
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, flags=re.DOTALL | re.MULTILINE))
INPUTS = ("q", "k", "v", "x", "packed", "tokens", "q_tokens", "k_tokens", "v_tokens", "bias", "table")
"""What a gradient is wanted of, where a row uses it."""
WITHOUT_GRADIENT = ("cache", "flex_attention")
"""Calls with a cache have none anywhere, torch's FlexAttention none on the CPU."""


class Row(NamedTuple):
    """One row of a section's table."""

    section: str
    before: str
    after: str

    def __str__(self) -> str:
        return self.before


def rows_of(section: str) -> list[Row]:
    """A row's first two cells are one piece of code each; `\\|` is a bar within a cell."""
    lines = [line for line in SECTIONS[section].splitlines() if line.startswith("| `")]
    cells = [re.split(r"(?<!\\)\|", line)[1:3] for line in lines]
    return [Row(section, *(cell.strip().strip("`").replace(r"\|", "|") for cell in pair)) for pair in cells]


ROWS = [row for section in SECTIONS for row in rows_of(section)]


def code(text: str) -> str:
    """Its Python."""
    return "\n".join(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL))


@pytest.fixture(scope="module")
def names() -> Callable[[str], dict[str, Any]]:
    """What the page defines before a section's table; each section builds on those before it."""
    made: dict[str, dict[str, Any]] = {}
    scope: dict[str, Any] = {name: getattr(xformers_formulas, name) for name in xformers_formulas.__all__}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        exec(compile(code(PAGE.split("\n## ")[0]), "docs/migration.md", "exec"), scope)
        for section, text in SECTIONS.items():
            exec(compile(code(text), "docs/migration.md", "exec"), scope)
            made[section] = dict(scope)
    return made.__getitem__


def results(expression: str, scope: dict[str, Any], wanted: list[str]) -> list[Tensor]:
    """The output, and its gradients of what is wanted."""
    if not wanted:
        with torch.no_grad():
            return [eval(expression, scope)]
    leaves = {name: scope[name].clone().requires_grad_() for name in wanted}
    out = eval(expression, {**scope, **leaves})
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    return [out, *torch.autograd.grad((out * weights).sum(), list(leaves.values()), materialize_grads=True)]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_row(row: Row, names: Callable[[str], dict[str, Any]]) -> None:
    scope = names(row.section)
    used = [name for name in INPUTS if all(re.search(rf"\b{name}\b", code) for code in (row.before, row.after))]
    assert used
    if any(name in row.before for name in WITHOUT_GRADIENT):
        used = []
    before, after = (results(expression, scope, used) for expression in (row.before, row.after))
    assert max(x.abs().max() for x in before[1:] or before) > 0.01  # two calls that give nothing are equal too
    for name, expected, actual in zip(["output", *used], before, after, strict=True):
        torch.testing.assert_close(
            actual, expected, rtol=1e-5, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_every_section_has_its_rows() -> None:
    assert {section: len(rows_of(section)) >= 10 for section in SECTIONS} == dict.fromkeys(SECTIONS, True)
    assert len(SECTIONS) == 5
    listed = [line for text in SECTIONS.values() for line in text.splitlines() if line.startswith("| ")]
    headings = [line for line in listed if line.startswith("| before")]
    assert len(listed) == len(headings) + len(ROWS)  # no row is passed over


def test_a_wrong_row_fails(names: Callable[[str], dict[str, Any]]) -> None:
    """The two alignments, and a window one too wide: what the page is there to prevent."""
    for section, before, after in (
        ("torch.nn.functional.scaled_dot_product_attention", "sdpa(q, k, v, is_causal=True)", "causal=True"),
        (
            "xformers",
            "memory_efficient_attention(t(q), t(k), t(v), LocalAttentionFromBottomRightMask(3, 1))",
            "window=(4, 1)",
        ),
    ):
        wrong = Row(
            section, before, f"t(attention(q, k, v, {after}))" if "t(q)" in before else f"attention(q, k, v, {after})"
        )
        with pytest.raises(AssertionError, match="output"):
            test_row(wrong, names)


def overview(row: str) -> list[str]:
    """The cells of a row of the first table; the first row has no name."""
    line = next(line for line in PAGE.splitlines() if line.startswith(f"| {row} |" if row else "| |"))
    return [cell.strip() for cell in line.strip("|").split("|")[1:]]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_queries_that_see_nothing(names: Callable[[str], dict[str, Any]]) -> None:
    scope = names("FlexAttention")
    q, k, v, t, mha, x = (scope[name] for name in ("q", "k", "v", "t", "mha", "x"))
    sees = torch.arange(6) != 0
    hidden = torch.zeros(10, 10, dtype=torch.bool)
    hidden[0] = True
    outs = {
        "fastattn": fastattn.attention(q, k, v, mask=sees[:, None]),
        "torch SDPA": torch.nn.functional.scaled_dot_product_attention(q, k, v, sees[:, None].expand(6, 10)),
        "`nn.MultiheadAttention`": mha(x, x, x, attn_mask=hidden)[0][:, None],
        "flash-attn": t(scope["flash_attn_func"](t(q), t(k[:, :, :5]), t(v[:, :, :5]), causal=True)),
        "FlexAttention": scope["flex_attention"](q, k, v, block_mask=scope["blocks"](lambda b, h, i, j: i != 0)),
    }
    said = dict(zip(overview(""), overview("a query that sees nothing"), strict=True))
    for library, out in outs.items():
        first, rest = out[:, :, 0], out[:, :, 1:]
        assert rest.isfinite().all(), library
        assert rest.abs().max() > 0.01, library
        assert first.isnan().all() if said[library] == "NaN" else (first == float(said[library])).all(), library


def test_what_is_not_taken_over() -> None:
    """Values that other libraries know, and a layout that fits by accident."""
    x = torch.randn(2, 4, 8, 16)
    for options, message in (
        ({"window": (-1, 1)}, "window must hold integers >= 0 or None"),
        ({"softcap": 0.0}, "softcap must be positive, or None"),
        ({"dropout_p": 1.0}, r"dropout_p must be in \[0, 1\)"),
        ({"alibi_slopes": torch.ones(4, requires_grad=True)}, "alibi_slopes has no gradient here"),
        ({"mask": torch.zeros(8, 8)}, "a float mask is passed as bias"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            fastattn.attention(x, x, x, **options)
    problem = fastattn.explain(*[x.transpose(1, 2)] * 3).problem
    assert (problem.heads_q, problem.seqlen_q) == (8, 4)
