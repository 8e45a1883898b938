# Two commands matter: `make demo` and `make test`. Each sets up all it needs, once.
#
# A stamp in the virtual environment says which step is done. The environment is keyed by nothing but its folder: another
# TORCH reinstalls torch there and builds again, from objects that are kept for each torch.

TORCH ?= 2.13.0
PYTHON ?= python3.11
VENV ?= .venv

CUDA_TORCH ?= 2.14.1
CUDA_VENV ?= .venv-cuda
CUDASIM ?= ../shared/cudasim

BIN := $(VENV)/bin
NATIVE := setup.py $(shell find csrc -type f)
CPP := $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
CHECKED := pytracker tests benchmarks examples setup.py
# Not this folder's pytracker but the one installed or named by PYTHONPATH.
INSTALLED := PYTHONSAFEPATH=1
# A worker for each core; files are spread over them, and a worker without work takes from another.
IN_PARALLEL := -n auto --maxprocesses=8 --dist=worksteal

.PHONY: demo integrations site test bench pictures lint types format format-check doctor build sanitize kernels wheel cuda-build cuda-test mutants cuda-counters sass gpu-build gpu-test gpu-bench clean

demo: build
	$(BIN)/python -m pytracker demo

test: build
	$(BIN)/python -m pytest -q $(IN_PARALLEL) $(PYTEST_ARGS)

bench: build
	$(BIN)/python -m pytest -q benchmarks/bench_cpu.py --benchmark-disable-gc --benchmark-columns=median \
	    --benchmark-json=build/benchmarks.json $(BENCH_ARGS) >build/benchmarks.log || { tail -40 build/benchmarks.log; exit 1; }
	$(BIN)/python -m benchmarks.table build/benchmarks.json docs/results
	@if [ -x $(CUDASIM)/build.sh ]; then $(MAKE) cuda-counters; \
	else echo "the CUDA counters need the simulator at $(CUDASIM)"; fi

# The pictures of docs/diagnosis.md, from trainings of the benchmark. It fails where a rule no longer says what they show.
pictures: build $(VENV)/.docs
	$(BIN)/python -m benchmarks.diagnosis.pictures

integrations: $(VENV)/.integrations

# The documentation: a warning is an error, and so is a link that leads nowhere.
site: build $(VENV)/.site
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs build/site
	@echo "build/site/index.html"

doctor: build
	$(BIN)/pytracker doctor

lint: $(VENV)/.dev
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/codespell README.md CONTRIBUTING.md CHANGELOG.md docs csrc $(CHECKED)

types: $(VENV)/.dev
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff format $(CHECKED)
	$(BIN)/clang-format -i $(CPP)

format-check: $(VENV)/.dev
	$(BIN)/ruff format --check $(CHECKED)
	$(BIN)/clang-format --dry-run --Werror $(CPP)

# The environment, torch, the package in editable form with the tools, and the library: four steps, each with its stamp.
build: $(VENV)/.built

