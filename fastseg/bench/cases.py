"""What is timed: each operator at sizes of the networks that use it, beside torch's own function."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import functional


@dataclass(frozen=True)
class Case:
    """One comparison: ours and theirs take the same inputs; `label` says the size."""

    operator: str
    label: str
    ours: Callable[..., Any]
    theirs: Callable[..., Any]
    inputs: tuple[Any, ...]


def cases(device: str, dtype: torch.dtype, layout: torch.memory_format) -> Iterator[Case]:
    """The operators at SegNet's and U-Net's sizes: batch 8 at 360x480 on a GPU, batch 1 at a quarter of it on a CPU."""
    n, h, w = (8, 360, 480) if device == "cuda" else (1, 90, 120)

    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype).contiguous(memory_format=layout)

    x = tensor(n, 64, h, w)
    label = "x".join(map(str, x.shape))
    pooled, indices = F.max_pool2d(x, 2, return_indices=True)
    _, offsets = functional.max_pool2d_with_offsets(x, 2)
    yield Case("max_pool2d", label, _indexed(functional.max_pool2d), _indexed(F.max_pool2d), (x,))
    yield Case("max_pool2d_with_offsets", label, _first(functional.max_pool2d_with_offsets), _indexed(F.max_pool2d), (x,))
    yield Case("max_unpool2d", label, functional.max_unpool2d, F.max_unpool2d, (pooled, indices, 2))
    yield Case(
        "max_unpool2d_with_offsets",
        label,
        lambda pooled, _, offsets: functional.max_unpool2d_with_offsets(pooled, offsets, 2),
        lambda pooled, indices, _: F.max_unpool2d(pooled, indices, 2),
        (pooled, indices, offsets),
    )
    low, weight, bias = tensor(n, 64, h // 2, w // 2), tensor(64, 32, 2, 2), torch.randn(32, device=device, dtype=dtype)
    yield Case(
        "conv_transpose2d", "k2 s2 64 to 32", functional.conv_transpose2d, F.conv_transpose2d, (low, weight, bias, 2)
    )
    logits = tensor(n, 11, h, w)
    target = torch.randint(0, 11, (n, h, w), device=device)
    yield Case("cross_entropy", "x".join(map(str, logits.shape)), functional.cross_entropy, F.cross_entropy, (logits, target))


def _indexed(pool: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x: pool(x, 2, return_indices=True)[0]


def _first(pool: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x: pool(x, 2)[0]


def step(function: Callable[..., Any], inputs: tuple[Any, ...], backward: bool) -> Callable[[], object]:
    """A call of the function, with its backward for a fixed gradient if asked."""
    leaves = [
        x.detach().clone().requires_grad_(backward) if isinstance(x, Tensor) and x.is_floating_point() else x
        for x in inputs
    ]
    if not backward:
        return lambda: function(*leaves)
    wanted = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
    grad = torch.randn_like(function(*leaves))
    return lambda: torch.autograd.grad(function(*leaves), wanted, grad)
