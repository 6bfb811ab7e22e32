"""Whether two forms of one model compute the same outputs, gradients and buffers.

`criterion` compares single operators; this module compares whole models, in which rounding errors add up. The error of
a tensor is the norm of its difference from float64, divided by its norm in float64. A tensor that is zero except for
rounding, such as the gradient of a bias in front of a batch norm, is divided by the largest norm of its kind instead.
A tensor is right if its error is at most the sum of

    SLACK times torch's own error,
    BASE times the median of torch's errors of the same kind, so that no tensor passes or fails by luck, and
    the allowance of `criterion`.
"""

from __future__ import annotations

import copy
import dataclasses
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .criterion import Comparison, allowance, exact_comparison

SLACK, BASE = 2.0, 8.0
ZERO = 1e-9  # a norm in float64 that is smaller than this times the largest norm is rounding
KINDS = ("outputs", "gradients", "buffers")

Outcome = dict[str, dict[str, Tensor | None]]
"""For each of KINDS, tensors by name; None for a parameter that gets no gradient."""


def tensors(result: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) for every tensor in nested tuples, lists, mappings and dataclasses. Names are dotted paths."""
    if isinstance(result, Tensor):
        yield name or "output", result
    elif isinstance(result, Mapping):
        for key, value in result.items():
            yield from tensors(value, f"{name}.{key}".lstrip("."))
    elif isinstance(result, (tuple, list)):
        for index, value in enumerate(result):
            yield from tensors(value, f"{name}.{index}".lstrip("."))
    elif dataclasses.is_dataclass(result) and not isinstance(result, type):
        for field in dataclasses.fields(result):
            yield from tensors(getattr(result, field.name), f"{name}.{field.name}".lstrip("."))


def outcome(
    model: nn.Module, inputs: Sequence[Any] = (), named: Mapping[str, Any] | None = None, seed: int = 0
) -> Outcome:
    """Outputs of `model(*inputs, **named)`, gradients of its parameters and float inputs, and its buffers afterwards.

    There are gradients in training mode only. A scalar output gets the gradient 1, any other a random one. The seed
    determines these and whatever the model draws. The model, its buffers and its `.grad`s are left unchanged; the
    model gets copies of the inputs, which it may overwrite.
    """
    leaves = [x.detach().clone().requires_grad_(model.training) if _is_float(x) else x for x in inputs]
    keywords = {
        key: x.detach().clone().requires_grad_(model.training) if _is_float(x) else x
        for key, x in (named or {}).items()
    }
    parameters = dict(model.named_parameters())
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    kept = {name: parameter.grad for name, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = None
    try:
        with torch.random.fork_rng(), torch.set_grad_enabled(model.training):
            torch.manual_seed(seed)
            copied = {key: _copy(x) for key, x in keywords.items()}
            outputs = dict(tensors(model(*map(_copy, leaves), **copied)))
            _backward([y for y in outputs.values() if y.requires_grad], seed)
        found = {f"input {n}": x.grad for n, x in enumerate(leaves) if _is_float(x)}
        found |= {f"input {key}": x.grad for key, x in keywords.items() if _is_float(x)}
        found |= {name: parameter.grad for name, parameter in parameters.items() if parameter.requires_grad}
        return {
            "outputs": {name: y.detach().clone() for name, y in outputs.items()},
            "gradients": found if model.training else {},
            "buffers": {name: buffer.clone() for name, buffer in model.named_buffers()},
        }
    finally:
        for name, parameter in parameters.items():
            parameter.grad = kept[name]
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if name in before:
                    buffer.copy_(before[name])


def _is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _copy(x: Any) -> Any:
    return x.clone() if isinstance(x, Tensor) else x


def _backward(outputs: Sequence[Tensor], seed: int) -> None:
    """Run the backward for a gradient of 1 for scalars and a random one for other outputs."""
    if not outputs:
        return
    generator = torch.Generator().manual_seed(seed)
    gradients = [
        torch.randn(y.shape, generator=generator).to(y) if y.dim() else torch.ones_like(y)  # .to: dtype and device
        for y in outputs
    ]
    torch.autograd.backward(outputs, gradients)


def in_float64(
    model: nn.Module, inputs: Sequence[Any] = (), named: Mapping[str, Any] | None = None, seed: int = 0
) -> Outcome:
    """`outcome` of a copy of the model in float64."""

    def to_float64(x: Any) -> Any:
        return x.double() if _is_float(x) else x

    exact = copy.deepcopy(model).double()
    keywords = {key: to_float64(x) for key, x in (named or {}).items()}
    return outcome(exact, [to_float64(x) for x in inputs], keywords, seed)


def compare_outcomes(found: Outcome, plain: Outcome, truth: Outcome, flips: float = 0.0) -> dict[str, list[Comparison]]:
    """For each kind, one Comparison per tensor: `found` and `plain` torch against `truth`, all of the same model.

    flips: additional error allowed to gradients. Where two values in a pooling window, or a value and zero, differ by
    rounding alone, the gradient may go either way, and both are right.
    """
    return {kind: _compare(found[kind], plain[kind], truth[kind], flips * (kind == "gradients")) for kind in KINDS}


def _compare(
    found: Mapping[str, Tensor | None], plain: Mapping[str, Tensor | None], truth: Mapping[str, Tensor | None],
    flips: float,
) -> list[Comparison]:  # fmt: skip
    """The comparisons of one kind."""
    norms = {name: _norm(want) for name, want in truth.items() if want is not None and _is_float(want)}
    largest = max(norms.values(), default=0.0)
    scales = {name: norm if norm > ZERO * largest else largest for name, norm in norms.items()}
    own = {name: norm_error(plain[name], truth[name], scale) for name, scale in scales.items()}
    usual = statistics.median(own.values()) if own else 0.0
    comparisons = []
    for name in dict.fromkeys([*truth, *found]):
        got, want = found.get(name), truth.get(name)
        if got is None or want is None:
            comparisons.append(exact_comparison(name, got is want and name in found and name in truth))
        elif _is_float(want):
            dtype = plain[name].dtype
            allowed = SLACK * own[name] + BASE * usual + allowance(dtype) + flips
            comparisons.append(Comparison(name, norm_error(got, want, scales[name]), own[name], allowed))
        else:
            equal = got.shape == want.shape and got.dtype == want.dtype and torch.equal(got, want)
            comparisons.append(exact_comparison(name, equal))
    return comparisons


def norm_error(got: Tensor | None, want: Tensor, scale: float) -> float:
    """Norm of the difference over `scale`. Infinite if the shapes differ, or if NaN or infinities differ."""
    if got is None or got.shape != want.shape:
        return float("inf")
    got, want = got.double(), want.double()
    same = (got == want) | (got.isnan() & want.isnan())
    if bool(same.all()):
        return 0.0
    difference = (got - want).masked_fill(same, 0.0)
    if not bool(difference.isfinite().all()):
        return float("inf")
    return difference.norm().item() / max(scale, torch.finfo(torch.float32).tiny)


def _norm(x: Tensor) -> float:
    """The norm of the finite elements."""
    return x[x.isfinite()].double().norm().item()


def failures(compared: Mapping[str, Sequence[Comparison]]) -> list[str]:
    """A sentence for each tensor that is not right."""
    return [
        f"{c.tensor} ({kind}) is off by {c.error:.2e}, allowed {c.allowed:.2e}"
        for kind, comparisons in compared.items()
        for c in comparisons
        if not c.passed
    ]


def equal(first: Outcome, second: Outcome) -> bool:
    """Whether two outcomes have the same tensors with bitwise equal values; NaN equals NaN."""
    if any(first[kind].keys() != second[kind].keys() for kind in KINDS):
        return False
    pairs = ((first[kind][name], second[kind][name]) for kind in KINDS for name in first[kind])
    return all(
        a is b if a is None or b is None else a.dtype == b.dtype and norm_error(a, b, 1.0) == 0.0 for a, b in pairs
    )
