"""Attention on DTensors, in processes of their own, against the same call on whole tensors: results and gradients."""

from __future__ import annotations

import re
import subprocess
import sys
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import fastattn

BATCH, HEADS, ALL = Shard(0), Shard(1), Replicate()
MESHES = {"2": (2,), "2x2": (2, 2)}
CASES: dict[str, dict[str, Callable[[Any], None]]] = {name: {} for name in MESHES}
"""mesh -> name -> what each process does there; it gets the mesh, and raises if something is wrong."""


def on(mesh: str, name: str, **given: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes the function, with these arguments, a case."""

    def add(function: Callable[..., None]) -> Callable[..., None]:
        CASES[mesh][name] = lambda device_mesh: function(device_mesh, **given)
        return function

    return add


def tensors(batch: int, heads_q: int, heads_kv: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    q, k, v = (torch.randn(batch, heads, n, 8) for heads, n in ((heads_q, 6), (heads_kv, 9), (heads_kv, 9)))
    return {"q": q.to(dtype), "k": k.to(dtype), "v": v.to(dtype)}


def compare(mesh: Any, given: dict[str, Tensor], placements: dict[str, Any], free: bool = True, **options: Any) -> None:
    """The sharded call against the whole one.

    given: tensors by name; placements: those that are not replicated. free: no rank may have to communicate before
    the results are there.
    """
    call = options.pop("call", fastattn.attention)
    whole = {
        name: x.clone().requires_grad_(x.is_floating_point() and name != "alibi_slopes") for name, x in given.items()
    }
    leaves = [name for name, x in whole.items() if x.requires_grad]
    replicated = [ALL] * mesh.ndim
    sharded = {name: distribute_tensor(x, mesh, placements.get(name, replicated)) for name, x in given.items()}
    for name in leaves:
        sharded[name].requires_grad_()

    def step(x: dict[str, Any]) -> list[Tensor]:
        # Like a part of a model: positional tensors first, a gradient through both results.
        names = [name for name in x if name in ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k")]
        communication = CommDebugMode()
        with communication if free else nullcontext():  # under a mode, nothing is compiled
            out, lse = call(
                *(x[name] for name in names),
                **{name: t for name, t in x.items() if name not in names},
                return_lse=True,
                **options,
            )
        if free:
            assert communication.get_total_counts() == 0
        loss = out.float().sin().sum() + lse.where(lse > -torch.inf, 0.0).cos().sum()
        return [out, lse, *torch.autograd.grad(loss, [x[name] for name in leaves])]

    found, want = step(sharded), step(whole)
    for name, a, b in zip(("out", "lse", *leaves), found, want, strict=True):
        assert isinstance(a, DTensor)
        torch.testing.assert_close(a.full_tensor(), b, msg=lambda text, name=name: f"{name}: {text}")


# ------------------------------------------------------------------------------------------------------------- dense


def extras(batch: int, heads: int, bias_shape: tuple[int, ...], slopes: int) -> dict[str, Tensor]:
    lengths = torch.arange(batch, dtype=torch.int32) * 2 + 3
    given = {"bias": torch.randn(*bias_shape), "sinks": torch.randn(heads), "kv_lengths": lengths}
    given["alibi_slopes"] = torch.rand(heads) if slopes == 1 else torch.rand(batch, heads)
    given["mask"] = torch.rand(*bias_shape) < 0.8
    given["q_offset"] = torch.arange(batch, dtype=torch.int32) - 1
    return given


BY_BATCH = {"q": [BATCH], "k": [BATCH], "v": [BATCH], "kv_lengths": [BATCH], "q_offset": [BATCH]}
BY_HEADS = {"q": [HEADS], "k": [HEADS], "v": [HEADS]}
BY_ROWS = {"q": [Shard(2)], "k": [Shard(2)], "v": [Shard(2)]}
LAYOUTS = {"batch": BY_BATCH, "heads": BY_HEADS, "rows": BY_ROWS, "replicated": {}}

for layout, sharding in LAYOUTS.items():

    @on("2", f"plain by {layout}", sharding=sharding)
    @on("2", f"plain by {layout}, uneven", sharding=sharding, sizes=(3, 3, 3), causal=True)
    @on("2", f"plain by {layout}, in groups", sharding=sharding, sizes=(2, 8, 4), window=(2, 1))
    @on("2", f"plain by {layout}, in groups that cannot be shared", sharding=sharding, sizes=(2, 6, 3), free=False)
    @on("2", f"plain by {layout}, in half precision", sharding=sharding, dtype=torch.bfloat16)
    def plain(mesh: Any, sharding: Any, sizes: Any = (2, 4, 2), dtype: Any = torch.float32, **options: Any) -> None:
        free = options.pop("free", sharding is not BY_ROWS)
        compare(mesh, tensors(*sizes, dtype), sharding, free, **options)

    for bias_shape in ((4, 6, 9), (2, 1, 6, 9), (1, 4, 1, 9), (6, 9), (2, 4, 6, 1)):

        @on("2", f"everything by {layout}, bias {bias_shape}", sharding=sharding, bias_shape=bias_shape)
        def everything(mesh: Any, sharding: Any, bias_shape: Any) -> None:
            given = {**tensors(2, 4, 2), **extras(2, 4, bias_shape, slopes=len(bias_shape) // 2)}
            compare(mesh, given, sharding, sharding is not BY_ROWS, causal=True, softcap=3.0)


@on("2", "one head of keys", placements={"q": [HEADS]})
@on("2", "one head of keys, by batch", placements=BY_BATCH)
def one_head_of_keys(mesh: Any, placements: Any) -> None:
    compare(mesh, {**tensors(2, 4, 1), "sinks": torch.randn(4)}, placements)


for layout, sharding in LAYOUTS.items():

    @on("2", f"second derivatives by {layout}", sharding=sharding)
    def second_derivatives(mesh: Any, sharding: Any) -> None:
        given = {**tensors(2, 4, 2), **extras(2, 4, (2, 1, 6, 9), slopes=1)}
        results = []
        for x in (given, {name: distribute_tensor(x, mesh, sharding.get(name, [ALL])) for name, x in given.items()}):
            leaves = [x[name].requires_grad_() for name in ("q", "k", "v", "bias", "sinks")]
            q, k, v = (x.pop(name) for name in "qkv")
            out = fastattn.attention(q, k, v, causal=True, **x)
            first = torch.autograd.grad(out.sin().sum(), leaves, create_graph=True)
            results.append(torch.autograd.grad(sum(grad.square().sum() for grad in first), leaves))
        for want, found in zip(*results, strict=True):
            torch.testing.assert_close(found.full_tensor(), want)  # type: ignore[attr-defined]


@on("2", "function transforms")
def transforms(mesh: Any) -> None:
    """The first call of all may be one inside of them."""
    q, k, v = tensors(2, 4, 2).values()
    sharded = [distribute_tensor(x, mesh, [HEADS]) for x in (q, k, v)]

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fastattn.attention(q, k, v).square().sum()

    want, found = torch.func.grad(loss)(q, k, v), torch.func.grad(loss)(*sharded)
    torch.testing.assert_close(found.full_tensor(), want)


@on("2", "partial sums come in")
def partial_sums(mesh: Any) -> None:
    q, k, v = tensors(2, 4, 2).values()
    part = DTensor.from_local(q / 2, mesh, [Partial()])
    rest = [distribute_tensor(x, mesh, [HEADS]) for x in (k, v)]
    torch.testing.assert_close(fastattn.attention(part, *rest).full_tensor(), fastattn.attention(q, k, v))


@on("2", "packed sequences by heads", placements={name: [HEADS] for name in "qkv"})
@on("2", "packed sequences, replicated", placements={})
@on("2", "packed sequences by rows", placements={name: [BATCH] for name in "qkv"}, free=False)
def packed(mesh: Any, placements: Any, free: bool = True) -> None:
    q, k, v = torch.randn(10, 4, 8), torch.randn(12, 2, 8), torch.randn(12, 2, 8)
    cu_q, cu_k = (torch.tensor(x, dtype=torch.int32) for x in ([0, 4, 10], [0, 7, 12]))
    given = {"q": q, "k": k, "v": v, "cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
    given |= {"bias": torch.randn(1, 4, 6, 7), "sinks": torch.randn(4), "alibi_slopes": torch.rand(2, 4)}
    compare(mesh, given, placements, free, call=fastattn.attention_varlen, causal=True)


@on("2", "compiled, by batch", sharding=BY_BATCH)
@on("2", "compiled, by heads", sharding=BY_HEADS)
def compiled(mesh: Any, sharding: Any) -> None:
    torch._dynamo.reset()
    call = torch.compile(fastattn.attention, backend="aot_eager", fullgraph=True)
    compare(mesh, {**tensors(2, 4, 2), "sinks": torch.randn(4)}, sharding, False, call=call, causal=True)


# ------------------------------------------------------------------------------------------------- more mesh dimensions


def everywhere(*placements: Any) -> dict[str, Any]:
    return {name: list(placements) for name in "qkv"}


@on("2x2", "batch and heads", placements=everywhere(BATCH, HEADS), sizes=(2, 4, 2))
@on("2x2", "batch and heads, in groups", placements=everywhere(BATCH, HEADS), sizes=(4, 8, 4))
@on("2x2", "heads twice", placements=everywhere(HEADS, HEADS), sizes=(2, 8, 4))
@on("2x2", "heads twice, uneven", placements=everywhere(HEADS, HEADS), sizes=(2, 5, 5))
@on("2x2", "heads twice, too few of keys", placements=everywhere(HEADS, HEADS), sizes=(2, 8, 2), free=False)
@on("2x2", "heads twice, in groups that cannot be", placements=everywhere(HEADS, HEADS), sizes=(2, 12, 6), free=False)
@on("2x2", "batch twice", placements=everywhere(BATCH, BATCH), sizes=(5, 4, 2))
@on("2x2", "batch alone", placements=everywhere(ALL, BATCH), sizes=(2, 4, 2))
@on("2x2", "one head of keys", placements={"q": [BATCH, HEADS], "k": [BATCH, ALL], "v": [BATCH, ALL]}, sizes=(2, 4, 1))
def on_two_dimensions(mesh: Any, placements: Any, sizes: Any, free: bool = True) -> None:
    compare(mesh, {**tensors(*sizes), "sinks": torch.randn(sizes[1])}, placements, free, causal=True)


# ----------------------------------------------------------------------------------------------------------- the cache


def cache_call(paged: bool, heads_kv: int = 2) -> dict[str, Tensor]:
    pages = (4, heads_kv, 4, 8) if paged else (2, heads_kv, 8, 8)
    given = {"q": torch.randn(2, 4, 1, 8), "k_cache": torch.randn(pages), "v_cache": torch.randn(pages)}
    given["cache_lengths"] = torch.tensor([2, 6], dtype=torch.int32)
    given["k_new"], given["v_new"] = torch.randn(2, 2, heads_kv, 1, 8)
    given["sinks"] = torch.randn(4)
    if paged:
        given["block_table"] = torch.tensor([[3, 1], [0, 2]], dtype=torch.int32)
    return given


def decode(x: dict[str, Any], **options: Any) -> tuple[Tensor, Tensor]:
    q, k_cache, v_cache, *_ = x.values()
    rest = {name: t for name, t in x.items() if name not in ("q", "k_cache", "v_cache")}
    return fastattn.attention_with_kv_cache(q, k_cache, v_cache, return_lse=True, **rest, **options)


CACHES = ("k_cache", "v_cache")


def caches(placements: list[Any]) -> dict[str, Any]:
    return {name: placements for name in CACHES}


@on("2", "cache by batch", placements=caches([BATCH]))
@on("2", "cache by heads", placements=caches([HEADS]))
@on(
    "2", "cache by heads, queries too", placements=caches([HEADS]) | {name: [HEADS] for name in ("q", "k_new", "v_new")}
)
@on("2", "cache, replicated", placements={"q": [BATCH]})
@on("2", "cache, one head of keys", placements={"q": [HEADS]}, heads_kv=1)
@on("2", "pages by heads", placements=caches([HEADS]), paged=True)
@on("2", "pages, replicated", placements={"q": [BATCH]}, paged=True)
@on("2x2", "cache by batch and heads", placements=caches([BATCH, HEADS]))
@on("2x2", "cache by heads on one", placements=caches([ALL, HEADS]))
def cache(mesh: Any, placements: Any, paged: bool = False, heads_kv: int = 2) -> None:
    whole = cache_call(paged, heads_kv)
    replicated = [ALL] * mesh.ndim
    sharded = {name: distribute_tensor(x.clone(), mesh, placements.get(name, replicated)) for name, x in whole.items()}
    want, found = decode(whole), decode(sharded)
    for a, b in zip(found, want, strict=True):
        assert a.stride() == b.stride()
        torch.testing.assert_close(a.full_tensor(), b)  # type: ignore[attr-defined]
    for name in CACHES:
        assert torch.equal(sharded[name].full_tensor(), whole[name])


# --------------------------------------------------------------------------------------------------------- the refusals


@on("2", "refusals of calls")
def refusals(mesh: Any) -> None:
    given = tensors(2, 4, 2)
    q, k, v = (distribute_tensor(x, mesh, [HEADS]) for x in given.values())
    with pytest.raises(TypeError, match="v must be a DTensor, as another argument is one, got Tensor: see"):
        fastattn.attention(q, k, given["v"])
    with pytest.raises(TypeError, match="q must be a DTensor"):
        fastattn.attention(given["q"], k, v)
    with pytest.raises(TypeError, match="sinks must be a DTensor"):
        fastattn.attention(q, k, v, sinks=torch.zeros(4))
    with pytest.raises(ValueError, match=r"dropout_p must be 0 for DTensors, got 0\.1: the mask depends on"):
        fastattn.attention(q, k, v, dropout_p=0.1, seed=3)
    with pytest.raises(ValueError, match=r"v must have shape .*, got shape \(2, 2, 9\)"):
        fastattn.attention(q, k, v[..., 0])
    for name, sentence in (("nothing", "backend must be None or one of"), ("cuda", "backend 'cuda' cannot compute")):
        with pytest.raises(ValueError, match=sentence):
            fastattn.attention(q, k, v, backend=name)
    other = init_device_mesh("cpu", (2, 1))
    with pytest.raises(ValueError, match="k must be on the mesh of the other arguments"):
        fastattn.attention(q, distribute_tensor(given["k"], other, [HEADS, ALL]), v)


@on("2", "refusals of caches")
def refusals_of_caches(mesh: Any) -> None:
    def refuse(words: str, paged: bool = False, heads_kv: int = 2, **placements: Any) -> None:
        given = cache_call(paged, heads_kv)
        before = given["k_cache"].clone()
        sharded = {name: distribute_tensor(x, mesh, [placements.get(name, ALL)]) for name, x in given.items()}
        with pytest.raises(ValueError, match=re.escape(words)):
            decode(sharded)
        assert torch.equal(sharded["k_cache"].full_tensor(), before)

    rows = Shard(2)
    refuse("k_cache must be sharded by batch or heads, Shard(0) or Shard(1), or replicated", k_cache=rows, v_cache=rows)
    refuse("k_cache must be sharded by heads, Shard(1), or replicated", paged=True, k_cache=BATCH, v_cache=BATCH)
    refuse("v_cache must have the placements of k_cache", k_cache=HEADS)
    refuse("k_cache must have a number of heads that 2 ranks can share", heads_kv=1, k_cache=HEADS, v_cache=HEADS)
    given = cache_call(paged=False)
    sharded = {name: distribute_tensor(x, mesh, [ALL]) for name, x in given.items()}
    for name, sentence in (("nothing", "backend must be None or one of"), ("cuda", "backend 'cuda' cannot compute")):
        with pytest.raises(ValueError, match=sentence):
            decode(sharded, backend=name)
    with pytest.raises(TypeError, match="v_cache must be a DTensor"):
        decode({**sharded, "v_cache": given["v_cache"]})


# ---------------------------------------------------------------------------------------------------------- processes


def work(rank: int, folder: str, name: str) -> None:
    """Runs all cases of a mesh in one process, and notes what went wrong in each."""
    torch.set_num_threads(1)
    shape = MESHES[name]
    size = torch.Size(shape).numel()
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    mesh = init_device_mesh("cpu", shape)
    failures: dict[str, str] = {}
    for case, run in CASES[name].items():
        torch.manual_seed(7)
        try:
            run(mesh)
        except Exception:
            failures[case] = traceback.format_exc()
    torch.save(failures, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, str]]]:
    """By mesh, what each rank noted."""
    found = {}
    for name, shape in MESHES.items():
        folder: Path = tmp_path_factory.mktemp(name)
        size = torch.Size(shape).numel()
        mp.spawn(work, (str(folder), name), nprocs=size)
        found[name] = [torch.load(folder / f"{rank}.pt") for rank in range(size)]
    return found


@pytest.mark.parametrize(("mesh", "case"), [(mesh, case) for mesh, cases in CASES.items() for case in cases])
def test_on_a_mesh(mesh: str, case: str, failures: dict[str, list[dict[str, str]]]) -> None:
    for rank, noted in enumerate(failures[mesh]):
        assert case not in noted, f"rank {rank}: {noted[case]}"


def test_import_leaves_dtensor_alone() -> None:
    """Nobody waits for torch.distributed.tensor who has no DTensor."""
    program = (
        "import sys, torch, fastattn; q = torch.zeros(1, 1, 2, 8, device='meta'); fastattn.attention(q, q, q); "
        "assert 'torch.distributed.tensor' not in sys.modules; assert 'fastattn.autograd.sharding' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
