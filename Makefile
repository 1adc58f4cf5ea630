# Each target sets up what it needs: a virtual environment in .venv, torch, the build. Variables:
#   TORCH=cpu|cuda   which torch a new environment gets (cpu is small)
#   PYTHON=python3   the Python (>= 3.10) a new environment is made from; gpu-check and gpu-bench run it directly

TORCH   ?= cpu
PYTHON  ?= python3
WORKERS ?= 2

VENV    := .venv
RUN     := $(VENV)/bin/python
PIP     := $(RUN) -m pip --disable-pip-version-check
CMAKE   := PATH="$(CURDIR)/$(VENV)/bin:$$PATH" cmake

# --no-deps: what torch needs comes with the package below, without asking PyTorch's index for each.
TORCH_cpu  := --no-deps --retries 1 --extra-index-url https://download.pytorch.org/whl/cpu torch==2.13.0
TORCH_cuda := torch

.DELETE_ON_ERROR:
.PHONY: demo test bench lint asan emulator-test mutate gpu-check gpu-bench wheel wheel-matrix clean native

demo: $(VENV)/.demo
	NARROWGAUGE_CUDA=OFF $(RUN) setup.py --quiet build_ext --inplace
	$(VENV)/bin/narrowgauge demo $(ARGS)

test: native emulator
	NARROWGAUGE_REQUIRE_NATIVE=1 NARROWGAUGE_REQUIRE_EMULATOR=1 $(RUN) -m pytest -n $(WORKERS) $(ARGS)

bench: native
	$(VENV)/bin/narrowgauge bench $(ARGS)

lint: $(VENV)/.dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $$(find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
	$(RUN) -m mypy

emulator-test: native emulator
	NARROWGAUGE_REQUIRE_EMULATOR=1 $(RUN) -m pytest -n $(WORKERS) -m emulator $(ARGS)

# The emulator's own checks find wrong indices of CUDA code; the sanitizers watch everything around them.
asan: native emulator-asan
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 NARROWGAUGE_EMULATOR_DIR=build/emulator-asan \
	NARROWGAUGE_EMULATOR_SCHEDULES=2 NARROWGAUGE_REQUIRE_EMULATOR=1 \
	$(RUN) -m pytest -n $(WORKERS) -m emulator $(ARGS)

# Switches off each barrier of the CUDA sources in turn: some test must notice.
mutate: native emulator
	$(RUN) tests/emulator/mutate.py $(ARGS)

# On a machine with a GPU whose Python has torch, with the libraries already in python/narrowgauge/lib.
gpu-check:
	PYTHONPATH=python $(PYTHON) -m pytest -m gpu $(ARGS)
	for tool in memcheck racecheck synccheck initcheck; do \
	    PYTHONPATH=python compute-sanitizer --tool $$tool --kernel-name kernel_substring=narrowgauge --error-exitcode 1 \
	        $(PYTHON) tools/gpu_samples.py || exit 1; \
	done

gpu-bench:
	PYTHONPATH=python $(PYTHON) -m narrowgauge.cli bench --device cuda $(ARGS)

wheel: $(VENV)/.dev
	rm -rf build/lib* build/bdist* dist
	$(PIP) wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .
	@ls dist/*.whl

wheel-matrix: wheel
	$(RUN) tools/wheel_matrix.py dist/narrowgauge-*.whl

clean:
	rm -rf build dist demo python/narrowgauge/lib .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# --- set-up ----------------------------------------------------------------------------------------------------

$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "narrowgauge needs Python 3.10 or newer")'
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet "setuptools>=77" cmake ninja
	$(PIP) install --quiet $(TORCH_$(TORCH))
	touch $@

# The package in place without its libraries, and what it needs to run; the libraries follow, incrementally.
$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	NARROWGAUGE_NATIVE=OFF $(PIP) install --quiet --no-build-isolation -e ".[cli]"
	touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	NARROWGAUGE_NATIVE=OFF $(PIP) install --quiet --no-build-isolation -e ".[dev]"
	touch $@ $(VENV)/.demo

# One CUDA architecture keeps this quick; a wheel has all of them.
native: $(VENV)/.dev
	NARROWGAUGE_CUDA_ARCHS=$${NARROWGAUGE_CUDA_ARCHS:-90a-real} $(RUN) setup.py --quiet build_ext --inplace

.PHONY: emulator emulator-asan
emulator: $(VENV)/.dev
	$(CMAKE) -S . -B build/cmake-emulator -G Ninja -DPython_EXECUTABLE=$(CURDIR)/$(RUN) \
	    -DNARROWGAUGE_EMULATOR=ON -DNARROWGAUGE_CPU=OFF -DNARROWGAUGE_CUDA=OFF
	$(CMAKE) --build build/cmake-emulator

emulator-asan: $(VENV)/.dev
	$(CMAKE) -S . -B build/cmake-emulator-asan -G Ninja -DPython_EXECUTABLE=$(CURDIR)/$(RUN) \
	    -DNARROWGAUGE_EMULATOR=ON -DNARROWGAUGE_CPU=OFF -DNARROWGAUGE_CUDA=OFF -DNARROWGAUGE_SANITIZE=ON
	$(CMAKE) --build build/cmake-emulator-asan
