# `make` lists the verbs. Each sets up what it needs and nothing twice; nothing outside this directory is changed.
PYTHON ?= python3
VENV   ?= .venv
# For machines without a torch; a torch of 2.10 or newer that $(PYTHON) has is kept, and so are its triton and torchvision.
TORCH  ?= torch==2.13.0
TRITON ?= triton==3.7.1
TIMM   ?= timm==1.0.31
RESULTS ?= build/bench
OUT    ?= build/gpu
ARGS   ?=

SHELL := /bin/bash
.DELETE_ON_ERROR:
.PHONY: help build lint test test-full mutants sanitize memcheck static compatibility bench bench-ops bench-peers train-demo tune plot readme gpu gpu-quick clean

py      := $(VENV)/bin/python
pip     := $(py) -m pip install -q --disable-pip-version-check
sources := $(shell find csrc -type f 2>/dev/null)

has_torch := import torch; assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10)
# One process of tests for each core, a file in one of them for its tests share costly fixtures; idle OpenMP threads
# sleep, for there are more of them than cores then. Not by xdist_group: xdist 3.8 loses the groups under pytest 9.
spread    = $$($(call has,xdist) && printf -- '-n auto --maxprocesses 8 --dist loadfile')
has       = $(py) -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("$(1)") is None)'

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: $(VENV)/.built ## the environment, the package and its C++ extension

