"""Other processes: distributed training, data loading, and modules on their way there; deterministic algorithms."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

import fastattn
import fastattn.nn as fnn

# ------------------------------------------------------------------------------------------------ distributed training

RANKS = 2


def make_model() -> nn.Module:
    """Everything that has a parameter: projections, sinks, norms."""
    torch.manual_seed(0)
    return fnn.MultiheadAttention(16, 4, batch_first=True, num_kv_heads=2, sinks=True, qk_norm=True, window=(3, 0))


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x, x, x, need_weights=False, is_causal=True)[0].square().mean()


def batch_of(rank: int, step: int) -> Tensor:
    return torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(10 * step + rank))


def train(model: nn.Module, batches: Callable[[int], list[Tensor]]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        torch.stack([loss_of(model, x) for x in batches(step)]).mean().backward()
        optimizer.step()


def train_one_rank(rank: int, folder: str, compiled: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    model: Any = DistributedDataParallel(make_model())
    run = torch.compile(model, backend="aot_eager") if compiled else model
    train(run, lambda step: [batch_of(rank, step)])
    torch.save(model.module.state_dict(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_distributed_data_parallel(compiled: bool, tmp_path: Path) -> None:
    """Two processes with half the batch each end at the weights of one process with all of it."""
    mp.spawn(train_one_rank, (str(tmp_path), compiled), nprocs=RANKS)
    alone = make_model()
    train(alone, lambda step: [batch_of(rank, step) for rank in range(RANKS)])
    begun = make_model().state_dict()
    for rank in range(RANKS):
        state = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(state, dict(alone.state_dict()))
        assert all(not torch.equal(weights, begun[name]) for name, weights in state.items() if "bias" not in name)


# --------------------------------------------------------------------------------------------------------- data loading


class Attended(Dataset[Tensor]):
    """Attention inside the workers, forward and backward."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Tensor:
        q = batch_of(0, index).view(2, 6, 2, 8).transpose(1, 2).requires_grad_()
        out = fastattn.attention(q, q, q, causal=True)
        (grad,) = torch.autograd.grad(out.square().sum(), q)
        with torch.no_grad():
            x = batch_of(0, index)
            return torch.stack(
                (out.detach().flatten(), grad.flatten(), self.module(x, x, x, need_weights=False)[0].flatten())
            )


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_data_loader_workers(method: str) -> None:
    data = Attended(make_model().eval())
    want = torch.stack([data[i] for i in range(len(data))])
    loader = DataLoader(data, batch_size=3, num_workers=2, multiprocessing_context=method, timeout=100)
    found = torch.cat(list(loader))
    assert torch.equal(found, want)


# --------------------------------------------------------------------------------------------------- pickles and copies

MODULES: dict[str, Callable[[], nn.Module]] = {
    "attention": make_model,
    "attention with rotary": lambda: fnn.MultiheadAttention(16, 4, batch_first=True, rotary=fnn.RotaryEmbedding(4)),
    "attention with alibi": lambda: fnn.MultiheadAttention(16, 4, batch_first=True, alibi=True),
    "replaced": lambda: fnn.replace_attention(nn.MultiheadAttention(16, 4, batch_first=True)),
}


def by_pickle(x: Any) -> Any:
    return pickle.loads(pickle.dumps(x))


def by_save(x: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(x, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("used", [False, True], ids=["new", "used"])
@pytest.mark.parametrize("transport", [copy.deepcopy, by_pickle, by_save], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", MODULES)
def test_modules_travel(name: str, transport: Callable[[Any], Any], used: bool) -> None:
    """What a module keeps for itself, tables of angles or prepared calls, neither stops it nor goes with it."""
    module, x = MODULES[name](), torch.randn(2, 6, 16)
    if used:
        loss_of(module, x).backward()
    twin = transport(module)
    assert type(twin) is type(module)
    assert all(torch.equal(a, b) and a is not b for a, b in zip(module.parameters(), twin.parameters(), strict=True))
    grads = []
    for model in (module, twin):
        model.zero_grad()
        loss = loss_of(model, x)
        loss.backward()
        grads.append([loss.detach(), *(p.grad for p in model.parameters())])
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("transport", [copy.deepcopy, by_pickle, by_save], ids=lambda f: f.__name__)
def test_language_model_and_cache_travel(transport: Callable[[Any], Any]) -> None:
    model = fnn.TransformerLM(11, 16, 24, 4, 2, dropout=0.0).eval()
    prompt = torch.randint(11, (2, 4))
    want = model.generate(prompt, max_new_tokens=5)
    assert torch.equal(transport(model).generate(prompt, max_new_tokens=5), want)
    cache = fnn.KVCache(2, 2, 8, 4, page_size=4)
    with torch.no_grad():
        for _ in range(2):
            cache.attend(torch.randn(2, 4, 1, 4), torch.randn(2, 2, 1, 4), torch.randn(2, 2, 1, 4), causal=True)
        twin = transport(cache)
        step = torch.randn(2, 4, 1, 4), torch.randn(2, 2, 1, 4), torch.randn(2, 2, 1, 4)
        assert torch.equal(twin.attend(*step, causal=True), cache.attend(*step, causal=True))


# ------------------------------------------------------------------------------------------- deterministic algorithms


def test_deterministic_algorithms_are_what_there_is() -> None:
    """torch.use_deterministic_algorithms(True) finds nothing to complain of, and changes nothing."""
    q, k, v = (torch.randn(2, heads, 70, 16, requires_grad=True) for heads in (4, 2, 2))
    bias, sinks = torch.randn(4, 70, 70, requires_grad=True), torch.randn(4, requires_grad=True)

    def step() -> list[Tensor]:
        out = fastattn.attention(q, k, v, causal=True, bias=bias, sinks=sinks, dropout_p=0.1, seed=3)
        return [out, *torch.autograd.grad(out.square().sum(), (q, k, v, bias, sinks))]

    want = step()
    torch.use_deterministic_algorithms(True)
    try:
        found = step()
        with torch.no_grad():
            lengths = torch.tensor([3, 60], dtype=torch.int32)
            fastattn.attention_with_kv_cache(q[:, :, :1], k.clone(), v.clone(), cache_lengths=lengths)
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(found, want, strict=True):
        assert torch.equal(a, b)
