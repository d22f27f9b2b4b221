# Each command does its own set-up: a virtual environment in .venv, by uv when present, else venv + pip.
.DEFAULT_GOAL := help
.PHONY: help demo demo-short test test-slow lint format types bench clean

VENV ?= .venv
BIN := $(VENV)/bin
PYTHON ?= python3
# pytest-benchmark refuses to work beside pytest-xdist, and tests have no use for it.
JOBS ?= 2
# Stealing, so that no process waits behind another's minute-long compilations when it has run out of tests.
PYTEST = $(BIN)/pytest -n $(JOBS) --dist worksteal -p no:benchmark
UV := $(shell command -v uv 2>/dev/null)

# Busy OpenMP threads that spin-wait cost up to 10x on a shared machine.
export OMP_WAIT_POLICY ?= PASSIVE

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(VENV)/.created:
	$(if $(UV),$(UV) venv $(VENV),$(PYTHON) -m venv $(VENV))
	@touch $@

$(VENV)/.installed-%: pyproject.toml setup.py constraints.txt | $(VENV)/.created
	$(if $(UV),VIRTUAL_ENV=$(VENV) $(UV) pip install,$(BIN)/python -m pip install --progress-bar on) -c constraints.txt -e ".[$*]"
	@touch $@

demo: $(VENV)/.installed-demo  ## tokenizer, training, a sample and the estimate, on real text (under 5 minutes)
	$(BIN)/rooflight demo

demo-short: $(VENV)/.installed-demo  ## the same with 30 seconds of training
	$(BIN)/rooflight demo --seconds 30 --fresh --out runs/demo-short

test: $(VENV)/.installed-test  ## the whole test suite but the slow tail
	$(PYTEST) -m "not slow"

test-slow: $(VENV)/.installed-test  ## the slow tail
	$(PYTEST) -m slow

lint: $(VENV)/.installed-dev  ## ruff, lint and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed-dev  ## rewrite the sources in ruff's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

PARTS := $(addprefix src/rooflight/,__init__.py __main__.py py.typed) kernels model tokenizer training integrations bench
types: $(VENV)/.installed-dev  ## mypy, over the package as a wheel has it
	@rm -rf .types && mkdir -p .types/rooflight
	@for part in $(PARTS); do ln -s ../../$$part .types/rooflight/; done
	cd .types && MYPYPATH=. ../$(BIN)/mypy --config-file ../pyproject.toml -p rooflight

bench: $(VENV)/.installed-test  ## benchmarks through pytest-benchmark
	$(BIN)/pytest --benchmark

clean:  ## remove the environment, caches and runs
	rm -rf $(VENV) .cache .types build *.egg-info runs
