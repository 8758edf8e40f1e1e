# `make run` and `make test` set up .venv themselves. PYTHON picks the interpreter (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The tests need no GPU, and pass with torch's CPU build and with its CUDA build, which is larger by gigabytes. Where the
# package index has no CPU build: PIP_EXTRA_INDEX_URL=<PyTorch's CPU wheels> make test TORCH=torch==2.13.0+cpu
TORCH ?= torch==2.13.0
WORKERS ?= 2

.PHONY: run test test-long bench gpu rehearse lint profiles clean

run: $(VENV)/.base
	$(BIN)/clo explore --out out
	@echo
	@echo "One sequence instead of sixteen:"
	$(BIN)/clo explore --batch 1 --no-sweep --no-figures

test: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m "not long"

test-long: $(VENV)/.dev
	OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m long

bench: $(VENV)/.base
	$(BIN)/python benchmarks/steps.py
	$(BIN)/python benchmarks/serving.py

# On a CUDA machine, with the Python that has torch, Triton and pytest there: nothing is installed.
MINUTES ?= 8
gpu:
	@$(PYTHON) benchmarks/gpu.py --minutes $(MINUTES)

# What `make gpu` tests of the decoder, on a machine without a GPU: with a Python that has torch built for CUDA 13.
rehearse:
	@$(PYTHON) tests/rehearsal/run.py tests/rehearsal/captures.py
	@$(PYTHON) tests/rehearsal/run.py --kernels compiled tests/rehearsal/compiled_steps.py
	@$(PYTHON) tests/rehearsal/run.py -m pytest -p no:cacheprovider tests/engine/test_cuda_decoder.py

lint: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/mypy

profiles: $(VENV)/.dev
	$(BIN)/python -m pip install -q -e ".[tables]"
	$(BIN)/python -m clo_calibration.build_profile

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v >= (3, 11) else \
		"Python 3.11 or newer is needed, %s is %d.%d: make PYTHON=python3.12 ..." % (sys.executable, *v))'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.base: $(VENV)/.created pyproject.toml
	$(BIN)/python -m pip install -q -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.created pyproject.toml
	$(BIN)/python -m pip install -q "$(TORCH)"
	$(BIN)/python -m pip install -q -e ".[dev]"
	@touch $@ $(VENV)/.base

clean:
	rm -rf $(VENV) out build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
