# make demo   set up and compress a real model, before and after measured (about ten minutes on two cores, most of it once)
# make test   set up and run every check: ruff, mypy, the tests, the short demo
# A virtual environment is made in .venv with the versions of constraints.txt.  Choose another interpreter with PYTHON=...
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
WORKERS ?= 2
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# Keeps the working folder off sys.path: the folder kernels/ would shadow the PyPI package of that name.
export PYTHONSAFEPATH = 1
export TOKENIZERS_PARALLELISM = false
# Threads that wait do not spin: beside another busy program, spinning makes this machine's work many times slower.
export OMP_WAIT_POLICY = PASSIVE

.PHONY: setup assets test lint kernels pytest slow triton-old demo demo-short dist clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "secateur needs Python 3.11 or newer; set PYTHON=/path/to/python3.11"; exit 2; }
	@$(PYTHON) -m venv $(VENV) || { echo "no venv module: on Debian, apt-get install python3.11-venv"; exit 2; }
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,demo]'
	@touch $(READY)

assets: $(READY)
	$(BIN)/python -m secateur.tools.demo --fetch-only

# The type check and the compiler of the CPU kernels take a core each.
test: $(READY)
	$(MAKE) --jobs=2 --output-sync=target lint kernels
	$(MAKE) pytest demo-short

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Compiled once and kept in the user's cache; the reference serves where there is no compiler or no AVX-512.
kernels: $(READY)
	$(BIN)/python -c "from secateur.kernels.sparse24 import cpu; print('kernels:', cpu.backend().name)"

pytest: $(READY) assets
	OMP_NUM_THREADS=1 SECATEUR_STRICT_SKIPS=1 $(BIN)/pytest -q -n $(WORKERS) --dist worksteal -m "not slow and not gpu"

# An older Triton beside the installed one: tests/kernels/gpu compiles the GPU kernels by both where it is there.
triton-old: .cache/triton-old/triton

.cache/triton-old/triton: | $(READY)
	$(BIN)/python -m pip install --quiet --no-deps --target .cache/triton-old triton==3.6.0

slow: $(READY) assets triton-old
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n $(WORKERS) -m "slow and not gpu"

demo: $(READY)
	$(BIN)/secateur demo --overwrite

demo-short: $(READY)
	$(BIN)/secateur demo --short --overwrite

dist: $(READY)
	$(BIN)/python -m build

clean:
	rm -rf $(VENV) .cache demo-out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
