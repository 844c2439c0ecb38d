"""Scores in the tens of thousands, of which one or a few tower above the rest: still as right as eager attention.

Products of float32 numbers that large leave some five digits after the point, and lse as few: what is recomputed from
it for the gradients must not inherit its rounding. Queries and keys are whole numbers here: scores are exact, and only
what follows from them is tested.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn

from . import eager
from .tolerance import assert_close, to_numpy

SCORE = 7e4
SHAPES = {
    "square": {"seqlen_q": 40, "seqlen_k": 70},
    "one query": {"seqlen_q": 1, "seqlen_k": 70},
    "few queries": {"seqlen_q": 3, "seqlen_k": 33},
    "few queries, many keys": {"seqlen_q": 2, "seqlen_k": 1500},
    "several blocks": {"seqlen_q": 33, "seqlen_k": 600, "heads_q": 2, "heads_kv": 1},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "causal": {"causal": True},
    "window": {"window": (9, 3)},
    "scale": {"scale": 0.0625},
    "small scale": {"scale": 2.0**-7},
    "sinks": {"sinks": True, "causal": True},
    "bias": {"bias": True, "causal": True},
    "alibi": {"alibi_slopes": True},
    "mask": {"mask": True, "bias": True},
    "softcap": {"softcap": 2.0**17},
    "dropout": {"dropout_p": 0.25, "seed": 7, "causal": True},
}


def towering(
    dtype: torch.dtype,
    device: str,
    seqlen_q: int,
    seqlen_k: int,
    heads_q: int = 2,
    heads_kv: int = 2,
    *,
    anyhow: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v with scores of about SCORE. Keys come in pairs that differ where queries are 0: ties."""
    q = torch.randn(2, heads_q, seqlen_q, 64, dtype=torch.float64)
    k = torch.randn(2, heads_kv, seqlen_k, 64, dtype=torch.float64)
    v = torch.randn(2, heads_kv, seqlen_k, 24, dtype=torch.float64)
    q, k = q * (SCORE / 3) ** 0.5, k * (SCORE / 3) ** 0.5
    q[..., -1] = 0.0
    pairs = seqlen_k // 2 * 2
    k[:, :, 1:pairs:2, :-1] = k[:, :, 0:pairs:2, :-1]
    if not anyhow:
        q, k = q.round(), k.round()
    return tuple(x.to(dtype).to(device) for x in (q, k, v))  # type: ignore[return-value]


def _largest_scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Of the last query with each head's keys: sinks of that size take half of its row, or all of others."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    return (q[:, :, -1:].double() @ k.double().mT * scale).amax((0, 2, 3)).to(q.dtype)


def filled_in(options: dict[str, Any], q: Tensor, k: Tensor) -> dict[str, Any]:
    """The options, with tensors where they say True: of numbers with few digits, so that scores stay exact."""
    options = dict(options)
    heads_q, pair = q.shape[1], (q.shape[2], k.shape[2])
    made: dict[str, Any] = {
        "sinks": lambda: _largest_scores(q, k, options.get("scale", 0.125)),
        "bias": lambda: torch.randint(-3, 4, pair, device=q.device).to(q.dtype),
        "alibi_slopes": lambda: (2.0 ** -torch.arange(heads_q, device=q.device)).float(),
        "mask": lambda: torch.rand(pair, device=q.device) < 0.7,
    }
    return options | {name: made[name]() for name, value in options.items() if value is True and name in made}


def check(
    q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any], backend: str, *, leave_out: tuple[str, ...] = ()
) -> None:
    options = filled_in(options, q, k)
    given = {"q": q, "k": k, "v": v} | {name: options[name] for name in ("bias", "sinks") if name in options}
    names = ("out", "lse", *(f"d{name}" for name in given))

    def attend(function: Any, dtype: torch.dtype, **more: Any) -> tuple[Tensor, ...]:
        leaves = {name: x.to(dtype).requires_grad_() for name, x in given.items()}
        out, lse = function(**{**options, **leaves}, **more)
        dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(out)
        return (out, lse, *torch.autograd.grad(out, list(leaves.values()), dout))

    found = attend(fastattn.attention, q.dtype, backend=backend, return_lse=True)
    exact, plain = attend(eager.dense, torch.float64), attend(eager.dense, q.dtype)
    for name, x, right, rounded in zip(names, found, exact, plain, strict=True):
        if name in leave_out:
            continue
        assert_close(name, x, to_numpy(right), rounded, q.dtype)


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


