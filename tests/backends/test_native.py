"""The native module and the C++ code under it."""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import fastattn
from fastattn import _cpu  # no skip: a module that was not built, or cannot be loaded, is a failure
from native_build import INSTRUCTION_SETS

RUNNABLE = _cpu.instruction_sets()


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_vector_types(instruction_set: str, tmp_path: Path) -> None:
    """Every operation of the vector types, the conversions, exp2 and tanh; errors are stated by the program."""
    from ..native.build import run_simd_check

    if instruction_set not in RUNNABLE:
        pytest.skip(f"this processor has no {instruction_set}")
    printed = run_simd_check(instruction_set, tmp_path)
    assert printed.endswith("\n0 failures\n"), printed
    assert "exp2" in printed


def test_is_the_first_choice() -> None:
    q = torch.randn(1, 1, 2, 8)
    assert fastattn.explain(q, q, q).backend == "cpu"


def test_needs_no_torch_symbol() -> None:
    """So that one build works with every version of torch."""
    undefined = subprocess.run(
        ["nm", "-D", "--undefined-only", _cpu.__file__], capture_output=True, text=True, check=True
    )
    symbols = undefined.stdout
    assert "Py" in symbols
    for mark in ("at::", "c10", "torch", "_ZN2at", "_ZNK2at"):
        assert mark not in symbols, mark
    needed = subprocess.run(["ldd", _cpu.__file__], capture_output=True, text=True, check=True).stdout
    assert "torch" not in needed


@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump, which comes with GCC's linker")
def test_sums_stay_in_registers() -> None:
    """GCC keeps them in memory, and writes and reads all of them once more per tile, if a loop over them is left."""
    command = ["objdump", "--disassemble", "--demangle", "--no-show-raw-insn", _cpu.__file__]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    name = re.compile(r"fastattn::(avx\w+)::(gemm_tile|decode_scores_tile|decode_outputs_tile)<(.*?)>\(")
    spill = re.compile(r"\tvmov\w+ +%[yz]mm\d+,-?(?:0x[0-9a-f]+)?\(%r[sb]p\)")
    stores = {}
    for function in listing.split("\n\n"):
        if found := name.search(function.lstrip().split("\n", 1)[0]):
            stores[found.groups()] = len(spill.findall(function))
    if not re.search(r"<.*fastattn::avx2::.*>:", listing):
        pytest.skip("this module has no symbols, or no kernels with vectors")
    assert {who[1] for who in stores} == {"gemm_tile", "decode_scores_tile", "decode_outputs_tile"}
    assert {who: count for who, count in stores.items() if count > 3} == {}


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})


CALL = (
    "import torch, fastattn; q = torch.ones(1, 1, 4, 8); print(fastattn.attention(q, q, q, backend='cpu').sum().item())"
)


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_instruction_set_can_be_forced(instruction_set: str) -> None:
    found = run_python("import fastattn._cpu as m; print(m.instruction_set())", FASTATTN_CPU_ISA=instruction_set)
    if instruction_set in RUNNABLE:
        assert found.stdout.strip() == instruction_set
        assert run_python(CALL, FASTATTN_CPU_ISA=instruction_set).stdout.strip() == "32.0"
    else:
        assert "FASTATTN_CPU_ISA must name an instruction set of this processor" in found.stderr


def test_unknown_instruction_set_is_refused() -> None:
    found = run_python(CALL, FASTATTN_CPU_ISA="avx1024")
    assert found.returncode != 0
    assert "FASTATTN_CPU_ISA must name an instruction set of this processor" in found.stderr
    assert "avx1024" in found.stderr


