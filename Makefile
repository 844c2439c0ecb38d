# `make demo` and `make test` need nothing but Python >= 3.10, a C++17 compiler and make.
# The oldest Triton that the kernels support is unpacked beside the environment, for its compiler alone.
PYTHON ?= python3
# The machine code that tests look at; other GPUs compile the PTX. Where there is no nvcc this says nothing.
export FASTATTN_CUDA_ARCHITECTURES ?= 75,80
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
OLDEST_TRITON := build/triton-3.6.0
# What the interpreter runs on the CPU, program by program: the meaning of the Triton kernels.
KERNEL_TESTS := $(addprefix tests/test_,forward.py backward.py varlen.py kv_cache.py nonfinite.py dropout.py strides.py \
                  large_scores.py)
NATIVE := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu')
CPP    := $(NATIVE) $(wildcard tests/native/*.cpp tests/native/emulated/*.h)

.PHONY: demo test bench bench-gpu lint format sanitize emulate clean

demo: $(STAMP)
	$(BIN)/python -m examples.demo

test: $(STAMP) $(OLDEST_TRITON)
	$(BIN)/python -m pytest -n 2 --dist worksteal
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 --dist worksteal --backend triton $(KERNEL_TESTS)
	$(BIN)/python -m benchmarks.inspect.compile_report --short --arch sm_80,sm_90
	PYTHONPATH=$(OLDEST_TRITON) $(BIN)/python -m benchmarks.inspect.compile_report --short --arch sm_80,sm_90

bench: $(STAMP)
	$(BIN)/python -m fastattn bench --plot benchmark.png --json benchmark.json

# For a machine with an NVIDIA GPU, in an environment of its own with torch built for CUDA.
bench-gpu:
	$(PYTHON) -m fastattn bench --device cuda --suite gpu --backend cuda,triton --json gpu.json --plot gpu.png \
	  --rivals sdpa,sdpa-flash,sdpa-cudnn,sdpa-efficient,flash-attn

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

sanitize: $(STAMP)
	$(BIN)/python -m tests.native.build sanitize

# Needs the headers of SIMDe: apt install libsimde-dev.
emulate: $(STAMP)
	$(BIN)/python -m tests.native.emulate

$(STAMP): requirements-dev.txt pyproject.toml setup.py native_build.py $(NATIVE)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -r requirements-dev.txt
	$(BIN)/python -m pip install -e .
	touch $@

$(OLDEST_TRITON): $(STAMP)
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $@ triton==3.6.0
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info fastattn/*.so .mypy_cache .ruff_cache .pytest_cache
