# Everything runs in .venv, which `make setup` makes with plain venv and pip.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup demo test test-all test-defects test-kill test-gpu soak lint check bench docs bench-gpu pocket wheel clean

setup: $(VENV)/.done

$(VENV)/.done: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "burnish needs Python 3.11 or later; try: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup
	$(BIN)/burnish run quickstart

# Two workers of one thread each; the tests of a file stay together, so that what they share is made once.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile

test: setup
	$(PYTEST) -m "not slow and not defect and not kill and not gpu"

test-all: setup
	$(PYTEST) -m "not defect and not kill and not gpu"
	$(MAKE) test-defects

test-defects: setup
	$(BIN)/python -m pytest -n 2 --dist load -m defect tests/reliability

test-kill: setup
	$(BIN)/python -m pytest -m kill -n 2 --dist worksteal tests/pipeline

test-gpu: setup
	$(BIN)/python -m pytest -m gpu -rs

soak: setup
	$(BIN)/python scripts/soak.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

docs: setup
	$(BIN)/mkdocs build --strict --quiet

check: lint test docs

bench: setup
	$(BIN)/python benchmarks/train_step.py --method all --peer trl --json

bench-gpu: setup
	$(BIN)/python benchmarks/gpu.py

pocket: setup
	$(BIN)/python scripts/pocket/build.py

wheel: setup
	$(BIN)/python -m build --wheel --outdir dist

clean:
	rm -rf $(VENV) build dist site src/*.egg-info
