# Everything sets itself up: a virtual environment with pinned packages, and the two bundled models.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
WORKERS ?= 2

.PHONY: help demo test unit lint bench setup
help:
	@echo "make demo   set up, then ask invented questions through both models (results/demo/)"
	@echo "make test   set up, then lint and run every test"
	@echo "make lint   ruff and mypy"
	@echo "make bench  time to first token and peak memory, as ratios of one run"

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@echo "== setting up $(VENV) (once) =="
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "kvtalk needs Python 3.11 or newer: make PYTHON=python3.12 ..."; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(READY)

demo: $(READY)
	@echo "== demo: a model reads, another answers from its cache =="
	@$(BIN)/kvtalk demo

unit: $(READY)
	@echo "== unit tests =="
	@$(BIN)/python -m pytest -m "not models" -n $(WORKERS) --dist worksteal

lint: $(READY)
	@echo "== ruff and mypy =="
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

test: lint unit
	@echo "== tests on the two bundled models (fetched once) =="
	@$(BIN)/kvtalk models pull
	@$(BIN)/python -m pytest -m models

bench: $(READY)
	@$(BIN)/kvtalk models pull smollm2-135m
	@$(BIN)/python benchmarks/bench.py
