"""Running statistics that a call of torch's and one of fastseg's share: moved as torch moves them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastseg
from fastseg import functional as FS
from fastseg.verification.criterion import relative_error


def shared(normalize):
    def run(x, weight, bias, mean, var):
        y = F.batch_norm(x, mean, var, weight, None, True)
        return normalize(y * y, mean, var, weight, bias)

    return run


ours = shared(lambda y, mean, var, weight, bias: FS.batch_norm_relu(y, mean, var, weight, None, True, input_bias=bias))
theirs = shared(lambda y, mean, var, weight, bias: F.relu(
    F.batch_norm(y + bias.view(-1, 1, 1), mean, var, weight, None, True)))  # fmt: skip


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("setting", ["torch", "triton"])
def test_a_call_of_torch_with_the_same_buffers(setting, compiled, device):
    x, weight, bias, mean = (torch.randn(shape, device=device) for shape in ((2, 4, 3, 5), 4, 4, 4))
    found = []
    torch.compiler.reset()
    for function in (torch.compile(ours, backend="aot_eager", fullgraph=True) if compiled else ours, theirs):
        leaves, running = [t.clone().requires_grad_() for t in (x, weight)], [mean.clone(), mean.square() + 1]
        with fastseg.backend(setting):
            y = function(*leaves, bias, *running)
            found.append([y, *running, *torch.autograd.grad(y.sin().sum(), leaves)])
    assert all(relative_error(a, b) < 1e-4 for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("setting", ["torch", "triton"])
def test_export_in_training(setting, strict, device):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).to(device)
    x = torch.randn(2, 3, 5, 5, device=device)
    fastseg.swap(model)
    with fastseg.backend(setting):
        exported = torch.export.export(model, (x,), strict=strict).module()
        assert relative_error(exported(x), model(x)) < 1e-5
