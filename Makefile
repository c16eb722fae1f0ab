# `make train`, `make test` and `make docs` work on a fresh clone: they create .venv first.
# PYTHON is the interpreter to create it with. ARGS is passed on to the command.
PYTHON ?= python3
OUT ?= runs/$(shell date +%Y-%m-%d-%H%M%S)
ARGS ?=
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: train test lint bench docs

train: .venv/train.stamp
	$(BIN)/python -m vqae.train --max-minutes 6 --out $(OUT) $(ARGS)

# Two processes of one thread each. The tests of a file run in one process and share its fixtures.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder $(ARGS)

lint: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/dev.stamp
	$(BIN)/python benchmarks/train.py $(ARGS)
	$(BIN)/python benchmarks/argmin_bench.py $(ARGS)

docs: .venv/dev.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --site-dir build/site

# A stamp file records an installation. It is remade when the requirements change.
.venv/train.stamp: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) --editable '.[train]'
	touch $@

.venv/dev.stamp: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) --editable '.[dev]'
	touch $@ .venv/train.stamp

.venv/bin/python:
	$(PYTHON) -m venv .venv
