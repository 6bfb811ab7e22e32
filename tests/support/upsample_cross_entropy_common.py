"""What the tests of upsample_cross_entropy share."""

import pytest
import torch
import torch.nn.functional as F

RESIZINGS = [  # size of the small map, and the arguments of interpolate
    ((3, 4), {"size": (12, 16), "mode": "bilinear"}),
    ((3, 4), {"scale_factor": 8, "mode": "bilinear"}),
    ((4, 5), {"size": (13, 9), "mode": "bilinear", "align_corners": True}),
    ((4, 3), {"scale_factor": (2.3, 1.7), "mode": "bilinear"}),
    ((4, 3), {"scale_factor": (2.3, 1.7), "mode": "bilinear", "recompute_scale_factor": True}),
    ((9, 11), {"scale_factor": 0.4, "mode": "bilinear", "align_corners": False}),
    ((5, 4), {"size": (1, 1), "mode": "bilinear", "align_corners": True}),
    ((1, 1), {"size": (5, 3), "mode": "bilinear"}),
    ((2, 70), {"size": (3, 75), "mode": "bilinear"}),
    ((3, 5), {"size": (7, 11), "mode": "nearest"}),
    ((4, 3), {"scale_factor": (2.3, 3.1), "mode": "nearest"}),
    ((10, 3), {"scale_factor": (2.09, 1.3), "mode": "nearest"}),
    ((6, 5), {"size": (4, 5), "mode": "nearest"}),
]
WAYS = pytest.mark.parametrize("small, way", RESIZINGS, ids=lambda x: "-".join(map(str, getattr(x, "values", tuple)())))


def make(shape, way, device="cpu", dtype=torch.float32, layout=torch.contiguous_format, ignore=255):
    """Logits, and labels in the size of the resized map, a fifth of which are `ignore`."""
    x = torch.randn(shape, device=device).mul(3).to(dtype).contiguous(memory_format=layout)
    size = F.interpolate(torch.empty(shape, device="meta"), **way).shape[2:]
    target = torch.randint(shape[1], (shape[0], *size), device=device)
    target[torch.rand(target.shape, device=device) < 0.2] = ignore
    return x, target


def composed(x, target, way, weight=None, **options):
    """The loss by torch's two functions."""
    weight = None if weight is None else weight.to(x.dtype)
    return F.cross_entropy(F.interpolate(x, **way), target.long(), weight, ignore_index=255, **options)


def results(function, x, target, *rest, **options):
    """Loss, and the gradient of the logits for a fixed gradient of the loss."""
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    loss = function(leaf, target, *rest, **options)
    grad = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype, device=loss.device).view(loss.shape)
    return loss.detach(), torch.autograd.grad(loss, leaf, grad)[0]
