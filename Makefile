# Every target makes the virtual environment that it needs: a machine with Python 3.10 or newer and make is enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TOOLS := $(VENV)/.tools
TESTS := $(VENV)/.tests
INSTALL := $(BIN)/python -m pip install --no-compile -c constraints.txt
# Each of many processes would compile all that it imports anew.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help compare test lint bench wheel clean
.DEFAULT_GOAL := help

help:  ## list what can be made
	@sed -n 's/^\([a-z]*\):.*## /make \1|/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "%-14s%s\n", $$1, $$2 }'

compare: $(TOOLS)  ## train a small network with and without batch normalization, and report
	$(BIN)/batchnorm compare

test: $(TESTS)  ## run the tests, then use the built wheel once
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
	$(BIN)/python tests/wheel_smoke.py

lint: $(TESTS)  ## check style, types, and which module may import which
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(TESTS)  ## time the layers against torch.nn, torch.compile and ONNX Runtime; half an hour
	$(BIN)/python -m benchmarks

wheel: $(TESTS)  ## build the wheel to release, with kernels compiled for Linux on x86-64
	$(BIN)/python release/compile_kernels.py --out src/batchnorm/kernels/compiled
	$(BIN)/python -m build --wheel --no-isolation

clean:  ## remove what was built and cached, but not the environment
	rm -rf build dist src/batchnorm/kernels/compiled .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests benchmarks docs release -name __pycache__ -type d -prune -exec rm -rf {} +

# What the command needs.
$(TOOLS): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "batchnorm needs Python 3.10 or newer, and '$(PYTHON)' is not;" \
	    "name another one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade 'pip>=25.1'
	$(INSTALL) -e '.[tools]'
	@touch $@

# What tests, checks and baselines need besides.
$(TESTS): $(TOOLS)
	$(INSTALL) --group test
	$(INSTALL) --no-deps --group timm --group opacus
	@touch $@
