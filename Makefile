# `make` alone lists the targets. Every target sets up what it needs: Python 3.11 and make are enough.

# The interpreter that creates the environment, and the environment's folder.
PYTHON ?= python3
VENV ?= .venv
# Processes that the tests run in: as many as there are cores, or a number.
JOBS ?= auto
# How tests are divided among them.
DIST := loadfile
# More arguments for the target's command, as in: make test ARGS="-k coda -x"
ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RUFF_PATHS := peft_cl tests examples benchmarks
RUFF_EXISTING = $(wildcard $(RUFF_PATHS))

# Tests marked `data` need real images; without them they are deselected by name, not skipped one by one.
ifeq ($(strip $(PEFT_CL_DATA)),)
SELECTION := and not data
SELECTION_NOTE := PEFT_CL_DATA is not set: tests marked 'data' are left out
else
SELECTION :=
SELECTION_NOTE := PEFT_CL_DATA=$(PEFT_CL_DATA): tests marked 'data' run too
endif
# Tests of a file share what it makes once. Slow ones take minutes: a process without work takes over from another.
PYTEST = HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(JOBS) --dist $(DIST)
# Keeps pytest's own exit status.
KEPT = status=$$?; echo $$status > $(PYTEST_STATUS); exit $$status

# Where .ci/run reads pytest's own exit status from: make turns every failure into its own status 2.
PYTEST_STATUS ?= /dev/null

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow quality style clean

help:  ## List the targets
	@sed -n 's/^\([a-z-]*\):.*##  *\(.*\)/\1|\2/p' $(firstword $(MAKEFILE_LIST)) | while IFS='|' read -r name text; do printf '  make %-9s %s\n' "$$name" "$$text"; done

install: $(STAMP)  ## Create .venv and install the project with its tested dependencies, where not done yet

# The constraints hold the versions that were tested. On Linux PyPI's torch brings CUDA packages; README has the way out.
$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV); the first time takes some minutes."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

demo: install  ## Train and compare the methods on small data, from nothing (sets up first)
	@$(BIN)/peft-cl demo $(ARGS)

test: install  ## Run the tests (with those on real images if PEFT_CL_DATA names their folder)
	@echo "$(SELECTION_NOTE)"
	@$(PYTEST) -m "not slow $(SELECTION)" $(ARGS); $(KEPT)

test-slow: DIST := worksteal
test-slow: install  ## Run the tests that take long: more kills and processes, matrices, benchmarks
	@echo "$(SELECTION_NOTE)"
	@$(PYTEST) -m "slow $(SELECTION)" $(ARGS); $(KEPT)

quality: install  ## Check lint and format, change nothing
	@$(BIN)/ruff check $(RUFF_EXISTING)
	@$(BIN)/ruff format --check $(RUFF_EXISTING)

style: install  ## Mend lint and format where ruff can
	@$(BIN)/ruff check --fix-only $(RUFF_EXISTING)
	@$(BIN)/ruff format $(RUFF_EXISTING)

clean:  ## Remove caches and build outputs (the environment stays)
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	find $(RUFF_EXISTING) -name __pycache__ -type d -prune -exec rm -rf {} +
