# Every target sets up what it needs into .venv; see `make help`.
SHELL := /bin/bash
BIN := .venv/bin
WORKERS ?= auto

# The first interpreter that is new enough. `make PYTHON=/path/to/python3 ...` overrides it.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1 && echo $$p && break; done)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all lint

help: ## Say what each target does
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 20

setup: .venv/.stamp ## Install the package and its tools into .venv

demo: .venv/.stamp ## Quantize a real weight, compile for sm_121a, execute the PTX with no GPU
	$(BIN)/nvfp4dsl demo $(ARGS)

test: .venv/.stamp ## Run the tests that need no GPU (at most 15 minutes)
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow" $(ARGS)

test-all: .venv/.stamp ## Run every test; those that need a GPU skip where there is none
	$(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

lint: .venv/.stamp ## ruff (lint and format), import layers, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@rm -rf .venv/lint && mkdir -p .venv/lint/nvfp4dsl && ln -s $(CURDIR)/nvfp4dsl/* $(CURDIR)/patches $(CURDIR)/autotune .venv/lint/nvfp4dsl/
	cd .venv/lint && ../bin/lint-imports --no-cache --config ../../pyproject.toml
	$(BIN)/mypy

# .venv/lint is the source tree as it looks once installed, for tools that read files rather than import them.

.venv/.stamp: pyproject.toml setup.py constraints.txt
	@test -n "$(PYTHON)" || { echo "nvfp4dsl needs Python 3.10 or newer with its venv module (on Debian: apt install python3-venv)." \
		"None was found on PATH; name one with: make PYTHON=/path/to/python3" >&2; exit 1; }
	@command -v gcc >/dev/null || { echo "nvfp4dsl needs gcc, for the emulator's host shim (on Debian: apt install gcc)." >&2; exit 1; }
	@echo "Setting up .venv with $(PYTHON); the first time takes some minutes."
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
