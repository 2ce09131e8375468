# The recipes that README and CI share. `make setup` once; the others call it when something changed.
SHELL := /bin/bash
VENV ?= .venv
PYTHON ?= python3
EXTRAS ?= ray,s3,kubernetes,test,recipes,lint

BIN := $(VENV)/bin
# Twice quiet: only errors are shown.
PIP := $(BIN)/python -m pip --quiet --quiet --disable-pip-version-check --no-input
NATIVE := $(shell find native -type f -not -path 'native/tests/*' 2>/dev/null)
PACKAGES := $(VENV)/.packages-installed
BUILT := $(VENV)/.native-built
MODULES := $(VENV)/.modules

.PHONY: setup demo test lint format chaos fault-matrix bench bench-gpu bench-rival rivals recipes native-test clean FORCE
.DELETE_ON_ERROR:

setup: $(BUILT)

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "setup: $(PYTHON) is missing; install Python 3.11 or later, or name one: make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "setup: $(PYTHON) is $$($(PYTHON) -V 2>&1), expected 3.11 or later; name another: make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "setup: $(PYTHON) cannot make virtual environments; install its venv package" >&2; exit 1; }
	@$(PYTHON) -c 'import os, sysconfig; h = sysconfig.get_path("include") + "/Python.h"; raise SystemExit(0 if os.path.exists(h) else 1)' || \
	  { echo "setup: the headers of $(PYTHON) are missing (Python.h); install its development package" >&2; exit 1; }
	@for cxx in $${CXX:-c++ g++ clang++}; do command -v $$cxx >/dev/null && exit 0; done; \
	  echo "setup: no C++ compiler found ($${CXX:-c++, g++ or clang++}); install g++ 11 or clang 16 or later, or name one: CXX=..." >&2; exit 1
	$(PYTHON) -m venv $(VENV)

# torch goes first and alone: every later install then finds it satisfied and cannot choose another.
$(PACKAGES): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install --constraint constraints.txt torch
	$(PIP) install --constraint constraints.txt $$($(BIN)/python -c 'import sys, tomllib; p = tomllib.load(open("pyproject.toml", "rb")); \
	  extras = p["project"]["optional-dependencies"]; \
	  print(*p["build-system"]["requires"], *p["project"]["dependencies"], *(d for e in sys.argv[1].split(",") for d in extras[e]), "cmake", "ninja")' $(EXTRAS))
	@touch $@

# An editable install knows modules by name: one that is new, or became a package, needs another.
$(MODULES): FORCE | $(PACKAGES)
	@find ktrain -name '*.py' | sort | cmp -s - $@ || find ktrain -name '*.py' | sort > $@

$(BUILT): $(PACKAGES) $(NATIVE) $(MODULES)
	$(PIP) install --constraint constraints.txt --no-build-isolation --no-deps --editable .
	@touch $@

demo: $(BUILT)
	$(BIN)/python examples/demo.py

test: $(BUILT)
	$(BIN)/python -m pytest -m "not chaos and not bench"

lint: $(BUILT)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(BUILT)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

chaos: $(BUILT)
	$(BIN)/python -m pytest -m chaos

# The page of the fault matrix, from the tests.
fault-matrix: $(BUILT)
	$(BIN)/python -m tests.faults

bench: $(BUILT)
	$(BIN)/python -m benchmarks

bench-gpu: $(BUILT)
	$(BIN)/python -m benchmarks --gpu $(if $(RECORD),--record $(RECORD))

# Other libraries beside ktrain, each in an environment of its own laid over this one: it finds torch and ktrain here, so
# that all of them run with the same build of torch, and its own packages come first.
RIVALS := $(patsubst benchmarks/needs/%.txt,%,$(wildcard benchmarks/needs/*.txt))
RIVAL ?= dlrover

.venv-%/.installed: benchmarks/needs/%.txt | $(BUILT)
	rm -rf .venv-$*
	$(BIN)/python -m venv .venv-$*
	echo "import site; site.addsitedir('$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')')" \
	  > "$$(.venv-$*/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/beneath.pth"
	grep -E '^torch==' constraints.txt > .venv-$*/torch-only.txt
	.venv-$*/bin/python -m pip --quiet --quiet --disable-pip-version-check --no-input install \
	  --constraint .venv-$*/torch-only.txt --requirement $<
	@touch $@

rivals: $(RIVALS:%=.venv-%/.installed)

bench-rival: .venv-$(RIVAL)/.installed
	.venv-$(RIVAL)/bin/python -m benchmarks --rival $(RIVAL)

# All recipes of docs/guides/ecosystem.md. torchtitan imports triton also where there is no GPU, and that takes 1 GB, so
# it gets an environment of its own and is not part of `make test`.
RECIPES_VENV := .venv-recipes

recipes:
	$(MAKE) setup VENV=$(RECIPES_VENV) EXTRAS=s3,test,recipes
	$(RECIPES_VENV)/bin/python -m pip --quiet --quiet --disable-pip-version-check --no-input install --constraint constraints.txt torchtitan triton
	$(RECIPES_VENV)/bin/python -m pytest tests/integration/test_recipes.py

# The C++ tests, under the sanitizers for addresses and undefined behaviour, and again under the one for threads.
native-test: $(BUILT)
	$(BIN)/python -m pytest tests/unit/native/test_sanitizers.py

clean:
	rm -rf $(VENV) .venv-* build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
