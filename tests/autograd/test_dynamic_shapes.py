"""One compilation serves all lengths, with torch.compile as people call it; and exported programs run elsewhere.

torch.compile takes the first sizes for constants and the second ones for a sign that they vary: two compilations.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import vmap
from torch.utils.checkpoint import checkpoint

import fastattn
import fastattn.nn as fnn
from fastattn.integrations.flash_attn import flash_attn_func
from fastattn.integrations.torch import use


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Counter:
    """A compiler that runs graphs as they are, forward and backward, and counts them."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        self.graphs += 1
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)


def qkv(length: int) -> list[Tensor]:
    return [torch.randn(2, heads, length, 8, requires_grad=True) for heads in (4, 2, 2)]


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return fastattn.attention(q, k, v, causal=True, window=(6, 0), softcap=5.0)


def with_lse(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out, lse = fastattn.attention(q, k, v, mask=torch.ones(q.shape[2], k.shape[2]).tril().bool(), return_lse=True)
    return out * lse[..., None]


def packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    cu = torch.tensor([0, 3, q.shape[2]], dtype=torch.int32)
    return fastattn.attention_varlen(*(x[0].transpose(0, 1) for x in (q, k, v)), cu, cu, causal=True)


def torchs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=True, window_size=(6, 0))


@pytest.mark.parametrize("function", [dense, with_lse, packed, torchs, flash], ids=lambda f: f.__name__)
def test_two_compilations_for_all_lengths(function: Callable[..., Tensor]) -> None:
    counter = Counter()
    run = torch.compile(function, fullgraph=True, backend=counter)
    for length in (5, 9, 17, 12, 40, 33):
        leaves = qkv(length)
        with use(function is torchs):
            found, want = run(*leaves), function(*leaves)
        torch.testing.assert_close(found, want)
        grads = (torch.autograd.grad(x.square().sum(), leaves) for x in (found, want))
        torch.testing.assert_close(*grads)
    assert counter.graphs == 2


@pytest.mark.parametrize("kind", ["attention", "torch's encoder", "language model"])
def test_modules_compile_twice_for_all_lengths(kind: str) -> None:
    counter = Counter()
    model: nn.Module
    if kind == "attention":
        model = fnn.MultiheadAttention(16, 4, batch_first=True, rotary=fnn.RotaryEmbedding(4), num_kv_heads=2)
    elif kind == "torch's encoder":
        model = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True)
    else:
        model = fnn.TransformerLM(11, 16, 24, 4, 1, dropout=0.0)

    def step(x: Tensor) -> Tensor:
        if kind == "attention":
            return model(x, x, x, need_weights=False, is_causal=True)[0]
        return model(x)

    run = torch.compile(step, fullgraph=True, backend=counter)
    for length in (5, 9, 17, 40):
        x = torch.randint(11, (2, length)) if kind == "language model" else torch.randn(2, length, 16)
        with use(kind == "torch's encoder"):
            torch.testing.assert_close(run(x), step(x), rtol=1e-4, atol=1e-5)
    assert counter.graphs == 2


def test_checkpoint_inside_a_compiled_function() -> None:
    """The backward pass computes the block again, with the dropout mask of the forward pass."""

    def block(x: Tensor) -> Tensor:
        return fastattn.attention(2 * x, x, x, causal=True, dropout_p=0.3).sin()

    x = torch.randn(1, 2, 9, 8, requires_grad=True)
    results = []
    for run in (
        torch.compile(lambda x: checkpoint(block, x, use_reentrant=False), fullgraph=True, backend="aot_eager"),
        block,
    ):
        torch.manual_seed(1)
        out = run(x)
        results.append((out, *torch.autograd.grad(out.sum(), x)))
    torch.testing.assert_close(*results)


def test_vmap_inside_a_compiled_function() -> None:
    q, k, v = (torch.randn(3, 2, heads, 6, 8) for heads in (4, 2, 2))

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return vmap(lambda q, k, v: fastattn.attention(q, k, v, causal=True), (0, 0, 0))(q, k, v)

    torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="aot_eager")(q, k, v), run(q, k, v))


# ------------------------------------------------------------------------------------------------------------- export

LOADER = """
import sys, torch, fastattn

program = torch.export.load("model.pt2").module()
for given, want in torch.load("data.pt"):
    torch.testing.assert_close(program(*given), want)
print("ran")
"""


class Layer(nn.Module):
    """Attention of torch and of fastattn, a mask, and a loss that is none."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = fnn.MultiheadAttention(16, 4, batch_first=True, num_kv_heads=2, sinks=True)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        x = self.attention(x, x, x, need_weights=False, is_causal=True)[0]
        q = x.unflatten(-1, (4, 4)).transpose(1, 2)
        return fastattn.attention(q, q, q, bias=bias) + F.scaled_dot_product_attention(q, q, q)


def test_exported_program_runs_in_another_process(tmp_path: Path) -> None:
    layer, length = Layer().eval(), torch.export.Dim("length", min=2, max=512)
    shapes = {"x": {1: length}, "bias": {0: length, 1: length}}
    with use():
        program = torch.export.export(layer, (torch.randn(2, 5, 16), torch.randn(5, 5)), dynamic_shapes=shapes)
    called = [str(node.target) for node in program.graph.nodes]
    assert called.count("fastattn.forward.default") == 3
    assert not any("scaled_dot_product" in name for name in called)
    torch.export.save(program, tmp_path / "model.pt2")
    inputs = [(torch.randn(2, n, 16), torch.randn(n, n)) for n in (5, 31, 64)]
    with torch.no_grad():
        torch.save([(given, layer(*given)) for given in inputs], tmp_path / "data.pt")
    done = subprocess.run([sys.executable, "-c", LOADER], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "ran\n", done.stderr


@pytest.mark.slow
def test_compiled_ahead_of_time(tmp_path: Path) -> None:
    """AOTInductor: the package calls the operators."""
    layer = Layer().eval()
    given = (torch.randn(2, 5, 16), torch.randn(5, 5))
    program = torch.export.export(layer, given)
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    with torch.no_grad():
        torch.testing.assert_close(torch._inductor.aoti_load_package(path)(*given), layer(*given))
