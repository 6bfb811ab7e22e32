"""Comparison of whole models: equal models pass, and every kind of difference is found."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from fastseg.verification import equivalence


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.unused = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Linear(1, 1)
        self.drop = nn.Dropout(0.5)

    def forward(self, x, scale=None):
        y = self.drop(self.norm(self.conv(x)))
        return {"out": y if scale is None else y * scale, "labels": (y.argmax(1),)}


@pytest.fixture
def net():
    return Net()


@pytest.fixture
def x():
    return torch.randn(2, 2, 6, 7)


def failures(found, plain, truth, **options):
    compared = equivalence.compare_outcomes(found, plain, truth, **options)
    return [(kind, c.tensor) for kind, comparisons in compared.items() for c in comparisons if not c.passed]


def test_a_model_is_equal_to_itself_and_close_to_float64(net, x):
    plain = equivalence.outcome(net, [x])
    assert set(plain["outputs"]) == {"out", "labels.0"}
    assert {"input 0", "conv.weight", "norm.bias"} <= set(plain["gradients"])
    assert plain["gradients"]["unused.weight"] is None
    assert plain["buffers"]["norm.num_batches_tracked"] == 1
    assert equivalence.equal(plain, equivalence.outcome(net, [x]))
    assert failures(plain, plain, equivalence.in_float64(net, [x])) == []


def test_the_model_is_left_unchanged(net, x):
    net.conv.weight.grad = kept = torch.ones_like(net.conv.weight)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    random = torch.get_rng_state()
    equivalence.outcome(net, [x])
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert net.conv.weight.grad is kept and net.conv.bias.grad is None and x.grad is None
    assert torch.equal(torch.get_rng_state(), random)


def test_evaluation_has_no_gradients_and_changes_no_buffer(net, x):
    found = equivalence.outcome(net.eval(), [x])
    assert found["gradients"] == {} and found["buffers"]["norm.num_batches_tracked"] == 0


def test_keyword_arguments_have_gradients(net, x):
    scale = torch.tensor(2.0)
    found = equivalence.outcome(net, [x], {"scale": scale})
    assert found["gradients"]["input scale"] is not None and not scale.requires_grad


def change(outcome, kind, name, how):
    return outcome | {kind: outcome[kind] | {name: how(outcome[kind][name])}}


@pytest.mark.parametrize(
    "kind, name, how",
    [
        ("outputs", "out", lambda t: t.index_put((torch.tensor(0),) * 4, t[0, 0, 0, 0] + 0.01)),
        ("outputs", "out", lambda t: t.index_put((torch.tensor(0),) * 4, torch.tensor(float("nan")))),
        ("outputs", "out", lambda t: t[:1]),
        ("outputs", "labels.0", lambda t: t + 1),
        ("gradients", "conv.weight", lambda t: t * 1.001),
        ("gradients", "conv.weight", lambda t: None),
        ("gradients", "unused.weight", lambda t: torch.zeros(1, 1)),
        ("buffers", "norm.running_mean", torch.zeros_like),
        ("buffers", "norm.num_batches_tracked", lambda t: t + 1),
    ],
)
def test_wrong_tensors_are_found(net, x, kind, name, how):
    plain, truth = equivalence.outcome(net, [x]), equivalence.in_float64(net, [x])
    found = change(plain, kind, name, how)
    assert failures(found, plain, truth) == [(kind, name)]
    assert not equivalence.equal(found, plain)


def test_missing_and_additional_tensors_are_found(net, x):
    plain, truth = equivalence.outcome(net, [x]), equivalence.in_float64(net, [x])
    more = plain | {"buffers": plain["buffers"] | {"extra": torch.zeros(1)}}
    assert failures(more, plain, truth) == [("buffers", "extra")]
    fewer = plain | {"buffers": {}}
    assert len(failures(fewer, plain, truth)) == 3
    assert not equivalence.equal(more, plain) and not equivalence.equal(fewer, plain)


def test_tensors_that_are_zero_except_for_rounding_are_scaled_by_their_kind(net, x):
    """The gradient of a bias in front of a batch norm is rounding noise in torch; other noise as small is right too."""
    plain, truth = equivalence.outcome(net, [x]), equivalence.in_float64(net, [x])
    largest = max(t.norm().item() for t in truth["gradients"].values() if t is not None)
    assert truth["gradients"]["conv.bias"].norm() < 1e-12 * largest
    found = change(plain, "gradients", "conv.bias", torch.zeros_like)
    assert failures(found, plain, truth) == []
    found = change(plain, "gradients", "conv.bias", lambda t: t + largest / 1000)
    assert failures(found, plain, truth) == [("gradients", "conv.bias")]


def test_flips_apply_to_gradients_only(net, x):
    plain, truth = equivalence.outcome(net, [x]), equivalence.in_float64(net, [x])
    found = change(plain, "gradients", "conv.weight", lambda t: t * 1.001)
    assert failures(found, plain, truth, flips=0.01) == []
    found = change(plain, "outputs", "out", lambda t: t * 1.001)
    assert failures(found, plain, truth, flips=0.01) == [("outputs", "out")]


def test_tensors_are_found_in_nested_results():
    @dataclass
    class Result:
        logits: torch.Tensor
        more: list
        note: str = "none"

    a, b, c = (torch.randn(1) for _ in range(3))
    found = dict(equivalence.tensors((Result(a, [{"deep": b}]), None, 3, c)))
    assert {name: id(t) for name, t in found.items()} == {"0.logits": id(a), "0.more.0.deep": id(b), "3": id(c)}
