# Every target that needs Python stands on `make setup`, which takes no time when nothing changed.
PYTHON ?= python3
export PYTHON
# How many tests at once; on two cores about half of the time goes into waiting for processes.
JOBS ?= 2
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help setup protos lint format test test-slow test-gpu chaos demo smoke bench clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## Make .venv with everything in it (PYTHON=python3.12 picks the interpreter)
	@scripts/setup.sh

protos: setup ## Generate the Python stubs from protos/
	PYTHON=$(BIN)/python scripts/generate_protos.sh

lint: setup ## Check style, types, protos and that the stubs are fresh
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	cd protos && ../$(BIN)/buf lint
	PYTHON=$(BIN)/python scripts/generate_protos.sh --check

format: setup ## Bring the code into shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: setup ## Run the tests, without those that need a real model
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n $(JOBS) --dist loadfile

test-slow: setup ## Run the tests that need a real model, or minutes
	$(BIN)/python -m pytest -m slow

test-gpu: setup ## Test the engine on this machine's GPU
	$(BIN)/python -m pytest tests/gpu

chaos: setup ## Kill processes at random while three tenants train (SEED= replays, KILLS= is how many)
	SEED=$(SEED) KILLS=$(KILLS) $(BIN)/python -m pytest -m slow -s tests/fault/test_chaos.py

demo: setup ## Train a real 135M-parameter model through the service, as two tenants
	$(BIN)/python scripts/demo.py

smoke: setup ## Run the baseline SFT smoke test on the mock backend
	$(BIN)/python scripts/baseline_sft_smoke.py

bench: setup ## Measure the service against a bare gRPC echo
	$(BIN)/python scripts/bench_service.py

clean: ## Remove caches and build outputs; keeps .venv
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -path ./.venv -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf
