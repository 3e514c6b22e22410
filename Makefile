# Every target sets up its own virtual environment first, on a fresh machine too: Python 3.11 or later is all
# that it needs. PYTHON=... picks another interpreter, VENV=... another folder.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready-

.PHONY: help demo test test-all lint bench support clean

help:
	@echo "make demo      see two real models get faster, with a report (under 4 minutes after set-up)"
	@echo "make test      the tests, without the slow sweep"
	@echo "make test-all  every test"
	@echo "make lint      ruff and pyright"
	@echo "make bench     the benchmarks"
	@echo "make support   write docs/support.md anew"

# A stamp is older than pyproject.toml when the dependencies may have changed; then they are installed again.
$(STAMP)demo: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[demo]"
	@touch $@

$(STAMP)test: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[test]"
	@touch $@ $(STAMP)demo

demo: $(STAMP)demo
	$(BIN)/python examples/demo.py

# Two workers with one thread each: models in the tests are small, and two cores is what CI has.
test: $(STAMP)test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow and not gpu" tests

test-all: $(STAMP)test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests

lint: $(STAMP)test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(STAMP)demo
	$(BIN)/python benchmarks/run.py

# docs/support.md, from the runs that the breadth tests make.
support: $(STAMP)test
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.zoo.support

clean:
	rm -rf $(VENV) build dist out .pytest_cache .ruff_cache .hypothesis
