.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help install quickstart test test-fast soak modes bench docs slurm slurm-down check format clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

.venv/.run: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable .
	touch $@

.venv/.dev: .venv/.run
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

install: .venv/.run  ## make .venv with distgan in it

quickstart: .venv/.run  ## train on handwritten digits, a few minutes on a CPU, after 2 minutes of installing
	$(BIN)/distgan train --config configs/quickstart.yaml

test: .venv/.dev  ## the tests, two at a time
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

test-fast: .venv/.dev  ## the tests of single parts, in less than two minutes
	$(BIN)/pytest -n 2 --dist loadfile -m 'not slow and not long' tests/unit

soak: .venv/.dev  ## kill -9 at random moments, thirty times (minutes)
	$(BIN)/pytest -m slow -k soak -s

modes: .venv/.run  ## which recipes cover 25 modes: 39 runs of 90 s and two of 15 minutes (about an hour); writes docs/modes.md
	$(BIN)/python benchmarks/modes.py

bench: .venv/.dev  ## speeds against the textbook's loop, on this machine alone (about 40 minutes)
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/processes.py
	$(BIN)/python benchmarks/loader.py
	$(BIN)/python benchmarks/costs.py
	$(BIN)/python benchmarks/start.py
	$(BIN)/python benchmarks/evaluation.py
	$(BIN)/python benchmarks/scaling.py --check

docs: .venv/.dev  ## the documents as a site, in docs/_build/index.html; warnings are errors
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet -c docs . docs/_build

slurm:  ## a Slurm of two nodes on this machine (Debian: slurmctld slurmd slurm-client munge)
	@slurm/local_cluster up

slurm-down:  ## end that Slurm's jobs and remove it
	@slurm/local_cluster down

check: .venv/.dev  ## formatting, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: .venv/.dev  ## put the code into its format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove .venv
	rm -rf .venv
