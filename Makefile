# `make demo` and `make test` set everything up; nothing else needs to be installed by hand.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV_VERSION := 0.13.8
EMULATOR := .venv-bqemulator

.PHONY: demo test check bench docs setup clean
# What uv installs is not compiled. Where nobody may keep byte code either, each start of each process compiles
# all that it imports: for an aggregate worker 2.0 s of CPU instead of 0.7.
unexport PYTHONDONTWRITEBYTECODE
.DEFAULT_GOAL := help

help:
	@grep -E '^# `|^[a-z]+:.*##' Makefile | sed -E 's/^([a-z]+):.*## /  make \1\t/; s/^# //'

$(VENV)/.installed: pyproject.toml uv.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Tapeline needs Python 3.11 or newer; set PYTHON=python3.x")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install -q --disable-pip-version-check uv==$(UV_VERSION)
	@VIRTUAL_ENV=$(CURDIR)/$(VENV) $(BIN)/uv sync -q --frozen --active --no-group dev --inexact
	@$(BIN)/tapeline warm
	@touch $@

$(VENV)/.dev: $(VENV)/.installed
	@VIRTUAL_ENV=$(CURDIR)/$(VENV) $(BIN)/uv sync -q --frozen --active --inexact
	@touch $@

# A BigQuery for tests, which wants older packages than ours. DuckDB takes its extension from a wheel, not from the net.
$(EMULATOR)/.installed: tests/requirements-bqemulator.txt
	@$(BIN)/uv venv -q --clear --python $(BIN)/python $(EMULATOR)
	@VIRTUAL_ENV=$(CURDIR)/$(EMULATOR) $(BIN)/uv pip install -q -r $<
	@mkdir -p $(EMULATOR)/home
	@HOME=$(CURDIR)/$(EMULATOR)/home $(EMULATOR)/bin/python -c "import duckdb, duckdb_extension_spatial as e, glob; \
		duckdb.execute(f\"INSTALL '{glob.glob(e.__path__[0] + '/extensions/*/spatial.duckdb_extension')[0]}'\")"
	@touch $@

setup: $(VENV)/.dev ## everything for development into .venv

demo: $(VENV)/.installed ## a synthetic market through the whole pipeline; Ctrl-C ends it
	@$(BIN)/tapeline demo

test: $(VENV)/.dev ## the whole test suite
	@$(MAKE) --no-print-directory $(EMULATOR)/.installed
	@$(BIN)/python -m pytest

check: $(VENV)/.dev ## ruff, mypy strict, import contracts
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

bench: $(VENV)/.dev ## the benchmarks; results into benchmarks/results
	@$(BIN)/python -m benchmarks

docs: $(VENV)/.dev ## the documentation as a site, into site/; links are checked
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "site/index.html; $(BIN)/mkdocs serve shows it"

clean:
	rm -rf site $(VENV) $(EMULATOR) .mypy_cache .ruff_cache .pytest_cache .hypothesis
