"""explain, available_backends, and the choice of a backend."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastattn
from fastattn.backends import Preference
from fastattn.backends.native import cuda
from fastattn.backends.reference import ReferenceBackend
from fastattn.problem import Problem

from ..cases import COMBINATIONS, FEATURES, VARLEN, Case, build

Q, K = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8)


def test_available_backends() -> None:
    names = fastattn.available_backends()
    assert "reference" in names
    assert len(set(names)) == len(names)
    assert [name for name in ("cuda", "triton", "cpu", "reference") if name in names] == names


@pytest.mark.parametrize("case", [FEATURES[0], *COMBINATIONS, VARLEN[-1]], ids=str)
def test_report_of_a_call(case: Case) -> None:
    report = build(case).explain()
    assert report.backend in fastattn.available_backends()
    assert {report.backend, *report.reasons} >= set(fastattn.available_backends())
    assert report.backend not in report.reasons
    assert all(isinstance(reason, str) and reason.endswith(".") for reason in report.reasons.values())
    assert str(report).startswith(f"This call runs on the backend '{report.backend}'.")
    assert all(f"not '{name}': {reason}" in str(report) for name, reason in report.reasons.items())


def test_report_describes_the_problem() -> None:
    report = fastattn.explain(Q, K, K[..., :3], causal=True, window=(4, None), softcap=2.0, dropout_p=0.1)
    problem = report.problem
    assert (problem.kind, problem.batch, problem.heads_q, problem.heads_kv) == ("dense", 2, 4, 2)
    assert (problem.seqlen_q, problem.seqlen_k, problem.head_dim, problem.head_dim_v) == (5, 7, 8, 3)
    assert (problem.window_left, problem.window_right, problem.bottom_right) == (4, 0, True)
    assert (problem.softcap, problem.dropout_p, problem.scale) == (2.0, 0.1, pytest.approx(8**-0.5))
    assert problem.features == {"dense", "causal", "window", "softcap", "dropout", "gqa"}
    assert "torch.float32" in str(report)
    assert "softcap" in str(report)


def test_varlen_report() -> None:
    cu = torch.tensor([0, 5], dtype=torch.int32)
    x = torch.randn(5, 2, 8)
    assert fastattn.explain(x, x, x, cu_seqlens_q=cu, cu_seqlens_k=cu).problem.kind == "varlen"
    with pytest.raises(ValueError, match="cu_seqlens_q and cu_seqlens_k go together"):
        fastattn.explain(x, x, x, cu_seqlens_q=cu)


def test_named_backend() -> None:
    report = fastattn.explain(Q, K, K, backend="reference")
    assert report.backend == "reference"
    assert set(report.reasons) >= set(fastattn.available_backends()) - {"reference"}
    assert all("reference" not in reason or "asked for by name" in reason for reason in report.reasons.values())


def test_computes_nothing() -> None:
    """No memory is touched, no random number drawn."""
    state = torch.get_rng_state()
    fastattn.explain(Q, K, K, dropout_p=0.5)
    assert torch.equal(torch.get_rng_state(), state)
    huge = torch.empty(1, device="meta").expand(64, 64, 1_000_000, 128)
    assert fastattn.explain(huge, huge, huge).problem.seqlen_k == 1_000_000


def test_sees_autocast() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fastattn.explain(Q, K, K).problem.dtype == torch.bfloat16


def test_report_is_a_value() -> None:
    report = fastattn.explain(Q, K, K, causal=True)
    assert pickle.loads(pickle.dumps(report)) == report == copy.deepcopy(report)
    assert hash(report.problem) == hash(copy.deepcopy(report.problem))
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.backend = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    "keyword", ["nonsense", "k_new", "block_table", "cos", "window_left", "rotary_interleaved", "mask_"]
)
def test_unknown_keywords(keyword: str) -> None:
    with pytest.raises(TypeError, match=f"explain got an unexpected keyword argument '{keyword}'"):
        fastattn.explain(Q, K, K, **{keyword: None})
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{keyword}'"):
        fastattn.reference.attention(Q, K, K, **{keyword: None})


# ------------------------------------------------------------------------------------------------- a choice to be made


class Picky(ReferenceBackend):
    """Computes what has no softcap."""

    name = "picky"

    def why_not(self, problem: Problem) -> str | None:
        return "it has no softcap." if problem.softcap is not None else None


class Absent(ReferenceBackend):
    """Runs on no machine."""

    name = "absent"

    def why_unavailable(self) -> str | None:
        return "there is no such device here."


@pytest.fixture
def _three_backends(use_backends: Callable[..., None]) -> None:
    use_backends(Absent(), Picky(), ReferenceBackend())


@pytest.mark.usefixtures("_three_backends")
def test_the_first_that_can_is_chosen() -> None:
    assert fastattn.available_backends() == ["picky", "reference"]
    report = fastattn.explain(Q, K, K)
    assert report.backend == "picky"
    assert report.reasons == {
        "absent": "there is no such device here.",
        "reference": "it can compute this call, but 'picky' comes first.",
    }
    report = fastattn.explain(Q, K, K, softcap=1.0)
    assert report.backend == "reference"
    assert report.reasons == {"absent": "there is no such device here.", "picky": "it has no softcap."}
    assert fastattn.explain(Q, K, K, backend="reference").reasons["picky"] == (
        "it can compute this call, but 'reference' was asked for by name."
    )


@pytest.mark.usefixtures("_three_backends")
@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [("picky", {"softcap": 1.0}, "it has no softcap"), ("absent", {}, "there is no such device here")],
)
def test_a_named_backend_that_cannot_raises_its_reason(name: str, options: dict, reason: str) -> None:
    for function in (fastattn.attention, fastattn.explain):
        with pytest.raises(ValueError, match=f"backend '{name}' cannot compute this call: {reason}"):
            function(Q, K, K, backend=name, **options)
    with pytest.raises(ValueError, match=r"one of \['absent', 'picky', 'reference'\], got 'other'"):
        fastattn.attention(Q, K, K, backend="other")


@pytest.mark.usefixtures("_three_backends")
def test_the_chosen_backend_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward run where explain says."""
    ran = []
    for method in ("forward", "backward", "decode"):
        original = getattr(ReferenceBackend, method)

        def spy(self: ReferenceBackend, *args: object, method: str = method, original: object = original) -> object:
            ran.append((self.name, method))
            return original(self, *args)  # type: ignore[operator]

        monkeypatch.setattr(ReferenceBackend, method, spy)
    q = Q.clone().requires_grad_()
    for options in ({}, {"backend": "reference"}, {"softcap": 1.0}):
        fastattn.attention(q, K, K, **options).sum().backward()
    lengths = torch.tensor([7, 7], dtype=torch.int32)
    with torch.no_grad():
        fastattn.attention_with_kv_cache(q, K, K, cache_lengths=lengths)
    chosen = ["picky", "reference", "reference"]
    assert [name for name, method in ran if method == "forward"] == [*chosen, "picky"]  # the last within decode
    assert [name for name, method in ran if method == "backward"] == chosen
    assert ("picky", "decode") in ran


