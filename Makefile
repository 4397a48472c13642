# The two commands that a fresh machine needs are `make demo` and `make test`. Both install into .venv first, if that is out of date.

VENV := .venv
PYTHON := $(VENV)/bin/python
STAMP := $(VENV)/.installed
# `make gpu-test PYTHON=python3` takes that interpreter as it is and installs nothing; likewise the other targets.
READY := $(if $(filter $(VENV)/bin/python,$(PYTHON)),$(STAMP))
# A module's tests stay in one process, so that they share what it prepared. Servers are started by one process alone.
IN_TWO_PROCESSES := -n 2 --dist loadscope
GPU_TESTS := sgl-kernel-dcp/tests test/gpu
GPU_LOG := logs/gpu_test.log

.DEFAULT_GOAL := help
.PHONY: help install demo watch test test-fast gpu-test walk lint mutants figures results docs-check docs release-check clean

help: ## This list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

install: $(STAMP) ## Creates .venv and installs SGLang and this package (11 GB, about 3 minutes)

$(STAMP): pyproject.toml UPSTREAM_VERSION scripts/setup.sh
	bash scripts/setup.sh $(VENV)
	@touch $(STAMP)

demo: $(READY) ## Serves a prompt that is longer than any instance's memory, on the CPU (under 4 minutes)
	$(PYTHON) scripts/demo.py

watch: $(READY) ## The demo, then more requests until Ctrl-C: look at it in a browser, or with `sglang-dcp top`
	$(PYTHON) scripts/demo.py --keep

test: $(READY) ## All tests, real servers on the CPU included (under an hour on 2 cores)
	$(PYTHON) -m pytest $(IN_TWO_PROCESSES) -m "not server"
	$(PYTHON) -m pytest -m server

test-fast: $(READY) ## The tests that start neither a server nor another SGLang process (under 3 minutes)
	$(PYTHON) -m pytest $(IN_TWO_PROCESSES) -m "not server and not gpu and not own_process"

gpu-test: SHELL := /bin/bash
gpu-test: $(READY) ## Kernels and runtime on a Hopper GPU, against stock SGLang; skips with the reason where there is none
	@mkdir -p $(dir $(GPU_LOG))
	set -o pipefail; CUDA_DEVICE_MAX_CONNECTIONS=32 $(PYTHON) -m pytest -v -rsP --durations=20 -m gpu $(GPU_TESTS) 2>&1 | tee $(GPU_LOG)

walk: $(READY) ## A million random steps of the page protocol, and of conversations (`make test` takes a part of them)
	DYNCP_WALK_STEPS=1000000 $(PYTHON) -m pytest test/unit/test_protocol.py test/unit/test_protocol_conversations.py

lint: $(READY) ## ruff and mypy
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy

mutants: $(READY) ## Breaks the data path on purpose, one fault at a time; each must fail a test
	$(PYTHON) scripts/run_mutants.py

figures: $(READY) ## Recomputes the simulator's figures from the traces
	$(PYTHON) -m benchmark.simulate.figures

results: $(READY) ## Writes the tables of docs/results from benchmark/results
	$(PYTHON) -m benchmark.headline.plot
	$(PYTHON) -m benchmark.simulate.conversations.plot
	$(PYTHON) scripts/results_tables.py

docs-check: $(READY) ## Relative links in the documentation resolve
	$(PYTHON) scripts/check_links.py

docs: $(READY) ## Builds the documentation into site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict --quiet

release-check: $(READY) ## Builds the wheels and runs the demo from a fresh environment (11 GB; REUSE=.venv takes SGLang from there)
	$(PYTHON) scripts/release_check.py $(if $(REUSE),--reuse $(REUSE))

clean: ## Removes .venv and caches
	rm -rf $(VENV) site .pytest_cache .mypy_cache .ruff_cache .hypothesis logs
