"""The first lines of a report: machine, versions, ceilings, and how to read the table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ..models.cases import ModelCase
from ..peaks import Peaks

RATIO_LINE = "ratio     the rival's time over the first fastattn's, median over rounds; above 1 fastattn wins"


def header_lines(header: Mapping[str, Any], peaks: Peaks) -> Iterator[str]:
    """Machine, versions, ceilings, and how to read the table."""
    yield from machine_lines(header)
    yield from _ceiling_lines(peaks)
    yield RATIO_LINE
    ceiling = "multiply-adds alone" if peaks.multiply_adds else "torch.mm (the faster of the dtype and float32)"
    yield f"peak      share of {ceiling} and of torch.sum's bandwidth"


def machine_lines(header: Mapping[str, Any]) -> Iterator[str]:
    """Machine, versions, and how time and memory are measured."""
    commit = "not in a git checkout" if header["commit"] is None else header["commit"][:12]
    dirty = " with uncommitted changes" if header["dirty"] else ""
    cpu = f"{header['cpu']}, {header['cores']} cores, {header['cpu_isa']}, last-level cache "
    yield f"machine   {cpu}{_size(header['last_level_cache_bytes'])}, memory {_size(header['memory_bytes'])}"
    if header["gpu"] is not None:
        yield f"gpu       {header['gpu']}, memory {_size(header['gpu_memory_bytes'])}, CUDA {header['cuda']}"
    yield f"system    {header['os']}"
    package = f"fastattn {header['fastattn']} ({commit}{dirty}), CPU kernels for {header['kernels']}"
    yield f"versions  Python {header['python']}, torch {header['torch']}, {package}"
    load = "unknown" if header["load_average"] is None else f"{header['load_average']:.2f}"
    yield f"run       {header['date']}, {header['device']}, {header['threads']} threads, load average {load}"
    yield f"clock     {header['clock']}, rounds A B A B; a round is dropped if others had the cores"
    yield f"memory    {header['memory_method'] or 'not measured: this system has no way to reset the peak'}"


def _ceiling_lines(peaks: Peaks) -> Iterator[str]:
    rates = ", ".join(f"{dtype} {rate / 1e9:.0f}" for dtype, rate in peaks.flops.items())
    yield f"ceilings  torch.mm at most {peaks.matmul_size} square, GFLOP/s: {rates}"
    if peaks.multiply_adds:
        rates = ", ".join(f"{dtype} {rate / 1e9:.0f}" for dtype, rate in peaks.multiply_adds.items())
        yield f"          multiply-adds alone, GFLOP/s: {rates}"
    bandwidths = f"torch.sum {peaks.read_bandwidth / 1e9:.1f}, Tensor.copy_ {peaks.copy_bandwidth / 1e9:.1f}"
    yield f"          over {_size(peaks.buffer_bytes)}, GB/s: {bandwidths}"
    if not peaks.quiet:
        yield "          too low, since other processes had the cores meanwhile: shares of them say little"


def model_header_lines(header: Mapping[str, Any], cases: Iterable[ModelCase]) -> Iterator[str]:
    """Machine, versions, sizes of the models, and how to read the table."""
    yield from machine_lines(header)
    yield f"models    random weights, Transformers {header['transformers']}, attn_implementation as named"
    for shape in dict.fromkeys(case.shape for case in cases):
        heads = f"{shape.num_attention_heads}/{shape.num_key_value_heads} heads"
        yield f"          {shape.family}: {shape.num_hidden_layers} layers, hidden {shape.hidden_size}, {heads}"
    yield RATIO_LINE


def _size(size: int | None) -> str:
    if size is None:
        return "unknown"
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