@DTYPES
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape: str, dtype: torch.dtype, backend: str, device: str) -> None:
    check(*towering(dtype, device, **SHAPES[shape]), {}, backend)


@DTYPES
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(options: dict[str, Any], dtype: torch.dtype, backend: str, device: str) -> None:
    check(*towering(dtype, device, **SHAPES["square"]), options, backend)


@DTYPES
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "options",
    [{}, {"causal": True}, {"scale": 0.13}, {"bias": True}, {"alibi_slopes": True, "causal": True}],
    ids=["plain", "causal", "scale", "bias", "alibi"],
)
def test_sums_that_are_rounded(
    options: dict[str, Any], shape: str, dtype: torch.dtype, backend: str, device: str
) -> None:
    """Forward and backward pass sum up products in the same order, however the rows are cut.

    No sinks: one as large as a score shows how that score was rounded, which is no fault.
    """
    check(*towering(dtype, device, anyhow=True, **SHAPES[shape]), options, backend)


LEFT_OUT = {"cpu": ("lse",), "triton": ("dq", "dk", "dv", "dbias")}


@DTYPES
@pytest.mark.parametrize("seqlen_q", [3, 40])
@pytest.mark.parametrize("lowest", [-5e37, -2e38, torch.finfo(torch.float32).min])
def test_rows_of_large_negative_biases(
    lowest: float, seqlen_q: int, dtype: torch.dtype, backend: str, device: str
) -> None:
    """In eager attention they drown the scores, so that all keys count alike; they are not hidden.

    The CPU's kernels divide biases by the scale, and bound what is too large then: their lse is another. Triton's
    compute the gradients of such rows as if each key were the only one, as lse says there.
    """
    q, k, v = (torch.randn(1, 2, n, 64, dtype=dtype, device=device) for n in (seqlen_q, 9, 9))
    bias = torch.zeros(seqlen_q, 9, dtype=dtype, device=device)
    bias[1] = lowest
    if backend == "triton" and lowest < -2.1e38:  # see the README
        out, lse = fastattn.attention(q, k, v, bias=bias, return_lse=True, backend=backend)
        assert (out[:, :, 1] == 0).all()
        assert (lse[:, :, 1] == -torch.inf).all()
        return
    for more in ({}, {"mask": torch.ones(1, 9, dtype=torch.bool, device=device)}):
        check(q, k, v, {"bias": bias, **more}, backend, leave_out=LEFT_OUT.get(backend, ()))


@DTYPES
@pytest.mark.parametrize("sink", [5e37, 3e38, -3e38])
@pytest.mark.parametrize("scale", [None, 1e-6])
def test_large_sinks(sink: float, scale: float | None, dtype: torch.dtype, backend: str, device: str) -> None:
    q, k, v = (torch.randn(1, 1, n, 64, dtype=dtype, device=device) for n in (3, 9, 9))
    sinks = torch.full((1,), sink, dtype=dtype, device=device)
    check(q, k, v, {"sinks": sinks, "scale": scale}, backend)


def test_varlen(backend: str, device: str) -> None:
    """Each sequence as by itself, few queries and many."""
    q, k, v = (x[0].transpose(0, 1) for x in towering(torch.float32, device, 40, 70))
    ends_q, ends_k = (torch.tensor(x, dtype=torch.int32, device=device) for x in ((0, 2, 35), (0, 30, 70)))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    fastattn.attention_varlen(*leaves, ends_q, ends_k, causal=True, backend=backend).sin().sum().backward()
    for queries, keys in ((slice(0, 2), slice(0, 30)), (slice(2, 35), slice(30, 70))):
        rows = (queries, keys, keys)
        own = [x[r].transpose(0, 1)[None].double().requires_grad_() for x, r in zip((q, k, v), rows, strict=True)]
        eager.dense(*own, causal=True)[0].sin().sum().backward()
        for name, leaf, x, r in zip("qkv", leaves, own, rows, strict=True):
            found = leaf.grad[r].transpose(0, 1)[None]
            assert_close(f"d{name}", found, to_numpy(x.grad), None, torch.float32)
