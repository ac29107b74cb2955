# make train    set everything up in .venv, then train a VAE (options: make train ARGS="--epochs 3")
# make test     set everything up in .venv, then run the tests (options: make test ARGS="-k kl")
# make bench    set everything up, then time the ops against their peers, into benchmarks/results
#               and docs/bench.png (with options, such as ARGS=--targets: into a new file here)
# make docs     the pages of docs/ and a reference of every public name, into build/docs
# make build    compile what changed and say what was built
# make lint     all static checks           make format   format Python, C++ and CUDA
# make sanitize all kernels under sanitizers (in part: make asan, make tsan)
# make soak     100,000 training steps; a run, and three at once, killed 20 times
# make fuzz     10,000 random calls, native against reference (more: ARGS="--hypothesis-seed=1")
# make gpu      build here with the torch of $(PYTHON), without .venv; then tests, compute-sanitizer
#               and benchmarks on CUDA, into benchmarks/results (one step: make gpu ARGS="--steps tests")
# make cuda-report  what the CUDA kernels cost, read from the binary, into docs/cuda.md
# make wheels   an sdist and one wheel for all Pythons and torches, installed and verified under each,
#               into dist (for some: make wheels PYTHONS="python3.11 python3.12" TORCHES=2.13.0)
# make clean    remove all that the other verbs made
#
# Without an NVIDIA driver all build for the CPU, with one for the GPUs present; FASTVAE_CUDA=1 builds
# for all GPUs, TORCH_CUDA_ARCH_LIST="8.0;9.0+PTX" for some, wherever there is nvcc.
#
# `make wheels` builds for all GPUs wherever there is nvcc.
#
# PYTHON, VENV and TORCH can be given too. pip and uv read their own environment variables, such as
# PIP_EXTRA_INDEX_URL.

PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0
ARGS   ?=

BIN     := $(VENV)/bin
PIP     := $(BIN)/python -m pip --disable-pip-version-check install
SAY     := $(PYTHON) tools/step.py
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

# Built for what runs here: the GPUs present, or the CPU alone. Who sets one of these two decides.
GPUS := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null \
          | grep -E '^[0-9]+\.[0-9]+$$' | sort -u | paste -s -d ';' -)
ifeq ($(FASTVAE_CUDA)$(TORCH_CUDA_ARCH_LIST),)
  wheels: export FASTVAE_CUDA :=
  wheels: export TORCH_CUDA_ARCH_LIST :=
  ifeq ($(GPUS),)
    export FASTVAE_CUDA := 0
  else
    export TORCH_CUDA_ARCH_LIST := $(GPUS)
  endif
endif

.PHONY: always train test bench docs sanitize asan tsan soak fuzz build lint format gpu cuda-report wheels clean

train: $(VENV)/train.done $(VENV)/build.done
	$(BIN)/python -m fastvae train $(ARGS)

# A process for each core, with one thread of its own: threads of several would wait for each other.
test: $(VENV)/test.done $(VENV)/build.done
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive \
	  $(BIN)/python -m pytest -q --numprocesses auto --dist loadfile --no-loadscope-reorder $(ARGS)

bench: $(VENV)/bench.done $(VENV)/build.done
	$(BIN)/python -m fastvae bench $(or $(ARGS),--output benchmarks/results --figure docs/bench.png)

docs: $(VENV)/docs.done $(VENV)/build.done
	@$(SAY) "docs" $(BIN)/python -m sphinx -E -W --keep-going -d build/doctrees docs build/docs $(ARGS)
	@echo "build/docs/index.html"

# asan: AddressSanitizer and UBSan, on the CPU loops and the CUDA loops, compiled for the CPU;
# tsan: ThreadSanitizer on the CPU loops.
asan: override ARGS += -k asan
tsan: override ARGS += -k tsan
sanitize asan tsan: $(VENV)/test.done $(VENV)/build.done
	FASTVAE_SANITIZE=1 $(BIN)/python -m pytest -q tests/test_sanitizers.py $(ARGS)