FEATURES = {
    "plain": {},
    "causal": {"causal": True},
    "everything": {"causal": True, "softcap": 4.0, "dropout_p": 0.25, "seed": 3, "window": (90, 0)},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("seqlen_q", [130, 274], ids=["keys in splits", "rows left over"])
def test_same_bits_for_any_number_of_threads(seqlen_q: int, features: str, dtype: torch.dtype) -> None:
    options = FEATURES[features]
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3, 8, 2):
        torch.set_num_threads(threads)
        try:
            torch.manual_seed(0)
            q, k, v = (
                torch.randn(2, h, n, 40, dtype=dtype, requires_grad=True)
                for h, n in ((4, seqlen_q), (2, 700), (2, 700))
            )
            bias = torch.randn(4, seqlen_q, 700, dtype=dtype, requires_grad=True)
            out, lse = fastattn.attention(q, k, v, bias=bias, return_lse=True, backend="cpu", **options)
            grads = torch.autograd.grad((out, lse), (q, k, v, bias), (torch.randn_like(out), torch.randn_like(lse)))
            few, few_lse = fastattn.attention(q[:, :, :1], k, v, return_lse=True, backend="cpu")
        finally:
            torch.set_num_threads(before)
        results.append((out, lse, *grads, few, few_lse))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim_v", [5, 33, 64])
def test_many_rows_share_a_copy_of_the_values(head_dim_v: int, dtype: torch.dtype) -> None:
    """On one thread a job has so many rows that it copies values into tiles; on many it reads them in place."""
    torch.manual_seed(1)
    q, k, v = (torch.randn(1, h, n, d, dtype=dtype) for h, n, d in ((4, 600, 24), (1, 300, 24), (1, 300, head_dim_v)))
    before = torch.get_num_threads()
    results = []
    for threads in (1, 16):
        torch.set_num_threads(threads)
        try:
            results.append(fastattn.attention(q, k, v, causal=True, backend="cpu"))
        finally:
            torch.set_num_threads(before)
    assert torch.equal(*results)
    expected = fastattn.attention(q.double(), k.double(), v.double(), causal=True, backend="reference")
    error = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    assert (results[0].double() - expected).abs().max() < error


def _attend_in_child(queue: multiprocessing.Queue) -> None:  # type: ignore[type-arg]
    q = torch.ones(2, 8, 256, 64)
    queue.put(fastattn.attention(q, q, q, backend="cpu").sum().item())


def test_survives_a_fork() -> None:
    q = torch.ones(2, 8, 256, 64)
    expected = fastattn.attention(q, q, q, backend="cpu").sum().item()  # starts the threads of this process
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_attend_in_child, args=(queue,))
    child.start()
    try:
        assert queue.get(timeout=60) == expected
    finally:
        child.join(timeout=10)
        child.kill()


class Attended(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int) -> torch.Tensor:
        q = torch.full((1, 4, 128, 32), float(i))
        return fastattn.attention(q, q, q, backend="cpu")[0, 0, 0, 0]


def test_works_in_data_loader_workers() -> None:
    loader = torch.utils.data.DataLoader(Attended(), batch_size=3, num_workers=2)
    assert torch.cat(list(loader)).tolist() == pytest.approx(list(range(6)))


