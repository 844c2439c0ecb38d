"""Tracers: torch.compile, torch.export, make_fx, FakeTensor, meta tensors, and opcheck of every operator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck

import fastattn
from fastattn import attention, attention_varlen, attention_with_kv_cache

from .. import cases
from ..cache_cases import CONTIGUOUS, PAGED, CacheCase
from ..cache_cases import build as build_cache
from ..cases import Case, build, expected


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function: Callable[..., Any], backend: str = "aot_eager", **more: Any) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, backend=backend, **more)


def value_and_grads(function: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    value = function(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


# ------------------------------------------------------------------------------------------------------- torch.compile

EVERYTHING = Case(
    "compiled", batch=2, seqlen_q=9, seqlen_k=11, **cases.ALL_TOGETHER | {"kv_lengths": (9, 11), "hidden_rows": ()}
)
EVERYTHING_VARLEN = Case(
    "compiled varlen", lengths=((4, 7), (5, 6)), **cases.ALL_TOGETHER | {"kv_lengths": (7, 4), "hidden_rows": ()}
)


def training_step(call: cases.Call) -> Callable[..., Tensor]:
    """A loss over out and lse, between operations that a compiler may fuse."""
    names = list(call.leaves)
    function = attention if call.cu_seqlens is None else attention_varlen

    def step(*leaves: Tensor) -> Tensor:
        given = dict(zip(names, leaves, strict=True))
        q, k, v = (2 * given.pop(name) for name in ("q", "k", "v"))
        out, lse = function(q, k, v, *(call.cu_seqlens or ()), return_lse=True, **{**call.options, **given})
        return out.sin().sum() + lse.masked_fill(lse == -torch.inf, 0.0).cos().sum()

    return step


@pytest.mark.parametrize(
    ("compiler", "case"),
    [("aot_eager", EVERYTHING), ("aot_eager", EVERYTHING_VARLEN), ("inductor", EVERYTHING)],
    ids=str,
)
def test_training_step(compiler: str, case: Case) -> None:
    call = build(case)
    step, leaves = training_step(call), list(call.leaves.values())
    found = value_and_grads(compiled(step, compiler), leaves)
    for a, b in zip(found, value_and_grads(step, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_training_in_half_precision(backend: str, device: str) -> None:
    """The graph keeps what rounding took from out, so that the gradients are those of eager execution."""
    call = build(cases.ALIKE[0], torch.bfloat16, device)
    leaves = list(call.requires_grad().values())
    dout = expected(cases.ALIKE[0], torch.bfloat16).dout.to(device)

    def gradients(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(*leaves, backend=backend), leaves, dout)

    for a, b in zip(gradients(compiled(attention)), gradients(attention), strict=True):
        assert torch.equal(a, b)


@pytest.mark.needs_dtype(torch.float32)
def test_named_backend_and_strides(backend: str, device: str) -> None:
    """The traced strides are those of the real outputs, so that views of them are right."""

    def merged(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, causal=True, backend=backend).transpose(1, 2).view(2, 9, 32)

    q, k, v = torch.randn(2, 9, 3, 4, 8, device=device).transpose(1, 3).unbind(2)
    assert torch.equal(compiled(merged)(q, k, v), merged(q, k, v))


def test_refusals_come_while_tracing() -> None:
    q = torch.randn(1, 2, 3, 8)
    for options, word in (({"backend": "nonsense"}, "nonsense"), ({"mask": torch.ones(4, 4).bool()}, "broadcastable")):
        with pytest.raises(Exception, match=word):
            compiled(lambda q, o=options: attention(q, q, q, **o))(q)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_dropout_is_that_of_eager(compiler: str) -> None:
    """Two layers in one graph draw two seeds, in eager's order, and the backward pass uses the forward's."""

    def two_layers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        first = attention(q, k, v, dropout_p=0.5)
        second = attention(q, k, v, dropout_p=0.5)
        return (first * torch.linspace(0, 1, first.numel()).view_as(first)).sum() + second.square().sum()

    tensors = list(torch.randn(3, 1, 2, 9, 8).unbind())
    results = []
    for function in (compiled(two_layers, compiler), two_layers):
        torch.manual_seed(3)
        results.append([value_and_grads(function, tensors), value_and_grads(function, tensors)])
    for found, want in zip(*results, strict=True):
        for a, b in zip(found, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert not torch.equal(results[0][0][0], results[0][1][0])


def test_two_layers_get_two_seeds() -> None:
    x = torch.randn(1, 2, 9, 8)
    first, second = compiled(lambda x: (attention(x, x, x, dropout_p=0.5), attention(x, x, x, dropout_p=0.5)))(x)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("seed", [7, torch.tensor(7)], ids=["int", "tensor"])
def test_seed_argument(seed: int | Tensor) -> None:
    x = torch.randn(1, 2, 9, 8)
    run = compiled(lambda x, seed: attention(x, x, x, dropout_p=0.5, seed=seed))
    assert torch.equal(run(x, seed), attention(x, x, x, dropout_p=0.5, seed=7))


@torch._dynamo.config.patch(error_on_recompile=True)
def test_dynamic_shapes_do_not_recompile() -> None:
    """One graph for all lengths and batch sizes, forward and backward."""

    def step(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return attention(q, k, v, causal=True, window=(3, 0), bias=bias)

    run = compiled(step, dynamic=True)
    # No two sizes of the first call are the same: the tracer would take them for one.
    for batch, rows, keys in ((3, 5, 7), (2, 9, 11), (6, 17, 40), (4, 33, 33)):
        q = torch.randn(batch, 4, rows, 8, requires_grad=True)
        k, v, bias = torch.randn(batch, 2, keys, 8), torch.randn(batch, 2, keys, 8), torch.randn(4, rows, keys)
        found, want = run(q, k, v, bias), step(q, k, v, bias)
        torch.testing.assert_close(found, want)
        (a,), (b,) = torch.autograd.grad(found.sum(), q), torch.autograd.grad(want.sum(), q)
        torch.testing.assert_close(a, b)


@torch._dynamo.config.patch(error_on_recompile=True)
def test_dynamic_varlen_does_not_recompile() -> None:
    run = compiled(lambda *given: attention_varlen(*given, causal=True), dynamic=True)
    for lengths in ((3, 4, 9), (5, 9), (8, 1, 1, 30)):
        cu = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        x = [torch.randn(sum(lengths), 2, 8) for _ in range(3)]
        torch.testing.assert_close(run(*x, cu, cu), attention_varlen(*x, cu, cu, causal=True))


@torch._dynamo.config.patch(error_on_recompile=True)
def test_decoding_does_not_recompile() -> None:
    """cache_lengths is data: a compiled decoding step serves every length, and writes into the cache it is given."""

    def step(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, new: Tensor) -> Tensor:
        return attention_with_kv_cache(q, k, v, cache_lengths=lengths, k_new=new, v_new=new, causal=True)

    run = compiled(step)
    caches, twins = ([torch.zeros(2, 2, 8, 4) for _ in range(2)] for _ in range(2))
    lengths = torch.tensor([0, 3], dtype=torch.int32)
    with torch.no_grad():
        for _ in range(5):
            q, new = torch.randn(2, 2, 1, 4), torch.randn(2, 2, 1, 4)
            assert torch.equal(run(q, *caches, lengths, new), step(q, *twins, lengths, new))
            lengths += 1
    assert all(torch.equal(a, b) for a, b in zip(caches, twins, strict=True))
    assert torch.count_nonzero(caches[0][1, :, 3:8]) == 2 * 5 * 4


@pytest.mark.parametrize(
    ("compiler", "case"), [("aot_eager", CONTIGUOUS[-1]), ("aot_eager", PAGED[-1]), ("inductor", PAGED[-1])], ids=str
)
def test_cache(compiler: str, case: CacheCase) -> None:
    calls = [build_cache(case), build_cache(case)]

    def run(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
        # Reading the cache behind the call must see what the call wrote.
        out = attention_with_kv_cache(q, k, v, **options)
        return out.sin(), k.nan_to_num(0.0).sum(dim=(1, 3))

    with torch.no_grad():
        found, want = (
            function(call.q, call.k_cache, call.v_cache, call.options)
            for function, call in zip((compiled(run, compiler), run), calls, strict=True)
        )
    torch.testing.assert_close(found, want)
    for name in ("k_cache", "v_cache"):
        torch.testing.assert_close(getattr(calls[0], name), getattr(calls[1], name), rtol=0, atol=0, equal_nan=True)


def test_other_functions_compile() -> None:
    """merge_states, apply_rotary, scaled_dot_product_attention, explain of nothing: one graph, no break."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        rotary = fastattn.Rotary(torch.ones(9, 4), torch.zeros(9, 4))
        k = fastattn.apply_rotary(k, rotary, torch.arange(9))
        halves = [attention(q, k[:, :, s], v[:, :, s], return_lse=True) for s in (slice(4), slice(4, 9))]
        mask = torch.ones(9, 9, dtype=torch.bool).tril()
        torchs = fastattn.scaled_dot_product_attention(q[0], k[0], v[0], mask, scale=0.3)
        return (*fastattn.merge_states(*zip(*halves, strict=True)), torchs)

    x = torch.randn(3, 1, 2, 9, 8).unbind()
    torch.testing.assert_close(compiled(run)(*x), run(*x))


