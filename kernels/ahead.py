"""Compiles a launch for any GPU with none present: `benchmarks.compile_report` and the simulator's tests need it."""

from __future__ import annotations

from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as triton_compile
from triton.tools.tensor_descriptor import TensorDescriptor

from .launch import Launch

_POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}


def target(vendor: str, capability: int) -> GPUTarget:
    """An NVIDIA GPU by compute capability, or an AMD one by its number."""
    return GPUTarget("cuda", capability, 32) if vendor == "cuda" else GPUTarget("hip", "gfx942", 64)


def compile_ahead(launch: Launch, device: GPUTarget) -> Any:
    """The compiled kernel, specialised to the launch's arguments as a call would be."""
    source = ASTSource(launch.kernel, *specialisation(launch))
    return triton_compile(source, target=device, options=options(launch))


def options(launch: Launch) -> dict[str, Any]:
    """What the compiler is told beside the arguments."""
    return {"num_warps": launch.num_warps, "num_stages": launch.num_stages, "enable_fp_fusion": True}


def specialisation(launch: Launch) -> tuple[dict[str, Any], dict[tuple[int, ...], Any], dict[tuple[int, ...], Any]]:
    """(types, constants, hints) of the arguments: launches that differ in them are compiled by themselves."""
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    hints: dict[tuple[int, ...], Any] = {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
        else:
            signature[parameter.name] = _type_of(value, (index,), not parameter.do_not_specialize, constants, hints)
    return signature, constants, hints


def leaves(launch: Launch) -> list[Any]:
    """What the compiled kernel is handed, in order: tensors and numbers that are not compiled in."""
    found: list[Any] = []
    for parameter in launch.kernel.params:
        if not parameter.is_constexpr:
            _collect(launch.arguments[parameter.name], not parameter.do_not_specialize, found)
    return found


def _type_of(value: Any, path: tuple[int, ...], specialise: bool, constants: dict, hints: dict) -> Any:
    """Triton's rules: None and, where specialised, 1 are constants; multiples of 16 are hinted."""
    if isinstance(value, tuple):
        types = [_type_of(x, (*path, i), specialise, constants, hints) for i, x in enumerate(value)]
        return type(value)(*types) if hasattr(value, "_fields") else tuple(types)
    if value is None or (specialise and type(value) is int and value == 1):
        constants[path] = value
        return "constexpr"
    if isinstance(value, torch.Tensor):
        if specialise and value.data_ptr() % 16 == 0:
            hints[path] = [["tt.divisibility", 16]]
        return _POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{_POINTERS[value.base.dtype][1:]}{list(value.block_shape)}>"
    if specialise and value % 16 == 0:
        hints[path] = [["tt.divisibility", 16]]
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _collect(value: Any, specialise: bool, found: list[Any]) -> None:
    if isinstance(value, tuple):
        for x in value:
            _collect(x, specialise, found)
    elif value is not None and not (specialise and type(value) is int and value == 1):
        found.append(value)
