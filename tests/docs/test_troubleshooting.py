"""docs/troubleshooting.md: its commands and snippets print what it shows, its sentences are those of the code."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fastattn
import native_build
from fastattn.backends.native import cpu, cuda
from fastattn.backends.triton import backend as triton
from fastattn.integrations.torch import explain, use
from fastattn.kernels import config
from fastattn.kernels.machine import Gpu, why_not_architecture
from fastattn.problem import Inputs

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if not name.startswith(("FASTATTN_", "TRITON_"))},
    "CUDA_VISIBLE_DEVICES": "",
    "HIP_VISIBLE_DEVICES": "",
}
"""A machine without a GPU, with no settings: the page's."""


def shown(kind: str) -> list[tuple[str, str]]:
    """The blocks of Python or of shell commands, each with the output shown below it, or ""."""
    return re.findall(rf"^```{kind}\n(.*?)```\n(?:\n```text\n(.*?)```)?", PAGE, flags=re.DOTALL | re.MULTILINE)


def pattern(output: str) -> str:
    """A regular expression: a line ... is any number of lines, and ... within a line any text."""
    lines = []
    for line in output.splitlines():
        parts = [re.escape(part) for part in line.rstrip().split("...")]
        lines.append(r"(?:.*\n)*" if line == "..." else ".*".join(parts) + r" *\n")
    return "".join(lines)


def says(sentence: str) -> bool:
    """Whether the page shows the sentence, with ... for some of it."""
    lines = re.sub(r"\n(?!\n|\||```)", " ", PAGE)
    quoted = [text for _, text in re.findall(r"(`+)(.+?)\1", lines) if " " in text]
    return any(re.fullmatch(".*".join(map(re.escape, text.split("..."))), sentence) for text in quoted)


def run(*command: str, **settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT | settings, capture_output=True, text=True, check=False)


def test_snippets_print_what_is_shown() -> None:
    blocks = shown("python")
    assert len(blocks) >= 6
    program = "print('=====')\n".join(source for source, _ in blocks)
    done = run(sys.executable, "-c", program)
    assert done.returncode == 0, done.stderr
    for (source, expected), printed in zip(blocks, done.stdout.split("=====\n"), strict=True):
        assert re.fullmatch(pattern(expected), printed), f"{source}\nprints\n{printed}"


@pytest.mark.parametrize(("command", "expected"), shown("sh"))
def test_commands_print_what_is_shown(command: str, expected: str) -> None:
    words = shlex.split(command)
    settings = dict(word.split("=", 1) for word in words[: words.index("python")])
    done = run(sys.executable, *words[words.index("python") + 1 :], **settings)
    assert done.returncode == 0, done.stderr
    assert expected
    assert re.fullmatch(pattern(expected), done.stdout), done.stdout


def test_a_wrong_output_fails() -> None:
    (_, expected), *_ = shown("python")
    assert re.fullmatch(pattern(expected), expected.replace("...\n", "  not 'other': it is not there.\n"))
    assert not re.fullmatch(pattern(expected), expected.replace("'reference'", "'other'"))
    assert not says("its dtype is torch.float64, and these kernels compute in float16.")


def calls() -> list[tuple[str, str]]:
    """The table of errors: the call, and what it says."""
    text = PAGE.split("## Errors")[1].split("\n## ")[0]
    return re.findall(r"^\| `(attention.*?)` \| `(.*?)` \|", text, flags=re.MULTILINE)


@pytest.mark.parametrize(("call", "message"), calls())
def test_errors(call: str, message: str) -> None:
    q, k, v = torch.randn(3, 2, 4, 10, 16).unbind()
    names: dict[str, Any] = {"torch": torch, "q": q, "k": k, "v": v, "lengths": torch.tensor([3, 3]).int()}
    names |= {name: getattr(fastattn, name) for name in ("attention", "attention_with_kv_cache")}
    with pytest.raises((TypeError, ValueError)) as refusal:
        eval(call, names)
    assert re.fullmatch(".*".join(map(re.escape, message.split("..."))), str(refusal.value))


def test_forward_mode() -> None:
    with pytest.raises(NotImplementedError) as refusal:
        torch.func.jvp(lambda q: fastattn.attention(q, q, q), (torch.ones(1, 1, 2, 4),), (torch.ones(1, 1, 2, 4),))
    assert says(str(refusal.value))


def described(dtype: torch.dtype = torch.float32, head_dim: int = 16, device: str = "cpu") -> Any:
    x = torch.empty(1, 1, 4, head_dim, dtype=dtype, device=device)
    return fastattn.explain(x, x, x).problem


def reasons(monkeypatch: pytest.MonkeyPatch) -> Iterator[str | None]:
    """The sentences of backends that no machine has all reasons for."""
    kernels = triton.TritonBackend(Gpu())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    yield kernels.why_unavailable()
    yield kernels.why_not(described())
    yield kernels.why_not(described(torch.float64))
    yield kernels.why_not(described(head_dim=640))
    gpu = config.Architecture("cuda", 80, 2**16, 80, (3, 6))
    wide = config.Shape(4, 512, 512, rows=64, keys=64, programs=1, loads_scores=False, masks=False, drops=False)
    yield config.why_not(wide, gpu)
    yield cpu.CpuBackend().why_not(described(device="meta"))
    for capability, dtype in ((70, torch.float16), (75, torch.bfloat16)):
        yield why_not_architecture(gpu._replace(capability=capability), dtype)
    for module, backend in ((cpu, cpu.CpuBackend()), (cuda, cuda.CudaBackend(cuda.Gpu()))):
        monkeypatch.setattr(module, f"_{backend.name}", None)
        monkeypatch.setattr(module, "_import_error", "No module named that", raising=False)
        yield backend.why_unavailable()
    monkeypatch.setattr(triton, "_import_launches", lambda: 1 / 0)
    yield triton._why_not_importable.__wrapped__()


