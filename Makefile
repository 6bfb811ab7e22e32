# make demo   fused layers swapped into a plain SegNet, trained on pictures, checked against torch
# make test   the whole test suite
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

.PHONY: demo test clean

demo: $(INSTALLED)
	$(BIN)/fastseg demo

test: $(INSTALLED)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m pytest -n auto --dist worksteal

# One stamp for the environment: a second run installs nothing until the pins or the requirements change.
$(INSTALLED): constraints.txt setup.py pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[demo,bench,test]"
	touch $@

clean:
	rm -rf $(VENV) build dist demo .pytest_cache .ruff_cache
