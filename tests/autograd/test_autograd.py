"""How calls live in PyTorch's autograd: graphs, saved tensors, checkpoints, function transforms."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastattn
from fastattn import attention, attention_varlen, reference
from fastattn.autograd.call import Call, flatten, flatten_cache
from fastattn.problem import Inputs, Options


@pytest.fixture
def qkv() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)


Qkv = tuple[Tensor, Tensor, Tensor]


# ------------------------------------------------------------------------------------------------------------- graphs


def test_no_graph_where_none_is_asked_for(qkv: Qkv) -> None:
    q, k, v = qkv
    assert not attention(q, k, v).requires_grad
    q.requires_grad_()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            out, lse = attention(q, k, v, return_lse=True)
        assert out.grad_fn is None
        assert not out.requires_grad
        assert not lse.requires_grad
    out, lse = attention(q, k, v, return_lse=True)
    assert out.requires_grad
    assert lse.requires_grad


@pytest.mark.parametrize("graph", [False, True])
def test_inputs_live_as_long_as_the_graph(graph: bool) -> None:
    q, k = torch.randn(2, 1, 1, 5, 8).unbind()
    k = k.clone()
    alive = weakref.ref(k)
    with torch.set_grad_enabled(graph):
        out = attention(q.requires_grad_(), k, k)
    del k
    gc.collect()
    assert (alive() is not None) == graph
    del out
    gc.collect()
    assert alive() is None


def test_a_graph_is_freed_by_backward(qkv: Qkv) -> None:
    q, k, v = qkv
    out = attention(q.requires_grad_(), k, v)
    out.sum().backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        out.sum().backward()


@pytest.mark.parametrize("index", [0, 1])
def test_graph_may_be_retained(index: int, qkv: Qkv) -> None:
    q, k, v = (x.requires_grad_() for x in qkv)
    result = attention(q, k, v, causal=True, return_lse=True)[index].sin().sum()
    first = torch.autograd.grad(result, (q, k), retain_graph=True)
    second = torch.autograd.grad(result, (q, k))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(not grad.requires_grad for grad in first)


def test_create_graph(qkv: Qkv) -> None:
    q, k, v = (x.requires_grad_() for x in qkv)
    (dq,) = torch.autograd.grad(attention(q, k, v).sum(), q, create_graph=True)
    assert dq.requires_grad
    dq.square().sum().backward()
    assert all(x.grad is not None and x.grad.abs().max() > 0 for x in (q, k, v))


def test_gradient_penalty_equals_the_references(qkv: Qkv) -> None:
    """The use of second derivatives that people have: a penalty on the norm of a gradient."""
    found = []
    for function in (attention, reference.attention):
        leaves = [x.double().requires_grad_() for x in qkv]
        out = function(*leaves, causal=True, softcap=3.0, dropout_p=0.2, seed=4)
        (dq,) = torch.autograd.grad(out.sin().sum(), leaves[0], create_graph=True)
        (out.sum() + dq.norm()).backward()
        found.append([x.grad for x in leaves])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ["dense", "varlen"])
def test_third_derivatives_equal_the_references(kind: str) -> None:
    cu = torch.tensor([0, 3, 5], dtype=torch.int32)
    shapes = [(6, 2, 3)] * 3 if kind == "varlen" else [(1, 2, 5, 3)] * 3
    data = [torch.randn(shape, dtype=torch.float64) for shape in (*shapes, (5,), (2,))]
    name, lengths = ("attention_varlen", (cu, cu)) if kind == "varlen" else ("attention", ())
    found = []
    for module in (fastattn, reference):
        leaves = [x.clone().requires_grad_() for x in data]
        q, k, v, bias, sinks = leaves
        options = {"causal": True, "softcap": 2.0, "bias": bias, "sinks": sinks}
        out, lse = getattr(module, name)(q, k, v, *lengths, **options, return_lse=True)
        total = out.sin().sum() + lse.masked_fill(lse == -torch.inf, 0.0).cos().sum()
        for _ in range(3):
            grads = torch.autograd.grad(total, leaves, create_graph=True)
            total = sum(x.sin().sum() for x in grads)
        found.append(grads)
    torch.testing.assert_close(*found)


def test_gradients_accumulate(qkv: Qkv) -> None:
    q, k, v = (x.requires_grad_() for x in qkv)
    for _ in range(2):
        attention(q, k, v).sum().backward()
    twice = q.grad.clone()
    q.grad = None
    attention(q, k, v).sum().backward()
    torch.testing.assert_close(twice, 2 * q.grad)


def test_overwriting_an_input_is_noticed(qkv: Qkv) -> None:
    q, k, v = qkv
    out = attention(q.requires_grad_(), k, v)
    k.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_anomaly_detection_finds_none(qkv: Qkv) -> None:
    """Neither rows without keys nor -inf leave a NaN on the way."""
    q, k, v = (x.requires_grad_() for x in qkv)
    mask = torch.ones(5, 7, dtype=torch.bool)
    mask[2] = False
    bias = torch.zeros(5, 7)
    bias[3] = -torch.inf
    with torch.autograd.set_detect_anomaly(True):
        out, lse = attention(q, k, v, mask=mask, bias=bias.requires_grad_(), return_lse=True)
        (out.sum() + lse.masked_fill(lse == -torch.inf, 0.0).sum()).backward()
    assert q.grad[:, :, 2:4].abs().max() == 0


def test_saved_tensors_can_be_packed_away(qkv: Qkv) -> None:
    """Offloading of activations, by hooks on whatever is saved."""
    q, k, v = (x.requires_grad_() for x in qkv)
    attention(q, k, v, causal=True).sin().sum().backward()
    want = [x.grad for x in (q, k, v)]
    q.grad = k.grad = v.grad = None
    packed = []

    def pack(x: Tensor) -> int:
        packed.append(x.detach().clone())
        return len(packed) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda place: packed[place]):
        out = attention(q, k, v, causal=True)
    out.sin().sum().backward()
    assert packed
    assert all(torch.equal(x.grad, y) for x, y in zip((q, k, v), want, strict=True))


def test_memory_saved_for_backward(qkv: Qkv) -> None:
    """Nothing of size seqlen_q x seqlen_k stays: the inputs, out and lse are enough."""
    q, k, v = (torch.randn(1, 1, 50, 2).requires_grad_() for _ in range(3))
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        attention(q, k, v, softcap=2.0, dropout_p=0.1)
    assert max(sizes) == 100


def test_parameters_and_subclasses(qkv: Qkv) -> None:
    class Labelled(Tensor):
        """A subclass without behaviour of its own."""

    q, k, v = qkv
    want = attention(q, k, v, causal=True)
    assert torch.equal(attention(torch.nn.Parameter(q), k, v, causal=True), want)
    labelled = q.as_subclass(Labelled).requires_grad_()
    out = attention(labelled, k, v, causal=True)
    assert torch.equal(out.as_subclass(Tensor), want)
    out.sum().backward()
    plain = q.detach().clone().requires_grad_()
    attention(plain, k, v, causal=True).sum().backward()
    assert torch.equal(labelled.grad.as_subclass(Tensor), plain.grad)


def test_modules_can_be_copied(qkv: Qkv) -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sinks = torch.nn.Parameter(torch.randn(4))
            self.rotary = fastattn.Rotary(torch.ones(9, 4), torch.zeros(9, 4))

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attention(fastattn.apply_rotary(q, self.rotary, torch.arange(5)), k, v, sinks=self.sinks)

    layer = Layer()
    layer(*qkv).sum().backward()
    twin = copy.deepcopy(layer)
    assert isinstance(twin.rotary, fastattn.Rotary)
    assert torch.equal(twin(*qkv), layer(*qkv))
    assert layer.sinks.grad.abs().max() > 0
    assert twin.sinks.data_ptr() != layer.sinks.data_ptr()


# ------------------------------------------------------------------------------------------------------- checkpointing


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("kind", ["dense", "varlen"])
def test_checkpoint(kind: str, use_reentrant: bool) -> None:
    """The recomputed forward draws the same seed, so the dropout mask is the same."""
    cu = torch.tensor([0, 4, 9], dtype=torch.int32)
    x = torch.randn(9, 2, 8) if kind == "varlen" else torch.randn(1, 2, 9, 8)

    def block(x: Tensor) -> Tensor:
        if kind == "varlen":
            return attention_varlen(2 * x, x, x, cu, cu, causal=True, dropout_p=0.5).sin()
        return attention(2 * x, x, x, causal=True, dropout_p=0.5).sin()

    grads = []
    for run in (block, lambda x: checkpoint(block, x, use_reentrant=use_reentrant)):
        torch.manual_seed(8)
        leaf = x.clone().requires_grad_()
        run(run(leaf)).sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


# --------------------------------------------------------------------------------------------------- torch.func and co


def functions(qkv: Qkv) -> tuple[Tensor, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    q, k, v = (x.double() for x in qkv)
    options = {"causal": True, "softcap": 2.0, "dropout_p": 0.2, "seed": 9}
    return q, lambda q: attention(q, k, v, **options), lambda q: reference.attention(q, k, v, **options)


def test_func_grad(qkv: Qkv) -> None:
    q, found, want = functions(qkv)
    a, b = (torch.func.grad(lambda q, f=f: f(q).sin().sum())(q) for f in (found, want))
    torch.testing.assert_close(a, b)


def test_func_grad_of_grad(qkv: Qkv) -> None:
    q, found, want = functions(qkv)
    inner = [torch.func.grad(lambda q, f=f: f(q).sin().sum()) for f in (found, want)]
    a, b = (torch.func.grad(lambda q, g=g: g(q).sin().sum())(q) for g in inner)
    torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_func_vjp_and_jacrev(qkv: Qkv) -> None:
    q, found, want = functions(qkv)
    cotangent = torch.randn_like(q)
    (a,), (b,) = (torch.func.vjp(f, q)[1](cotangent) for f in (found, want))
    torch.testing.assert_close(a, b)
    jacobian = torch.func.jacrev(lambda q: found(q)[:, :, :2, 0])(q)
    torch.testing.assert_close(jacobian, torch.func.jacrev(lambda q: want(q)[:, :, :2, 0])(q))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap(qkv: Qkv) -> None:
    _, k, v = qkv
    many = torch.randn(3, 2, 4, 5, 8)
    found = torch.func.vmap(lambda q: attention(q, k, v, causal=True))(many)
    torch.testing.assert_close(found, torch.stack([attention(q, k, v, causal=True) for q in many]))


CU = torch.tensor([0, 3, 6], dtype=torch.int32)
LENGTHS = torch.tensor([2], dtype=torch.int32)


def operator(name: str, *args: object) -> Tensor:
    return getattr(torch.ops.fastattn, name)(*args)[0]


def backward_operator(dout: Tensor) -> Tensor:
    q = torch.ones(dout.shape)
    call = flatten(Inputs(q, q, q), Call(Options(), None))
    return operator(
        "backward", dout, None, *torch.ops.fastattn.forward(*call, True)[:3], *call, [True] * 3 + [False] * 2
    )


# Ways from a tensor of shape (6, 2, 8) into fastattn.
CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "attention": lambda x: attention(x[None], x[None], x[None]),
    "with options": lambda x: attention(x[None], x[None], x[None], dropout_p=0.5, seed=1, return_lse=True)[1],
    "through bias": lambda x: attention(torch.ones(2, 2, 6, 8), *torch.ones(2, 2, 2, 8, 8), bias=x.movedim(0, 1)),
    "varlen": lambda x: attention_varlen(x, x, x, CU, CU),
    "torch's function": lambda x: fastattn.scaled_dot_product_attention(x, x, x),
    "flash-attn's function": lambda x: fastattn.integrations.flash_attn.flash_attn_func(x[None], x[None], x[None]),
    "cache": lambda x: fastattn.attention_with_kv_cache(x[None], x[None], x[None], cache_lengths=LENGTHS),
    "operator forward": lambda x: operator(
        "forward", *flatten(Inputs(x[None], x[None], x[None]), Call(Options(), None)), True
    ),
    "operator backward": lambda x: backward_operator(x[None]),
    "operator cache": lambda x: operator(
        "cache", *flatten_cache(Inputs(*[x[None]] * 3, kv_lengths=LENGTHS), Call(Options(), None))
    ),
}
FORWARD_MODE = (
    "fastattn has no derivatives in forward mode .* use reverse mode, .* or call fastattn.reference.attention"
)


@pytest.mark.parametrize("name", CALLS)
def test_forward_mode_is_refused_and_not_wrong(name: str) -> None:
    """There is no forward-mode formula: a call says so, and what to do, and does not lose the tangent."""
    call, x = CALLS[name], torch.randn(6, 2, 8)
    for run in (call, lambda x: torch.compile(call, backend="eager")(x)):
        with pytest.raises(NotImplementedError, match=FORWARD_MODE):
            torch.func.jvp(run, (x,), (x,))
        torch._dynamo.reset()
    with torch.autograd.forward_ad.dual_level(), torch.no_grad():
        call(x)  # without a tangent, it is a call as any other
        with pytest.raises(NotImplementedError, match=FORWARD_MODE):
            call(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))


@pytest.mark.parametrize("name", ["attention", "with options", "varlen", "torch's function"])
def test_forward_mode_over_reverse_mode_is_refused(name: str) -> None:
    call, x = CALLS[name], torch.randn(6, 2, 8, requires_grad=True)
    with pytest.raises(NotImplementedError, match=FORWARD_MODE):
        torch.func.hessian(lambda x: call(x).sum())(x.detach())
    with fastattn.integrations.torch.use():
        recorded = [call(x), torch.nn.functional.scaled_dot_product_attention(x, x, x)]
    with torch.autograd.forward_ad.dual_level():
        for out in recorded:
            dual = torch.autograd.forward_ad.make_dual(torch.ones_like(out), torch.ones_like(out))
            with pytest.raises(NotImplementedError, match=FORWARD_MODE):
                torch.autograd.grad(out, x, dual)


def test_the_reference_has_forward_mode(qkv: Qkv) -> None:
    """As the refusal says."""
    q, k, v = (x.double() for x in qkv)
    t, e = torch.randn_like(q), 1e-6

    def run(q: Tensor) -> Tensor:
        return reference.attention(q, k, v, causal=True)

    _, found = torch.func.jvp(run, (q,), (t,))
    torch.testing.assert_close(found, (run(q + e * t) - run(q - e * t)) / (2 * e), rtol=1e-6, atol=1e-8)


def test_batched_output_gradients(backend: str, device: str) -> None:
    q, k, v = (torch.randn(1, 2, 5, 8, device=device, requires_grad=True) for _ in range(3))
    bias = torch.randn(5, 5, device=device, requires_grad=True)

    def short() -> tuple[torch.Tensor, ...]:
        return (fastattn.attention(q, k, v, causal=True, backend=backend),)

    def ordinary() -> tuple[torch.Tensor, ...]:
        return fastattn.attention(q, k, v, bias=bias, return_lse=True, backend=backend)

    for function, sources in ((short, (q, k, v)), (ordinary, (q, k, v, bias))):
        outputs = function()
        batches = [torch.randn(3, *out.shape, device=device) for out in outputs]
        found = torch.autograd.grad(outputs, sources, batches, is_grads_batched=True)
        for i in range(3):
            expected = torch.autograd.grad(function(), sources, [batch[i] for batch in batches])
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a[i], b)


@pytest.mark.needs_dtype(torch.float64)
def test_vectorized_jacobian_and_hessian(backend: str, device: str) -> None:
    q, k, v = (torch.randn(1, 1, 3, 4, dtype=torch.float64, device=device) for _ in range(3))

    def total(q: torch.Tensor) -> torch.Tensor:
        return fastattn.attention(q, k, v, backend=backend).square().sum()

    for derivative in (torch.autograd.functional.jacobian, torch.autograd.functional.hessian):
        torch.testing.assert_close(derivative(total, q, vectorize=True), derivative(total, q))
