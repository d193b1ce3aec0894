# `make demo` and `make test` work on a fresh machine that has Python 3.11 and a package registry.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test test-all test-interop check style bench docs clean

$(READY): pyproject.toml constraints.txt plugins/dbcap-starter/pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "dbcap needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	# torch first and alone, so that its pin is met before anything else asks for some other build.
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,heif]' --editable plugins/dbcap-starter
	touch $@

demo: $(READY)  ## caption images with the model that comes along
	$(BIN)/python docs/demo.py

# A file of tests stays in one process, for its fixtures; each process has one thread, so that they do not wait for each other.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -q --numprocesses auto --dist loadfile

test: $(READY)  ## everything but the slow tests
	$(PYTEST) -m "not slow and not interop"

test-all: $(READY)  ## the slow tests too
	$(PYTEST) -m "not interop"

test-interop: $(READY)  ## run exported models in transformers.js and Optimum; needs Node and package registries
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -m "not slow" tests/interop

check: $(READY)  ## what must hold of the code: format, lint, types, import direction, generated docs
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python docs/generate.py --check

style: $(READY)  ## put the code into form
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

bench: $(READY)  ## measure speed and memory; writes bench-results/*.json
	$(BIN)/python tests/bench/run.py

docs: $(READY)  ## write docs/commands/*.md and docs/config.md from the code
	$(BIN)/python docs/generate.py

clean:
	rm -rf .venv .interop bench-results .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
