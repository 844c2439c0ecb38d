"""The dropout mask: Philox4x32-10 bit for bit, at its rate, reproducible, the same forward and backward."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import fastattn
from fastattn.philox import dropout_keep, philox4x32

from . import oracle
from .test_oracle import KNOWN_ANSWERS, words

pytestmark = pytest.mark.usefixtures("poisoned_memory")


# ----------------------------------------------------------------------------------------------------------- generator


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS)
def test_published_vectors(counter: str, key: str, result: str) -> None:
    c0, c1, c2, c3 = (torch.tensor([word]) for word in words(counter))
    k0, k1 = words(key)
    assert [int(word) for word in philox4x32((c0, c1, c2, c3), (k0, k1))] == words(result)
    as_tensors = torch.tensor(k0), torch.tensor(k1)
    assert [int(word) for word in philox4x32((c0, c1, c2, c3), as_tensors)] == words(result)


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**32, 0x7FFF_FFFF_FFFF_FFFF])
def test_keep_follows_the_rule(seed: int) -> None:
    threshold = int(0.3 * 2**32)
    keep = dropout_keep(seed, threshold, range(2, 4), 3, 5, 11, device=torch.device("cpu"))
    want = [[oracle.dropout_keep(seed, 0.3, b * 3 + h, 5, 11) for h in range(3)] for b in (2, 3)]
    assert np.array_equal(keep.numpy(), np.array(want))


# ----------------------------------------------------------------------------------------------- through the functions


def kept(backend: str, device: str, batch: int, heads: int, rows: int, keys: int, **options: object) -> Tensor:
    """The mask that attention applies: with equal scores and the identity as values, out shows each probability."""
    q = torch.zeros(batch, heads, rows, 8, device=device)
    k = torch.zeros(batch, 1, keys, 8, device=device)
    v = torch.eye(keys, device=device).expand(batch, 1, keys, keys)
    out = fastattn.attention(q, k, v, backend=backend, **options)
    p = float(options["dropout_p"])  # type: ignore[arg-type]
    share = 1 / (keys * (1 - p))
    torch.testing.assert_close(out, torch.where(out > 0, share, 0.0), rtol=1e-5, atol=0)
    return out > 0


@pytest.mark.parametrize("p", [1e-12, 0.001, 0.1, 0.5, 0.75, 0.9, 0.999])
@pytest.mark.parametrize(("rows", "keys"), [(1, 1), (3, 5), (17, 63), (65, 66)])
def test_mask_is_the_rule(rows: int, keys: int, p: float, backend: str, device: str) -> None:
    seed = 0x0FED_CBA9_8765_4321
    found = kept(backend, device, 2, 3, rows, keys, dropout_p=p, seed=seed).cpu().numpy()
    for b in range(2):
        for h in range(3):
            assert np.array_equal(found[b, h], oracle.dropout_keep(seed, p, b * 3 + h, rows, keys))


@pytest.mark.parametrize("seed", [0, 5, 2**32, 2**32 + 5, 2**63 - 1])
def test_both_halves_of_the_seed_count(seed: int, backend: str, device: str) -> None:
    found = kept(backend, device, 1, 1, 9, 33, dropout_p=0.5, seed=seed).cpu().numpy()
    assert np.array_equal(found[0, 0], oracle.dropout_keep(seed, 0.5, 0, 9, 33))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_mask_does_not_depend_on_the_dtype(dtype: torch.dtype, backend: str, device: str) -> None:
    v = torch.eye(20, device=device).expand(1, 2, 20, 20)
    q = torch.zeros(1, 2, 9, 8, device=device)
    masks = []
    for x in (dtype, torch.float32):
        given = q.to(x), torch.zeros(1, 2, 20, 8, device=device, dtype=x), v.to(x)
        masks.append(fastattn.attention(*given, dropout_p=0.4, seed=7, backend=backend) > 0)
    assert torch.equal(*masks)


def test_mask_does_not_depend_on_the_rest_of_the_call(backend: str, device: str) -> None:
    """Masked entries use up their random words too, and the mask is that of absolute i and j."""
    options = {"dropout_p": 0.5, "seed": 3}
    full = kept(backend, device, 1, 2, 8, 8, **options)
    q, v = torch.zeros(1, 2, 8, 8, device=device), torch.eye(8, device=device).expand(1, 2, 8, 8)
    causal = fastattn.attention(q, q, v, causal=True, window=(3, None), backend=backend, **options) > 0
    i, j = torch.arange(8, device=device)[:, None], torch.arange(8, device=device)
    assert torch.equal(causal, full & (j <= i) & (j >= i - 3))


def test_varlen_counts_within_the_sequence(backend: str, device: str) -> None:
    lengths = ((4, 9), (0, 3), (7, 6))
    q = torch.zeros(11, 3, 8, device=device)
    k = torch.zeros(18, 1, 8, device=device)
    v = torch.cat([torch.eye(9, device=device)[:n] for _, n in lengths])[:, None]
    cu = [torch.tensor(x, dtype=torch.int32, device=device) for x in ([0, 4, 4, 11], [0, 9, 12, 18])]
    out = fastattn.attention_varlen(q, k, v, *cu, dropout_p=0.5, seed=21, backend=backend)
    start = 0
    for b, (rows, keys) in enumerate(lengths):
        for h in range(3):
            found = (out[start : start + rows, h, :keys] > 0).cpu().numpy()
            assert np.array_equal(found, oracle.dropout_keep(21, 0.5, b * 3 + h, rows, keys))
        start += rows


def test_forward_and_backward_drop_the_same(backend: str, device: str) -> None:
    """With the identity as values and as cotangents, out and the gradient of v are each other's transpose."""
    n = 35
    q, k = torch.randn(2, 1, 2, n, 8, device=device).unbind()
    v = torch.eye(n, device=device).repeat(1, 2, 1, 1).requires_grad_()
    out = fastattn.attention(q, k, v, dropout_p=0.4, seed=11, backend=backend)
    (dv,) = torch.autograd.grad(out, v, torch.eye(n, device=device).expand_as(out))
    assert torch.equal(out > 0, dv.transpose(2, 3) > 0)
    torch.testing.assert_close(dv.transpose(2, 3), out.detach())
    # Dropping is not just masking: what is dropped still stands in the softmax's denominator.
    plain = fastattn.attention(q, k, v, backend=backend)
    torch.testing.assert_close(out, torch.where(out > 0, plain / 0.6, 0.0))


