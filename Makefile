# `make demo` and `make test` work on a fresh machine with Python >= 3.11; each makes the environment it needs.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# waiting threads must not spin: on a shared machine that slows small models down many times
export OMP_WAIT_POLICY = passive

.PHONY: demo test check lint types build bench clean

demo: $(VENV)/.demo
	$(BIN)/parablock demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest

check: lint types test build

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/hadolint Dockerfile

types: $(VENV)/.dev
	$(BIN)/mypy

# the wheel is built, installed beside the environment's libraries, and answers a question
build: $(VENV)/.dev
	rm -rf dist build/wheel-check
	$(BIN)/python -m build --wheel --outdir dist
	$(PIP) --no-deps --target build/wheel-check dist/*.whl
	cd build && PYTHONPATH=wheel-check ../$(BIN)/python -m parablock generate --json "Mara has 4 boxes with 6 pencils in each. Mara buys 5 more. How many pencils does Mara have now?"

# the figures of the README, measured on this machine
bench: $(VENV)/.dev
	$(BIN)/python benchmarks/decoding.py
	$(BIN)/python benchmarks/engine.py
	$(BIN)/python benchmarks/training_cost.py
	$(BIN)/python benchmarks/page.py

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch first and pinned: the plain name would bring several GB of CUDA packages to a machine without a GPU
$(VENV)/.torch: $(BIN)/python constraints.txt
	$(PIP) torch==2.13.0
	touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(PIP) --editable '.[plot]'
	touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(PIP) --editable '.[train,plot,app,eval,dev]'
	touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) build dist *.egg-info
