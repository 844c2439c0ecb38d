"""`use` where another library has wrapped torch's functions before fastattn was imported."""

from __future__ import annotations

import subprocess
import sys
from textwrap import dedent

import pytest

WRAPPED = {
    "Tensor.backward": "torch.Tensor.backward = wraps(torch.Tensor.backward)",
    "torch.autograd.backward": "torch.autograd.backward = wraps(torch.autograd.backward)",
    "torch.autograd.grad": "torch.autograd.grad = wraps(torch.autograd.grad)",
    "multi_head_attention_forward": "F.multi_head_attention_forward = wraps(F.multi_head_attention_forward)",
}


@pytest.mark.parametrize("honest", [True, False], ids=["functools.wraps", "hidden"])
@pytest.mark.parametrize("closure", [True, False], ids=["closure", "global"])
@pytest.mark.parametrize("name", WRAPPED)
def test_functions_that_others_wrapped_before(name: str, closure: bool, honest: bool) -> None:
    """They run once, and the switch is as it was."""
    program = f"""
        import functools
        import torch
        import torch.nn.functional as F

        def wraps(function):
            global inner
            inner = function
            if {closure}:
                def run(*args, **kwargs):
                    calls.append(None)
                    return function(*args, **kwargs)
            else:
                def run(*args, **kwargs):
                    calls.append(None)
                    return inner(*args, **kwargs)
            return functools.wraps(function)(run) if {honest} else run

        calls = []
        {WRAPPED[name]}
        from fastattn.integrations.torch import explain, use

        q = torch.randn(1, 2, 4, 8, requires_grad=True)
        module = torch.nn.MultiheadAttention(8, 2)
        for on in (False, True):
            with use(on):
                F.scaled_dot_product_attention(q, q, q).sum().backward()
                torch.autograd.backward(F.scaled_dot_product_attention(q, q, q).sum())
                torch.autograd.grad(F.scaled_dot_product_attention(q, q, q).sum(), q)
                module(q[0], q[0], q[0], need_weights=False)
            assert not explain(q, q, q).active
            print(on, len(calls))
    """
    done = subprocess.run([sys.executable, "-c", dedent(program)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    once, twice = (int(line.split()[1]) for line in done.stdout.splitlines())
    assert once > 0
    if honest:  # torch runs any other once more, under any function mode
        assert twice == 2 * once
