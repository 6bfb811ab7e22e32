"""Fused sequences: hooks that need the tensors between the layers, and changes after the swap."""

import copy

import pytest
import torch
from support.swap_common import NORM, POOLED, assert_same, block, operators, results, twins
from torch import nn

import fastseg

# --- hooks -----------------------------------------------------------------------------------------------------------


HOOKS = ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"]


@pytest.mark.parametrize("register", HOOKS)
@pytest.mark.parametrize(
    "at, ran", [(0, POOLED), (1, "max_pool2d"), (2, "max_pool2d"), (3, NORM)], ids=["conv", "norm", "relu", "pool"]
)
def test_a_hook_registered_after_the_swap_sees_the_same_tensors(at, ran, register, device, triton_backend):
    """Layers without hooks still run fused."""
    plain, model, _ = twins(block(nn.ReLU(), nn.MaxPool2d(2)).to(device))
    x = torch.randn(2, 3, 6, 6, device=device)
    seen = []
    for each in (plain, model):
        getattr(each[at], f"register_{register}")(lambda layer, *values: seen.append(values))
    found, want = results(model, x), results(plain, x)
    assert ran in operators(model, x) and (POOLED in operators(model, x)) == (at == 0)
    assert_same(found, want)
    ours, theirs = [
        [t for value in values for t in (value if isinstance(value, tuple) else (value,))] for values in seen[:2]
    ]
    for got, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_hooks_registered_before_the_swap_are_reported():
    model = block(nn.ReLU(), bias=False)
    handle = model[1].register_forward_hook(lambda *_: None)
    report = fastseg.swap(model)
    assert type(model) is nn.Sequential
    assert report.left[0].reason == "has hooks on 1 + 2, which need tensors that the fused kernel never creates"
    handle.remove()
    assert fastseg.swap(model).swapped[0].together == (("1", "2"),)


def test_a_hook_for_all_modules_sees_every_layer(device, triton_backend):
    _, model, _ = twins(block(nn.ReLU()).to(device))
    x, seen = torch.randn(2, 3, 5, 5, device=device), []
    handle = nn.modules.module.register_module_forward_hook(lambda layer, *_: seen.append(type(layer).__name__))
    try:
        model(x)
    finally:
        handle.remove()
    assert seen == ["Conv2d", "BatchNorm2d", "ReLU", "Sequential"]


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weight_norm_that_uses_a_hook_is_correct(device, triton_backend):
    """The hook of nn.utils.weight_norm recomputes the weight at each call, so the convolution must be called."""
    plain, model = (block(nn.ReLU()).to(device) for _ in range(2))
    for each in (plain, model):
        nn.utils.weight_norm(each[0])
    plain.load_state_dict(model.state_dict())
    assert fastseg.swap(model).swapped[0].together == (("1", "2"),)
    x = torch.randn(2, 3, 5, 5, device=device)
    for each in (plain, model):
        with torch.no_grad():
            each[0].weight_g.copy_(torch.tensor([1.0, -1, 2, -2])[:, None, None, None])
    assert operators(model, x) == [NORM]
    assert_same(results(model, x), results(plain, x))


# --- changes after the swap ------------------------------------------------------------------------------------------


def test_replaced_layers_count(device, triton_backend):
    plain, model, _ = twins(block(nn.ReLU(), nn.MaxPool2d(2)).to(device))
    x = torch.randn(2, 3, 6, 6, device=device)
    for at, layer in ((2, nn.GELU()), (1, nn.Identity()), (0, nn.Conv2d(3, 2, 1)), (3, nn.BatchNorm2d(2))):
        for each in (plain, model):
            each[at] = copy.deepcopy(layer).to(device)
        assert_same(results(model, x), results(plain, x))
    for each in (plain, model):
        torch.manual_seed(0)
        each.append(nn.ReLU()).insert(0, nn.Conv2d(3, 3, 1).to(device))
        del each[2]
    assert operators(model, x) == [NORM]
    assert_same(results(model, x), results(plain, x))


def test_a_forward_set_on_a_layer_is_called(device, triton_backend):
    _, model, _ = twins(block(nn.ReLU()).to(device))
    model[1].forward = lambda x: x * 0 + 2
    assert torch.equal(model(torch.randn(2, 3, 3, 3, device=device)), torch.full((2, 4, 1, 1), 2.0, device=device))


def test_a_slice_is_a_sequence_of_the_same_layers(device, triton_backend):
    plain, model, _ = twins(nn.Sequential(*block(nn.ReLU()), nn.MaxPool2d(2)).to(device))
    x = torch.randn(2, 3, 6, 6, device=device)
    assert list(model[:2]) == list(model)[:2]
    for part, ran in (
        (slice(2), [NORM]),
        (slice(1, 3), [NORM]),
        (slice(2, None), ["max_pool2d"]),
        (slice(4), [POOLED]),
    ):
        given = x if part.start is None else torch.randn(2, 4, 4, 4, device=device)
        assert operators(model[part], given) == ran
        assert_same(results(model[part], given), results(plain[part], given))


def test_layers_repeated_in_one_sequence(device, triton_backend):
    """[conv, bn, relu] * 3 has one norm, whose statistics are updated three times."""
    plain, model, report = twins(
        nn.Sequential(*[nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU()] * 3).to(device)
    )
    assert report.swapped[0].together == (("0", "1", "2"), ("3", "4", "5"), ("6", "7", "8"))
    x = torch.randn(2, 3, 5, 5, device=device)
    assert operators(model, x) == [NORM] * 3
    assert_same(results(model, x), results(plain, x))
    assert model[1].num_batches_tracked == 3


def test_a_norm_that_is_also_called_outside_its_sequence(device, triton_backend):
    """It runs alone there and fused in the sequence; the two calls do not affect each other."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3)
            self.body = nn.Sequential(nn.Conv2d(3, 3, 1), self.norm, nn.ReLU())

        def forward(self, x):
            return self.norm(x) + self.body(x)

    plain, model, _ = twins(Twice().to(device))
    x = torch.randn(2, 3, 4, 4, device=device)
    assert_same(results(model, x), results(plain, x))


def test_conversion_to_sync_batch_norm_after_the_swap(device, triton_backend):
    plain, model, report = twins(block(nn.ReLU()).to(device))
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert converted is model and type(model[1]) is nn.SyncBatchNorm
    x = torch.randn(2, 3, 5, 5, device=device)
    model.eval(), plain.eval()
    assert operators(model, x) == []
    assert_same(results(model, x), results(plain, x))
    report.undo()
    assert type(model) is nn.Sequential and type(model[1]) is nn.SyncBatchNorm
