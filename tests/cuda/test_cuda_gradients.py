"""Gradients of the CUDA C++ kernels as built, executed in a simulator of PTX and on a GPU; see test_cuda_kernels.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn.backends.native import cuda
from fastattn.problem import values

from .. import cases
from ..cases import GQA, Call, Case
from ..tolerance import assert_close

pytest.importorskip("triton", reason="Triton, whose cuobjdump takes the PTX out of the module, is not installed")

from benchmarks.inspect.cuda_simulator import Simulator

from .cuda_machines import Hardware
from .test_cuda_kernels import BF16, FP16, SIZES, _case, _dims

pytestmark = [
    pytest.mark.skipif(cuda._cuda is None, reason="fastattn was built without nvcc"),
    pytest.mark.usefixtures("poisoned_memory"),
]

CAPABILITY = 80
ALL_DIMS = (8, 32, 64, 96, 128, 192, 256)

ALIKE: dict[str, Any] = {"mean": 2.0, "batch": 1, **_dims(64)}

CASES: tuple[tuple[Case, torch.dtype], ...] = (
    *((_case(f"alike, head_dim {d}", **{**ALIKE, **_dims(d)}), BF16) for d in (32, 64, 128, 256)),
    (_case("alike, float16", **ALIKE), FP16),
    (_case("alike, few queries", seqlen_q=2, seqlen_k=80, **ALIKE), BF16),
    (_case("alike, few queries and many keys", seqlen_q=2, seqlen_k=1300, **ALIKE), BF16),
    (Case("alike, varlen", mean=4.0, lengths=((40, 170), (9, 150)), **_dims(64)), BF16),
    *((_case(f"queries {n}", seqlen_q=n, causal=True, heads_q=1, heads_kv=1), BF16) for n in SIZES),
    *((_case(f"keys {n}", seqlen_k=n, heads_q=1, heads_kv=1), BF16) for n in SIZES),
    *((_case(f"square {n}", seqlen_q=n, seqlen_k=n, causal=True, **_dims(128)), BF16) for n in (1, 63, 64, 127, 257)),
    *((_case(f"head_dim {d}", causal=True, seqlen_q=80, **_dims(d)), BF16) for d in ALL_DIMS),
    *((_case(f"head_dim {d}, float16", seqlen_q=80, **_dims(d)), FP16) for d in ALL_DIMS),
    *((_case(f"head_dim {d}, softcap", softcap=1.5, causal=True, seqlen_q=80, **_dims(d)), BF16) for d in ALL_DIMS[1:]),
    (_case("head_dim_v larger", **_dims(40, 128)), BF16),
    (_case("head_dim_v smaller", **_dims(128, 24)), BF16),
    (_case("causal top-left", causal=True, causal_alignment="top-left"), BF16),
    (_case("more queries than keys", seqlen_q=300, seqlen_k=100, causal=True), BF16),
    (_case("window", window=(70, 20)), BF16),
    (_case("window left", window=(30, None)), BF16),
    (_case("window right", window=(None, 5)), BF16),
    (_case("window causal, long", window=(33, None), causal=True, seqlen_q=300, seqlen_k=300), BF16),
    (_case("alibi", alibi="h", causal=True), BF16),
    (_case("alibi and softcap, float16", alibi="h", softcap=2.0), FP16),
    (_case("sinks", sinks=True, causal=True, batch=2), BF16),
    (_case("sinks without keys", sinks=True, seqlen_q=201, seqlen_k=50, causal=True), BF16),
    (_case("kv_lengths", batch=2, kv_lengths=(130, 0), causal=True), BF16),
    (_case("negative scale", scale=-0.2), BF16),
    (_case("GQA", **{**GQA, "head_dim": 64, "head_dim_v": 64}, causal=True), BF16),
    (_case("head_dim not innermost", layout="bhds"), BF16),
    (_case("scattered", layout="scattered", seqlen_q=70, seqlen_k=70), BF16),
    (Case("varlen", lengths=((7, 19), (130, 150), (0, 5), (65, 64)), causal=True, heads_q=2, heads_kv=2), BF16),
    (Case("varlen, window", lengths=((7, 19), (130, 150), (64, 0), (65, 64)), window=(20, 0), **GQA), BF16),
    (Case("q_offset", seqlen_q=150, seqlen_k=201, q_offset=(60, -30), causal=True, alibi="h", **_dims(64)), BF16),
    (
        Case("q_offset past keys", seqlen_q=150, seqlen_k=201, q_offset=(190, 5000), window=(40, 30), **_dims(64)),
        BF16,
    ),
    (Case("varlen, q_offset", lengths=((7, 19), (130, 150), (65, 64)), q_offset=(9, -20, 5), causal=True, **GQA), BF16),
    (Case("varlen, spare", lengths=((7, 7), (200, 200)), spare=(5, 5), alibi="bh", causal=True, sinks=True), BF16),
)


@pytest.mark.parametrize("run", CASES, ids=lambda run: f"{run[0]}-{str(run[1]).removeprefix('torch.')}")
def test_gradients(run: tuple[Case, torch.dtype], machine: Simulator | Hardware) -> None:
    check(*run, machine)


def check(case: Case, dtype: torch.dtype, machine: Simulator | Hardware) -> None:
    """Out and all gradients of a case are right, and no kernel did what it must not."""
    call, want = cases.build(case, dtype, machine.device), cases.expected(case, dtype)
    leaves = call.requires_grad()
    out, lse = call.run(return_lse=True, backend="cuda")
    torch.autograd.backward((out, lse), (want.dout.to(out.device), want.dlse.to(out.device)))
    assert_close("out", out, want.exact.out, want.eager_out, dtype)
    for name, leaf in leaves.items():
        assert leaf.grad is not None, name
        term = want.exact.terms.get(name, 0.0)
        assert_close(f"d{name}", leaf.grad, want.exact.grads[name], want.eager_grads[name], dtype, largest_term=term)
    assert any("bwd_dq" in name for name in machine.kernels)
    assert any("bwd_dk" in name for name in machine.kernels)
    assert not machine.findings


def _gradients(
    call: Call, dout: Tensor, dlse: Tensor | None = None, of: tuple[str, ...] | None = None
) -> dict[str, Tensor]:
    """Of the call's tensors that are named, None = all; the others do not require grad."""
    names = of or tuple(call.leaves)
    leaves = {name: x.detach().requires_grad_(name in names) for name, x in call.leaves.items()}
    options = call.options | {name: leaves[name] for name in ("sinks",) if name in leaves}
    run = Call(call.case, leaves["q"], leaves["k"], leaves["v"], options, call.cu_seqlens)
    out, lse = run.run(return_lse=True, backend="cuda")
    results, seeds = ((out,), (dout,)) if dlse is None else ((out, lse), (dout, dlse))
    found = torch.autograd.grad(results, [leaves[name] for name in names], seeds)
    return dict(zip(names, found, strict=True))


