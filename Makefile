# Two commands do everything on a fresh machine with python3 >= 3.11:
#   make demo    align a real language model and open the report it names
#   make test    lint, types, layers, doctests and the default test suite
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO_CONFIG ?= copg:demo
DEMO_WORKDIR ?= runs/demo
DEMO_ARGS ?=
# Tests mostly wait for single-threaded compilation: two at a time even on two cores. Groups stay in
# one process: what a group has compiled, such as an algorithm's update, its other tests use.
TEST_WORKERS ?= 2
TEST_OPTIONS := -q -n $(TEST_WORKERS) --dist loadgroup
# Fewer page faults for large arrays: 6 to 8 % off a training step on Linux, ignored elsewhere.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

# Set-up steps share one environment: never run them side by side.
.NOTPARALLEL:
.PHONY: demo test lint test-slow weights wheel clean help

help:
	@grep -E '^#   make' Makefile | cut -c4-

demo: $(VENV)/.installed-demo weights
	$(BIN)/python -m experiments.main --config=$(DEMO_CONFIG) --workdir=$(DEMO_WORKDIR) $(DEMO_ARGS)

#   make lint    ruff, import-linter, mypy
test: lint weights
	$(BIN)/python -m pytest -q --doctest-modules alignment rl_theory representation sharding experiments
	$(BIN)/python -m pytest $(TEST_OPTIONS) tests

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

#   make test-slow   the tests marked slow
test-slow: $(VENV)/.installed-test weights
	$(BIN)/python -m pytest $(TEST_OPTIONS) -m slow tests

# Without a network the tests that need the weights skip with the reason; the demo says what to do.
weights: $(VENV)/.installed-demo
	-$(BIN)/python -m experiments.data.pretrained

#   make wheel   build the distribution into dist/
wheel: $(VENV)/.installed-test
	rm -rf build dist
	$(BIN)/python -m build --wheel --outdir dist .

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache *.egg-info

# One environment; each use installs what it lacks once, and again only when setup.py or the
# constraints change.
$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "bootstrax needs Python >= 3.11: set PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-demo: setup.py constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -q -e ".[experiments,lm]" -c constraints.txt
	touch $@

$(VENV)/.installed-test: setup.py constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -q -e ".[experiments,lm,test]" -c constraints.txt
	touch $@ $(VENV)/.installed-demo