def test_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    found = list(reasons(monkeypatch))
    assert len(found) == 11
    for reason in found:
        assert reason is not None
        assert says(reason), reason


def test_no_nvcc(monkeypatch: pytest.MonkeyPatch) -> None:
    """An installation that insists on CUDA kernels says what it misses; one that does not goes on."""
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(native_build.shutil, "which", lambda name: None)
    monkeypatch.setattr(native_build.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("FASTATTN_CUDA", "1")
    with pytest.raises(RuntimeError, match="there is no nvcc") as refusal:
        native_build.find_nvcc()
    assert says(str(refusal.value))
    monkeypatch.delenv("FASTATTN_CUDA")
    assert native_build.find_nvcc() is None


def test_note_of_a_copy() -> None:
    q, k = torch.randn(1, 2, 10, 16).half(), torch.randn(1, 2, 16, 10).half().mT
    problem = fastattn.explain(q, k, q).problem
    (note,) = cuda.CudaBackend(cuda.Gpu()).notes(problem, Inputs(q, k, q))
    assert says(note), note


def test_reasons_of_torchs_function() -> None:
    q = torch.randn(2, 4, 10, 16)
    nested = torch.nested.nested_tensor([torch.randn(3, 8), torch.randn(4, 8)], layout=torch.jagged)
    with use():
        found = [explain(x, x, x).reason for x in (nested, q.to("meta"))]
        with torch.autograd.forward_ad.dual_level():
            found.append(explain(q, q, q).reason)
        found.append(explain(q, q, q, torch.ones(10, 10).int()).reason)
    for reason in found:
        assert reason is not None
        assert says(reason), reason


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")
def test_what_compilers_and_forward_mode_get() -> None:
    q = torch.randn(1, 1, 4, 8)
    compiled = torch.compile(lambda q: q if fastattn.explain(q, q, q) else -q, fullgraph=True, backend="eager")
    with pytest.raises(torch._dynamo.exc.Unsupported):
        compiled(q)
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(lambda q: fastattn.attention(q, q, q), (q,), (q,))


def test_transformers() -> None:
    program = """
import torch
from transformers import BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM, MambaConfig, MambaModel
from transformers import __version__, masking_utils
from fastattn.integrations import huggingface

def attempt(function):
    try:
        function()
    except Exception as error:
        print(error)

sizes = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
llama = LlamaConfig(intermediate_size=8, **sizes)
attempt(lambda: LlamaForCausalLM._from_config(llama, attn_implementation="fastattn"))
huggingface.register()
model = LlamaForCausalLM._from_config(llama, attn_implementation="fastattn")
tokens = torch.ones(1, 4, dtype=torch.int64)
attempt(lambda: BloomForCausalLM._from_config(BloomConfig(**sizes), attn_implementation="fastattn"))
attempt(lambda: MambaModel._from_config(MambaConfig(), attn_implementation="fastattn"))
queries = {"cache_position": torch.arange(4)} if __version__.startswith("4") else {"q_length": 4}
mask = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["fastattn"](batch_size=1, kv_length=4, **queries)
attempt(lambda: mask.logical_not())
attempt(lambda: model(tokens, attention_mask=torch.ones(1, 1, 4, 4, dtype=torch.int64)))
model(tokens, attention_mask=torch.ones(1, 4, dtype=torch.int64))
"""
    done = run(sys.executable, "-c", program)
    assert done.returncode == 0, done.stderr
    table = PAGE.split("| message begins with |")[1].split("\n\n")[0]
    beginnings = re.findall(r"^\| (`+)(.*?)\1 \|", table, flags=re.MULTILINE)
    messages = done.stdout.splitlines()
    assert len(messages) == len(beginnings) == 5
    for (_, beginning), message in zip(beginnings, messages, strict=True):
        assert message.startswith(beginning), message


def test_variables_are_those_that_are_read() -> None:
    """By the Python and the C++ of the library and of its installation."""
    patterns = ("native_build.py", "setup.py", "fastattn/**/*.py", "kernels/**/*.py", "csrc/**/*.cpp")
    source = "\n".join(file.read_text() for pattern in patterns for file in ROOT.glob(pattern))
    read = set(re.findall(r"""(?:environ\.get|getenv)\("(\w+)\"""", source))
    table = PAGE.split("## Environment variables")[1]
    listed = set(re.findall(r"`((?:FASTATTN|TRITON)_\w+|CUDA_HOME|CXX)`", table))
    assert listed == read


def test_files_and_pages_named_exist() -> None:
    for name in ("troubleshooting.md", "migration.md"):
        text = (ROOT / "docs" / name).read_text()
        for file in re.findall(r"`(tests/[\w/.]*)`", text):
            assert (ROOT / file).exists(), file
        for page in re.findall(r"\]\(([\w.-]+)", text):
            assert (ROOT / "docs" / page).exists(), page
