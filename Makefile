# Everything runs in .venv, which the first target that needs it makes. Override PYTHON or TORCH to choose others.
PYTHON ?= python3
TORCH ?= torch==2.13.0 triton==3.7.1
BIN := .venv/bin
STAMP := .venv/installed
# One process a core, whole files to each, so that what a file sets up once is set up once.
PYTEST := $(BIN)/pytest -n auto --maxprocesses 8 --dist loadfile --max-worker-restart 0
RESULTS := --out benchmarks/results
KERNELS := benchmarks/results/kernel-resources.json
SOURCES := pyproject.toml setup.py CMakeLists.txt $(shell find csrc -type f)

.PHONY: setup demo test test-long kernels-check kernels-table sanitize lint bench bench-large bench-train bench-published bench-cache bench-ops docs clean

setup: $(STAMP)

# torch first and alone, so that nothing later chooses another build of it
$(STAMP): $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $(STAMP)

demo: setup
	$(BIN)/vitok reconstruct examples --out demo

test: setup
	$(PYTEST) -m "not long"

test-long: setup
	$(PYTEST) -m long --durations 15

# What can be proven of the kernels without a GPU.
kernels-check: setup sanitize
	$(PYTEST) tests/ops -m "not long" -k triton
	$(BIN)/python -m vitok.kernels.resources
	$(BIN)/python csrc/cuda_resources.py

# The committed table of kernels, which the long tests compare.
kernels-table: setup
	$(BIN)/python -m vitok.kernels.resources --json $(KERNELS)
	$(BIN)/python csrc/cuda_resources.py --json $(KERNELS)
	$(BIN)/python docs/generate.py

# The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, called with random arguments.
sanitize: setup
	PYTHON=$(BIN)/python csrc/sanitize.sh

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Whole models, ours and other people's; then the tables that follow from the rows. What cannot be measured here says so.
# Of large batches only what the tables need: under ten minutes on two cores with AMX.
LARGE := $(BIN)/vitok bench peers --cases 512,16x128 --peers "SD-VAE f8,Wan 2.1" --seconds 0 $(RESULTS)/large
BATCHES := reference,vitok fast bf16,vitok fast int8,compile freezing,linear layers alone
bench: setup
	failed=0; \
	$(BIN)/vitok bench model --batch 8 --what both --providers "$(BATCHES)" --seconds 0.5 $(RESULTS) || failed=1; \
	$(BIN)/vitok bench model --batch 1 --what both --seconds 0.5 $(RESULTS) --resume || failed=1; \
	$(BIN)/vitok bench peers --cases 256 --seconds 0.2 $(RESULTS) || failed=1; \
	$(BIN)/vitok bench scale --limit 2 --seconds 0.3 $(RESULTS) || failed=1; \
	$(BIN)/vitok bench packed --seconds 0.3 $(RESULTS) || failed=1; \
	$(LARGE) || failed=1; \
	$(BIN)/python docs/generate.py && exit $$failed

# Peers on 512 pixels and on clips, where a call takes up to twenty seconds.
bench-large: setup
	$(LARGE)
	$(BIN)/python docs/generate.py

# A training step, ours beside its eager reference, the compiler's and the matrix products alone.
bench-train: setup
	$(BIN)/vitok bench model --batch 8 --what train --providers "reference,vitok,compile,linear layers alone" --seconds 3 $(RESULTS)/train
	$(BIN)/python docs/generate.py

# ViTok-v2 at 350M beside its plain definition in both dtypes, and loading it.
bench-published: setup
	$(BIN)/vitok bench published --dtype bfloat16 $(RESULTS)
	$(BIN)/vitok bench published --dtype float32 --what both $(RESULTS) --resume
	$(BIN)/python docs/generate.py

# Filling a latent cache beside encoding alone.
bench-cache: setup
	$(BIN)/vitok bench cache $(RESULTS)
	$(BIN)/python docs/generate.py

# Every op beside its peers; then what follows from the rows: the order of `auto`, the plots and the tables.
bench-ops: setup
	$(BIN)/vitok bench ops $(RESULTS)
	$(BIN)/python benchmarks/auto.py
	$(BIN)/python docs/generate.py

docs: setup
	$(BIN)/python docs/generate.py

clean:
	rm -rf .venv build dist demo vitok/_C*.so vitok/_build.json *.egg-info