lint: $(VENV)/.installed ## ruff, mypy, clang-format
	$(py) -m ruff check .
	$(py) -m ruff format --check .
	$(py) -m mypy
	@echo "clang-format" && PATH="$(VENV)/bin:$$PATH" clang-format --dry-run -Werror \
	  $(filter %.h %.cpp %.cuh %.cu,$(sources) $(wildcard tests/emulation/*.* tests/emulation/cuda/*))

test: $(VENV)/.built ## every test (ARGS="-k attention" for some)
	OMP_WAIT_POLICY=passive $(py) -m pytest $(spread) $(ARGS)

test-full: $(VENV)/.built ## every test with its whole grid of cases
	OMP_WAIT_POLICY=passive $(py) -m pytest --full $(spread) $(ARGS)

mutants: $(VENV)/.built ## plant known faults in the kernels and see that the tests notice (ARGS="attention" for one op)
	$(py) tests/mutants.py --csv benchmarks/results/mutants.csv $(ARGS)

# Builds of their own: the package and its extension lie in build/<verb>, in front of the checkout's.
checked = FASTVIT_BUILD=cpu FASTVIT_CXXFLAGS="-O1 -g -fno-omit-frame-pointer -DFASTVIT_SCRATCH_KEPT=0 $(1)" \
  PYTHONWARNINGS=ignore $(py) setup.py -qq build --build-lib build/$@ --build-temp build/$@/objects
watched := OMP_WAIT_POLICY=passive PYTHONMALLOC=malloc
runtime  = $$($${CXX:-c++} -print-file-name=$(1).so)

# Uninitialised memory is NaN on the heap (255) and absurd on the stack (a pattern): results show who reads it.
sanitize: $(VENV)/.installed ## the CPU kernels under AddressSanitizer and UBSan (ARGS=tests/test_linear.py: these tests)
	@echo "building the extension" && $(call checked,-fsanitize=address -fsanitize=undefined -fsanitize=float-cast-overflow \
	  -fno-sanitize-recover=all -ftrivial-auto-var-init=pattern)
	LD_PRELOAD="$(call runtime,libasan) $(call runtime,libubsan) $(call runtime,libstdc++)" \
	  ASAN_OPTIONS=detect_leaks=0:malloc_fill_byte=255:max_malloc_fill_size=1073741824 UBSAN_OPTIONS=print_stacktrace=1 \
	  PYTHONPATH=build/$@ $(watched) $(if $(ARGS),$(VENV)/bin/pytest $(ARGS),$(py) tests/memory.py)

memcheck: $(VENV)/.installed ## the CPU kernels under valgrind, whose CPU has no AVX-512
	@command -v valgrind >/dev/null || { echo "no valgrind: apt-get install valgrind"; exit 1; }
	@echo "building the extension" && $(call checked)
	PYTHONPATH=build/$@ $(watched) valgrind -q --error-exitcode=1 --fair-sched=yes --num-callers=25 --partial-loads-ok=no \
	  --suppressions=tests/memcheck.supp $(py) tests/memory.py

static: $(VENV)/.installed ## the kernels compiled for every chip: registers, occupancy, the roofline's time (no GPU needed)
	env -u TRITON_INTERPRET $(py) -m fastvit.benchmarks.static $(ARGS)
	$(py) -m fastvit.benchmarks.sass --csv benchmarks/results/cuda.csv >/dev/null

compatibility: $(VENV)/.peers ## what keeps working on other people's models: benchmarks/results/compatibility.csv and the README
	$(py) tests/compatibility.py --csv benchmarks/results/compatibility.csv $(ARGS)
	$(py) -m fastvit.benchmarks.readme

bench: $(VENV)/.built ## ViT-B/16 on two photographs: table, rows, pictures, report in RESULTS=build/bench (ARGS="--batch 16")
	$(py) -m fastvit bench --results $(RESULTS) $(ARGS)

bench-ops: $(VENV)/.built ## every op against eager, SDPA's backends, torch.compile and what else is installed (ARGS="--op attention")
	$(py) -m fastvit bench-ops --compile --peers --backend auto --results $(RESULTS) $(ARGS)

bench-peers: $(VENV)/.peers ## ViT-S/16 and B/16 against ONNX Runtime, OpenVINO, zentorch, torch.compile, transformers, torchvision
	$(py) -m fastvit bench --grid peers --peers --backend auto --seconds 8 --results $(RESULTS) $(ARGS)

train-demo: $(VENV)/.built ## a small ViT on handwritten digits from scratch, by fastvit and in eager: accuracy, curves, where it looks
	$(py) -m fastvit.benchmarks.train_demo build/train-demo $(ARGS)

plot: $(VENV)/.installed ## draw the rows in RESULTS=build/bench again
	$(py) -m fastvit.benchmarks.plot $(RESULTS)

readme: $(VENV)/.installed ## write the README's tables from benchmarks/results/
	$(py) -m fastvit.benchmarks.readme

gpu: ## check and measure on the GPU with the system's python as it is; results in OUT=build/gpu
	mkdir -p "$(OUT)" && PYTHON="$(PYTHON)" OUT="$(abspath $(OUT))" bash benchmarks/gpu.sh $(ARGS)

gpu-quick: ## the same in under three minutes
	@$(MAKE) --no-print-directory gpu ARGS="--quick $(ARGS)"

tune: ## search faster block sizes on the GPU with the system's python; prints a table to commit (ARGS="--op attention")
	mkdir -p "$(OUT)" && OUT="$(abspath $(OUT))" $(PYTHON) -m fastvit.benchmarks.tune $(ARGS)

clean: ## remove everything built; the environment stays
	rm -rf build dist *.egg-info fastvit/*.so .mypy_cache .pytest_cache .ruff_cache
	rm -f $(VENV)/.built

# The environment. --system-site-packages shows it the torch that is there; the .pth file does so where $(PYTHON) lives
# in an environment of its own. Debian's python3 comes without ensurepip: virtualenv and pip --python are ways round.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "fastvit needs Python 3.10 or newer: make PYTHON=python3.12"; exit 1; }
	@set -u; site=; where=; \
	if where=$$($(PYTHON) -W ignore -c '$(has_torch); print(torch.__path__[0])' 2>/dev/null); then \
	  echo "keeping the torch in $$where"; site=--system-site-packages; fi; \
	$(py) -m pip --version >/dev/null 2>&1 || { echo "making $(VENV)"; \
	  $(PYTHON) -m venv $$site $(VENV) >/dev/null 2>&1 \
	  || $(PYTHON) -m virtualenv -q $$site $(VENV) 2>/dev/null \
	  || { $(PYTHON) -m venv --without-pip $$site $(VENV) && $(PYTHON) -m pip -q --python $(py) install pip; } 2>/dev/null \
	  || { echo "$(PYTHON) cannot make a virtual environment: apt-get install python3-venv"; exit 1; }; }; \
	test -z "$$where" || $(py) -c 'import torch' 2>/dev/null \
	  || dirname "$$where" >"$$($(py) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/kept_torch.pth"
	@touch $@

# torch and what depends on one exact torch, with --no-deps so that none of them brings another; then all of them pinned.
$(VENV)/.torch: $(VENV)/.created
	@echo "installing torch and what it runs with, unless they are there"
	@$(pip) 'setuptools>=70' wheel
	@$(py) -W ignore -c '$(has_torch)' 2>/dev/null || $(pip) '$(TORCH)'
	@test "$$(uname -s)" != Linux || $(call has,triton) || $(pip) --no-deps '$(TRITON)'
	@$(call has,torchvision) || $(pip) --no-deps "torchvision==0.$$($(py) -W ignore -c 'import torch; print(15 + int(torch.__version__.split(".")[1]))').*"
	@$(call has,timm) || $(pip) --no-deps '$(TIMM)'
	@$(py) -c "$$write_constraints" >$(VENV)/constraints.txt
	@touch $@

define write_constraints
from importlib.metadata import PackageNotFoundError, version
for name in ("torch", "triton", "pytorch-triton", "torchvision"):
    try:
        print(f"{name}=={version(name)}")
        if name.endswith("triton") and version(name).startswith(("3.4", "3.5", "3.6")):
            print("numpy<2.4  # what its interpreter understands")
    except PackageNotFoundError:
        pass
endef
export write_constraints

$(VENV)/.installed: pyproject.toml setup.py $(VENV)/.torch
	@echo "installing fastvit and its tools"
	@FASTVIT_BUILD=none PYTHONWARNINGS=ignore $(pip) -c $(VENV)/constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

# Each by itself: one that cannot be had leaves the others. zentorch asks for any torch, and loads beside its own only.
$(VENV)/.peers: $(VENV)/.built
	@echo "installing the peers"
	@minor=$$($(py) -W ignore -c 'import torch; print(".".join(torch.__version__.split(".")[:2]))'); \
	$(py) -c "$$list_peers" "zentorch==$$minor.*" | while read -r peer; do \
	  PYTHONWARNINGS=ignore $(pip) -c $(VENV)/constraints.txt "$$peer" </dev/null \
	  || echo "$$peer cannot be installed: measuring without it"; done
	@touch $@

define list_peers
import re, sys
from importlib.metadata import requires
peers = [need.partition(";")[0].strip() for need in requires("fastvit") if re.search(r"extra == .peers.", need)]
print(*(need for need in peers if not need.startswith("fastvit")), *sys.argv[1:], sep="\n")
endef
export list_peers

# Without a compiler or Python's headers fastvit is pure Python: that is said, and is no error. A failed compilation is one.
$(VENV)/.built: $(VENV)/.installed $(sources)
	@if [ "$$FASTVIT_BUILD" = none ]; then echo "FASTVIT_BUILD=none: no extension, so no cpu and cuda backends"; \
	elif ! command -v $${CXX:-c++} >/dev/null; then echo "no C++ compiler: pure-Python install, the cpu and cuda backends stay off (apt-get install g++)"; \
	elif ! $(py) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))'; then \
	  echo "no Python.h: pure-Python install, the cpu and cuda backends stay off (apt-get install python3-dev)"; \
	else echo "building the extension"; $(py) setup.py -q build_ext --inplace; fi
	@touch $@
