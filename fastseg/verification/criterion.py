"""When a result of an operator is right: the criterion of `fastseg verify` and of the tests.

The truth is what torch computes in float64. An output or gradient is right if its error is at most torch's own error in
the same dtype plus a small tolerance. Integer results must be equal. While fastseg's function runs, torch's
deterministic mode fills every new tensor with NaN, so that elements that no kernel writes are found.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

# In units of the dtype's epsilon: one rounding in half precision, another order of summation in float32.
TOLERANCE = {torch.float64: 64, torch.float32: 8, torch.float16: 1, torch.bfloat16: 1}

Function = Callable[..., Any]


@dataclass(frozen=True)
class Comparison:
    """One tensor: the relative errors of fastseg's and of torch's result against float64, and the error allowed."""

    tensor: str
    error: float
    torch_error: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed

    def as_dict(self) -> dict[str, Any]:
        """The comparison for JSON, which has no infinity: numbers that are not finite become None."""
        numbers = {
            name: value if math.isfinite(value) else None for name, value in asdict(self).items() if name != "tensor"
        }
        return {"tensor": self.tensor, **numbers, "passed": self.passed}


def exact_comparison(tensor: str, equal: bool) -> Comparison:
    """The comparison of a tensor that must be equal to torch's: integers, and gradients that are None."""
    return Comparison(tensor, 0.0 if equal else float("inf"), 0.0, 0.0)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fill new tensors with NaN (integers: the largest value), and raise for non-deterministic operators."""
    before, fill = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def relative_error(result: Tensor, truth: Tensor) -> float:
    """``max |result - truth| / max |truth|``. Infinite if the shapes differ, or if NaN or infinities differ."""
    if result.shape != truth.shape:
        return float("inf")
    result, truth = result.detach().double(), truth.detach().double()
    same = (result == truth) | (result.isnan() & truth.isnan())
    if bool(same.all()):
        return 0.0
    difference = (result - truth).abs().masked_fill(same, 0.0)
    if not bool(difference.isfinite().all()):
        return float("inf")
    scale = truth[truth.isfinite()].abs().max().item()
    return difference.max().item() / max(scale, torch.finfo(torch.float32).tiny)


def _is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _run(
    function: Function, inputs: Sequence[Any], grads: Sequence[Tensor] | None, dtype: torch.dtype | None
) -> tuple[list[Any], list[Tensor | None], Sequence[Tensor]]:
    """(outputs, gradients of the float inputs, gradients of the outputs) of a call in `dtype` (None: as given).

    grads: gradients of the float outputs; None to draw them.
    """
    cast = [x.detach().to(dtype or x.dtype) if _is_float(x) else x for x in inputs]
    leaves = [x.clone().requires_grad_() if _is_float(x) else x for x in cast]
    result = function(*leaves)
    outputs = list(result) if isinstance(result, (tuple, list)) else [result]
    differentiable = [y for y in outputs if y.requires_grad]
    if grads is None:
        generator = torch.Generator(device="cpu").manual_seed(0)
        grads = [torch.randn(y.shape, generator=generator).to(y.dtype).to(y.device) for y in differentiable]
    wanted = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
    if not differentiable or [g.shape for g in grads] != [y.shape for y in differentiable]:
        return outputs, [None] * len(wanted), grads
    found = torch.autograd.grad(
        differentiable, wanted, [g.to(y.dtype) for g, y in zip(grads, differentiable, strict=True)], allow_unused=True
    )
    return outputs, list(found), grads


def compare_to_torch(
    ours: Function, theirs: Function, inputs: Sequence[Any], names: Sequence[str] | None = None, poison: bool = True
) -> list[Comparison]:
    """Compare `ours(*inputs)` and its gradients with `theirs`, which must also run in float64.

    inputs: tensors and other arguments; float tensors become leaves that require gradients. names: of the inputs, for
    the report. poison: run `ours` under `poisoned`. Pass False for calls that fall back to PyTorch, since some of
    its operators are not deterministic.
    """
    names = names or [f"input {i}" for i in range(len(inputs))]
    native, native_grads, grads = _run(theirs, inputs, None, None)
    truth, true_grads, _ = _run(theirs, inputs, grads, torch.float64)
    with poisoned() if poison else contextlib.nullcontext():
        mine, my_grads, _ = _run(ours, inputs, grads, None)
    leaves = [name for name, x in zip(names, inputs, strict=True) if _is_float(x)]
    labels = [f"output {i}" for i in range(len(mine))] + [f"grad {name}" for name in leaves]
    comparisons = []
    for label, got, own, want in zip(labels, mine + my_grads, native + native_grads, truth + true_grads, strict=True):
        if got is None or want is None:
            comparisons.append(exact_comparison(label, got is want))
        elif want.is_floating_point():
            torch_error = relative_error(own, want)
            tolerance = TOLERANCE[got.dtype] * torch.finfo(got.dtype).eps
            comparisons.append(Comparison(label, relative_error(got, want), torch_error, torch_error + tolerance))
        else:
            equal = got.shape == own.shape and got.dtype == own.dtype and torch.equal(got, own)
            comparisons.append(exact_comparison(label, equal))
    return comparisons
