# Every target sets itself up: a bare Linux machine with Python >= 3.10 and make is enough.
#
#   make demo            attribute the example file with the tiny judge, and compare with the loop
#   make train-demo      train the tiny policy with itself as judge: a log, a plot, minutes
#   make test            everything that CI runs
#   make equal-answers   the benchmarks in their smallest form, as a part of that
#   make bench           the CPU benchmarks, in full
#   make gpu             build, tests, compute-sanitizer and benchmarks on an NVIDIA GPU; by PYTHON and its
#                        own torch, with no network and no virtual environment
#   make lint            formatting, lint and types
#   make compile-only    every Triton kernel for every GPU generation, without a GPU
#   make format          rewrite the sources in the house format
#   make clean           remove what the targets made, .venv included
#
# Variables: PYTHON (the interpreter to start from), VENV (where to set up), TORCH (what pip is told to
# install as torch, options included; by default a CPU build, as a bare "torch" brings gigabytes of
# CUDA). A torch that is in VENV already is left alone. Of `make gpu`: PARTS (build,tests,sanitize,bench
# or sweep), RESULTS (the folder for results files and logs), MINUTES (of the benchmarks).

VENV ?= .venv
# The first that is new enough. ("true" last: make takes an exit status of 127 for no output at all.)
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo $$p && break; \
	done; true)
TORCH ?=
PARTS ?= build,tests,sanitize,bench
RESULTS ?= bench/results
MINUTES ?= 6

BIN := $(VENV)/bin
STAMP := $(VENV)/.set-up
CPP := $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/*.cpp csrc/cpu/*.h csrc/cuda/* tests/cpp/*.cpp tests/cpp/*.h tests/cpp/*.cu bench/*.cpp)
CPU_TORCH := torch==2.13.0
CPU_INDEX := https://download.pytorch.org/whl/cpu

export PIP_DISABLE_PIP_VERSION_CHECK = 1
# Bytecode comes of what is imported, at the first time: pip would make it of everything, which takes
# half a minute.
INSTALL := $(BIN)/pip install -q --no-compile
export PYTHONDONTWRITEBYTECODE =
# What pyproject.toml asks for, line by line.
REQUIREMENTS = $(BIN)/python -c 'from setuptools.config.pyprojecttoml import read_configuration as read; \
	project = read("pyproject.toml", expand=False)["project"]; extra = project["optional-dependencies"]; \
	print(*project["dependencies"], *extra["test"], *extra["bench"], sep="\n")'

.PHONY: demo train-demo test equal-answers bench gpu lint compile-only format clean setup

demo: $(STAMP)
	@mkdir -p build
	$(BIN)/g2r-fast attribute examples/demo.jsonl --judge tiny --out build/demo.jsonl --overwrite --show --compare

train-demo: $(STAMP)
	$(BIN)/g2r-fast train --config examples/tiny_policy/demo.yaml --output build/train-demo

# What takes one core runs beside the rest.
test: $(STAMP)
	@$(MAKE) --no-print-directory -j 3 --output-sync=target lint compile-only equal-answers
	$(BIN)/python -m pytest tests -q -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

# The benchmarks in their smallest form: they assert equal answers and report no speed.
equal-answers: $(STAMP)
	$(BIN)/python -m pytest bench -q --quick --threads 1

bench: $(STAMP)
	$(BIN)/python -m pytest bench -q

gpu:
	$(or $(PYTHON),false) -m bench.gpu --parts "$(PARTS)" --results "$(RESULTS)" --minutes "$(MINUTES)"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/mypy

# The compilers allocate and free all the time, and glibc by itself keeps only seven pieces of a size at
# hand: it is to keep them, and what it has from the system, too.
KEPT := tcache_count=60000 trim_threshold=1000000000 top_pad=67108864 mmap_threshold=100000000
compile-only: $(STAMP)
	GLIBC_TUNABLES=$(subst $() ,:,$(KEPT:%=glibc.malloc.%)) $(BIN)/python tests/compile_only.py

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

clean:
	rm -rf $(VENV) build dist *.egg-info g2r_fast/_core*.so g2r_fast/_cpu_ops.so g2r_fast/_cuda_ops.so g2r_fast/*_missing.txt

setup: $(STAMP)

# Once; again when the package's description or its compiled part changes.
$(STAMP): pyproject.toml setup.py g2r_fast/building.py $(wildcard csrc/* csrc/cpu/* csrc/cuda/*)
	@$(or $(PYTHON),false) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "no Python >= 3.10 found; say make PYTHON=/path/to/python" >&2; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || \
		{ echo "$(PYTHON) -m venv failed: on Debian and Ubuntu, apt install python3-venv" >&2; exit 1; }
	$(INSTALL) "setuptools>=77" wheel "pybind11>=2.13"
ifneq ($(TORCH),)
	@$(BIN)/python -c "import torch" 2>/dev/null || $(INSTALL) $(TORCH)
else
	@# The CPU build has a name of its own. Only where pip knows it from no index is its home asked,
	@# and only where that cannot be reached is the large build taken.
	@$(BIN)/python -c "import torch" 2>/dev/null || \
		$(INSTALL) "$(CPU_TORCH)+cpu" 2>/dev/null || \
		$(INSTALL) --retries 1 --timeout 20 "$(CPU_TORCH)" --index-url $(CPU_INDEX) || \
		{ echo "no CPU build of torch found: installing the full one"; $(INSTALL) "$(CPU_TORCH)"; }
endif
	@# pip uses one core: the parts are compiled meanwhile, and the install behind finds them there.
	$(BIN)/python setup.py -q build_ext --inplace & $(REQUIREMENTS) | $(INSTALL) -r /dev/stdin; \
		status=$$?; wait; exit $$status
	$(INSTALL) --no-build-isolation -e ".[test,bench]"
	@$(BIN)/g2r-fast doctor
	@touch $@
