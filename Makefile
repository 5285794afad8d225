# Needs Python 3.11 to 3.13 and make. PYTHON chooses the interpreter: make test PYTHON=python3.12

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# The tensors of the tests and the demo are small: a second thread costs more than it gives.
export OMP_NUM_THREADS ?= 1

.PHONY: help demo test gpu quick lint format bench clean

help:
	@echo "make demo    the whole pipeline on the built-in sample shop, ends with a table of results"
	@echo "make test    lint, types and every test that needs neither network nor GPU"
	@echo "make gpu     the tests that need a GPU"
	@echo "make quick   the tests without the slow ones"
	@echo "make lint    ruff and mypy"
	@echo "make format  ruff format"
	@echo "make bench   kernel benchmarks (a GPU makes them worth reading)"
	@echo "make clean   remove what the targets above made"

# Made anew only when what is installed changes.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; ok = (3, 11) <= sys.version_info < (3, 14); sys.exit(None if ok else f"mmm4rec needs Python 3.11 to 3.13, this is {sys.version.split()[0]}: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(INSTALLED)
	$(BIN)/mmm4rec demo --workspace demo

test: lint
	$(BIN)/python -m pytest -m "not gpu and not network"

gpu: $(INSTALLED)
	$(BIN)/python -m pytest -m gpu

quick: $(INSTALLED)
	$(BIN)/python -m pytest -m "not gpu and not network and not slow"

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED)
	$(BIN)/python kernels/benchmarks/run.py --warm 4 --out build/kernels.jsonl

clean:
	rm -rf $(VENV) demo build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
