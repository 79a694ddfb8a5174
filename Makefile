# `make demo` and `make test` set up what they need first. Can be given: make demo LAB=../lab ARGS="--minutes 3" PYTHON=python3.12

PYTHON ?= python3
VENV ?= .venv
LAB ?=
ARGS ?=
BIN := $(VENV)/bin
# Written last, so that an interrupted installation is taken up again.
STAMP := $(VENV)/.installed

.PHONY: setup demo test slow check clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "make: $(PYTHON) is missing or older than Python 3.11; name another: make PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
		{ echo "make: $(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -e '.[dev]' -c constraints.txt
	@touch $@

# In this folder, or in LAB.
demo: setup
ifeq ($(LAB),)
	$(BIN)/shot demo $(ARGS)
else
	cd '$(LAB)' && '$(abspath $(BIN))/shot' demo $(ARGS)
endif

test: setup
	$(BIN)/python -m pytest $(ARGS)

# The minutes-long tests that `make test` leaves out.
slow: setup
	$(BIN)/python -m pytest -m slow $(ARGS)

check: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyrefly check
	$(BIN)/lint-imports --no-logo

# Leaves runs, prepared data and the environment alone.
clean:
	rm -rf build dist .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
