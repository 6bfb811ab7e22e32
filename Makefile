# make demo      fused layers swapped into a plain SegNet, trained on pictures, checked against torch
# make test      the whole test suite
# make gpu       on a machine with a GPU: its tests, verify, benchmarks and machine code, into build/gpu (under 9 minutes);
#                with that machine's own torch and triton: python3 benchmarks/gpu.py --out build/gpu
# make witness   without a GPU: fastseg verify on the IR that Triton compiles, for compute capability 8.0 and 9.0 (needs
#                Python 3.12 or 3.13, and 6 GB for an environment of its own)
# make versions  with each supported pair of torch and triton: quick tests, machine code, the wheel; downloads gigabytes
#                unless environments are given: make versions ARGS="--environment 2.15.0=/path/to/python"
# make docs      the documentation with the API reference, into build/site
PYTHON ?= python3
WITNESS_PYTHON ?= python3.12
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
WITNESS := .venv-witness
WITNESS_PINS := tests/support/witness-requirements.txt

.PHONY: demo test gpu witness versions docs clean

demo: $(INSTALLED)
	$(BIN)/fastseg demo

test: $(INSTALLED)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m pytest -n auto

gpu: $(INSTALLED)
	$(BIN)/python benchmarks/gpu.py --out build/gpu

witness: $(WITNESS)/installed
	$(WITNESS)/bin/python tests/support/run_witness.py

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

# Its own environment: ttsem needs one version of Triton, which constraints.txt does not name.
$(WITNESS)/installed: $(WITNESS_PINS) setup.py
	$(WITNESS_PYTHON) -m venv $(WITNESS)
	$(WITNESS)/bin/python -m pip install --quiet --requirement $(WITNESS_PINS) --editable .
	touch $@

clean:
	rm -rf $(VENV) $(WITNESS) build dist demo *.egg-info .pytest_cache .ruff_cache
