# Needs Python >= 3.10 and make; everything else goes into .venv.
# PYTHON=python3.12 picks an interpreter, PIP_FLAGS passes options to pip.

PYTHON ?= python3
PIP_FLAGS ?=
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS)

.PHONY: demo test test-quantised test-oldest check docs dist clean

demo: .venv/installed-eval
	$(BIN)/motionmerge demo

# Processes share the tests out; threads inside them would only wait for each other. Some tests wait
# for processes of their own, so that two cores have work for three.
test: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist worksteal

# Apart from the others, as whatever imports diffusers then imports these packages too. The package
# itself is installed already, so that pip adds these alone.
test-quantised: .venv/installed-dev
	$(INSTALL) -c constraints.txt 'motionmerge[quantised]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/switching/test_quantised.py \
		tests/training/test_quantised.py

# The core with the oldest versions that are supported, in an environment of its own.
test-oldest: .venv-oldest/installed
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest tests/io tests/merging tests/exports \
		tests/switching tests/test_without_torch.py

check: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/mypy

# A warning is an error here; the banner about the successor of MkDocs is none of ours.
docs: .venv/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# What is uploaded at a release; kernels are compiled where it is installed. TAG=v1.2.3 checks that
# this is the package's version.
dist: .venv/installed-dev
	rm -rf dist
	$(BIN)/python -m build --sdist
	test -z "$(TAG)" || test -f "dist/motionmerge-$(TAG:v%=%).tar.gz"

clean:
	rm -rf .venv .venv-oldest dist

# The newest pip, as one that came with Python takes twice as long for so many packages.
$(BIN)/python:
	$(PYTHON) -m venv --upgrade-deps .venv

# The stamps are older than what they depend on exactly when an installation is due.
.venv/installed-eval: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -c constraints.txt -e '.[videos,eval]'
	touch $@

.venv/installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -c constraints.txt -e '.[dev]'
	touch $@ .venv/installed-eval

# For .ci/run: one resolution and one build instead of two.
.venv/installed-ci: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -c constraints.txt -e '.[dev,docs]'
	touch $@ .venv/installed-dev .venv/installed-eval .venv/installed-docs

.venv/installed-docs: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -c constraints.txt -e '.[docs]'
	touch $@

.venv-oldest/installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) \
		-c constraints-oldest.txt -e '.[videos]' matplotlib pytest hypothesis packaging tomli
	touch $@
