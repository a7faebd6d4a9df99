# `make` lists the targets. None needs root or an activated environment; each can be run again at any time.
# A Python other than the first that fits: make PYTHON=/path/to/python3.12 …

.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory
BIN := .venv/bin
JARS := .spark_fs/jars
EXTRAS := spark,local,postgres,fast,notebook,demo,bench,dev

CANDIDATES := python3 python3.14 python3.13 python3.12 python3.11 python3.10
FIND_PYTHON = for name in $(CANDIDATES); do command -v $$name >/dev/null \
	&& $$name -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo $$name && break; done
# Looked for when first used, and once only.
PYTHON ?= $(eval PYTHON := $(shell $(FIND_PYTHON)))$(PYTHON)

.PHONY: help venv setup demo test test-faults check lint types test-fast bench bench-online bench-asof bench-datasets clean

help: ## List the targets (this text)
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: .venv/.installed ## Create .venv with the package and all its extras

setup: .venv/.installed ## The same, and fetch the Delta jars into .spark_fs/jars (once)
	@$(BIN)/python -m spark_fs.jars $(JARS)

demo: setup ## Run the worked example on real data, from definitions to online features
	@$(BIN)/python feature_repo/demo/run.py

test: setup ## Run all tests but those on a cluster, two files at a time; the slowest are listed at the end
	@$(BIN)/python -m pytest -n 2 --dist loadfile --ignore tests/faults tests

test-faults: setup ## Run the tests on a Spark cluster of real processes, which are killed and frozen
	@$(BIN)/python -m pytest tests/faults

check: lint types test-fast ## What to run before a commit: format, lint, types, fast tests

lint: .venv/.installed ## Check the format and the code with ruff
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .

types: .venv/.installed ## Check the types with mypy --strict
	@$(BIN)/mypy

test-fast: .venv/.installed ## Run the tests that need no JVM
	@$(BIN)/python -m pytest tests/unit $(wildcard tests/test_*.py)

bench: setup ## Run the benchmarks
	@$(BIN)/python -m benchmarks

bench-online: setup ## Run those of the online store: minutes; ARGS="--only read" runs one part
	@$(BIN)/python -m benchmarks.bench_online $(ARGS)

bench-asof: setup ## Run all workloads of the as-of join: hours, 40 GB; ARGS="--only medium" runs one
	@$(BIN)/python -m benchmarks.bench_asof $(ARGS)

bench-datasets: setup ## Run those of training datasets: minutes; ARGS="--only read" runs one part
	@$(BIN)/python -m benchmarks.bench_datasets $(ARGS)

clean: ## Remove .venv, caches and build output; .spark_fs, which holds data, stays
	rm -rf .venv build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -not -path './.spark_fs/*' -prune -exec rm -rf {} +

# The stamp is newer than setup.py: nothing to install. It is written last, so an interrupted set-up is taken up again.
.venv/.installed: setup.py $(BIN)/pip
	@echo "Installing into .venv (1.7 GB, some minutes) …"
	@$(BIN)/python -m pip install --quiet --retries 2 --disable-pip-version-check --use-pep517 \
		--editable '.[$(EXTRAS)]' || { \
		echo "The packages could not be installed; pip says above why." >&2; \
		echo "Fix: connect to the network, set HTTPS_PROXY, or name a mirror in PIP_INDEX_URL; then run make again." >&2; \
		exit 1; }
	@touch $@

# Java first: without it all that follows would be in vain.
$(BIN)/pip:
	@test -n "$(PYTHON)" || { \
		echo "There is no Python 3.10 or newer. Fix: apt-get install python3, or make PYTHON=/path/to/python3.12" >&2; \
		exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "$(PYTHON) is not Python 3.10 or newer. Fix: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(PYTHON) -m spark_fs.doctor
	@echo "Creating .venv with $(PYTHON) …"
	@$(PYTHON) -m venv --clear .venv >/dev/null 2>&1 || { \
		echo "No virtual environment can be made. Fix: apt-get install python3-venv, or make PYTHON=… another one" >&2; \
		exit 1; }
