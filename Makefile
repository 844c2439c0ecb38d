# `make demo` and `make test` need nothing but Python >= 3.10, a C++17 compiler and make.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
NATIVE := $(wildcard csrc/*.h csrc/*.cpp csrc/cpu/*.h csrc/cpu/*.cpp csrc/cpu/simd/*.h)
CPP    := $(NATIVE) $(wildcard tests/native/*.cpp)

.PHONY: demo test bench lint format sanitize clean

demo: $(STAMP)
	$(BIN)/python -m examples.demo

test: $(STAMP)
	$(BIN)/python -m pytest -n 2

bench: $(STAMP)
	$(BIN)/python -m fastattn bench --plot benchmark.png --json benchmark.json

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

$(STAMP): requirements-dev.txt pyproject.toml setup.py native_build.py $(NATIVE)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -r requirements-dev.txt
	$(BIN)/python -m pip install -e .
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info fastattn/*.so .mypy_cache .ruff_cache .pytest_cache
