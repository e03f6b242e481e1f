# Everything runs in .venv, which the first target makes. A second call finds it and does no work twice.
#   make demo     pictures from the bundled model, dense and accelerated, side by side -> out/report.html
#   make test     the whole test suite
#   make lint     ruff and pyright
#   make clean    remove .venv, caches and out/
# Choose the interpreter with `make PYTHON=python3.12 demo`, the test files with `make test TESTS=tests/seams`.

PYTHON  ?= python3
TESTS   ?= tests
OUT     ?= out
VENV    := .venv
BIN     := $(VENV)/bin
PIP     := $(BIN)/python -m pip --disable-pip-version-check --quiet
LOCK    := -c constraints.txt

.PHONY: demo test lint format ledger clean help
.DELETE_ON_ERROR:

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

demo: $(VENV)/.package
	$(BIN)/ditkit demo --out $(OUT)

test: $(VENV)/.test
	$(BIN)/python -m pytest --numprocesses=auto --maxprocesses=8 $(TESTS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

ledger: $(VENV)/.package
	$(BIN)/python -m benchmarks.ledger

clean:
	rm -rf $(VENV) $(OUT) build dist .pytest_cache .ruff_cache .hypothesis src/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "ditkit needs Python 3.10 or newer; $(PYTHON) is older. Try: make PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
		{ rm -rf $(VENV); echo "$(PYTHON) cannot make a virtual environment; on Debian: apt install python3-venv"; exit 1; }
	@touch $@

# torch comes first and alone: what is installed after it finds the version it needs and pulls no other build.
$(VENV)/.torch: $(VENV)/.made constraints.txt
	@echo "installing torch into $(VENV)"
	@$(PIP) install $(LOCK) setuptools torch
	@touch $@

$(VENV)/.package: $(VENV)/.torch pyproject.toml
	@echo "installing ditkit into $(VENV)"
	@$(PIP) install $(LOCK) -e .
	@touch $@

$(VENV)/.test: $(VENV)/.package
	@echo "installing the test tools into $(VENV)"
	@$(PIP) install $(LOCK) -e '.[test]'
	@touch $@

$(VENV)/.dev: $(VENV)/.test
	@echo "installing the linters into $(VENV)"
	@$(PIP) install $(LOCK) -e '.[dev]'
	@touch $@