def _seeds(call: Call) -> tuple[Tensor, Tensor]:
    want = cases.expected(call.case, call.q.dtype)
    return want.dout.to(call.q.device), want.dlse.to(call.q.device)


SUBSETS = (("q",), ("k",), ("v",), ("sinks",), ("q", "v"), ("k", "v"))


@pytest.mark.parametrize("head_dim", [64, 192])
def test_subsets_have_the_same_bits(head_dim: int, machine: Simulator | Hardware) -> None:
    """And so have two runs of all. (At head_dim 192 keys and values have a kernel each.)"""
    sizes: dict[str, Any] = {"seqlen_q": 70, "seqlen_k": 90, "heads_q": 2, "heads_kv": 1}
    case = _case("subsets", **{**sizes, "head_dim": head_dim, "head_dim_v": head_dim}, sinks=True, causal=True)
    call = cases.build(case, BF16, machine.device)
    seeds = _seeds(call)
    whole, again = (_gradients(call, *seeds) for _ in range(2))
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    for names in SUBSETS:
        before = len(machine.kernels)
        found = _gradients(call, *seeds, of=names)
        assert all(torch.equal(found[name], whole[name]) for name in names), names
        launched = " ".join(machine.kernels[before:])
        assert ("bwd_dq" in launched) == ("q" in names)
        assert ("bwd_dk" in launched) == ("k" in names or ("v" in names and head_dim == 64))
        assert ("bwd_dv" in launched) == ("v" in names and head_dim == 192)
    assert not machine.findings


@pytest.mark.parametrize("layout", ["expanded", "head_dim not innermost", "odd rows"])
def test_any_layout_of_dout(layout: str, machine: Simulator | Hardware) -> None:
    """What kernels cannot read in chunks is copied first."""
    call = cases.build(_case("dout", **_dims(64), seqlen_q=40, seqlen_k=50), BF16, machine.device)
    dout = _seeds(call)[0]
    if layout == "expanded":
        dout = dout[..., :1].expand(dout.shape)
    elif layout == "odd rows":
        dout = torch.cat([dout, dout[..., :3]], -1)[..., : dout.shape[-1]]
    else:
        dout = dout.transpose(2, 3).contiguous().transpose(2, 3)
    assert not dout.is_contiguous()
    want, found = _gradients(call, dout.contiguous()), _gradients(call, dout)
    assert all(torch.equal(found[name], want[name]) for name in want)
    assert not machine.findings


