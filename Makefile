# Everything runs in .venv, which any target creates; no environment needs to be active.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

# Threads that spin while they wait make small factorizations many times slower as soon as another process is busy.
export OMP_WAIT_POLICY ?= passive

.PHONY: demo test lint types test-slow test-frameworks docs plant-bugs bench clean

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

## The examples for Lightning, Hugging Face's Trainer and Accelerate, with what they need.
test-frameworks: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,frameworks]'
	$(BIN)/python -m pytest -q -m frameworks

## The site, into build/docs: runs the gallery, and takes warnings for errors.
docs: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,docs]'
	$(BIN)/python -m sphinx -W --keep-going --fresh-env docs build/docs

## Typical bugs, planted one at a time in a copy of the package: a test must find each.
plant-bugs: $(READY)
	$(BIN)/python tests/plant_bugs.py

## The article's experiment at full size (about 10 minutes), the cost of a step (10), natgrad against its rivals (half a
## day; what was stopped goes on where it was).
bench: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,benchmarks]'
	$(BIN)/natgrad autoencoder --optimizers adam,kfac-sgd,kfac --steps 26 --overwrite --out benchmarks/results/autoencoder
	$(BIN)/natgrad bench overhead --out benchmarks/results/cost
	$(BIN)/natgrad bench scaling --out benchmarks/results/cost
	$(BIN)/natgrad bench tune --out benchmarks/results/rivals
	$(BIN)/natgrad bench run --out benchmarks/results/rivals

clean:
	rm -rf .venv build dist docs/gallery docs/sg_execution_times.rst
