"""fastattn.nn.MultiheadAttention against torch.nn.MultiheadAttention: results, weights and all gradients."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
import fastattn.nn.attention as module_under_test
from fastattn import reference
from fastattn.nn import MultiheadAttention

from ..tolerance import assert_close, to_numpy

E, H = 24, 4


@dataclass
class Case:
    """A module, its inputs and its masks; sizes are small and odd on purpose."""

    name: str
    module: dict[str, Any] = field(default_factory=dict)
    batch: int | None = 3  # None: unbatched
    seqlen_q: int = 5
    seqlen_k: int | None = None  # None: self-attention
    padding: str | None = None  # "bool" or "float"
    attn_mask: str | None = None  # "bool 2", "bool 3", "float 2", "float 3" or "causal"
    call: dict[str, Any] = field(default_factory=dict)

    @property
    def keys(self) -> int:
        return self.seqlen_q if self.seqlen_k is None else self.seqlen_k


CASES = [
    Case("self attention"),
    Case("batch first", {"batch_first": True}),
    Case("one query", seqlen_q=1, seqlen_k=1),
    Case("no bias", {"bias": False}),
    Case("cross attention", seqlen_k=7),
    Case("other widths", {"kdim": 10, "vdim": 18, "batch_first": True}, seqlen_k=7),
    Case("other widths without bias", {"kdim": 24, "vdim": 7, "bias": False}, seqlen_k=4),
    Case("bool padding", padding="bool"),
    Case("float padding", {"batch_first": True}, padding="float", seqlen_k=9),
    Case("bool attn_mask", attn_mask="bool 2", seqlen_k=6),
    Case("bool attn_mask per head", {"batch_first": True}, attn_mask="bool 3"),
    Case("float attn_mask", attn_mask="float 2"),
    Case("float attn_mask per head", attn_mask="float 3", seqlen_k=6),
    Case("both bool", padding="bool", attn_mask="bool 2", seqlen_k=6),
    Case("both bool per head", padding="bool", attn_mask="bool 3"),
    Case("both float", padding="float", attn_mask="float 2"),
    Case("both float per head", padding="float", attn_mask="float 3"),
    Case("bool padding and float attn_mask", padding="bool", attn_mask="float 2"),
    Case("float padding and bool attn_mask", padding="float", attn_mask="bool 2"),
    Case("causal hint", attn_mask="causal", call={"is_causal": True}),
    Case("causal hint and padding", attn_mask="causal", padding="bool", call={"is_causal": True}),
    Case("causal hint, more keys", attn_mask="causal", seqlen_k=8, call={"is_causal": True}),
    # A mask that is not causal under the hint: torch reads it where it needs weights or merges it with padding.
    Case("wrong causal hint", attn_mask="bool 2", call={"is_causal": True}),
    Case("wrong causal hint, float", attn_mask="float 3", seqlen_k=7, call={"is_causal": True}),
    Case("wrong causal hint and padding", attn_mask="bool 3", padding="bool", call={"is_causal": True}),
    Case("wrong causal hint and float padding", attn_mask="float 2", padding="float", call={"is_causal": True}),
    Case("bias_kv", {"add_bias_kv": True}),
    Case("zero_attn", {"add_zero_attn": True, "batch_first": True}, seqlen_k=7),
    Case(
        "bias_kv, zero_attn, masks",
        {"add_bias_kv": True, "add_zero_attn": True},
        padding="bool",
        attn_mask="bool 2",
    ),
    Case("bias_kv, other widths", {"add_bias_kv": True, "kdim": 10, "vdim": 6}, attn_mask="float 3", seqlen_k=6),
    Case("unbatched", batch=None),
    Case(
        "unbatched, batch first",
        {"batch_first": True},
        batch=None,
        padding="bool",
        attn_mask="float 3",
        seqlen_k=6,
    ),
    Case("per head weights", call={"average_attn_weights": False}, seqlen_k=7),
    Case("per head weights, unbatched", call={"average_attn_weights": False}, batch=None),
]


def make_masks(case: Case) -> dict[str, Tensor | None]:
    """Masks that leave the first key visible to everyone, so that torch has no NaN."""
    batch = case.batch or 1
    padding = attn_mask = None
    if case.padding is not None:
        padding = torch.rand(batch, case.keys) < 0.4
        padding[:, 0] = False
        if case.padding == "float":
            padding = torch.randn(batch, case.keys).masked_fill(padding, -torch.inf)
        padding = padding if case.batch is not None else padding[0]
    if case.attn_mask == "causal":
        attn_mask = torch.ones(case.seqlen_q, case.keys, dtype=torch.bool).triu(1)
    elif case.attn_mask is not None:
        kind, dims = case.attn_mask.split()
        lead = () if dims == "2" else (batch * H,)
        attn_mask = torch.rand(*lead, case.seqlen_q, case.keys) < 0.4
        attn_mask[..., 0] = False
        if kind == "float":
            attn_mask = torch.randn(attn_mask.shape).masked_fill(attn_mask, -torch.inf)
    return {"key_padding_mask": padding, "attn_mask": attn_mask}


def make_inputs(case: Case, module: torch.nn.MultiheadAttention) -> list[Tensor]:
    """One tensor for self-attention without widths of their own, else three."""

    def tensor(seqlen: int, width: int) -> Tensor:
        if case.batch is None:
            return torch.randn(seqlen, width)
        shape = (case.batch, seqlen, width) if module.batch_first else (seqlen, case.batch, width)
        return torch.randn(shape)

    if case.seqlen_k is None and module.kdim == module.vdim == E:
        return [tensor(case.seqlen_q, E)]
    return [tensor(case.seqlen_q, E), tensor(case.keys, module.kdim), tensor(case.keys, module.vdim)]


def run(
    module: torch.nn.MultiheadAttention,
    inputs: list[Tensor],
    masks: dict[str, Tensor | None],
    dtype: torch.dtype,
    call: dict[str, Any],
) -> dict[str, Tensor]:
    """Output, weights, and the gradients of inputs, masks and parameters for fixed cotangents."""
    module = copy.deepcopy(module).to(dtype)
    leaves = [x.to(dtype).requires_grad_() for x in inputs]
    masks = {
        name: mask if mask is None or mask.dtype == torch.bool else mask.to(dtype).requires_grad_()
        for name, mask in masks.items()
    }
    query, key, value = leaves * 3 if len(leaves) == 1 else leaves
    out, weights = module(query, key, value, **masks, **call)
    generator = torch.Generator().manual_seed(7)
    loss = (out * torch.randn(out.shape, generator=generator).to(dtype)).sum()
    results = {"out": out}
    if weights is not None:
        loss = loss + (weights * torch.randn(weights.shape, generator=generator).to(dtype)).sum()
        results["weights"] = weights
    loss.backward()
    results.update({f"grad of input {i}": x.grad for i, x in enumerate(leaves)})
    results.update(
        {f"grad of {name}": mask.grad for name, mask in masks.items() if mask is not None and mask.grad is not None}
    )
    results.update({f"grad of {name}": p.grad for name, p in module.named_parameters()})
    return results


def assert_equal_to_torch(case: Case, dtype: torch.dtype, need_weights: bool, training: bool = True) -> None:
    torch.manual_seed(0)
    theirs = torch.nn.MultiheadAttention(E, H, **case.module).train(training)
    for p in theirs.parameters():  # torch begins with biases of zero, which would hide a mix-up
        torch.nn.init.normal_(p, std=0.3)
    ours = MultiheadAttention(E, H, **case.module).train(training)
    ours.load_state_dict(theirs.state_dict())
    # Rounded to dtype first, so that all three see the same numbers.
    theirs, ours = theirs.to(dtype), ours.to(dtype)
    inputs = [x.to(dtype) for x in make_inputs(case, theirs)]
    masks = {n: m if m is None or m.dtype == torch.bool else m.to(dtype) for n, m in make_masks(case).items()}
    call = {**case.call, "need_weights": need_weights}
    exact = run(theirs, inputs, masks, torch.float64, call)
    eager = run(theirs, inputs, masks, dtype, call)
    found = run(ours, inputs, masks, dtype, call)
    assert found.keys() == exact.keys()
    for name, value in found.items():
        assert value.dtype == dtype
        assert_close(name, value, to_numpy(exact[name]), eager[name], dtype, largest_term=1.0)


@pytest.mark.parametrize("need_weights", [False, True], ids=["plain", "weights"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.filterwarnings("ignore:Support for mismatched")
def test_equals_torch(case: Case, need_weights: bool) -> None:
    assert_equal_to_torch(case, torch.float32, need_weights)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("number", [0, 13, 28], ids=lambda n: CASES[n].name)
def test_equals_torch_in_other_dtypes(number: int, dtype: torch.dtype) -> None:
    for need_weights in (False, True):
        assert_equal_to_torch(CASES[number], dtype, need_weights, training=False)


@pytest.mark.parametrize("batch_first", [False, True])
def test_equals_torchs_eval_fast_path(batch_first: bool) -> None:
    torch.manual_seed(0)
    theirs = torch.nn.MultiheadAttention(E, H, dropout=0.5, batch_first=batch_first).eval()
    ours = MultiheadAttention(E, H, dropout=0.5, batch_first=batch_first).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 5, E)
    with torch.no_grad():
        for call in ({}, {"need_weights": False}, {"average_attn_weights": False}):
            for a, b in zip(ours(x, x, x, **call), theirs(x, x, x, **call), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_causal_without_a_mask_is_top_left() -> None:
    torch.manual_seed(0)
    module = MultiheadAttention(E, H, batch_first=True)
    x, memory = torch.randn(2, 4, E), torch.randn(2, 6, E)
    mask = torch.ones(4, 6, dtype=torch.bool).triu(1)
    for need_weights in (False, True):
        expected, _ = module(x, memory, memory, attn_mask=mask, need_weights=need_weights)
        found, weights = module(x, memory, memory, is_causal=True, need_weights=need_weights)
        torch.testing.assert_close(found, expected)
        assert weights is None or torch.all(weights[:, mask] == 0)


def test_the_causal_hint_saves_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def attention(*args: Any, **options: Any) -> Tensor:
        seen.append(options)
        return fastattn.attention(*args, **options)

    monkeypatch.setattr("fastattn.nn.attention.attention", attention)
    x, mask = torch.randn(5, 2, E), torch.ones(5, 5, dtype=torch.bool).triu(1)
    MultiheadAttention(E, H)(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)
    (options,) = seen
    assert options["causal"]
    assert options["mask"] is None
    assert options["bias"] is None


@pytest.mark.parametrize("masks", ["bool padding", "float padding", "bool padding and bool attn_mask"])
def test_rows_without_keys_give_the_output_bias_and_finite_gradients(masks: str) -> None:
    """torch gives NaN there."""
    torch.manual_seed(0)
    module = MultiheadAttention(E, H, batch_first=True)
    torch.nn.init.normal_(module.out_proj.bias)
    x = torch.randn(2, 4, E, requires_grad=True)
    padding = torch.tensor([[False, False, True, True], [True] * 4])
    call = {"key_padding_mask": padding}
    if masks == "float padding":
        call = {"key_padding_mask": torch.zeros(2, 4).masked_fill(padding, -torch.inf)}
    elif "attn_mask" in masks:  # each hides half of the keys from sequence 1, together all
        padding[1, :2] = False
        call["attn_mask"] = torch.tensor([[True, True, False, False]] * 4)
    for need_weights in (False, True):
        out, weights = module(x, x, x, need_weights=need_weights, **call)
        torch.testing.assert_close(out[1], module.out_proj.bias.expand(4, E))
        assert weights is None or torch.all(weights[1] == 0)
        (grad,) = torch.autograd.grad(out.sum(), x)
        assert torch.isfinite(grad).all()
        assert torch.all(grad[1] == 0)


@pytest.mark.parametrize(
    "extra",
    [{}, {"bias": False}, {"kdim": 10, "vdim": 7}, {"add_bias_kv": True}, {"dtype": torch.bfloat16}],
    ids=str,
)
def test_state_dict_and_initial_values_are_torchs(extra: dict[str, Any]) -> None:
    torch.manual_seed(3)
    theirs = torch.nn.MultiheadAttention(E, H, **extra)
    torch.manual_seed(3)
    ours = MultiheadAttention(E, H, **extra)
    expected, found = theirs.state_dict(), ours.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    theirs.load_state_dict(found)
    ours.load_state_dict(expected)


def test_dropout_is_for_training_and_shared_by_output_and_weights() -> None:
    torch.manual_seed(0)
    p, seqlen = 0.3, 40
    module = MultiheadAttention(E, H, dropout=p, batch_first=True)
    x = torch.randn(2, seqlen, E)
    call = {"average_attn_weights": False}
    torch.manual_seed(1)
    out, weights = module(x, x, x, **call)
    torch.manual_seed(1)
    torch.testing.assert_close(module(x, x, x, need_weights=False)[0], out)
    torch.manual_seed(2)
    assert not torch.allclose(module(x, x, x, **call)[0], out)

    v = torch.nn.functional.linear(x, module.in_proj_weight[2 * E :], module.in_proj_bias[2 * E :])
    mixed = weights @ v.unflatten(-1, (H, E // H)).transpose(1, 2)
    torch.testing.assert_close(module.out_proj(mixed.transpose(1, 2).flatten(2)), out)

    _, full = module.eval()(x, x, x, **call)
    kept = weights != 0
    torch.testing.assert_close(weights[kept], (full / (1 - p))[kept])
    deviation = (p * (1 - p) / kept.numel()) ** 0.5
    assert abs(1 - kept.double().mean() - p) < 5 * deviation
    torch.testing.assert_close(module(x, x, x)[0], module(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize("kernel", [None, "torch"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_weights_come_beside_the_backends_own_output(
    kernel: str | None, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    module = MultiheadAttention(E, H, dropout=dropout, batch_first=True, backend=kernel)
    calls = []

    def spy(name: str, function: Any) -> Any:
        return lambda *args, **options: calls.append((name, options.get("backend"))) or function(*args, **options)

    for name in ("attention", "torch_attention"):
        function = getattr(module_under_test, name)
        monkeypatch.setattr(module_under_test, name, spy(name, function))
    x = torch.randn(2, 9, E)
    out, weights = module(x, x, x, average_attn_weights=False)
    expected = {None: [("attention", None)], "torch": [("torch_attention", None)] if dropout == 0 else []}
    assert calls == expected[kernel]
    v = torch.nn.functional.linear(x, module.in_proj_weight[2 * E :], module.in_proj_bias[2 * E :])
    mixed = weights @ v.unflatten(-1, (H, E // H)).transpose(1, 2)
    torch.testing.assert_close(module.out_proj(mixed.transpose(1, 2).flatten(2)), out)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("kernel", [None, "torch"])
def test_dropout_of_everything(kernel: str | None, need_weights: bool) -> None:
    torch.manual_seed(0)
    theirs = torch.nn.MultiheadAttention(E, H, dropout=1.0)
    torch.nn.init.normal_(theirs.out_proj.bias)
    ours = MultiheadAttention(E, H, dropout=1.0, backend=kernel)
    ours.load_state_dict(theirs.state_dict())
    replaced = fastattn.nn.replace_attention(copy.deepcopy(theirs))
    case = Case("dropout of everything")
    inputs = make_inputs(case, ours)
    expected = run(theirs, inputs, {}, torch.float32, {"need_weights": need_weights})
    for module in (ours, replaced):
        found = run(module, inputs, {}, torch.float32, {"need_weights": need_weights})
        torch.testing.assert_close(found, expected)
        assert torch.all(found["grad of input 0"] == 0)
        assert need_weights == ("weights" in found)
    x = inputs[0]
    torch.testing.assert_close(ours.eval()(x, x, x), theirs.eval()(x, x, x))


def test_without_weights_nothing_asks_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    module = MultiheadAttention(E, H)
    x = torch.randn(5, 2, E)

    def refuse(*_: Any, **__: Any) -> Tensor:
        raise AssertionError("the matrix of weights was computed")

    monkeypatch.setattr(reference, "attention_weights", refuse)
    assert module(x, x, x, need_weights=False)[1] is None
    with pytest.raises(AssertionError, match="was computed"):
        module(x, x, x)


def test_autocast() -> None:
    torch.manual_seed(0)
    theirs, ours = torch.nn.MultiheadAttention(E, H), MultiheadAttention(E, H)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(5, 2, E, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        for need_weights in (False, True):
            out, _ = ours(x, x, x, need_weights=need_weights)
            expected, _ = theirs(x, x, x, need_weights=need_weights)
            assert out.dtype == expected.dtype == torch.bfloat16
            torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)
            out.float().sum().backward()
    assert x.grad.dtype == torch.float32


def test_empty_batch_and_no_queries() -> None:
    module = MultiheadAttention(E, H, batch_first=True)
    for shape in ((0, 5, E), (2, 0, E)):
        x = torch.randn(shape)
        assert module(x, x, x, need_weights=False)[0].shape == shape
        assert module(x, x, x)[0].shape == shape
