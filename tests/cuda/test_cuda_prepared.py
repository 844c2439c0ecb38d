"""Calls of q, k and v alone on the CUDA kernels: the short way through what was prepared, simulated or on a GPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn.backends import empty_results
from fastattn.backends.native import cuda
from fastattn.problem import Inputs, Options, describe

pytest.importorskip("triton", reason="Triton, whose cuobjdump takes the PTX out of the module, is not installed")

pytestmark = [
    pytest.mark.skipif(cuda._cuda is None, reason="fastattn was built without nvcc"),
    pytest.mark.usefixtures("poisoned_memory"),
]

CAPABILITY = 80
SHAPE = (1, 2, 20, 16)


@pytest.fixture
def steps(machine: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The operations that went the short way."""
    found: list[str] = []
    run_step = machine.run_step

    def noted(device: torch.device, step: Any, *rest: Any) -> None:
        found.append(step.operation)
        run_step(device, step, *rest)

    monkeypatch.setattr(machine, "run_step", noted)
    return found


def normal(machine: Any, *shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(shape).to(machine.device, dtype)


def misaligned(x: Tensor) -> Tensor:
    """The same values in memory that does not begin at a multiple of 16 bytes."""
    memory = x.new_empty(x.numel() + 1)[1:].view(x.shape)
    return memory.copy_(x)


def evaluate(backend: str, inputs: list[Tensor], dout: Tensor, needs: tuple[bool, bool, bool]) -> tuple[Tensor, ...]:
    for x, need in zip(inputs, needs, strict=True):
        x.requires_grad_(need)
    out = fastattn.attention(*inputs, causal=True, backend=backend)
    wanted = [x for x in inputs if x.requires_grad]
    return (out, *(torch.autograd.grad(out, wanted, dout) if wanted else ()))


def check(machine: Any, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, needs: tuple[bool, bool, bool]) -> None:
    """Compares out and the gradients needed with the reference's in float64."""
    found = evaluate("cuda", [x.detach() for x in (q, k, v)], dout, needs)
    truth = evaluate("reference", [x.detach().double() for x in (q, k, v)], dout.double(), needs)
    for ours, exact in zip(found, truth, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=4e-3, atol=4e-3)
    assert machine.findings == []


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "tokens first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "gaps between rows": lambda x: torch.cat([x, x[..., :8]], dim=-1)[..., : x.shape[-1]],
    "one head for all": lambda x: x[:, :1].expand(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False), (False, True, False), (False,) * 3])
def test_layouts_and_needs(layout: str, needs: tuple[bool, bool, bool], machine: Any, steps: list[str]) -> None:
    q, k, v = (LAYOUTS[layout](normal(machine, *SHAPE)) for _ in range(3))
    check(machine, q, k, v, normal(machine, *SHAPE), needs)
    assert steps == ["forward", "backward"][: 1 + any(needs)]


GRADIENTS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "expanded": (lambda x: x[:, :1, :1].expand(x.shape), True),
    "negated": (torch._neg_view, True),
    "transposed": (lambda x: x.transpose(2, 3).contiguous().transpose(2, 3), False),
    "misaligned": (misaligned, False),
    "zero without memory": (lambda x: torch._efficientzerotensor(x.shape, dtype=x.dtype, device=x.device), True),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_output_gradients(name: str, machine: Any, steps: list[str]) -> None:
    make, short = GRADIENTS[name]
    q, k, v = (normal(machine, *SHAPE) for _ in range(3))
    check(machine, q, k, v, make(normal(machine, *SHAPE)), (True, True, True))
    assert steps == ["forward", "backward"][: 1 + short]


def test_memory_that_begins_elsewhere_goes_the_general_way(machine: Any, steps: list[str]) -> None:
    q, k, v, dout = (normal(machine, *SHAPE) for _ in range(4))
    for given, short in ((misaligned(q), False), (q, True), (misaligned(q), False)):
        steps.clear()
        check(machine, given, k, v, dout, (True, True, True))
        assert steps == (["forward", "backward"] if short else [])


def test_hooks_may_bring_tensors_back_elsewhere(machine: Any, steps: list[str]) -> None:
    q, k, v, dout = (normal(machine, *SHAPE) for _ in range(4))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, misaligned):
        check(machine, q, k, v, dout, (True, True, True))
    assert steps == ["forward"]


def test_workspace_for_parts_of_the_keys(machine: Any, steps: list[str]) -> None:
    """A few queries share their keys out, and hand partial results on in memory of their own."""
    q, (k, v) = normal(machine, 1, 2, 3, 16), normal(machine, 2, 1, 2, 700, 16).unbind()
    check(machine, q, k, v, normal(machine, 1, 2, 3, 16), (False, False, False))
    assert steps == ["forward"]
    assert any("combine" in name or "merge" in name for name in machine.kernels), machine.kernels


class Driverless(cuda.Gpu):
    """Hands tensors on the CPU to the native module, as a GPU would hand over its own."""

    def why_unavailable(self) -> str | None:
        return None

    def architecture(self, device: torch.device) -> cuda.Architecture:
        return cuda.Architecture(80, 16)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here, and these addresses are not its own")
def test_the_native_module_takes_what_it_is_handed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes as far as the driver, which is not there."""
    monkeypatch.setattr(cuda, "_stream", lambda device: (0, 0))
    q, k, v, dout = (torch.randn(1, 2, 5, 8, dtype=torch.float16) for _ in range(4))
    inputs = Inputs(q, k, v)
    problem = describe("dense", inputs, Options())
    prepared = cuda.CudaBackend(Driverless()).prepare(problem, inputs)
    assert prepared is not None
    results = empty_results(problem, q, for_backward=True)
    for run in (
        lambda: prepared.infer(q, k, v),
        lambda: prepared.forward(q, k, v),
        lambda: prepared.backward(q, k, v, results, dout, (True, False, True)),
    ):
        with pytest.raises(RuntimeError, match="failed with cuda"):
            run()


def test_a_general_call_is_planned_once(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What memory it needs is known from the calls of its kind before it."""
    asked: list[str] = []
    find = cuda._workspace_bytes.__wrapped__

    def noted(call: Any, operation: str, *rest: Any) -> int:
        asked.append(operation)
        return find(call, operation, *rest)

    monkeypatch.setattr(cuda, "_workspace_bytes", functools.lru_cache(noted))
    for _ in range(2):
        q, k, v = (normal(machine, *SHAPE).requires_grad_() for _ in range(3))
        out = fastattn.attention(q, k, v, softcap=2.0, return_lse=True, backend="cuda")[0]
        torch.autograd.grad(out.sum(), (q, k, v))
    assert asked == ["forward", "backward"]
