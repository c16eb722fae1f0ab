# Two commands do everything on a fresh machine: `make train` and `make test`. PYTHON names the interpreter to use.
PYTHON ?= python3
OUT ?= runs/$(shell date +%Y-%m-%d-%H%M%S)
ARGS ?=
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: train test lint bench docs

train: .venv/train.stamp
	$(BIN)/python -m vqae.train --max-minutes 6 --out $(OUT) $(ARGS)

# Two processes of one thread each; the tests of a file share what they have made.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder $(ARGS)

lint: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/dev.stamp
	$(BIN)/python benchmarks/train_bench.py $(ARGS)
	$(BIN)/python benchmarks/argmin_bench.py $(ARGS)

docs: .venv/dev.stamp
	$(BIN)/python -W error -m pdoc --docformat google --output-directory build/reference vq_kernels vqae.model

# A stamp stands for "installed": made again only when what is asked for has changed.
.venv/train.stamp: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) --editable '.[train]'
	touch $@

.venv/dev.stamp: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) --editable '.[dev]'
	touch $@ .venv/train.stamp

.venv/bin/python:
	$(PYTHON) -m venv .venv
