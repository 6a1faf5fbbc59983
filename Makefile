# The developer's commands are CI's commands.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup demo test test-all lint format bench clean native

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt CMakeLists.txt $(wildcard src/llava_fa/csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# The compiled kernels beside the sources, for `PYTHONPATH=src` with another checkout's environment.
native:
	cmake -S . -B build && cmake --build build && cmake --install build --prefix src

demo: setup
	$(BIN)/llava-fa demo --out demo-out

test: setup
	$(BIN)/python -m pytest

test-all: setup lint
	$(BIN)/python -m pytest -m 'slow or not slow' --timeout 1800

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	$(BIN)/python benchmarks/layer_parts.py
	$(BIN)/python benchmarks/ablations.py
	$(BIN)/python benchmarks/accuracy.py --plot docs/accuracy.svg

clean:
	rm -rf $(VENV) demo-out build dist src/llava_fa/*.so
