"""Every backend that runs here is a parameter of the tests; memory that nothing wrote is NaN while they run."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import fastattn
from fastattn.autograd import fast_path
from fastattn.backends import Backend, dispatch
from fastattn.backends.native import cuda
from fastattn.kernels.machine import interpreting

COMPLETE_BACKENDS = ("reference", "cpu", "triton")
"""Those that promise every feature: for them a refused call is a failure, for others a skipped test."""

REFUSED_DTYPES = {
    "cuda": (torch.float64, torch.float32),  # half precision alone
    # Triton's kernels compute in float32; its interpreter gets bfloat16 wrong.
    "triton": (torch.float64, torch.bfloat16) if interpreting() else (torch.float64,),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--backend", action="append", help="test this backend only; may be repeated")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        # Inductor knows an operator by its name and arguments. What it compiled for an older tree, whose operators gave
        # results of other shapes, must not be taken for this one's.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder = tempfile.mkdtemp(prefix="fastattn-inductor-")
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        chosen = metafunc.config.getoption("--backend") or fastattn.available_backends()
        on_gpu = pytest.mark.gpu
        metafunc.parametrize(
            "backend", [pytest.param(name, marks=on_gpu if device_of(name) == "cuda" else ()) for name in chosen]
        )
    if "machine" in metafunc.fixturenames and hasattr(metafunc.module, "CAPABILITY"):
        from .cuda import cuda_machines

        metafunc.parametrize("machine", cuda_machines.parameters(metafunc.module.CAPABILITY), indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what a backend refuses for its dtype alone or in most cases, and what takes an interpreter minutes.

    That the backend refuses those dtypes, and says so, is a test of its own.
    """
    kept, left_out = [], []
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        backend = parameters.get("backend", "")
        dtypes = [parameters.get("dtype"), *(mark.args[0] for mark in item.iter_markers("needs_dtype"))]
        refused = any(dtype in REFUSED_DTYPES.get(backend, ()) for dtype in dtypes)
        refused |= item.get_closest_marker("complete") is not None and backend not in COMPLETE_BACKENDS
        slow = backend == "triton" and interpreting() and item.get_closest_marker("many_programs")
        (left_out if refused or slow else kept).append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept


def device_of(backend: str) -> str:
    """Where a backend keeps its tensors."""
    return "cuda" if backend in ("cuda", "triton") and torch.cuda.is_available() else "cpu"


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Iterator[None]:
    """Skips a test whose call is refused by a backend that is there and does not promise everything.

    Anything else that goes wrong is a failure, also where a backend refuses a call after it was chosen.
    """
    try:
        return (yield)
    except dispatch.Refusal as refusal:
        backend = dispatch.by_name(pyfuncitem.funcargs.get("backend", "cpu"))
        if backend.name in COMPLETE_BACKENDS or backend.why_unavailable() is not None:
            raise
        pytest.skip(str(refusal))


@pytest.fixture
def device(backend: str) -> str:
    """Where the backend under test keeps its tensors."""
    return device_of(backend)


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(20)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fills what torch.empty returns with NaN (integers: the largest), so that reading it does not go unnoticed."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture
def use_backends(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Replaces the backends there are; what was decided for calls like a test's own is forgotten, before and after."""

    def forget() -> None:
        dispatch._choose_cached.cache_clear()
        fast_path._kinds.clear()

    def use(*backends: Backend) -> None:
        monkeypatch.setattr(dispatch, "BACKENDS", backends)
        forget()

    yield use
    forget()


@pytest.fixture
def machine(request: pytest.FixtureRequest, use_backends: Callable[..., None]) -> Any:
    """What runs CUDA kernels of the compute capability that the test's module says (CAPABILITY, times 10).

    See tests/cuda/cuda_machines.py. It stands behind the backend "cuda", which is there before all others.
    """
    machine = request.param()
    use_backends(cuda.CudaBackend(machine), *dispatch.BACKENDS)
    return machine
