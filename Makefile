# make demo   fused layers swapped into a plain SegNet, trained on pictures, checked against torch
# make test   the whole test suite
# make gpu    on a machine with a GPU: its tests, verify, benchmarks and machine code, into build/gpu (under 9 minutes);
#             with that machine's own torch and triton: python3 benchmarks/gpu.py --out build/gpu
# make versions  with each supported pair of torch and triton: quick tests, machine code, the wheel; downloads gigabytes
#             unless environments are given: make versions ARGS="--environment 2.15.0=/path/to/python"
# make docs   the documentation with the API reference, into build/site
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

.PHONY: demo test gpu versions docs clean

demo: $(INSTALLED)
	$(BIN)/fastseg demo

test: $(INSTALLED)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m pytest -n auto

gpu: $(INSTALLED)
	$(BIN)/python benchmarks/gpu.py --out build/gpu

versions:
	$(PYTHON) tests/versions.py $(ARGS)

docs: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs build/site

# One stamp for the environment: a second run installs nothing until the pins or the requirements change.
$(INSTALLED): constraints.txt setup.py pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[demo,bench,test]"
	touch $@

clean:
	rm -rf $(VENV) build dist demo *.egg-info .pytest_cache .ruff_cache
