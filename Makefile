# `make demo` and `make test` set everything up; nothing else needs to be installed by hand.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV_VERSION := 0.13.8

.PHONY: demo test check bench setup clean
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

setup: $(VENV)/.dev ## everything for development into .venv

demo: $(VENV)/.installed ## a synthetic market through the whole pipeline; Ctrl-C ends it
	@$(BIN)/tapeline demo

test: $(VENV)/.dev ## the whole test suite
	@$(BIN)/python -m pytest

check: $(VENV)/.dev ## ruff, mypy strict, import contracts
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

bench: $(VENV)/.dev ## the benchmarks; results into benchmarks/results
	@$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