# -------------------------------------------------------------------------------------------------- export and make_fx


class Layer(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, causal=True, softcap=5.0)


def test_export() -> None:
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)
    program = torch.export.export(Layer(), (q, k, v))
    assert torch.ops.fastattn.forward.default in [node.target for node in program.graph.nodes]
    assert torch.equal(program.module()(q, k, v), Layer()(q, k, v))


def test_export_with_dynamic_lengths() -> None:
    rows, keys = torch.export.Dim("rows", min=2, max=512), torch.export.Dim("keys", min=2, max=512)
    shapes = {"q": {2: rows}, "k": {2: keys}, "v": {2: keys}}
    given = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)
    program = torch.export.export(Layer(), given, dynamic_shapes=shapes)
    q, k, v = torch.randn(2, 4, 31, 8), torch.randn(2, 2, 100, 8), torch.randn(2, 2, 100, 8)
    assert torch.equal(program.module()(q, k, v), Layer()(q, k, v))


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx(mode: str) -> None:
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = q.detach().requires_grad_()
        return torch.autograd.grad(attention(q, k, v, causal=True).sin().sum(), q)[0]

    graph = make_fx(step, tracing_mode=mode)(q, k, v)
    names = [str(node.target) for node in graph.graph.nodes]
    assert "fastattn.forward.default" in names
    assert "fastattn.backward.default" in names
    torch.testing.assert_close(graph(q + 1, k, v), step(q + 1, k, v))


