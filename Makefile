# make demo        set up and watch it work, no GPU and no download of weights needed
# make test        set up, lint, type check, quick tests
# make test-slow   the slow tests as well
# make docs        the site of the docs, into site
# make dist        wheel and sdist, into dist

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
# constraints.txt needs Python 3.11 or later; override with `make PYTHON=... test`.
PYTHON ?= $(shell if python3.11 -c '' 2>/dev/null; then echo python3.11; else echo python3; fi)

.PHONY: demo test test-slow lint format docs dist clean
.DEFAULT_GOAL := test

demo: $(STAMP)
	$(BIN)/ddit demo

test: lint
	$(BIN)/python -m pytest -m "not slow" -n 2

test-slow: lint
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)
	$(BIN)/mkdocs build --strict

dist: $(STAMP)
	$(BIN)/python -m hatchling build

# An environment that is already there is completed, not replaced.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import sys; v = sys.version_info; \
	    sys.exit(0 if v >= (3, 11) else f"Python 3.11 or later is needed, $(VENV) has {v[0]}.{v[1]}: remove it and run make PYTHON=python3.11")'
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

# Leaves the environment (.venv) and results (out, runs) alone.
clean:
	rm -rf build dist site src/*.egg-info .pytest_cache .ruff_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
