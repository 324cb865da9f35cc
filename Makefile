# Needs Python >= 3.11 and a package index, nothing else. Another interpreter: make PYTHON=python3.13 …
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
PYTEST_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
LOCK_VENV := $(VENV)-lock
UV := 0.13.9

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo up install test lint bench torture wheel lock clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z.]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo "  make demo ARGS='--seconds 60' passes arguments on; PYTHON=python3.13 chooses the interpreter."

demo: $(VENV)/.installed ## installs, then everything at once: servers, actors, a simulated terminal, live signals
	@$(BIN)/python runner.py demo $(ARGS)

up: $(VENV)/.installed ## installs, then runs the system for a real terminal
	@$(BIN)/python runner.py up $(ARGS)

install: $(VENV)/.installed ## makes .venv and stops there

test: $(VENV)/.tested ## installs the test extras and runs the whole suite on real servers
	@$(BIN)/python -m pytest $(PYTEST_ARGS) $(ARGS)

lint: $(VENV)/.tested ## ruff, mypy --strict and who may import whom
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

bench: $(VENV)/.tested ## the benchmarks, beside their peers
	@$(BIN)/python runner.py bench $(ARGS)

torture: $(VENV)/.tested ## kills, freezes, fills and cuts off everything for an hour, and prints what it cost
	@$(BIN)/python -m pytest -m torture --timeout 1800 $(PYTEST_ARGS) $(ARGS)

wheel: $(VENV)/.tested ## dist/*.whl, which runs outside the checkout
	@$(PIP) wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

lock: $(LOCK_VENV)/bin/uv ## resolves pyproject.toml into requirements/*.lock; ARGS=--upgrade takes newer versions
	@set -e; compile="$(LOCK_VENV)/bin/uv pip compile --quiet --no-config --universal --fork-strategy fewest --generate-hashes \
	  --python-version 3.11 --custom-compile-command 'make lock' --group pyproject.toml:build $(ARGS) pyproject.toml"; \
	eval "$$compile --all-extras --output-file requirements/test.lock"; \
	eval "$$compile --extra embedded --constraints requirements/test.lock --no-annotate --output-file requirements/embedded.lock"; \
	eval "$$compile --constraints requirements/test.lock --no-annotate --output-file requirements/runtime.lock"

.env: | .env.example ## the secrets that docker-compose.yml asks for; an existing file stays
	@umask 077; $(PYTHON) -c 'import secrets, sys; print("".join(line.rstrip() + ("m" + secrets.token_hex(20) if line.rstrip().endswith("=") else "") + "\n" for line in sys.stdin), end="")' <.env.example >$@

clean: ## removes .venv, caches and build results; the state in var/ stays
	@rm -rf $(VENV) $(LOCK_VENV) dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -type d -not -path './var/*' -prune -exec rm -rf {} +

$(VENV)/.made:
	@command -v $(PYTHON) >/dev/null || { echo "There is no $(PYTHON): install Python 3.11 or newer, or name one, as in: make PYTHON=python3.11 demo" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python %d.%d is too old: install Python 3.11 or newer and name it, as in: make PYTHON=python3.11 demo" % sys.version_info[:2])'
	@$(PYTHON) -m venv --clear $(VENV)
	@touch $@

# The stamps are newer than the lock they were installed from, so a second `make` starts at once.
$(VENV)/.installed: $(VENV)/.made requirements/embedded.lock pyproject.toml
	@echo "Installing into $(VENV) (once; about 550 MB on disk) …"
	@$(PIP) install --quiet --require-hashes --requirement requirements/embedded.lock
	@$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.tested: $(VENV)/.made requirements/test.lock pyproject.toml
	@echo "Installing into $(VENV), with the test extras (once; about 1 GB on disk) …"
	@$(PIP) install --quiet --require-hashes --requirement requirements/test.lock
	@$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	@touch $(VENV)/.installed $@

$(LOCK_VENV)/bin/uv:
	@$(PYTHON) -m venv --clear $(LOCK_VENV)
	@$(LOCK_VENV)/bin/python -m pip --disable-pip-version-check --no-input install --quiet uv==$(UV)
