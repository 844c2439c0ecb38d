"""torch.utils.flop_counter.FlopCounterMode on fastattn: operations of the products that are computed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from textwrap import dedent
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from fastattn import attention, attention_varlen, attention_with_kv_cache, nn

B, H, HKV, SQ, SK, D, DV = 2, 4, 2, 5, 9, 8, 6
ints = lambda *numbers: torch.tensor(numbers, dtype=torch.int32)  # noqa: E731


def count(run: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def qkv(*, grad: bool = False) -> list[Tensor]:
    return [torch.randn(s, requires_grad=grad) for s in ((B, H, SQ, D), (B, HKV, SK, D), (B, HKV, SK, DV))]


def pairs(
    queries: int, keys: int, *, causal: bool = False, window: Any = None, causal_alignment: str = "bottom-right"
) -> int:
    """Keys that the queries of a sequence see, one by one."""
    left, right = window or (None, None)
    offset = keys - queries if causal_alignment == "bottom-right" else 0
    return sum(
        (left is None or j >= i + offset - left)
        and (right is None or j <= i + offset + right)
        and (not causal or j <= i + offset)
        for i in range(queries)
        for j in range(keys)
    )


OPTIONS: list[dict[str, Any]] = [
    {},
    *({"causal": True, "causal_alignment": a} for a in ("bottom-right", "top-left")),
    *({"window": w, "causal_alignment": a} for a in ("bottom-right", "top-left") for w in ((2, 1), (0, 0), (None, 3))),
    {"window": (3, None)},
    {"causal": True, "window": (1, 5)},
    {"window": (100, 2**60)},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("lengths", [None, (9, 2), (0, 4)], ids=str)
def test_visible_scores_are_counted(options: dict[str, Any], lengths: tuple[int, ...] | None, backend: str) -> None:
    q, k, v = qkv(grad=True)
    kv_lengths = None if lengths is None else ints(*lengths)
    seen = H * sum(pairs(SQ, n, **options) for n in lengths or (SK, SK))
    out = attention(q, k, v, kv_lengths=kv_lengths, **options, backend=backend)
    forward = count(lambda: attention(q, k, v, kv_lengths=kv_lengths, **options, backend=backend))
    assert forward == 2 * seen * (D + DV)
    assert count(lambda: out.sum().backward()) == 2 * seen * (3 * D + 2 * DV)


def test_it_is_what_torch_counts_for_attention() -> None:
    q, k, v = qkv(grad=True)
    out = attention(q, k, v)
    shapes = [(B, H, n, d) for n, d in ((SQ, DV), (SQ, D), (SK, D), (SK, DV))]
    assert count(lambda: attention(q, k, v)) == sdpa_flop_count(*shapes[1:])
    assert count(lambda: out.sum().backward()) == sdpa_backward_flop_count(*shapes)


@pytest.mark.parametrize(
    ("wanted", "width"),
    [(("q",), 2 * D + DV), (("k",), 2 * D + DV), (("v",), D + DV), (("bias",), D + DV), (("q", "v"), 2 * D + 2 * DV)],
    ids=str,
)
def test_gradients_that_nobody_needs_are_not_counted(wanted: tuple[str, ...], width: int) -> None:
    tensors = dict(zip(("q", "k", "v", "bias"), (*qkv(), torch.randn(SQ, SK)), strict=True))
    for name in wanted:
        tensors[name].requires_grad_()
    out = attention(**tensors)
    assert count(lambda: out.sum().backward()) == 2 * B * H * SQ * SK * width


def test_masks_are_not_looked_into() -> None:
    q, k, v = qkv()
    none = torch.zeros(SQ, SK, dtype=torch.bool)
    assert count(lambda: attention(q, k, v, mask=none)) == 2 * B * H * SQ * SK * (D + DV)


@pytest.mark.parametrize("kv_lengths", [None, (3, 0, 1)], ids=str)
def test_packed_sequences(kv_lengths: tuple[int, ...] | None) -> None:
    q, k, v = (torch.randn(9, heads, dim, requires_grad=True) for heads, dim in ((H, D), (HKV, D), (HKV, DV)))
    cu_q, cu_k, keys = ints(0, 4, 4, 7), ints(0, 3, 8, 9), kv_lengths or (3, 5, 1)
    seen = H * sum(pairs(m, n, causal=True) for m, n in zip((4, 0, 3), keys, strict=True))

    def run() -> Tensor:
        lengths = None if kv_lengths is None else ints(*kv_lengths)
        return attention_varlen(q, k, v, cu_q, cu_k, causal=True, kv_lengths=lengths)

    assert count(run) == 2 * seen * (D + DV)
    out = run()
    assert count(lambda: out.sum().backward()) == 2 * seen * (3 * D + 2 * DV)


@pytest.mark.parametrize("new", [0, 2])
def test_cache(new: int) -> None:
    q = torch.randn(B, H, 2, D)
    k_new, v_new = (torch.randn(B, HKV, new, n) if new else None for n in (D, DV))

    def run() -> None:
        caches = torch.zeros(B, HKV, 16, D), torch.zeros(B, HKV, 16, DV)
        attention_with_kv_cache(q, *caches, cache_lengths=ints(3, 7), k_new=k_new, v_new=v_new, causal=True)

    seen = H * sum(pairs(2, n + new, causal=True) for n in (3, 7))
    assert count(run) == 2 * seen * (D + DV)


def test_lengths_that_cannot_be_known() -> None:
    """Fake tensors: as long as can be; packed sequences, all of one length."""
    with FakeTensorMode():
        q, k, v = qkv()
        found = count(lambda: attention(q, k, v, kv_lengths=ints(1, 2).to("meta").to("cpu"), causal=True))
        assert found == 2 * B * H * pairs(SQ, SK, causal=True) * (D + DV)
        q, k, v = (torch.empty(12, heads, D) for heads in (H, HKV, HKV))
        cu = torch.empty(4, dtype=torch.int32)
        assert count(lambda: attention_varlen(q, k, v, cu, cu)) == 2 * 3 * 4 * 4 * H * 2 * D


def test_symbolic_sizes_stay_symbolic() -> None:
    """A compiler may count too, and that must not bind the program to these sizes."""
    found: list[Any] = []

    def traced(q: Tensor, k: Tensor) -> Tensor:
        with FlopCounterMode(display=False) as counter:
            out = attention(q, k, k, causal=True, window=(3, 0))
        found.append((counter.get_total_flops(), *q.shape[:3], k.shape[2]))
        return out

    make_fx(traced, tracing_mode="symbolic")(torch.randn(3, 2, 5, 8), torch.randn(3, 2, 7, 8))
    ((flops, *sizes),) = found
    assert all(isinstance(n, torch.SymInt) for n in (flops, *sizes))
    for numbers in ((3, 2, 5, 7), (2, 1, 9, 4), (1, 1, 1, 1), (4, 2, 0, 6)):
        batch, heads, seqlen_q, seqlen_k = numbers
        values = dict(zip((n.node.expr for n in sizes), numbers, strict=True))
        want = 2 * batch * heads * pairs(seqlen_q, seqlen_k, causal=True, window=(3, 0)) * 16
        assert int(flops.node.expr.subs(values)) == want


def test_modules_have_their_own_lines() -> None:
    module = torch.nn.ModuleDict({"one": nn.MultiheadAttention(16, 4, batch_first=True)})
    x = torch.randn(B, SQ, 16)
    with FlopCounterMode(display=False) as counter:
        module["one"](x, x, x, need_weights=False)
    assert counter.get_flop_counts()["MultiheadAttention"][torch.ops.fastattn.forward] == 2 * B * 16 * SQ * SQ * 2


def test_under_transforms() -> None:
    q, k, v = (torch.randn(3, B, H, SQ, D) for _ in range(3))
    found = count(lambda: vmap(grad(lambda q, k, v: attention(q, k, v).sum(), (0, 1, 2)))(q, k, v))
    assert found == 2 * 3 * B * H * SQ * SQ * 7 * D


@pytest.mark.parametrize("first", ["import fastattn", "import torch.utils.flop_counter"])
def test_in_either_order_of_imports(first: str) -> None:
    """The counter brings Triton along: fastattn does not import it, but notices when somebody does."""
    script = f"""
        {first}
        import importlib.util, sys
        if "fastattn" in sys.modules:
            assert "torch.utils.flop_counter" not in sys.modules
            assert importlib.util.find_spec("torch.utils.flop_counter") is not None  # a look is no import
        import fastattn, torch
        from torch.utils.flop_counter import FlopCounterMode
        q = torch.randn(1, 1, 4, 8)
        with FlopCounterMode(display=False) as counter:
            fastattn.attention(q, q, q)
        print(counter.get_total_flops())
    """
    done = subprocess.run([sys.executable, "-c", dedent(script)], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.returncode) == (f"{2 * 4 * 4 * 16}\n", 0), done.stderr


@pytest.mark.parametrize("counted_first", [True, False])
def test_reloading(counted_first: bool) -> None:
    """Of fastattn and of the counter, in any order: the formulas stay, and one hook."""
    script = f"""
        import importlib, sys
        if {counted_first}:
            import torch.utils.flop_counter
        import fastattn, torch
        importlib.reload(fastattn)
        import torch.utils.flop_counter
        importlib.reload(fastattn)
        for _ in range(2):
            importlib.reload(torch.utils.flop_counter)
        importlib.reload(fastattn.autograd.flops)
        importlib.reload(fastattn)
        counter = importlib.reload(torch.utils.flop_counter)
        assert len([x for x in sys.meta_path if type(x).__module__.startswith("fastattn")]) == 1
        assert type(counter.__loader__) is type(counter.__spec__.loader) is type(torch.__loader__)
        q = torch.randn(1, 1, 4, 8)
        with counter.FlopCounterMode(display=False) as counted:
            fastattn.attention(q, q, q)
        print(counted.get_total_flops())
    """
    done = subprocess.run([sys.executable, "-c", dedent(script)], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.returncode) == (f"{2 * 4 * 4 * 16}\n", 0), done.stderr