soak: $(VENV)/test.done $(VENV)/build.done
	$(BIN)/python tests/soak.py $(ARGS)

fuzz: $(VENV)/test.done $(VENV)/build.done
	$(BIN)/python -m pytest -q tests/test_fuzz.py --hypothesis-profile=fuzz $(ARGS)

build: $(VENV)/build.done
	$(BIN)/python -m fastvae info

lint: $(VENV)/dev.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(SOURCES)
	$(BIN)/mypy

format: $(VENV)/dev.done
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES)

gpu:
	$(PYTHON) setup.py build_ext --inplace
	PYTHONPATH=. $(PYTHON) benchmarks/gpu.py $(ARGS)

cuda-report: export FASTVAE_CUDA := 1
cuda-report: $(VENV)/test.done $(VENV)/build.done
	$(BIN)/python tests/cuda_resources.py --write docs/cuda.md

wheels: $(VENV)/wheels.done
	$(BIN)/python tools/wheels.py --pythons $(PYTHONS) --torch $(TORCHES)

clean:
	rm -rf $(VENV) build dist *.egg-info fastvae/*.so fastvae/_no_binary.txt
	find . -name __pycache__ -prune -exec rm -r {} +

# Each finished step leaves a file, so that nothing is installed or compiled twice.

$(VENV)/venv.done:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "$(PYTHON) is missing or older than 3.10: set PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	  || { echo "$(PYTHON) cannot make virtual environments: install python3-venv" >&2; exit 1; }
	@$(SAY) "environment in $(VENV)" $(PYTHON) -m venv --clear $(VENV)
	@touch $@

# The usual torch for Linux brings gigabytes of CUDA. Where there is no NVIDIA driver the CPU build
# serves: pip's if it is told of one, else the one from PyTorch's own index, which uv knows.
$(VENV)/torch.done: $(VENV)/venv.done
	@$(SAY) "build tools" $(PIP) 'setuptools>=77' pybind11 ninja numpy
	@if [ "$$(uname)" = Linux ] && ! command -v nvidia-smi >/dev/null; then \
	  $(SAY) "torch for CPUs" $(PIP) '$(TORCH)+cpu' 2>/dev/null || { $(PIP) --quiet uv \
	    && $(SAY) "torch for CPUs, from its own index" $(BIN)/uv pip install \
	       --python $(BIN)/python --torch-backend cpu '$(TORCH)'; }; \
	fi || echo "no CPU build of torch found: taking the usual one, which is large"
	@$(SAY) "torch" $(PIP) '$(TORCH)'
	@touch $@

# Compiled first, where one sees how far it is; pip then finds it done.
$(addprefix $(VENV)/,train.done test.done bench.done docs.done dev.done): \
  $(VENV)/torch.done pyproject.toml setup.py | $(VENV)/build.done
	@$(SAY) "fastvae and what '$(basename $(@F))' needs" \
	  $(PIP) --no-build-isolation --editable '.[$(basename $(@F))]'
	@touch $@

# Without torch, which the tool fetches for each Python.
$(VENV)/wheels.done: $(VENV)/venv.done pyproject.toml
	@$(SAY) "pip, which reads groups" $(PIP) 'pip>=25.1'
	@$(SAY) "what 'wheels' needs" $(PIP) --group wheels
	@touch $@

$(VENV)/build.done: $(VENV)/torch.done $(VENV)/build.for setup.py $(SOURCES)
	@$(SAY) "kernels" $(BIN)/python setup.py build_ext --inplace
	@touch $@

# What for, so that another wish compiles anew.
$(VENV)/build.for: always | $(VENV)/venv.done
	@echo "$(FASTVAE_CUDA) $(TORCH_CUDA_ARCH_LIST)" | cmp -s - $@ \
	  || echo "$(FASTVAE_CUDA) $(TORCH_CUDA_ARCH_LIST)" > $@
