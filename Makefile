# The two commands of this project are `make demo` and `make test`; both make .venv and install what is locked first.
#   PYTHON=python3.12 make demo      another interpreter (3.11 to 3.13)
#   VENV=/elsewhere make test        another place for the environment
PYTHON ?= python3
VENV ?= .venv
EXTRAS := data,encoders,eval,dev
LOCK := docker/constraints.txt
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Tools that a step looks up by name (ninja, torchrun) are the environment's, never the machine's.
export PATH := $(abspath $(BIN)):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast lint install lock

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1	\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 20

demo: $(STAMP) ## from rendered videos to generated ones on this machine: runs/demo/report.html
	$(BIN)/python -m launch.demo

test: lint ## everything: lint, types, fast tests, tests that take long or start several processes
	$(BIN)/python -m pytest
	$(BIN)/python -m pytest -m 'distributed or slow'

test-fast: $(STAMP) ## the tests that need one process, nothing else
	$(BIN)/python -m pytest

lint: $(STAMP) ## ruff and mypy
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy

install: $(STAMP) ## make .venv and install, nothing else

# The stamp is the last thing written, so an installation that was cut short is taken up again by the next command.
# The lock also holds for what builds the packages that come as source: through PIP_CONSTRAINT with pip before 25.3,
# through PIP_BUILD_CONSTRAINT with later ones.
$(STAMP): pyproject.toml $(LOCK)
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' || { \
	  echo "error: $(PYTHON) is not Python 3.11, 3.12 or 3.13: name one, as in PYTHON=python3.12 make $(MAKECMDGOALS)" >&2; exit 2; }
	test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV)
	PIP_CONSTRAINT=$(LOCK) PIP_BUILD_CONSTRAINT=$(LOCK) \
	  $(BIN)/python -m pip install --quiet -c $(LOCK) -e '.[$(EXTRAS)]'
	@touch $@

lock: ## resolve the newest versions pyproject.toml allows in a fresh environment and write them down
	sh docker/lock.sh $(PYTHON) $(LOCK) '$(EXTRAS)'
