"""Keys of how tensors lie in memory: equal where nothing but addresses and values differ, and only there."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn.autograd import fast_path
from fastattn.backends import layout_key
from fastattn.backends.native import cpu, prepared

READERS = [layout_key.attributes]
if layout_key._native is not None:
    READERS.append(layout_key._native)  # type: ignore[arg-type]
READER = pytest.mark.parametrize("read", READERS, ids=lambda read: read.__name__)

DIFFERENT: dict[str, Callable[[], Tensor]] = {
    "contiguous": lambda: torch.randn(2, 3, 4, 8),
    "double": lambda: torch.randn(2, 3, 4, 8, dtype=torch.float64),
    "half": lambda: torch.randn(2, 3, 4, 8).half(),
    "bfloat16": lambda: torch.randn(2, 3, 4, 8).bfloat16(),
    "integers": lambda: torch.zeros(2, 3, 4, 8, dtype=torch.int32),
    "transposed": lambda: torch.randn(2, 4, 3, 8).transpose(1, 2),
    "expanded": lambda: torch.randn(2, 1, 4, 8).expand(2, 3, 4, 8),
    "another shape": lambda: torch.randn(2, 4, 3, 8),
    "fewer dimensions": lambda: torch.randn(2, 3, 32),
    "no dimensions": lambda: torch.randn(()),
    "negated": lambda: torch._neg_view(torch.randn(2, 3, 4, 8)),
    "empty": lambda: torch.randn(2, 3, 0, 8),
}


def test_the_native_reader_is_used_where_torch_exports_the_table() -> None:
    exported = cpu._cpu is not None and hasattr(torch.Tensor, "__dlpack_c_exchange_api__")
    assert layout_key.layout_key is (layout_key._native if exported else layout_key.attributes)


@READER
def test_keys_are_equal_only_for_equal_layouts(read: Callable[..., Hashable]) -> None:
    keys = {name: read(make()) for name, make in DIFFERENT.items()}
    assert len(set(keys.values())) == len(keys)
    again = {name: read(make()) for name, make in DIFFERENT.items()}
    assert again == keys
    for a, b in itertools.permutations(DIFFERENT, 2):
        assert read(DIFFERENT[a](), DIFFERENT[b]()) != read(DIFFERENT[b](), DIFFERENT[a]())
    assert read(torch.randn(4)[1:]) == read(torch.randn(3))
    assert read(torch.nn.Parameter(torch.randn(3))) == read(torch.randn(3))


@READER
@pytest.mark.parametrize("make", [lambda: torch.eye(3).to_sparse(), lambda: 1], ids=["sparse", "no tensor"])
def test_what_has_no_layout_is_refused_by_name(
    read: Callable[..., Hashable], make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fast_path, "layout_key", read)
    x = torch.randn(1, 1, 2, 8)
    with pytest.raises((TypeError, ValueError), match=r"^q must be"):
        fastattn.attention(make(), x, x)
    with pytest.raises((TypeError, ValueError), match=r"^v must be"):
        fastattn.attention(x, x, make())


@pytest.mark.skipif(layout_key._native is None, reason="this version of torch does not export DLPack's table")
def test_the_native_reader_refuses_what_it_cannot_tell() -> None:
    read: Any = layout_key._native
    assert len({read(*[torch.randn([1] * dims)] * n) for n in range(9) for dims in range(9)}) == 1 + 8 * 9
    with pytest.raises(TypeError, match="at most 8 tensors, got 9"):
        read(*[torch.randn(1)] * 9)
    with pytest.raises(TypeError, match="at most 8 dimensions, got 9"):
        read(torch.randn([1] * 9))
    with pytest.raises(TypeError, match="no memory"):
        read(torch._efficientzerotensor((1, 2)))


@pytest.mark.skipif(cpu._cpu is None, reason="the native module is not built")
def test_results_do_not_depend_on_the_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (torch.randn(2, 4, 5, 8, requires_grad=True) for _ in range(3))
    dout = torch.randn(2, 4, 5, 8)
    results = []
    for read in READERS:
        for module in (fast_path, prepared):
            monkeypatch.setattr(module, "layout_key", read)
        fast_path._kinds.clear()
        for _ in range(2):  # the first call prepares
            out = fastattn.attention(q, k, v, causal=True, backend="cpu")
            results.append((out, *torch.autograd.grad(out, (q, k, v), dout)))
    fast_path._kinds.clear()
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
