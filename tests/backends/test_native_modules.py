"""The native modules: what is said where one is missing, and what the build and the kernel tables must agree on."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fastattn.backends.native import why_not_imported
from native_build import CUDA_FOLDERS, CudaFolder

CUDA = Path(__file__).parents[2] / "csrc" / "cuda"
ROW = re.compile(r"\{Family::k(\w+), (\w+), ")
SOURCES = {
    **{"Forward": "forward", "Decode": "decode", "BwdDq": "bwd_dq", "BwdDkdv": "bwd_dkdv", "BwdDk": "bwd_dkdv"},
    **{"BwdDv": "bwd_dkdv", "AppendKv": "append_kv", "Combine": "combine"},
}
"""The file in which the kernels of a family are."""


def test_a_module_that_was_not_built_is_called_that() -> None:
    circular = ImportError("cannot import name '_gone' from partially initialized module 'fastattn'")
    assert re.fullmatch(r"there is no fastattn\._gone in .*fastattn", why_not_imported("_gone", circular))


def test_a_module_that_cannot_be_loaded_says_why() -> None:
    assert why_not_imported("_cpu", ImportError("undefined symbol: x")) == "undefined symbol: x"


@pytest.mark.parametrize("folder", [folder for folder in CUDA_FOLDERS if folder.name != "smxx"], ids=lambda x: x.name)
def test_kernel_tables_list_what_is_built(folder: CudaFolder) -> None:
    """Each head dimension of each family, once, upward; and no other."""
    rows = ROW.findall((CUDA / folder.name / "kernel_table.h").read_text())
    assert len(rows) == len(set(rows))
    found: dict[str, set[int]] = {}
    for family, dim in rows:
        found.setdefault(SOURCES[family], set())
        if dim != "kAnyHeadDim":
            found[SOURCES[family]].add(int(dim))
    assert found == {name: set(dims) for name, dims in folder.families.items()}
    for family in {family for family, _ in rows}:
        dims = [dim for name, dim in rows if name == family and dim != "kAnyHeadDim"]
        assert dims == sorted(dims, key=int)


def test_gpus_run_what_is_built_for_them() -> None:
    """The ranges of compute capabilities in kernel_table.cpp are those of the build."""
    text = (CUDA / "host" / "kernel_table.cpp").read_text()
    rows = re.findall(r"\{(\d+), (\w+), \w+, (sm\d+)::kKernels\}", text)
    found = {name: (int(begin), None if end == "kNoEnd" else int(end)) for begin, end, name in rows}
    built = {x.name: (min(x.ptx), x.end if x.end < 1000 else None) for x in CUDA_FOLDERS if x.name != "smxx"}
    assert found == built
