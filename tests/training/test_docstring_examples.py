"""The examples in the docstrings run and print what they say."""

import doctest
import importlib
import pkgutil

import pytest

import fastseg.training

MODULES = [
    "fastseg.atomic_write",
    "fastseg.commands.options",
    "fastseg.commands.model_spec",
    *(f"fastseg.training.{module.name}" for module in pkgutil.iter_modules(fastseg.training.__path__)),
]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_run(name):
    if name == "fastseg.training.data":
        pytest.importorskip("sklearn")
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0
