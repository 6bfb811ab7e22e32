"""fastseg.swap in networks written without fastseg in mind: results stay the same, and the report is exact."""

import collections
import contextlib
import copy
import pickle

import pytest
import torch
from support.wild import fcn
from support.wild.cases import CASES, CLASSES, GRADIENT_TOLERANCE, POOL, SEQUENCE, batch
from torch import nn

import fastseg
from fastseg.verification import criterion, equivalence

PARTS = {nn.Conv2d: "conv", nn.ConvTranspose2d: "deconv", nn.BatchNorm2d: "norm", nn.ReLU: "relu", nn.MaxPool2d: "pool"}


def kinds(model):
    return [type(module) for module in model.modules()]


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


@pytest.fixture
def model(case, device):
    return case.model(device)


@pytest.fixture
def data(case, device):
    return batch(case, device)


def fused(report):
    """The number of fused groups, by the kinds of their layers."""
    found = collections.Counter()
    for sequence in report.swapped:
        for names in sequence.together:
            layers = (sequence.module.get_submodule(name) for name in names)
            kinds = (next(word for base, word in PARTS.items() if isinstance(layer, base)) for layer in layers)
            found[" + ".join(kinds)] += 1
    return found


def test_the_report_is_exact(case, model):
    before = kinds(model)
    report = fastseg.swap(model, strict=True)
    assert collections.Counter(layer.op for layer in report.swapped) == case.swapped
    assert fused(report) == case.fused
    assert report.left == []
    assert sum(a is not b for a, b in zip(before, kinds(model), strict=True)) == sum(case.swapped.values())


def on_kernels(report, model, data):
    # Without swapped layers, torch's own functions run, some of which raise where all must be deterministic.
    with fastseg.backend("triton"), criterion.poisoned() if report.swapped else contextlib.nullcontext():
        return equivalence.outcome(model, data)


@pytest.mark.interpreted
def test_without_cpu_kernels_results_have_the_same_bits(case, model, data, no_cpu_kernels):
    plain = equivalence.outcome(model, data)
    fastseg.swap(model)
    assert equivalence.equal(equivalence.outcome(model, data), plain)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_results_are_the_same_before_the_swap_after_it_and_after_undo(case, model, data, device, training):
    model.train(training)
    keys, before = list(model.state_dict()), kinds(model)
    plain = equivalence.outcome(model, data)
    truth = equivalence.in_float64(model, data)
    report = fastseg.swap(model)
    during = equivalence.outcome(model, data)
    assert equivalence.failures(equivalence.compare_outcomes(during, plain, truth, GRADIENT_TOLERANCE)) == []
    if not (device == "cpu" and training and case.slow_to_train):
        assert (
            equivalence.failures(
                equivalence.compare_outcomes(on_kernels(report, model, data), plain, truth, GRADIENT_TOLERANCE)
            )
            == []
        )
    assert list(model.state_dict()) == keys
    report.undo()
    assert kinds(model) == before and list(model.state_dict()) == keys
    if device == "cpu":
        assert equivalence.equal(equivalence.outcome(model, data), plain)


def test_every_swapped_layer_runs_on_the_kernels(case, model, data, triton_backend):
    """So that the comparison above does not compare torch with itself."""
    fastseg.swap(model)
    chosen = fastseg.explain(model, *data)
    assert {choice.backend for choice in chosen} <= {"triton"}
    ran = collections.Counter(choice.operator for choice in chosen)
    pooled_together = sum(n for layers, n in case.fused.items() if "pool" in layers)
    alone = set(case.swapped) - {SEQUENCE} - ({POOL} if pooled_together == case.swapped.get(POOL) else set())
    assert alone <= ran.keys()
    assert sum(n for op, n in ran.items() if op.startswith(SEQUENCE)) == sum(case.fused.values())


def test_compact_indices(device, triton_backend):
    """SharedSegNet has one kind of window; ENet has two, so its indices stay int64."""
    model, case = CASES["segnet-shared"].model(device), CASES["segnet-shared"]
    data = batch(case, device)
    plain, truth = equivalence.outcome(model, data), equivalence.in_float64(model, data)
    report = fastseg.swap(model, compact_indices=True)
    assert report.compact_indices and report.compact_reason is None
    seen = set()
    model.net.pool.register_forward_hook(lambda module, inputs, output: seen.add(output[1].dtype))
    assert (
        equivalence.failures(
            equivalence.compare_outcomes(equivalence.outcome(model, data), plain, truth, GRADIENT_TOLERANCE)
        )
        == []
    )
    assert seen == {torch.uint8}
    report = fastseg.swap(CASES["enet"].model(device), compact_indices=True)
    assert not report.compact_indices and "differ in kernel_size" in report.compact_reason


def test_copies_of_a_swapped_model_compute_the_same(model, data):
    fastseg.swap(model)
    want = equivalence.outcome(model, data)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert kinds(copied) == kinds(model)
        assert equivalence.equal(equivalence.outcome(copied, data), want)


def test_state_dicts_load_in_both_directions(case, device):
    plain, swapped = case.model(device), case.model(device)
    fastseg.swap(swapped)
    assert list(plain.state_dict()) == list(swapped.state_dict())
    swapped.load_state_dict(plain.state_dict(), strict=True)
    plain.load_state_dict(swapped.state_dict(), strict=True)


def test_code_that_initializes_layers_by_class_works_after_the_swap(device):
    """FCN initializes each instance of nn.ConvTranspose2d; a swapped layer must still be one."""
    net = fcn.FCN(CLASSES, 32)
    want = net.upscore.weight.detach().clone()
    fastseg.swap(net)
    net.upscore.weight.data.zero_()
    net._initialize_weights()
    assert torch.equal(net.upscore.weight, want) and want.count_nonzero() > 0
