"""What fastseg.swap does not swap, and its report."""

import copy
import json
import pickle

import pytest
import torch
from support.swap_common import MyPool, kinds, reasons
from torch import nn

import fastseg


class Stock(nn.MaxPool2d):
    """Has torch's forward."""


class MaxPool2d(nn.Module):
    """Shares only the name with torch's class."""


def unswappable():
    """Layers that swap must not change, each with a part of the reason."""
    own = nn.MaxPool2d(2)
    own.forward = lambda input: input
    strange = nn.ConvTranspose2d(2, 2, 2)
    strange.weight = type("Strange", (nn.Parameter,), {})(strange.weight.detach())
    return {
        "subclass": (MyPool(2), "subclass"),
        "lazy": (nn.LazyConvTranspose2d(4, 2), "lazy"),
        "scripted": (torch.jit.script(nn.MaxPool2d(2)), "torch.jit"),
        "traced": (torch.jit.trace(nn.ConvTranspose2d(2, 2, 2), torch.zeros(1, 2, 3, 3)), "torch.jit"),
        "quantized": (torch.ao.nn.quantized.ConvTranspose2d(2, 2, 2), "quantized"),
        "reference": (torch.ao.nn.quantized.reference.ConvTranspose2d(2, 2, 2), "quantized"),
        "same name": (MaxPool2d(), "does not extend it"),
        "own forward": (own, "its own forward"),
        "strange weight": (strange, "type Strange"),
    }


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_layers_that_cannot_be_swapped_are_reported_with_the_reason():
    cases = unswappable()
    model = nn.ModuleDict({name: module for name, (module, _) in cases.items()})
    model["plain"] = nn.MaxPool2d(2)
    before = kinds(model)[:-1]
    report = fastseg.swap(model)
    assert kinds(model)[:-1] == before and type(model["plain"]) is fastseg.nn.MaxPool2d
    found = reasons(report)
    assert found.keys() >= cases.keys()
    for name, (_, word) in cases.items():
        assert word in found[name], name


def test_other_layers_are_not_candidates():
    model = nn.Sequential(nn.MaxPool1d(2), nn.MaxPool3d(2), nn.AvgPool2d(2), nn.ConvTranspose1d(1, 1, 1), nn.NLLLoss())
    before = kinds(model)
    assert fastseg.swap(model).candidates == []
    assert kinds(model) == before


# --- the report ------------------------------------------------------------------------------------------------------


def test_the_report_is_a_table_and_a_dictionary(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    model = nn.ModuleDict({"[red]pool": nn.MaxPool2d(2), "mine": MyPool(2)})
    report = fastseg.swap(model)
    text = str(report)
    why = "is a subclass with its own forward"
    for word in ("ModuleDict: 1 of 2 layers swapped", "[red]pool", "yes", "mine", f"no: {why}"):
        assert word in text
    assert json.loads(json.dumps(report.as_dict())) == {
        "model": "ModuleDict",
        "layers": [
            {
                "names": ["[red]pool"],
                "op": "max_pool2d",
                "class": "torch.nn.modules.pooling.MaxPool2d",
                "swapped": True,
                "reason": None,
                "together": [],
            },
            {
                "names": ["mine"],
                "op": "max_pool2d",
                "class": "support.swap_common.MyPool",
                "swapped": False,
                "reason": why,
                "together": [],
            },
        ],
        "compact_indices": False,
        "compact_reason": None,
    }


def test_the_table_is_as_wide_as_the_terminal(monkeypatch):
    model = nn.ModuleDict({"a_name_of_some_length" * 3: nn.Sequential(*[nn.BatchNorm2d(3), nn.ReLU()] * 8)})
    report = fastseg.swap(model)
    for columns in (60, 80, 200):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert max(map(len, str(report).splitlines())) <= columns
    assert len(str(report).splitlines()) == 6  # no line is wrapped in a terminal of that width


@pytest.mark.parametrize("make", [lambda: nn.MaxPool2d(2), lambda: Stock(2)])
def test_a_report_kept_in_its_model_is_copied_and_saved_with_it(make):
    model = nn.Sequential(make())
    model.report = fastseg.swap(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.report.candidates[0].module is twin[0] and type(twin[0]) is type(model[0])
        twin.report.undo()
        assert type(twin[0]) is type(make()) is not type(model[0])