$(VENV)/.venv:
	@command -v $(PYTHON) >/dev/null || { echo "there is no $(PYTHON) here; say which Python to take: make PYTHON=python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo "$(PYTHON) is $$($(PYTHON) --version); pytracker needs 3.10 or later: make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.torch-$(TORCH): $(VENV)/.venv
	$(BIN)/python -m pip install --quiet torch==$(TORCH) 'setuptools>=77' ninja numpy
	@rm -f $(VENV)/.torch-*
	@touch $@

$(VENV)/.dev: $(VENV)/.torch-$(TORCH) pyproject.toml
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[dev]'
	@touch $@

# The trainers and tools of tests/integrations and tests/sinks; without them these tests are skipped.
$(VENV)/.integrations: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[dev-integrations]'
	@touch $@

$(VENV)/.site: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[site]'
	@touch $@

$(VENV)/.docs: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[docs]'
	@touch $@

$(VENV)/.built: $(VENV)/.dev $(NATIVE)
	$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

# The CPU core with AddressSanitizer and UndefinedBehaviorSanitizer, in a folder of its own, and the tests that drive it.
sanitize: build
	PYTRACKER_SANITIZE=address,undefined $(BIN)/python setup.py --quiet build
	$(INSTALLED) PYTHONPATH=$$(echo build/torch-*-address-undefined/lib.*) \
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	$(BIN)/python -m pytest -q -p no:cacheprovider $(IN_PARALLEL) tests/native tests/core tests/control tests/tracking tests/test_gradients.py tests/test_meters.py $(PYTEST_ARGS)

# A CUDA build of torch in an environment of its own, with a real (not editable) install, since one source folder holds
# one library.
$(CUDA_VENV)/.torch-$(CUDA_TORCH):
	$(PYTHON) -m venv $(CUDA_VENV)
	$(CUDA_VENV)/bin/python -m pip install --quiet torch==$(CUDA_TORCH) 'setuptools>=77' ninja numpy \
	    click rich pytest pytest-benchmark hypothesis expecttest
	@rm -f $(CUDA_VENV)/.torch-*
	@touch $@

cuda-build: $(CUDA_VENV)/.torch-$(CUDA_TORCH) kernels
	$(CUDA_VENV)/bin/python -m pip install --quiet --no-deps --no-build-isolation --force-reinstall .

# What is shipped of the kernels: machine code for every architecture and PTX, without torch and without a toolkit.
kernels: build
	$(BIN)/python csrc/cuda/make_kernels.py

# The source distribution, and from it the wheel for this Python and this torch, whose version is in its name.
wheel: kernels
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist . >build/wheel.log 2>&1 || { tail -40 build/wheel.log; exit 1; }
	@wc -c dist/*

# g++ 12 fails on -march=native for some recent processors, and the simulator needs no more than this.
SIMULATOR_ARCH := $(if $(filter x86_64,$(shell uname -m)),-march=x86-64-v3,-march=native)
build/cudasim/libcudart.so.13: $(wildcard $(CUDASIM)/src/*)
	CXXFLAGS_ARCH=$(SIMULATOR_ARCH) $(CUDASIM)/build.sh build/cudasim

cuda-test: cuda-build build/cudasim/libcudart.so.13
	$(INSTALLED) CUDASIM_LIB=$(abspath build/cudasim/libcudart.so.13) \
	$(CUDA_VENV)/bin/python $(CUDASIM)/cudasim.py run --devices 2 -- $(CUDA_VENV)/bin/python -m pytest -q tests/cuda $(PYTEST_ARGS)

# Takes away each fence, barrier and ticket reset of the kernels by itself; fails where no test fails for one.
mutants: cuda-build build/cudasim/libcudart.so.13
	$(INSTALLED) PYTHONPATH=tests/cuda CUDASIM_LIB=$(abspath build/cudasim/libcudart.so.13) \
	$(CUDA_VENV)/bin/python $(CUDASIM)/cudasim.py run -- $(CUDA_VENV)/bin/python tests/cuda/mutants.py docs/results

# The benchmarks lie in the checkout, whose pytracker is not the one to be counted: they get a path of their own.
cuda-counters: cuda-build build/cudasim/libcudart.so.13
	@mkdir -p build/path && ln -sfn $(CURDIR)/benchmarks build/path/benchmarks
	$(INSTALLED) PYTHONPATH=build/path CUDASIM_LIB=$(abspath build/cudasim/libcudart.so.13) \
	$(CUDA_VENV)/bin/python $(CUDASIM)/cudasim.py run -- $(CUDA_VENV)/bin/python -m benchmarks.cuda_counters docs/results

# Instructions, registers and loads of the kernels' inner loop, beside those of the revision BEFORE.
BEFORE ?= HEAD
sass: build
	$(BIN)/python -m benchmarks.sass docs/results --before $(BEFORE)

# On a machine with a GPU: the suite of the CUDA back end on it, and how fast it is beside what torch offers. GPU_PYTHON is
# an interpreter with a CUDA build of torch, numpy and, for the tests, pytest and hypothesis; nothing is fetched.
GPU_PYTHON ?= python3
gpu-build:
	$(GPU_PYTHON) setup.py --quiet build_ext --inplace

gpu-test: gpu-build
	$(GPU_PYTHON) -m pytest -q tests/cuda $(PYTEST_ARGS)

gpu-bench: gpu-build
	$(GPU_PYTHON) -m benchmarks.gpu $(BENCH_ARGS) docs/results

clean:
	rm -rf build $(VENV)/.built
