"""What the tests of the cross-entropy losses share."""

import pytest
import torch
import torch.nn.functional as F

LAYOUTS = pytest.mark.parametrize(
    "layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"]
)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
BACKENDS = pytest.mark.parametrize("backend", ["torch", "triton"])
INTERPRETED = pytest.mark.skipif(torch.cuda.is_available(), reason="runs kernels on CPU tensors")
REDUCTIONS = pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
QUIET = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's in the interpreter, for NaN results
NAN, INF = float("nan"), float("inf")


def make(shape, device="cpu", dtype=torch.float32, layout=torch.contiguous_format, ignore=None):
    """Logits, and labels, a fifth of which are `ignore`."""
    x = torch.randn(shape, device=device).mul(3).to(dtype).contiguous(memory_format=layout)
    target = torch.randint(shape[1], (shape[0], *shape[2:]), device=device)
    if ignore is not None:
        target[torch.rand(target.shape, device=device) < 0.2] = ignore
    return x, target


def exact(x, target, weight=None, **kwargs):
    """torch's loss in float64, and a function from the gradient of the loss to that of the logits."""
    x = x.detach().double().requires_grad_()
    loss = F.cross_entropy(x, target.long(), None if weight is None else weight.double(), **kwargs)
    return loss, lambda grad: torch.autograd.grad(loss, x, grad.double())[0]
