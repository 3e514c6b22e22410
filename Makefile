# Every target sets up its own virtual environment first, on a fresh machine too: Python 3.11 or later is all
# that it needs. PYTHON=... picks another interpreter, VENV=... another folder.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready-

.PHONY: help demo test test-all lint bench support composition pages docs wheel clean

help:
	@echo "make demo      see two real models get faster, with a report (under 4 minutes after set-up)"
	@echo "make test      the tests, without the slow sweep"
	@echo "make test-all  every test"
	@echo "make lint      ruff and pyright"
	@echo "make bench     the benchmarks"
	@echo "make support   write docs/support.md anew"
	@echo "make pages     write the other generated pages, tables and charts of docs/ anew"
	@echo "make docs      the documentation as a site, links checked: build/site/index.html"
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

# The site is made of text alone: of the packages only those of the extra `docs`.
$(STAMP)docs: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])' \
	  | xargs $(BIN)/python -m pip install --quiet --disable-pip-version-check
	@touch $@

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

# What is written from definitions (ops, passes, the graph view) and from kept results.
pages: $(STAMP)test
	@mkdir -p build
	$(BIN)/python -c 'import elision.kernels.docs as d; print(d.page(), end="")' > build/page && mv build/page docs/ops.md
	$(BIN)/python -c 'import elision.passes.docs as d; print(d.page(), end="")' > build/page && mv build/page docs/passes.md
	EXPECTTEST_ACCEPT=1 $(BIN)/python -m pytest -q tests/test_docs_ir.py
	$(BIN)/python benchmarks/run.py --pages

# A link or an anchor that leads nowhere, or a page that the navigation lacks, is an error (mkdocs.yml); --quiet would let
# it pass.
docs: $(STAMP)docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "build/site/index.html"

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