class PlannedGpu(cuda.Gpu):
    """A GPU that is not here."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def why_unavailable(self) -> str | None:
        return None

    def architecture(self, device: torch.device) -> cuda.Architecture:
        return cuda.Architecture(self.capability, 132)


class PlannedTriton(ReferenceBackend):
    """Stands for Triton's kernels, and computes everything."""

    name = "triton"

    def why_unavailable(self) -> str | None:
        return None

    def preference(self, problem: Problem) -> Preference:
        return Preference.NORMAL


LARGE: dict[str, Any] = {"heads": 16, "heads_kv": 16, "seqlen_q": 8192, "seqlen_k": 8192, "head_dim": 64}


@pytest.mark.skipif(cuda._cuda is None, reason="fastattn was built without nvcc")
@pytest.mark.parametrize(
    ("capability", "changes", "chosen"),
    [
        (90, {}, "triton"),
        (80, {}, "cuda"),
        (100, {}, "cuda"),
        (90, {"seqlen_q": 512, "seqlen_k": 512}, "cuda"),
        (90, {"seqlen_q": 1, "seqlen_k": 2**27}, "cuda"),
        (90, {"heads_kv": 4}, "cuda"),
        (90, {"head_dim": 256}, "cuda"),
    ],
)
def test_large_calls_on_hopper_go_to_triton(
    capability: int, changes: dict[str, int], chosen: str, use_backends: Callable[..., None]
) -> None:
    use_backends(cuda.CudaBackend(PlannedGpu(capability)), PlannedTriton(), ReferenceBackend())
    size = LARGE | changes
    with FakeTensorMode():
        q, k = (
            torch.empty(
                1, size[f"heads{kv}"], size[f"seqlen_{x}"], size["head_dim"], dtype=torch.bfloat16, device="cuda"
            )
            for x, kv in (("q", ""), ("k", "_kv"))
        )
        report = fastattn.explain(q, k, k)
    assert report.backend == chosen
    passed_over = {"triton": "is faster for calls this large on this GPU.", "cuda": "comes first."}[chosen]
    other = {"triton": "cuda", "cuda": "triton"}[chosen]
    assert report.reasons[other] == f"it can compute this call, but {chosen!r} {passed_over}"
