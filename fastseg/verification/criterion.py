"""When a result of an operator is right: the criterion of `fastseg verify` and of the tests.

The truth is what torch computes in float64. An output or gradient is right if its error is at most torch's own error in
the same dtype and precision plus a small allowance. Integer results must be equal. While fastseg's function runs,
torch's deterministic mode fills every new tensor with NaN, so that elements that no kernel writes are found.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .precision import TF32_EPSILON, convolving

SUM = {torch.float64: 64, torch.float32: 8}
"""What another order of summation may change, in epsilons of the dtype of the sum, relative to its terms."""
TF32 = 2
"""What TF32 may change in a product, in epsilons of TF32: both factors lose their last bits."""

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


def allowance(dtype: torch.dtype, precision: str = "ieee", cancellation: float = 1.0) -> float:
    """How far a result may be from float64 beyond torch's own error, relative to the largest magnitude.

    Sums are in float32 (float64 for float64). What their order and TF32 change is relative to the terms. The one
    rounding of a result in half precision is relative to the result.

    Args:
        dtype: that of the result.
        precision: how float32 was multiplied, "ieee" or "tf32".
        cancellation: the largest sum of magnitudes of terms, divided by the largest magnitude of a result.
    """
    summed = torch.float64 if dtype == torch.float64 else torch.float32
    terms = SUM[summed] * torch.finfo(summed).eps
    if dtype == torch.float32 and precision == "tf32":
        terms += TF32 * TF32_EPSILON
    rounding = torch.finfo(dtype).eps if dtype != summed else 0.0
    return rounding + terms * cancellation


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


def _cancellation(truth: Tensor, positive: Tensor) -> float:
    """By how much the terms of a gradient are larger than the gradient: the largest of each, divided.

    A backward is linear in the gradients of the outputs, so a gradient is the sum of one part from their positive
    elements and one from their negative ones. The magnitudes of both parts are a lower bound of the sum of magnitudes,
    and are that sum where all factors have one sign, as in the gradient of a bias.
    """
    terms, result = (positive.abs() + (truth - positive).abs()), truth.abs()
    largest, scale = (float(x[x.isfinite()].max()) if bool(x.isfinite().any()) else 0.0 for x in (terms, result))
    return max(1.0, largest / max(scale, torch.finfo(torch.float32).tiny))


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
    ours: Function, theirs: Function, inputs: Sequence[Any], names: Sequence[str] | None = None, poison: bool = True,
    precision: str = "ieee",
) -> list[Comparison]:  # fmt: skip
    """Compare `ours(*inputs)` and its gradients with `theirs`, which must also run in float64.

    Args:
        ours, theirs: fastseg's function and torch's.
        inputs: tensors and other arguments; float tensors become leaves that require gradients.
        names: of the inputs, for the report.
        poison: run `ours` under `poisoned`. Pass False for calls that fall back to PyTorch, since some of its operators
            are not deterministic.
        precision: how both multiply float32 in convolutions, "ieee" or "tf32", whatever torch is set to.
    """
    names = names or [f"input {i}" for i in range(len(inputs))]
    with convolving(precision):
        native, native_grads, grads = _run(theirs, inputs, None, None)
        truth, true_grads, _ = _run(theirs, inputs, grads, torch.float64)
        positive = _run(theirs, inputs, [g.clamp(min=0) for g in grads], torch.float64)[1]
        with poisoned() if poison else contextlib.nullcontext():
            mine, my_grads, _ = _run(ours, inputs, grads, None)
    leaves = [name for name, x in zip(names, inputs, strict=True) if _is_float(x)]
    labels = [f"output {i}" for i in range(len(mine))] + [f"grad {name}" for name in leaves]
    comparisons = []
    results = zip(
        labels, mine + my_grads, native + native_grads, truth + true_grads, [None] * len(truth) + positive, strict=True
    )
    for label, got, own, want, part in results:
        if got is None or want is None:
            comparisons.append(exact_comparison(label, got is want))
        elif want.is_floating_point():
            torch_error = relative_error(own, want)
            cancellation = 1.0 if part is None else _cancellation(want, part)
            allowed = torch_error + allowance(got.dtype, precision, cancellation)
            comparisons.append(Comparison(label, relative_error(got, want), torch_error, allowed))
        else:
            equal = got.shape == own.shape and got.dtype == own.dtype and torch.equal(got, own)
            comparisons.append(exact_comparison(label, equal))
    return comparisons
