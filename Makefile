# `make demo` and `make test` also set up a fresh machine. They need Python 3.11 or newer, git and make.
PYTHON ?= python3
BIN := .venv/bin
RUNS ?= $(CURDIR)/runs
export RAY_USAGE_STATS_ENABLED := 0
export MLFLOW_DISABLE_TELEMETRY := true
# uv does not compile packages. If this variable were set, each of Ray's dozens of processes would compile torch anew.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test check drill lint docs smoke bench gpu-bundle clean

# uv installs all packages in seconds, pip in minutes.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: .venv/installed
	RAY_ADDRESS=local $(BIN)/python pipeline/main.py run mnist-demo --storage $(RUNS)

# One process runs the tests that start Ray, the other one the rest (tests/conftest.py).
PYTEST := $(BIN)/python -m pytest -n 2 --no-loadscope-reorder

test: .venv/installed lint
	$(PYTEST) -m "not drill"

# Run this before every commit: the tests that need neither Ray nor minutes.
check: .venv/installed lint
	$(PYTEST) -q -m "not cluster and not slow and not drill"

drill: .venv/installed
	$(BIN)/python -m pytest -m drill

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

# Build the docs site into build/site; a broken link is an error.
docs: .venv/installed
	$(BIN)/python docs/build_site.py

# Compute every table and figure of the paper on a few images, in a quarter of an hour. The tests run some of them.
smoke: .venv/installed
	for r in $$($(BIN)/python -c 'from pipeline.recipes.paper import PAPER; print(*PAPER)'); do \
	  RAY_ADDRESS=local $(BIN)/python pipeline/main.py run $$r-smoke --storage $(RUNS)/smoke || exit 1; done

bench: .venv/installed
	for b in benchmarks/bench_*.py; do $(BIN)/python $$b || exit 1; done

# Pack a bundle for a GPU machine without a network. Copy this directory there and run
# benchmarks/gpu.sh --bundle runs/gpu-bundle.
GPU_DATA ?=
gpu-bundle: .venv/installed
	infra/offline-bundle.sh --slim --have infra/gpu-image.txt $(if $(GPU_DATA),--data $(GPU_DATA)) $(RUNS)/gpu-bundle

clean:
	rm -rf .venv runs build .pytest_cache .mypy_cache .ruff_cache .hypothesis