@pytest.mark.parametrize("which", ["q", "k", "inf k", "v", "dout"])
def test_visible_nonfinite_values(which: str, machine: Simulator | Hardware) -> None:
    """NaN shows exactly where the reference has it; here all queries see all keys."""
    call = cases.build(_case("nonfinite", seqlen_q=150, seqlen_k=200), BF16, machine.device)
    dout = _seeds(call)[0].clone()
    spoiled = {"q": call.q, "k": call.k, "inf k": call.k, "v": call.v, "dout": dout}[which]
    if which == "inf k":
        spoiled[0, 0, 120, 9] = torch.inf
    else:
        spoiled[0, 0, 130] = torch.nan
    found = _gradients(call, dout)
    leaves = [x.detach().float().requires_grad_() for x in call.leaves.values()]
    want = torch.autograd.grad(fastattn.reference.attention(*leaves), leaves, dout.float())
    assert any(x.isnan().any() for x in want)
    for name, exact in zip(call.leaves, want, strict=True):
        assert torch.equal(found[name].isnan(), exact.isnan()), name
        assert found[name][0, 1].isfinite().all()
    assert not machine.findings


UNSEEN = (
    _case("kv_lengths", batch=3, kv_lengths=(130, 0, 64), causal=True, sinks=True),
    Case("spare tokens", lengths=((7, 19), (0, 5), (70, 64)), spare=(40, 30), head_dim=64, head_dim_v=64, causal=True),
)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("case", UNSEEN, ids=str)
def test_unseen_memory_does_not_matter(case: Case, poison: float, machine: Simulator | Hardware) -> None:
    """The same bits in all gradients, whatever lies past kv_lengths or in rows of no sequence, of dout too."""
    found = []
    for value in (0.0, poison):
        call = cases.build(case, BF16, machine.device)
        dout, dlse = (x.clone() for x in _seeds(call))
        for b, length in enumerate(case.kv_lengths or ()):
            call.k[b, :, length:] = call.v[b, :, length:] = value
        if call.cu_seqlens is not None:
            queries, keys = (int(cu[-1]) for cu in call.cu_seqlens)
            call.q[queries:] = dout[queries:] = call.k[keys:] = call.v[keys:] = value
            dlse[:, queries:] = value
        found.append(_gradients(call, dout, dlse))
    for name, clean in found[0].items():
        assert clean.isfinite().all(), name
        assert torch.equal(found[1][name], clean), name
    assert not machine.findings


HUGE = 2**31 - 1
GARBAGE = (
    (-5, 1000, 7, HUGE),
    (HUGE, 7, 1000, -5),
    (60, 40, 20, 0),
    (-(2**31), -1, -HUGE, -2),
    (0, HUGE, HUGE, HUGE),
)


@pytest.mark.parametrize("number", range(len(GARBAGE)))
def test_garbage_does_not_lead_out_of_memory(
    number: int, machine: Simulator | Hardware, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Index tensors on a GPU are checked by nobody; the simulator raises on an access outside of a tensor."""
    for check in ("_check_cu_seqlens", "_check_lengths", "_check_q_offset"):
        monkeypatch.setattr(values, check, lambda *_: None)
    cu_seqlens, good = (
        torch.tensor(x, dtype=torch.int32, device=machine.device) for x in (GARBAGE[number], (0, 7, 30, 60))
    )
    call = cases.build(Case("garbage", lengths=((60, 60),), **_dims(64)), BF16, machine.device)
    dout = torch.ones_like(call.q)
    for pair in ((cu_seqlens, good), (good, cu_seqlens), (cu_seqlens, cu_seqlens)):
        call.cu_seqlens = pair
        call.options["causal"] = pair[0] is good
        _gradients(call, dout)
    dense = cases.build(_case("garbage", **_dims(64), batch=4, seqlen_q=20, seqlen_k=40), BF16, machine.device)
    dense.options["kv_lengths"] = cu_seqlens
    _gradients(dense, torch.ones_like(dense.q))
    dense.options |= {"q_offset": cu_seqlens, "window": (HUGE, 5)}
    _gradients(dense, torch.ones_like(dense.q))
    assert len([name for name in machine.kernels if "bwd_dkdv" in name]) == 5
    assert not machine.findings


def test_varlen_workspace(machine: Simulator | Hardware) -> None:
    """Two numbers for each row and head, however many sequences there are; none is legal."""
    for lengths in ([0], [0, 5, 5, 40], list(range(41))):
        cu_seqlens = torch.tensor(lengths, dtype=torch.int32, device=machine.device)
        q = torch.randn(40, 2, 64, device=machine.device).to(BF16).requires_grad_()
        fastattn.attention_varlen(q, q, q, cu_seqlens, cu_seqlens, backend="cuda").sum().backward()
        assert machine.tensors["workspace"].numel() == 2 * 512  # 80 numbers, up to a multiple of 256 bytes
        assert q.grad is not None
        if lengths == [0]:
            assert not q.grad.any()
    assert not machine.findings
