# make demo   set everything up and run the whole job on real text (under ten minutes, two cores)
# make test   set everything up and pass the tests
# make test-adapters   the tests against other loaders and frameworks (installs torch and others)
# make fuzz   longer runs of the native cores under the sanitizers (FUZZ_CASES=...)
# make kernels   compile the kernels for Hopper GPUs and check the compiler's report
# make lint   format, lint and type checks
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Any release will do; where a build without CUDA is at hand, name that one.
TORCH ?= torch==2.13.0
TORCHVISION ?= torchvision==0.28.0
SOURCES := pyproject.toml CMakeLists.txt $(wildcard kernels/*/*.cpp kernels/*/*.h)

# A checkout of ThunderKittens at the commit of kernels/thunderkittens.pin.
THUNDERKITTENS_ROOT ?= $(wildcard build/thunderkittens)

FUZZ_CASES ?= 200000
FUZZ_FLAGS := -std=c++17 -O1 -g -ffp-contract=off -fsanitize=address,undefined \
  -fno-sanitize-recover=all

.PHONY: demo quick test test-slow test-adapters fuzz kernels lint format bench clean

demo: $(VENV)/.demo
	$(BIN)/metagrad-filter demo

quick: $(VENV)/.demo
	$(BIN)/metagrad-filter demo --quick

test: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(VENV)/.test
	$(BIN)/python -m pytest -m slow

test-adapters: $(VENV)/.adapters
	$(BIN)/python -m pytest tests/adapters tests/test_server.py

fuzz:
	mkdir -p build/fuzz
	set -e; for source in tests/native/*_fuzz.cpp; do \
	  program=build/fuzz/$$(basename $$source .cpp); \
	  $(CXX) $(FUZZ_FLAGS) -I kernels/scorer $$source -o $$program; \
	  $$program $(FUZZ_CASES) 1; done

# Says what is missing and goes on where nvcc or the headers of ThunderKittens are not there.
kernels: $(VENV)/.test
	THUNDERKITTENS_ROOT=$(THUNDERKITTENS_ROOT) $(BIN)/python -m bench.kernels --compile

lint: $(VENV)/.lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

format: $(VENV)/.lint
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Regenerates the committed records behind the README's tables, and the tables.
bench: $(VENV)/.demo
	$(BIN)/python -m bench.demo
	$(BIN)/python -m bench.metagradients
	$(BIN)/python -m bench.second_order
	$(BIN)/python -m bench.lds
	$(BIN)/python -m bench.stability
	$(BIN)/python -m bench.distillation
	$(BIN)/python -m bench.estimators
	$(BIN)/python -m bench.refresh
	$(BIN)/python -m bench.drift
	$(BIN)/python -m bench.own_pool
	$(BIN)/python -m bench.series_demo
	$(BIN)/python -m bench.series
	$(BIN)/python -m bench.series_store
	$(BIN)/python -m bench.attention
	$(BIN)/python -m bench.throughput
	$(BIN)/python -m bench.loader
	$(BIN)/python -m bench.loader --worker

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; name one: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/.demo: $(BIN)/python $(SOURCES)
	$(BIN)/python -m pip install -q -e '.[demo]'
	touch $@

$(VENV)/.test: $(BIN)/python $(SOURCES)
	$(BIN)/python -m pip install -q -e '.[demo,test]'
	touch $@

$(VENV)/.adapters: $(VENV)/.test
	$(BIN)/python -m pip install -q '$(TORCH)'
	$(BIN)/python -m pip install -q -e '.[demo,test,adapters]'
	# MosaicML Streaming pins older releases of packages that it works with (numpy, transformers).
	$(BIN)/python -m pip install -q --no-deps mosaicml-streaming==0.13.0 '$(TORCHVISION)'
	touch $@

$(VENV)/.lint: $(BIN)/python $(SOURCES)
	$(BIN)/python -m pip install -q -e '.[demo,test,lint]'
	touch $@

clean:
	rm -rf $(VENV) build demo
