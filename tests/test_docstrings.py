"""Public docstrings: every function and class has its sections, and the examples print what they show."""

import doctest
import inspect

import pytest
import torch

import fastseg

PUBLIC = {
    **{f"functional.{name}": getattr(fastseg.functional, name) for name in fastseg.functional.__all__},
    **{f"nn.{name}": getattr(fastseg.nn, name) for name in fastseg.nn.__all__},
    **{f"models.{name}": getattr(fastseg.models, name) for name in fastseg.models.__all__ if name != "MODELS"},
    **{name: getattr(fastseg, name) for name in fastseg.__all__ if callable(getattr(fastseg, name))},
}
NEEDED = {  # sections that a docstring of each kind must have
    "functional": ("Args:", "Raises:", "Example:"),
    "nn": ("Example:",),
    "models": ("Example:",),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_the_sections_are_there(name):
    text = inspect.getdoc(PUBLIC[name]) or ""
    first, _, rest = text.partition("\n")
    assert first.endswith(".") and len(first) > 20, "a one-line summary"
    assert not rest or rest.startswith("\n"), "an empty line after the summary"
    for section in NEEDED.get(name.split(".")[0], ()):
        assert f"\n{section}\n" in text, section


@pytest.mark.parametrize("name", PUBLIC)
def test_the_examples_print_what_they_show(name):
    if torch.cuda.is_available():
        pytest.skip("the examples show what a CPU prints")
    finder = doctest.DocTestFinder(recurse=False)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    for test in finder.find(PUBLIC[name], name, globs={}):
        said = []
        runner.run(test, out=said.append)
        assert not runner.failures, "".join(said)
