"""Compiles a launch for any GPU with none present, for `benchmarks.inspect` and the simulator's tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.compiler import compile as triton_compile
from triton.runtime.jit import create_function_from_signature

from .launch import Launch

Specialisation = tuple[dict[str, Any], dict[tuple[int, ...], Any], dict[tuple[int, ...], Any]]
"""(types, constants, hints) of the arguments: launches that differ in them are compiled by themselves.

Types are by name; constants and hints by place, which within a tuple is a path.
"""


def target(vendor: str, capability: int) -> GPUTarget:
    """An NVIDIA GPU by compute capability, or an AMD one by its number."""
    return GPUTarget("cuda", capability, 32) if vendor == "cuda" else GPUTarget("hip", "gfx942", 64)


def compile_ahead(launch: Launch, device: GPUTarget) -> Any:
    """The compiled kernel, specialised to the launch's arguments as a call would be."""
    source = ASTSource(launch.kernel, *specialisation(launch, device))
    return triton_compile(source, target=device, options=options(launch))


def options(launch: Launch) -> dict[str, Any]:
    """What the compiler is told beside the arguments."""
    return {"num_warps": launch.num_warps, "num_stages": launch.num_stages, "enable_fp_fusion": True}


def specialisation(launch: Launch, device: GPUTarget) -> Specialisation:
    """What a call would specialise the kernel to, found by the code that calls run through."""
    backend = make_backend(device)
    bind = create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
    bound, found, _ = bind(**launch.arguments)
    _, types, constants, hints = launch.kernel._pack_args(backend, options(launch), bound, found, {})
    return types, constants, hints


def leaves(launch: Launch, device: GPUTarget) -> list[Any]:
    """What the compiled kernel is handed, in order: tensors and numbers that are not compiled in."""
    _, constants, _ = specialisation(launch, device)
    values = [launch.arguments[parameter.name] for parameter in launch.kernel.params]
    return [value for path, value in _flat(values, ()) if path not in constants]


def _flat(values: list[Any] | tuple[Any, ...], path: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], Any]]:
    for index, value in enumerate(values):
        if isinstance(value, tuple):
            yield from _flat(value, (*path, index))
        else:
            yield (*path, index), value
