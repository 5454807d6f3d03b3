# Two commands for a user: `make quickstart`, `make test`. Both set up .venv first; nothing else is installed anywhere.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: quickstart test check format setup clean

setup: $(VENV)/.installed

# torch comes first and alone, so that its pinned CPU build is the one everything else finds.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), "megamm needs Python 3.10 or newer, this is " + sys.version.split()[0]'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "setting up $(VENV) (a few minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[quickstart,wandb,evaluation,dev]'
	@touch $@

quickstart: setup
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python launchers/quickstart.py

test: setup
	@PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(PYTEST_ARGS)

check: setup
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/pyright
	@$(BIN)/lint-imports

format: setup
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) quickstart .pytest_cache .ruff_cache *.egg-info
