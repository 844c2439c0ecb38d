"""The pages for developers: files and modules that they name exist, and each page is linked."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
PAGES = sorted((ROOT / "docs" / "internals").glob("*.md"))
PATH = r"(?<![\w./-])(?:fastattn|kernels|csrc|benchmarks|tests|docs|examples)/[\w./-]*[\w/]"
MODULE = r"python -m ((?:benchmarks|tests|examples|fastattn)[\w.]*)"

with_pages = pytest.mark.parametrize("page", [CONTRIBUTING, *PAGES], ids=lambda page: page.stem)


@with_pages
def test_files_named_exist(page: Path) -> None:
    text = page.read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    paths = {*(ROOT / name for name in re.findall(PATH, text)), *(page.parent / link for link in links)}
    missing = sorted(str(path.relative_to(ROOT)) for path in paths if not path.exists())
    assert not missing, f"{page.relative_to(ROOT)} names what does not exist: {', '.join(missing)}"


@with_pages
def test_modules_named_exist(page: Path) -> None:
    missing = [name for name in re.findall(MODULE, page.read_text()) if importlib.util.find_spec(name) is None]
    assert not missing


def test_every_page_is_linked() -> None:
    missing = [page.name for page in PAGES if f"docs/internals/{page.name}" not in CONTRIBUTING.read_text()]
    assert PAGES
    assert not missing
