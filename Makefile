# The two commands of the README, `make demo` and `make test`, set up all they need on a fresh machine.
# Another interpreter: `make test PYTHON=python3.12`. Another figure folder: `make demo OUT=figures`.

PYTHON ?= python3
OUT    ?= demo
JOBS   ?= 2

BIN     := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# One thread per worker: the tests run in parallel already. With `worksteal` a worker takes whole files as long as it can,
# so that what the tests of a file share is mostly computed once.
PYTEST  := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MPLBACKEND=Agg $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help demo test lint types kernels docs docs-serve notebooks deep clean
.DELETE_ON_ERROR:

help:
	@echo "make demo        the trained network on scenes, a backbone on a photograph: figures in $(OUT)/"
	@echo "make check       lint, types, tests of the spec and of the kernels on small shapes: within 90 s on two cores"
	@echo "make test        lint, types, site, tests"
	@echo "make lint        ruff, and the words of docstrings, comments and pages"
	@echo "make types       mypy"
	@echo "make kernels     compile the CPU kernels"
	@echo "make docs        build the site into site/"
	@echo "make docs-serve  serve the site locally and rebuild it on every change"
	@echo "make notebooks   execute every notebook"
	@echo "make deep        all tests, the slow ones too, with many random examples"
	@echo "make clean       remove the environment and everything built"

# The environment grows in two steps: what `make demo` needs, then what `make test` needs (torch among it).
# `__init__.py` has the version, which pip stores.
.venv/demo.stamp: pyproject.toml constraints.txt dat_ref/__init__.py
	@echo "== installing what the demo needs into .venv"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "dat_ref needs Python 3.10 or newer, and $(PYTHON) is " + sys.version.split()[0] + ". Name another one: make PYTHON=python3.12")'
	@$(PYTHON) -m venv .venv
	@$(INSTALL) --editable '.[viz]'
	@touch $@

.venv/test.stamp: .venv/demo.stamp
	@echo "== installing what the tests and the site need into .venv"
	@$(INSTALL) --editable '.[test,docs,dev]'
	@touch $@

demo: .venv/demo.stamp
	@$(BIN)/dat-ref explain --out $(OUT)

# The site is built beside lint, types and the CPU kernels. pytest comes last, so that its closing line is the last one
# printed. It takes the site from `docs`, which has executed the notebooks, and neither builds nor executes them again.
test: .venv/test.stamp
	@$(MAKE) --no-print-directory -j$(JOBS) docs lint types kernels
	@echo "== pytest"
	@BUILT_SITE=site $(PYTEST) -m "not slow"

# The inner loop: the spec with its oracles and golden fixtures, the rows of the peers, the kernels on small shapes.
# Each name is tests/test_NAME.py, or a file of that name in a folder of tests/.
CHECK := attention backends backends_neighborhood bias block_backbone conventions coverage deprecated_names golden \
         gradients kernels_cpu kernels_cpu_parts layer layering offsets oracle params_official peers_golden \
         peers_registry sampling torch_functional windows
CHECK_FILES = $(foreach name,$(CHECK),$(wildcard tests/test_$(name).py tests/*/test_$(name).py))

.PHONY: check
check: .venv/test.stamp
	@test $(words $(CHECK)) -eq $(words $(CHECK_FILES)) || { echo "CHECK: expected one file for each name, got $(CHECK_FILES)"; exit 1; }
	@$(MAKE) --no-print-directory -j$(JOBS) lint types
	@echo "== pytest"
	@$(PYTEST) -m "not slow and not notebook" $(CHECK_FILES)

lint: .venv/test.stamp
	@echo "== ruff"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@echo "== language"
	@$(BIN)/python tests/lint/language.py

types: .venv/test.stamp
	@echo "== mypy"
	@$(BIN)/mypy

# Compiled once, so that the workers of pytest need not compile them at the same time.
kernels: .venv/test.stamp
	@echo "== CPU kernels"
	@OMP_NUM_THREADS=1 $(BIN)/dat-ref bench --warm --device cpu --backends cpu --dtypes float32 float64 > /dev/null

# Not --quiet: that hides warnings from --strict as well, and a broken link would pass.
docs: .venv/test.stamp
	@echo "== mkdocs"
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-serve: .venv/test.stamp
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

notebooks: .venv/test.stamp
	@$(PYTEST) -m notebook

deep: .venv/test.stamp
	@HYPOTHESIS_PROFILE=deep $(PYTEST)

clean:
	@rm -rf .venv demo site dist build .cache .hypothesis .mypy_cache .pytest_cache .ruff_cache
