"""A case, and the dtype, memory format and device of its tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..precision import PRECISIONS, in_force

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
CONVOLUTIONS = ("conv_transpose2d", "conv_transpose2d_affine_relu", "max_unpool2d_conv2d")
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Case:
    """One call of an operator: fastseg's function, torch's, the inputs by name, and the sizes in words.

    eager: what torch runs for the call on a GPU, under autocast and in a network of this memory format, if that is more
    than `theirs`: with the casts, and with copies back to the memory format that the next layer takes.
    """

    operator: str
    size: str
    ours: Callable[..., Any]
    theirs: Callable[..., Any]
    inputs: dict[str, Any] = field(repr=False)
    eager: Callable[..., Any] | None = None

    @property
    def precisions(self) -> tuple[str, ...]:
        """How the call can multiply float32: exactly, and as TF32 if it is a convolution in float32."""
        multiplies = self.operator in CONVOLUTIONS and self._first.dtype == torch.float32
        return PRECISIONS if multiplies else PRECISIONS[:1]

    @property
    def precision(self) -> str:
        """How the call multiplies float32 as torch is set now. A CPU multiplies exactly."""
        return in_force() if self._first.is_cuda and len(self.precisions) > 1 else PRECISIONS[0]

    @property
    def _first(self) -> Tensor:
        return next(x for x in self.inputs.values() if isinstance(x, Tensor))

    def step(self, function: Callable[..., Any], backward: bool) -> Callable[[], Any]:
        """A function that calls `function` on the inputs; with backward, also for gradients of fixed random values."""
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
    """Random gradients of these outputs; 1 for a scalar, as loss.backward() has it."""
    return [torch.randn_like(y) if y.dim() else torch.ones_like(y) for y in outputs]


def _differentiable(result: Any) -> list[Tensor]:
    return [y for y in (result if isinstance(result, (tuple, list)) else [result]) if y.requires_grad]


@dataclass(frozen=True)
class Placement:
    """The dtype, memory format and device of a case's tensors."""

    dtype: torch.dtype
    layout: torch.memory_format
    device: str

    @property
    def _drawn_on(self) -> str:
        """Where random values are drawn: on the CPU, so that they are the same on every device."""
        return "meta" if self.device == "meta" else "cpu"

    def tensor(self, *shape: int) -> Tensor:
        """A random tensor, in the memory format if it has four dimensions."""
        made = torch.randn(shape, device=self._drawn_on).to(self.device, self.dtype)
        return made.contiguous(memory_format=self.layout) if made.dim() == 4 else made

    def parameters(self, channels: int) -> Tensor:
        """A value between 0.5 and 1.5 for each channel, in float32 if the tensors are in half precision."""
        made = torch.rand(channels, device=self._drawn_on).add(0.5).to(self.device)
        return made.to(torch.float64) if self.dtype == torch.float64 else made

    def labels(self, classes: int, *shape: int) -> Tensor:
        """Random int64 labels from 0 to classes - 1."""
        return torch.randint(classes, shape, device=self._drawn_on).to(self.device)


def describe(shape: Sequence[int], *words: str) -> str:
    """A case's sizes in words, such as "2x8x8x32 k2 s2 p0"."""
    return " ".join(["x".join(map(str, shape)), *words])
