"""The public surface: names, signatures, documentation, types, and what importing it needs."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.resources
import inspect
import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import pytest

import fastattn

PUBLIC = {
    "Report",
    "Rotary",
    "__version__",
    "apply_rotary",
    "attention",
    "attention_varlen",
    "attention_with_kv_cache",
    "available_backends",
    "explain",
    "merge_states",
    "reference",
    "scaled_dot_product_attention",
}

POSITION = {"causal": False, "window": None, "causal_alignment": "bottom-right", "q_offset": None}
SCORES = {"mask": None, "bias": None, "alibi_slopes": None, "softcap": None, "sinks": None}
TRAINING = {"kv_lengths": None, "scale": None, "dropout_p": 0.0, "seed": None}
RETURNS = {"return_lse": False, "backend": None}
REQUIRED = inspect.Parameter.empty

# function -> (positional parameters, keyword-only parameters with their defaults), in order
SIGNATURES: dict[Callable[..., Any], tuple[list[str], dict[str, Any]]] = {
    fastattn.attention: (["q", "k", "v"], {**POSITION, **SCORES, **TRAINING, **RETURNS}),
    fastattn.attention_varlen: (
        ["q", "k", "v", "cu_seqlens_q", "cu_seqlens_k"],
        {**POSITION, **SCORES, **TRAINING, **RETURNS},
    ),
    fastattn.attention_with_kv_cache: (
        ["q", "k_cache", "v_cache"],
        {
            "cache_lengths": REQUIRED,
            **dict.fromkeys(["k_new", "v_new", "block_table", "rotary"]),
            **POSITION,
            **SCORES,
            "scale": None,
            **RETURNS,
        },
    ),
    fastattn.merge_states: (["outs", "lses"], {}),
    fastattn.apply_rotary: (["x", "rotary", "positions"], {}),
    fastattn.available_backends: ([], {}),
}


def test_public_names() -> None:
    assert set(fastattn.__all__) == PUBLIC
    assert fastattn.__all__ == sorted(fastattn.__all__)
    assert all(hasattr(fastattn, name) for name in PUBLIC)
    exposed = {name for name, x in vars(fastattn).items() if not name.startswith("_") and not inspect.ismodule(x)}
    assert exposed <= PUBLIC


def test_submodules_are_attributes() -> None:
    """Public ones, once somebody asks for them; what is not public is not listed."""
    out = run_python("""
        import sys
        import fastattn
        assert "fastattn.nn" not in sys.modules and "fastattn.integrations" not in sys.modules
        print(*dir(fastattn))
        print(*dir(fastattn.integrations))
        print(fastattn.nn.MultiheadAttention.__name__, fastattn.reference.attention.__name__)
        print(fastattn.integrations.torch.use.__name__, fastattn.integrations.huggingface.register.__name__)
        print(fastattn.integrations.flash_attn.install.__name__)
        assert dir(fastattn.nn) == sorted(fastattn.nn.__all__)
        print(*dir(fastattn))
    """)
    listed, integrations, *found, later = out.splitlines()
    assert set(listed.split()) == PUBLIC | {"integrations", "nn"}
    assert integrations.split() == ["flash_attn", "huggingface", "torch"]
    assert found == ["MultiheadAttention attention", "use register", "install"]
    assert later == listed
    with pytest.raises(AttributeError, match="module 'fastattn' has no attribute 'attentoin'"):
        fastattn.attentoin  # noqa: B018
    with pytest.raises(ImportError, match="attentoin"):
        from fastattn import attentoin  # noqa: F401


@pytest.mark.parametrize("package", [fastattn, fastattn.integrations], ids=lambda x: x.__name__)
def test_type_checkers_see_submodules_and_no_getattr(package: Any) -> None:
    """`make lint` runs the checker; to it, a module with __getattr__ has any name, misspelled ones too."""
    tree = ast.parse(inspect.getsource(package))
    (choice,) = [node for node in tree.body if isinstance(node, ast.If)]
    assert ast.unparse(choice.test).endswith("TYPE_CHECKING")  # what it knows by name
    seen = {alias.asname for node in choice.body for alias in node.names}  # type: ignore[attr-defined]
    assert seen == set(dir(package)) - set(getattr(package, "__all__", ()))
    assert "__getattr__" in ast.unparse(choice.orelse[0])


def test_version_is_that_of_the_distribution() -> None:
    assert fastattn.__version__ == importlib.metadata.version("fastattn")


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda f: f.__name__)
def test_signatures(function: Callable[..., Any]) -> None:
    positional, keywords = SIGNATURES[function]
    parameters = inspect.signature(function).parameters.values()
    assert [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD] == positional
    assert {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY} == keywords
    assert [p.name for p in parameters if p.kind is p.KEYWORD_ONLY] == list(keywords)
    assert not [p for p in parameters if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def test_signature_of_torchs_function() -> None:
    parameters = inspect.signature(fastattn.scaled_dot_product_attention).parameters
    defaults = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False}
    assert {name: p.default for name, p in parameters.items()} == {
        **dict.fromkeys(["query", "key", "value"], REQUIRED),
        **defaults,
    }
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters.values())


@pytest.mark.parametrize("name", sorted(PUBLIC - {"__version__", "reference"}))
def test_documented(name: str) -> None:
    documentation = inspect.getdoc(getattr(fastattn, name))
    assert documentation
    assert len(documentation.split()) > 8
    for parameter in SIGNATURES.get(getattr(fastattn, name), ([], {}))[0]:
        assert parameter in documentation


@pytest.mark.parametrize("function", [*SIGNATURES, fastattn.scaled_dot_product_attention, fastattn.explain])
def test_annotated(function: Callable[..., Any]) -> None:
    signature = inspect.signature(function)
    assert signature.return_annotation is not signature.empty
    assert all(p.annotation is not p.empty for p in signature.parameters.values())


def test_every_option_is_documented() -> None:
    documentation = inspect.getdoc(fastattn.attention) or ""
    for option in {**POSITION, **SCORES, **TRAINING, **RETURNS}:
        assert f"\n    {option} " in documentation, option


def test_types_are_shipped() -> None:
    assert importlib.resources.files("fastattn").joinpath("py.typed").is_file()


def run_python(script: str) -> str:
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_needs_nothing_but_torch() -> None:
    """Import, forward, backward and dropout with every optional package out of reach."""
    out = run_python("""
        import sys
        for name in "numpy scipy matplotlib tqdm triton transformers pytest hypothesis einops".split():
            sys.modules[name] = None
        import warnings
        warnings.simplefilter("ignore")
        import torch, fastattn
        q = torch.randn(1, 2, 3, 4, requires_grad=True)
        fastattn.attention(q, q, q, causal=True, dropout_p=0.1).sum().backward()
        print(tuple(q.grad.shape), fastattn.explain(q, q, q).backend)
    """)
    assert out.startswith("(1, 2, 3, 4)")


def test_import_changes_nothing_of_torchs() -> None:
    """No default dtype, thread count, random state or warning filter is touched, and no CUDA context is made."""
    out = run_python("""
        import warnings, torch
        def state():
            return (torch.get_default_dtype(), torch.get_num_threads(), torch.get_rng_state().tolist(),
                    torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled(),
                    torch.cuda.is_initialized(), list(warnings.filters))
        before = state()
        import fastattn
        print(state() == before)
    """)
    assert out.strip() == "True"
