# The same few commands for a newcomer and for CI. `make` alone lists them.
#
# Two stamps in one environment: `make demo` installs no torch, `make test` adds it later. A stamp is stale when
# pyproject.toml or constraints.txt changed after it, or when another Makefile wrote it.

VENV    ?= .venv
NEWEST  ?= .venv-newest
# One test worker per logical core, at most eight. (`-n auto` counts physical cores: on many VMs that is half of them.)
WORKERS ?= logical
ARGS    ?=
# What `make bench` runs on, which names its file of results: DEVICE=gpu where JAX has one.
DEVICE  ?= cpu

# A command that exists may still not run (a shim of a version manager that has nothing behind it), so each is tried;
# venv and ensurepip are tried too, because some distributions package them apart.
RUNS_AT_LEAST = -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < tuple(map(int, "$(1)".split("."))))' \
	>/dev/null 2>&1
PYENV_VERSIONS = $$(pyenv root 2>/dev/null || echo "$$HOME/.pyenv")/versions

PYTHON ?= $(shell for python in python3.11 python3 python3.12 python3.13 $(PYENV_VERSIONS)/3.11*/bin/python3.11; do \
	"$$python" $(call RUNS_AT_LEAST,3.11) && { echo "$$python"; break; }; done)

PIP_INSTALL = -m pip install --quiet --disable-pip-version-check
PYTEST      = -m pytest -n $(WORKERS) --maxprocesses 8 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help demo demo-holds examples test test-long mutants bench docs lint format types newest clean
.DELETE_ON_ERROR:
.NOTPARALLEL: # two installations into one environment would trip over each other

help: ## list these targets
	@echo "qjax: simulated quantization in JAX"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile
	@echo "Settings: PYTHON=… (3.11 or newer), VENV=$(VENV), WORKERS=$(WORKERS), DEVICE=$(DEVICE), ARGS=… (for pytest, the demo, benchmarks)"

demo: $(VENV)/.demo-installed ## run the demo; results land in runs/demo
	$(VENV)/bin/python -m experiments.demo --out runs/demo $(ARGS)

demo-holds: $(VENV)/.demo-installed ## check that the last demo showed what it should
	$(VENV)/bin/python -m experiments.demo.check runs/demo/results.json

test: $(VENV)/.test-installed ## run the tests and the examples in docstrings
	$(VENV)/bin/python $(PYTEST) -m "not long" $(ARGS)

test-long: $(VENV)/.test-installed ## run the tests that compile for long (the examples have a target of their own)
	$(VENV)/bin/python $(PYTEST) -m long --ignore=tests/examples $(ARGS)

examples: $(VENV)/.test-installed ## run the examples, print what they show and check it
	$(VENV)/bin/python $(PYTEST) -rP tests/examples $(ARGS)

mutants: $(VENV)/.test-installed ## flip one decision of the numerics at a time: some test must catch each
	$(VENV)/bin/python -m tests.mutants $(ARGS)

bench: $(VENV)/.bench-installed ## measure qjax beside its peers (25 minutes) and write docs/benchmarks.md
	$(VENV)/bin/python -m benchmarks --out benchmarks/results/$(DEVICE).json $(ARGS)
	$(VENV)/bin/python -m benchmarks render

docs: $(VENV)/.demo-installed ## write the generated pages anew (docs/conventions.md)
	$(VENV)/bin/python docs/generate_conventions.py

lint: $(VENV)/.dev-installed ## check style and format (ruff)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(VENV)/.dev-installed ## mend style and format where ruff can
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

types: $(VENV)/.dev-installed ## check types (pyright)
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

# The environment of constraints.txt is the oldest JAX that is promised; this one is the newest, without torch. It is
# installed anew each time, because "newest" changes without any file here changing.
newest: ## run the tests with the newest JAX, on Python 3.13 where there is one
	@found=; \
	for python in python3.13 $(PYENV_VERSIONS)/3.13*/bin/python3.13; do \
		"$$python" $(call RUNS_AT_LEAST,3.13) && found="$$python" && break; done; \
	if [ -z "$$found" ]; then echo "make newest: skipped, no Python 3.13 here"; exit 0; fi; \
	set -e; \
	$(NEWEST)/bin/python $(call RUNS_AT_LEAST,3.13) || "$$found" -m venv --clear $(NEWEST); \
	echo "installing the newest JAX that pyproject.toml lets in, and the tests' other needs, into $(NEWEST) …"; \
	$(NEWEST)/bin/python $(PIP_INSTALL) --upgrade --upgrade-strategy eager -e ".[test]"; \
	$(NEWEST)/bin/python -c 'import jax, sys; print("jax", jax.__version__, "on Python", sys.version.split()[0])'; \
	$(NEWEST)/bin/python $(PYTEST) -m "not long" $(ARGS)

clean: ## remove environments, caches and runs
	rm -rf $(VENV) $(NEWEST) runs build dist .pytest_cache .ruff_cache .hypothesis .cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# What each stamp installs. Types are checked against everything that qjax and the experiments import.
$(VENV)/.demo-installed: EXTRAS = demo
$(VENV)/.test-installed: EXTRAS = test,peers
$(VENV)/.dev-installed:  EXTRAS = dev,experiments
$(VENV)/.bench-installed: EXTRAS = bench

# constraints.txt was made for Python 3.11 and names releases that newer Pythons may not have: it is used on 3.11 alone.
$(VENV)/.%-installed: pyproject.toml constraints.txt $(VENV)/bin/python
	@echo "installing qjax[$(EXTRAS)] into $(VENV) (a few minutes the first time) …"
	@constraints=$$($(VENV)/bin/python -c 'import sys; print("-c constraints.txt" * (sys.version_info[:2] == (3, 11)))'); \
	$(VENV)/bin/python $(PIP_INSTALL) $$constraints -e ".[$(EXTRAS)]"
	@touch $@

# Made when it is missing or when the Python it points to has gone; an environment that is there is kept.
$(VENV)/bin/python:
	@python="$(PYTHON)"; \
	if ! "$${python:-none}" $(call RUNS_AT_LEAST,3.11); then \
		echo "qjax needs Python 3.11 or newer with venv and ensurepip." >&2; \
		echo "Tried without success: $${python:-python3.11, python3, python3.12, python3.13}" >&2; \
		echo "Install one (python3.11 gives the tested set of versions), or name it: make PYTHON=/path/to/python3.11" >&2; \
		exit 1; fi; \
	echo "making $(VENV) with $$("$$python" --version)"; \
	"$$python" -m venv --clear $(VENV)
