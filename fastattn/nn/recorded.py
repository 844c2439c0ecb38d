"""Whether something reads a module instead of running it: torch.jit, torch.onnx, torch.fx."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.jit import is_scripting, is_tracing  # type: ignore[attr-defined]  # public, but not in __all__

__all__ = ["fx_leaf", "is_recorded", "is_scripting", "is_tracing"]


def is_recorded() -> bool:
    """Whether operations are being recorded that must run without fastattn: torch.jit.trace or torch.onnx.export."""
    # The last question imports the exporter, which only those who export should pay for.
    return is_tracing() or (torch.compiler.is_compiling() and torch.onnx.is_in_onnx_export())


def fx_leaf(module: nn.Module, *arguments: Any) -> Any:
    """The module as one node of the graph that torch.fx traces, as torch's own modules are; None outside of torch.fx.

    Raises TypeError if the module itself is what torch.fx was asked to trace.
    """
    for argument in arguments:
        if isinstance(argument, torch.fx.Proxy):
            tracer = argument.tracer
            if not isinstance(tracer, torch.fx.Tracer):
                raise TypeError(
                    f"a {type(module).__name__} can be traced by a torch.fx.Tracer, which knows the paths of modules, "
                    f"got a {type(tracer).__name__}"
                )
            path = tracer.path_of_module(module)
            if not path:
                raise TypeError(
                    f"torch.fx traces a model that contains a {type(module).__name__}, which becomes one node of its "
                    "graph, got the module itself: wrap it in another one"
                )
            return tracer.create_proxy("call_module", path, arguments, {})
    return None