# --------------------------------------------------------------------------------------------- tensors without numbers


@pytest.mark.parametrize("case", [EVERYTHING, EVERYTHING_VARLEN, cases.VARLEN[-2], *cases.LAYOUT_CASES[:4]], ids=str)
def test_fake_tensors(case: Case) -> None:
    """Shapes, dtypes and strides of outputs and gradients are those of a real run."""
    real = build(case)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = cases.replace_tensors(build(case), mode.from_tensor)
        fake.cu_seqlens = None if real.cu_seqlens is None else tuple(mode.from_tensor(x) for x in real.cu_seqlens)
        found = run_with_grads(fake)
    assert all(type(x).__name__ == "FakeTensor" for x in found)
    for a, b in zip(found, run_with_grads(real), strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


def run_with_grads(call: cases.Call) -> list[Tensor]:
    leaves = call.requires_grad()
    out, lse = call.run(return_lse=True)
    return [out, lse, *torch.autograd.grad(out.sum() + lse.sum(), list(leaves.values()))]


def test_meta_tensors() -> None:
    call = cases.replace_tensors(build(EVERYTHING), lambda x: x.to("meta"))
    found = run_with_grads(call)
    assert all(x.device.type == "meta" for x in found)
    for a, b in zip(found, run_with_grads(build(EVERYTHING)), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
    meta = build_cache(CONTIGUOUS[-1])
    options = {name: x.to("meta") if isinstance(x, Tensor) else x for name, x in meta.options.items()}
    options["rotary"] = tuple(x.to("meta") for x in meta.options["rotary"][:2])
    out = attention_with_kv_cache(meta.q.to("meta"), meta.k_cache.to("meta"), meta.v_cache.to("meta"), **options)
    assert out.shape == (*meta.q.shape[:3], meta.case.head_dim_v)


# ------------------------------------------------------------------------------------------------------------- opcheck


def operator_arguments(call: cases.Call, *, for_backward: bool) -> tuple[Any, ...]:
    """The positional arguments of torch.ops.fastattn.forward for a call."""
    o = call.options
    left, right = o["window"] or (None, None)
    names = ("mask", "bias", "alibi_slopes", "sinks", "kv_lengths", "q_offset")
    seed = torch.tensor(o["seed"]) if "seed" in o else None
    tensors = (call.q, call.k, call.v, *(o.get(name) for name in names), *(call.cu_seqlens or (None, None)), seed)
    options = (o["causal"], left, right, o["causal_alignment"], o["softcap"], o["scale"], o.get("dropout_p", 0.0))
    return (*tensors, *options, None, for_backward)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("case", [EVERYTHING, EVERYTHING_VARLEN, cases.LAYOUT_CASES[0]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_forward(case: Case, dtype: torch.dtype, grad: bool) -> None:
    call = build(case, dtype)
    if grad:
        call.requires_grad()
    opcheck(torch.ops.fastattn.forward.default, operator_arguments(call, for_backward=grad))


@pytest.mark.parametrize("case", [EVERYTHING, EVERYTHING_VARLEN, cases.LAYOUT_CASES[0]], ids=str)
@pytest.mark.parametrize("wanted", ["all", "some"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_backward(wanted: str, case: Case, dtype: torch.dtype) -> None:
    check_backward_operator(case, wanted, dtype)


def test_opcheck_backward_that_is_differentiated_again() -> None:
    """Dense calls only: second derivatives of packed sequences read cu_seqlens, which a tracer does not have."""
    case = Case(
        "twice", seqlen_q=5, seqlen_k=7, head_dim=8, head_dim_v=8, causal=True, dropout_p=0.3, bias="1hqk", **cases.GQA
    )
    check_backward_operator(case, "twice", torch.float32)


def check_backward_operator(case: Case, wanted: str, dtype: torch.dtype) -> None:
    call = build(case, dtype)
    arguments = operator_arguments(call, for_backward=True)
    out, lse, low, _ = torch.ops.fastattn.forward(*arguments)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    needs = [True, True, True, "bias" in call.leaves, "sinks" in call.leaves]
    if wanted == "some":
        dlse, needs = None, [False, True, False, "bias" in call.leaves, False]
    if wanted == "twice":
        call.requires_grad()
        dout.requires_grad_()
        dlse.requires_grad_()
    opcheck(torch.ops.fastattn.backward.default, (dout, dlse, out, lse, low, *arguments[:-1], needs))


@pytest.mark.parametrize("case", [CONTIGUOUS[0], CONTIGUOUS[-1], PAGED[-1]], ids=str)
def test_opcheck_cache(case: CacheCase) -> None:
    """The operator changes the caches and nothing else, as its schema says."""
    call = build_cache(case)
    o = call.options
    # opcheck compares before and after by equality, which NaN would defeat.
    caches = call.k_cache.nan_to_num(0.0), call.v_cache.nan_to_num(0.0)
    names = ("mask", "bias", "alibi_slopes", "sinks", "cache_lengths", "q_offset", "k_new", "v_new", "block_table")
    cos, sin, interleaved = o.get("rotary", (None, None, False))
    left, right = o["window"] or (None, None)
    options = (o["causal"], left, right, o["causal_alignment"], o["softcap"], o["scale"], 0.0, interleaved, None)
    opcheck(torch.ops.fastattn.cache.default, (call.q, *caches, *(o.get(n) for n in names), cos, sin, *options))


def test_opcheck_seed() -> None:
    opcheck(torch.ops.fastattn.draw_seed.default, (torch.empty((), dtype=torch.int64),))
    assert torch.Tag.nondeterministic_seeded in torch.ops.fastattn.draw_seed.default.tags
