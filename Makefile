# One screen of commands; `make` lists them. Everything runs in .venv, which `make setup` builds and keeps fresh.

PYTHON ?= python3
MODEL ?= benchmarks/tiny_model/checkpoint
CUDA ?=
# Processes that run tests side by side.
TEST_WORKERS ?= 2
# A package index with CPU builds of torch, for machines whose default index has only CUDA builds.
TORCH_INDEX ?=

BIN := .venv/bin
CONSTRAINTS := requirements/constraints.txt
LIBRARY := kernels/losa_kernels/native/liblosa_kernels.so
STAMP := .venv/.setup-stamp$(if $(CUDA),-cuda)
comma := ,
DRILL_RESULTS := benchmarks/results/drills.jsonl
EXTRAS := dev$(if $(CUDA),$(comma)cuda)
# A CUDA build of torch brings the triton that it was made with.
PINS := $(if $(CUDA),build/constraints-cuda.txt,$(CONSTRAINTS))
PYTEST := $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile
# PIP_CONSTRAINT also binds the isolated environment in which the package is built; -c would not.
PIP := PIP_CONSTRAINT=$(CURDIR)/$(PINS) $(BIN)/python -m pip --disable-pip-version-check install

.DEFAULT_GOAL := help
.PHONY: help setup kernels demo serve test test-slow test-gpu frontend-matrix router-matrix soak drills bench bench-gpu check fmt constraints clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 24

setup: $(STAMP) $(LIBRARY) ## build .venv with pinned versions and CPU torch (CUDA=1: with the CUDA extra), and the kernels

$(STAMP): pyproject.toml $(PINS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed (PYTHON=...)")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
ifdef CUDA
	$(PIP) torch
else
	@# The CPU build first and by name: anything that merely needs torch might bring several GB of CUDA libraries.
	$(PIP) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) 'torch==2.13.0+cpu' || { \
	  echo 'No build of torch named 2.13.0+cpu; taking the default one (large on Linux: set TORCH_INDEX to avoid it).'; \
	  $(PIP) torch; }
endif
	$(PIP) -e '.[$(EXTRAS)]'
	@touch $@

build/constraints-cuda.txt: $(CONSTRAINTS)
	@mkdir -p $(@D) && grep -v '^triton==' $< > $@

kernels: $(LIBRARY) ## compile the CPU kernels (part of setup; seconds) and those for GPUs, without one (a minute or two)
ifeq ($(shell uname -sm),Linux x86_64)
	$(BIN)/python -m losa_kernels.triton.compile
else
	@echo 'There is no triton for this platform: going on without the kernels for GPUs.'
endif

$(LIBRARY): kernels/CMakeLists.txt $(wildcard kernels/csrc/*) | $(STAMP)
	@if command -v "$${CXX:-c++}" >/dev/null; then \
	  $(BIN)/cmake -S kernels -B build/kernels >/dev/null && \
	  MAKEFLAGS=--no-print-directory $(BIN)/cmake --build build/kernels --parallel 2 && touch $@; \
	else \
	  echo 'No C++ compiler (c++, or CXX=...): going on without the CPU kernels; attention will be computed by torch.'; \
	fi

demo: setup ## the whole runtime in a minute, on the small model that comes with it
	$(BIN)/python -m benchmarks.demo

serve: setup ## serve MODEL (default: the small model that comes with the project)
	$(BIN)/losa serve --model $(MODEL)

# Threads that wait for one another spin briefly, as tests side by side share the cores.
test test-slow: export GOMP_SPINCOUNT ?= 1000

test: setup ## the tests, in TEST_WORKERS (2) processes
	$(PYTEST)

test-slow: setup ## longer property runs, sanitizers and real-client suites
	$(PYTEST) -m slow

test-gpu: setup ## what only a GPU can show: kernels in bfloat16, the GPU backends, the engine (setup with CUDA=1)
	$(BIN)/python -m pytest -m gpu

frontend-matrix: setup ## the suite for SGLang's frontend with several of its releases (builds them, minutes)
	$(BIN)/python -m tests.frontend.matrix

router-matrix: setup ## two servers behind each of the routers that SGLang deployments use (installs them, minutes)
	$(BIN)/python -m tests.routers.matrix

soak: setup ## thousands of requests and hostile messages on end, and bugs planted in a copy of the sources
	$(BIN)/python -m pytest -m soak -s --record $(DRILL_RESULTS)
	$(BIN)/python -m tests.mutants --record $(DRILL_RESULTS)

drills: setup ## processes killed, stopped and told to end, too many clients; figures against goals (ten minutes)
	$(BIN)/python -m benchmarks.drills --record $(DRILL_RESULTS)

bench: setup ## measure again what the README shows, ten minutes on two quiet cores (pictures of quality: from its rows)
	$(BIN)/python -m benchmarks.load
	$(BIN)/python -m benchmarks.offline --requests 8 --output 64
	$(BIN)/python -m benchmarks.attention --rounds 2
	$(BIN)/python -m benchmarks.scheduler
	$(BIN)/python -m benchmarks.peers --document 1024 --output 16
	$(BIN)/python -m benchmarks.peers --counts 32 --sample 1 --baselines --variants dense losa
	$(BIN)/python -m benchmarks.min_context
	$(BIN)/python -m benchmarks.host_share --method losa --context 2048 --rounds 20
	$(BIN)/python -m benchmarks.quality --report-only --contexts 4096 --tasks multi_value --samples 500
	$(BIN)/python -m benchmarks.quality.probe --report-only

bench-gpu: setup ## measure attention and whole decode steps on a GPU, ten minutes at most (CUDA=1)
	$(BIN)/python -m benchmarks.gpu

check: setup ## lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror kernels/csrc/*
	$(BIN)/mypy

fmt: setup ## format the code and sort imports
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i kernels/csrc/*

constraints: setup ## write the versions in .venv to requirements/constraints.txt
	@{ sed -n '/^#/!q;p' $(CONSTRAINTS); \
	   $(BIN)/python -m pip freeze --all --exclude-editable --exclude pip | sed -E 's/^(torch==[0-9.]+)\+.*/\1/'; \
	   sed -n '/^# Only/,$$p' $(CONSTRAINTS); } > $(CONSTRAINTS).new && mv $(CONSTRAINTS).new $(CONSTRAINTS)

clean: ## remove caches and build leftovers (.venv stays)
	rm -rf build dist $(LIBRARY) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find losa_runtime kernels server tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
