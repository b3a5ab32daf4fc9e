# Everything runs in .venv, which any target creates; no environment needs to be active.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

# Threads that spin while they wait make small factorizations many times slower as soon as another process is busy.
export OMP_WAIT_POLICY ?= passive

.PHONY: demo test lint types test-slow bench clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

## The article's experiment: Adam against K-FAC, interleaved. Ends with a table, and a plot in runs/demo.
demo: $(READY)
	$(BIN)/natgrad demo

## What CI runs: lint, types, tests.
test: lint types
	$(BIN)/python -m pytest -q

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(READY)
	$(BIN)/mypy

## Checks that take minutes, on the experiment at full size.
test-slow: $(READY)
	$(BIN)/python -m pytest -q -m slow

## The article's experiment at full size, all optimizers; writes benchmarks/results/autoencoder.
bench: $(READY)
	$(BIN)/natgrad autoencoder --optimizers sgd,adam,kfac-sgd,kfac-adam,kfac --steps 50 --out benchmarks/results/autoencoder

clean:
	rm -rf .venv build dist
