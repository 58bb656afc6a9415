# make demo [BASE=owner/name]   the whole way on a real base, by the commands you would type
# make test | test-slow         the tests: fast tier, and the slow ones
# make lint                     style, types, import rules, generated pages
# make docs                     write the generated pages (docs/cli.md, docs/recipe.md, docs/scaling.md)
#
# Everything runs in .venv, which is made on first use and again when pyproject.toml or constraints.txt change.
#   PYTHON=python3.12           another interpreter to make .venv with (3.11 or newer)
#   PIP_ARGS="..."              more for pip install, such as --extra-index-url https://download.pytorch.org/whl/cpu

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
SOURCES := src tests benchmarks examples docs
# Tests start hundreds of processes; without bytecode each would compile the whole package anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow lint docs constraints

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "error: adapterhub needs Python 3.11 or newer; $(PYTHON) is `$(PYTHON) --version 2>&1`" >&2; \
		echo "fix: name a newer one, like make PYTHON=python3.12" >&2; \
		exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt $(PIP_ARGS) -e '.[serve,demo,dev]'
	@touch $(INSTALLED)

demo: $(INSTALLED)
	$(BIN)/python examples/orders/demo.py $(if $(BASE),--base '$(BASE)')

test: $(INSTALLED)
	$(BIN)/python -m pytest -n auto --dist worksteal

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m 'slow and not gpu' -n auto --dist worksteal

lint: $(INSTALLED)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy -p adapterhub
	$(BIN)/lint-imports --no-cache
	$(BIN)/python docs/generate.py --check
	$(BIN)/python docs/scaling.py --check

docs: $(INSTALLED)
	$(BIN)/python docs/generate.py
	$(BIN)/python docs/scaling.py

# After a change of the dependencies, in a fresh .venv: rm -r .venv && make install && make constraints
constraints: $(INSTALLED)
	sed -n '/^#/p' constraints.txt > constraints.new
	$(BIN)/python -m pip freeze --all --exclude pip --exclude-editable | sed -n 's/^\([A-Za-z0-9._-]*==[^+ ]*\).*/\1/p' >> constraints.new
	mv constraints.new constraints.txt
	touch $(INSTALLED)
