# Needs Python >= 3.10 and make; everything else goes into .venv.
# PYTHON=python3.12 picks an interpreter, PIP_FLAGS passes options to pip.

PYTHON ?= python3
PIP_FLAGS ?=
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS)

.PHONY: demo test test-quantised check docs clean

demo: .venv/installed-eval
	$(BIN)/motionmerge demo

# Processes share the tests out; threads inside them would only wait for each other.
test: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

# Apart from the others, as whatever imports diffusers then imports these packages too.
test-quantised: .venv/installed-dev
	$(INSTALL) -c constraints.txt -e '.[dev,quantised]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/switching/test_quantised.py

check: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A warning is an error here; the banner about the successor of MkDocs is none of ours.
docs: .venv/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf .venv

$(BIN)/python:
	$(PYTHON) -m venv .venv

# The stamps are older than what they depend on exactly when an installation is due.
.venv/installed-eval: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -c constraints.txt -e '.[eval]'
	touch $@

.venv/installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -c constraints.txt -e '.[dev]'
	touch $@ .venv/installed-eval

.venv/installed-docs: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -c constraints.txt -e '.[docs]'
	touch $@
