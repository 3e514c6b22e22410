# Every target sets up its own virtual environment first, on a fresh machine too: Python 3.11 or later is all
# that it needs. PYTHON=... picks another interpreter, VENV=... another folder.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready-

.PHONY: help demo test test-all lint bench support composition wheel clean

help:
	@echo "make demo      see two real models get faster, with a report (under 4 minutes after set-up)"
	@echo "make test      the tests, without the slow sweep"
	@echo "make test-all  every test"
	@echo "make lint      ruff and pyright"
	@echo "make bench     the benchmarks"
	@echo "make support   write docs/support.md anew"
	@echo "make composition  write docs/composition.md anew"
	@echo "make wheel     dist/*.whl with the C++ kernels in it"

# A stamp is older than these when the dependencies or the C++ kernels may have changed; then all is installed again.
BUILT := pyproject.toml setup.py $(wildcard kernels/cpu/csrc/*)

$(STAMP)demo: $(BUILT)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[demo]"
	@touch $@

$(STAMP)test: $(BUILT)
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

# docs/composition.md, from every ordered pair of passes.
composition: $(STAMP)test
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.zoo.composition

# auditwheel, with patchelf on the PATH, names the oldest Linux that the library runs on; where it finds none, the plain
# wheel stays.
wheel: $(STAMP)demo
	$(BIN)/python -m pip install --quiet --disable-pip-version-check build auditwheel patchelf
	ELISION_BUILD=require $(BIN)/python -m build --wheel --outdir dist/plain
	PATH="$(BIN):$$PATH" $(BIN)/python -m auditwheel repair --wheel-dir dist dist/plain/elision-*.whl || cp dist/plain/elision-*.whl dist/

clean:
	rm -f kernels/cpu/libelision.so
	rm -rf $(VENV) build dist out .pytest_cache .ruff_cache .hypothesis
