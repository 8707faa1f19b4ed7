# Everything runs in a virtual environment made here; PYTHON chooses the interpreter it is made from.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN_DIR ?= quickstart

.PHONY: help install test test-gpu soak lint format quickstart clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 16

# One stamp an installation: reinstalls when the dependencies change, and only then.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	@touch $@

install: $(VENV)/.installed  ## make the virtual environment and install Riverrun into it

test: install  ## all tests that run without a GPU (tests/gpu skips itself)
	$(BIN)/python -m pytest -q -n logical --maxprocesses 8 --dist worksteal

test-gpu:  ## the GPU tests, in the environment that is active
	python -m pytest -q -m gpu tests/gpu

soak: install  ## an hour: 100,000 mutated inputs a reader, and a run that is killed 60 times
	RIVERRUN_FUZZ=100000 $(BIN)/python -m pytest -q -n logical --maxprocesses 8 tests/fuzz
	$(BIN)/python -m tests.soak.kills --kills 60

lint: install  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install  ## let ruff rewrite the sources
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

quickstart: install  ## tokenise real text, train a small hybrid, evaluate, generate, export, load back
	$(BIN)/riverrun quickstart --run-dir $(RUN_DIR)

clean:  ## remove the virtual environment and build products
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
