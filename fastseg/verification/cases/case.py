"""A case, and where its tensors lie."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Case:
    """One call of one operator, ours and torch's, its inputs by name, and its size in words.

    eager: what torch runs for it on a GPU under autocast in a network of this memory format, where that is more than
    `theirs`: casts, and copies back to the format that the next layer takes.
    """

    operator: str
    size: str
    ours: Callable[..., Any]
    theirs: Callable[..., Any]
    inputs: dict[str, Any] = field(repr=False)
    eager: Callable[..., Any] | None = None

    def step(self, function: Callable[..., Any], backward: bool) -> Callable[[], Any]:
        """A call of `ours` or `theirs` on these inputs; with backward, its gradients for a fixed random gradient."""
        leaves = [
            x.detach().requires_grad_(backward) if isinstance(x, Tensor) and x.is_floating_point() else x
            for x in self.inputs.values()
        ]
        if not backward:
            return lambda: function(*leaves)
        wanted = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
        differentiable = _differentiable(function(*leaves))
        if not differentiable:
            return lambda: function(*leaves)
        grads = random_gradients(differentiable)
        return lambda: torch.autograd.grad(_differentiable(function(*leaves)), wanted, grads)


def random_gradients(outputs: Sequence[Tensor]) -> list[Tensor]:
    """For the backward of these outputs; of a loss 1, as loss.backward() has it."""
    return [torch.randn_like(y) if y.dim() else torch.ones_like(y) for y in outputs]


def _differentiable(result: Any) -> list[Tensor]:
    return [y for y in (result if isinstance(result, (tuple, list)) else [result]) if y.requires_grad]


@dataclass(frozen=True)
class Placement:
    """Where and how the tensors of a case lie."""

    dtype: torch.dtype
    layout: torch.memory_format
    device: str

    def tensor(self, *shape: int) -> Tensor:
        made = torch.randn(shape, device="meta" if self.device == "meta" else "cpu").to(self.device, self.dtype)
        return made.contiguous(memory_format=self.layout) if made.dim() == 4 else made

    def parameters(self, channels: int) -> Tensor:
        """A value for each channel, between 0.5 and 1.5, in float32 where the tensors are in half precision."""
        made = torch.rand(channels, device="meta" if self.device == "meta" else "cpu").add(0.5).to(self.device)
        return made.to(torch.float64) if self.dtype == torch.float64 else made

    def labels(self, classes: int, *shape: int) -> Tensor:
        return torch.randint(classes, shape, device="meta" if self.device == "meta" else "cpu").to(self.device)


def in_words(shape: Sequence[int], *rest: str) -> str:
    return " ".join(["x".join(map(str, shape)), *rest])
