# Each target stands alone: it makes .venv from constraints.txt where that is missing or older, then does its work.
# Needs Python 3.11 and a C++ compiler. Variables: PYTHON (the interpreter), JOBS (tests at a time), ARGS (handed on).

PYTHON ?= $(shell command -v python3.11 || command -v python3)
JOBS   ?= 2
ARGS   ?=

VENV  := .venv
STAMP := $(VENV)/.made-from-constraints
RUN   := PATH="$(CURDIR)/$(VENV)/bin:$$PATH"
PIP   := $(VENV)/bin/python -m pip -qq --disable-pip-version-check

.PHONY: install quickstart test lint format bench faults

install: $(STAMP)

quickstart: $(STAMP)
	@$(RUN) python launch/quickstart.py $(ARGS)

test: $(STAMP)
	@$(RUN) python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

faults: $(STAMP)
	@$(RUN) python -m pytest -m "faults or soak" -s $(ARGS)

lint: $(STAMP)
	@$(RUN) ruff check .
	@$(RUN) ruff format --check .

format: $(STAMP)
	@$(RUN) ruff check --fix .
	@$(RUN) ruff format .

bench: $(STAMP)
	@$(RUN) python -m benchmarks $(ARGS)

# torch comes first and by itself: pip then takes a local CPU build where it finds one, and wheels with CUDA elsewhere.
$(STAMP): constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed; make PYTHON=... names it")'
	@echo "making $(VENV) from constraints.txt (once; some minutes)"
	@$(PYTHON) -m venv --clear $(VENV)
	@$(PIP) install $$(grep '^torch==' constraints.txt)
	@$(PIP) install -r constraints.txt
	@touch $@