def test_lse_is_that_of_all_keys(backend: str, device: str) -> None:
    q, k, v = torch.randn(3, 2, 2, 9, 16, device=device).unbind()
    _, plain = fastattn.attention(q, k, v, return_lse=True, backend=backend)
    _, dropped = fastattn.attention(q, k, v, dropout_p=0.9, seed=1, return_lse=True, backend=backend)
    torch.testing.assert_close(dropped, plain)


# ---------------------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_rate(p: float, backend: str, device: str) -> None:
    """The share of survivors over all, per row and per column is that of independent coins, within 5 deviations."""
    found = kept(backend, device, 2, 4, 64, 64, dropout_p=p, seed=99).double()
    deviation = (p * (1 - p)) ** 0.5
    for dims in ((0, 1, 2, 3), (0, 1, 2), (0, 1, 3), (1, 2, 3), (0, 2, 3)):
        count = found.numel() / found.mean(dims).numel()
        assert (found.mean(dims) - (1 - p)).abs().max() < 5 * deviation / count**0.5


@pytest.mark.parametrize("dim", [0, 1, 2, 3])
def test_neighbours_are_independent(dim: int, backend: str, device: str) -> None:
    found = kept(backend, device, 3, 3, 64, 64, dropout_p=0.5, seed=5).double() - 0.5
    n = found.shape[dim]
    products = 4 * found.narrow(dim, 0, n - 1) * found.narrow(dim, 1, n - 1)
    assert abs(products.mean()) < 5 / products.numel() ** 0.5


@pytest.mark.many_programs
def test_expectation_is_attention(backend: str, device: str) -> None:
    q, k, v = torch.randn(3, 1, 2, 6, 8, device=device).unbind()
    plain = fastattn.attention(q, k, v, backend=backend)
    outs = [fastattn.attention(q, k, v, dropout_p=0.3, seed=seed, backend=backend) for seed in range(300)]
    mean, deviation = torch.stack(outs).mean(0), torch.stack(outs).std(0)
    assert ((mean - plain).abs() < 5 * deviation / 300**0.5).all()


# -------------------------------------------------------------------------------------------------------------- seeds


def call(backend: str, device: str, **options: object) -> Tensor:
    x = torch.linspace(-1, 1, 2 * 9 * 8, device=device).view(1, 2, 9, 8)
    return fastattn.attention(x, x, x, backend=backend, **options)


def test_manual_seed_reproduces(backend: str, device: str) -> None:
    torch.manual_seed(1)
    first, second = (call(backend, device, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(1)
    again = call(backend, device, dropout_p=0.5)
    torch.manual_seed(2)
    other = call(backend, device, dropout_p=0.5)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert not torch.equal(first, other)


def test_seed_argument(backend: str, device: str) -> None:
    state = torch.get_rng_state()
    first, again = (call(backend, device, dropout_p=0.5, seed=17) for _ in range(2))
    as_tensor = call(backend, device, dropout_p=0.5, seed=torch.tensor(17))
    assert torch.equal(first, again)
    assert torch.equal(first, as_tensor)
    assert not torch.equal(first, call(backend, device, dropout_p=0.5, seed=18))
    assert torch.equal(torch.get_rng_state(), state), "a given seed must leave the generator alone"


def test_without_dropout_the_generator_rests(backend: str, device: str) -> None:
    state = torch.get_rng_state()
    plain = call(backend, device)
    assert torch.equal(plain, call(backend, device, dropout_p=0.0, seed=3))
    assert torch.equal(torch.get_rng_state(), state)


def test_generators_of_other_devices_do_not_matter(backend: str, device: str) -> None:
    """The seed comes from the CPU generator, wherever the tensors are."""
    torch.manual_seed(4)
    state = torch.get_rng_state()
    call(backend, device, dropout_p=0.5)
    assert not torch.equal(torch.get_rng_state(), state)