def test_many_threads_may_call_at_once() -> None:
    q, k, v = (torch.randn(1, 4, n, 48) for n in (100, 300, 300))
    expected = fastattn.attention(q, k, v, causal=True, backend="cpu")
    wrong = []

    def call() -> None:
        for _ in range(20):
            if not torch.equal(fastattn.attention(q, k, v, causal=True, backend="cpu"), expected):
                wrong.append(1)

    threads = [threading.Thread(target=call) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_interpreter_is_free_while_a_kernel_runs() -> None:
    q = torch.randn(1, 8, 2048, 64)
    ticks = 0
    done = threading.Event()

    def work() -> None:
        fastattn.attention(q, q, q, backend="cpu")
        done.set()

    thread = threading.Thread(target=work)
    thread.start()
    while not done.is_set():
        ticks += 1
    thread.join()
    assert ticks > 100


def test_indices_beyond_32_bits() -> None:
    """Strides that reach over 2^31 elements, in memory that is never touched in between."""
    stride = 2**31 + 64
    storage = torch.empty(3 * stride, dtype=torch.float16)  # reserved, not written
    q = storage.as_strided((1, 1, 3, 16), (0, 0, stride, 1))
    values = torch.randn(1, 1, 3, 16, dtype=torch.float16)
    q.copy_(values)
    torch.testing.assert_close(
        fastattn.attention(q, q, q, backend="cpu"), fastattn.attention(values, values, values, backend="cpu")
    )


def test_misaligned_memory() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        storage = torch.randn(3 * 4 * 33 * 24 + 1, dtype=dtype)
        q, k, v = storage[1:].view(3, 1, 4, 33, 24).unbind()
        expected = fastattn.attention(q.clone(), k.clone(), v.clone(), causal=True, backend="cpu")
        assert torch.equal(fastattn.attention(q, k, v, causal=True, backend="cpu"), expected)


def test_memory_that_cannot_be_had_is_an_exception() -> None:
    """The workspace of this call is larger than the process may grow; nothing crashes, and the next call works."""
    script = """
import resource, torch, fastattn
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 2**30, resource.RLIM_INFINITY))
q = torch.ones(1, 1, 1, 1).expand(1, 1, 1, 2**22)
try:
    fastattn.attention(q, q, torch.ones(1, 1, 1, 1), backend="cpu")
except MemoryError:
    print("refused")
x = torch.ones(1, 1, 2, 8)
print(fastattn.attention(x, x, x, backend="cpu").sum().item())
"""
    assert run_python(script).stdout.split() == ["refused", "16.0"]


def test_no_size_is_cut_to_32_bits() -> None:
    q = torch.ones(1, 1, 1, 1, dtype=torch.float16).expand(1, 1, 1, 2**45)
    with pytest.raises(ValueError, match=f"head_dim is {2**45}, and this backend takes at most"):
        fastattn.attention(q, q, torch.ones(1, 1, 1, 1, dtype=torch.float16), backend="cpu")


def test_default_device_does_not_matter() -> None:
    q, v = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 5)
    expected = fastattn.attention(q, q, v, backend="cpu")
    with torch.device("meta"):
        assert torch.equal(fastattn.attention(q, q, v, backend="cpu"), expected)


def test_tensors_without_memory() -> None:
    k = torch.randn(1, 2, 40, 16)
    zero = torch._efficientzerotensor((1, 2, 40, 16))
    for x in (k, zero):  # the first prepares calls of this kind
        out = fastattn.attention(x, k, k, backend="cpu")
    torch.testing.assert_close(out, k.mean(dim=2, keepdim=True).expand_as(out))
    out, _ = fastattn.attention(zero, k, k, return_lse=True, backend="cpu")
    torch.testing.assert_close(out, k.mean(dim=2, keepdim=True).expand_as(out))
    q = k.clone().requires_grad_()
    assert torch.autograd.grad(fastattn.attention(q, k, k, backend="cpu"), q, zero)[0].abs().max() == 0


def test_a_negated_view_of_a_cache_is_written_through() -> None:
    cache, new = torch._neg_view(torch.zeros(1, 2, 8, 16)), torch.randn(1, 2, 1, 16)
    lengths = torch.zeros(1, dtype=torch.int32)
    out = fastattn.attention_with_kv_cache(
        new, cache, cache.clone(), cache_lengths=lengths, k_new=new, v_new=new, backend="cpu"
    )
    assert torch.equal(cache[:, :, :1], new)
    torch.testing.assert_close(out, new)


def test_unseen_neighbour_of_an_odd_last_key_does_not_matter() -> None:
    """bfloat16 keys are read in pairs; of the last pair one may be NaN that no query sees."""
    q, k, v = (torch.randn(1, 2, n, 16, dtype=torch.bfloat16) for n in (37, 40, 40))
    k[:, :, 37:] = v[:, :, 37:] = torch.nan
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = fastattn.attention(*leaves, causal=True, causal_alignment="top-left", backend="cpu")
    assert all(grad[:, :, :37].isfinite().all() for grad in torch.autograd.grad(out.sum(), leaves))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_enormous_scores(dtype: torch.dtype) -> None:
    q, k, v = torch.randn(3, 1, 1, 64, 64).to(dtype).unbind()
    for scale in (1e8, 1e9, 1e20):
        out, lse = fastattn.attention(q, k, v, scale=scale, return_lse=True, backend="cpu")
        expected, expected_lse = fastattn.attention(q, k, v, scale=scale, return_lse=True, backend="reference")
        assert out.isfinite().all()
        torch.testing.assert_close(lse, expected_lse)
        torch.testing.assert_close(out, expected, rtol=0.02, atol=0.02)
