"""A model with fastseg swapped in, compared with the same model without it: what `fastseg swap` checks."""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin

from .. import dispatch
from ..swapping import SwapReport, swap
from . import equivalence
from .criterion import Comparison
from .equivalence import Outcome

MODES = ("training", "evaluation")
FLIPS = 0.01
"""How far a gradient may be from float64 beyond the error of plain PyTorch; see equivalence.compare_outcomes."""
WITHOUT_TRUTH = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.1}
"""How far a result may be from plain PyTorch's if there is no float64 result to compare with."""
NOT_THE_SAME = 5.0
"""If the outputs of a model in float64 are further from its own than this times WITHOUT_TRUTH, it computes something
else in float64."""


def describe_error(error: BaseException) -> str:
    """The type of an error and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


class CannotCopyError(ValueError):
    """copy.deepcopy refuses a model."""


def copied(model: nn.Module) -> nn.Module:
    """Return a copy of a model. Raises CannotCopyError, which says whose fault that is."""
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise CannotCopyError(
            f"the model cannot be copied, which the check does so that each call starts from the same state: "
            f"copy.deepcopy raises {describe_error(error)}"
        ) from error


class WithLoss(nn.Module):
    """A model and its loss. ``forward(target, *inputs)`` returns the result, and the loss of its first output."""

    def __init__(self, model: nn.Module, loss: nn.Module) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, target: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Tensor]:
        result = self.model(*args, **kwargs)
        return result, self.loss(next(equivalence.tensors(result))[1], target)


@dataclass(frozen=True)
class Trial:
    """A model and a call of it.

    Args:
        model: the model, without fastseg.
        inputs: its positional arguments.
        named: its keyword arguments.
        seed: seed of its random numbers, such as dropout.
    """

    model: nn.Module
    inputs: Sequence[Any]
    named: dict[str, Any]
    seed: int

    def initialise(self) -> None:
        """Call a model with lazy layers once: only then do they have parameters, and can be copied and swapped.

        Raises:
            ValueError: the model fails.
        """
        tensors = itertools.chain(self.model.parameters(), self.model.buffers())
        if not any(isinstance(tensor, UninitializedTensorMixin) for tensor in tensors):
            return
        inputs, named = copy.deepcopy((list(self.inputs), self.named))  # a forward may write to its inputs
        try:
            with torch.no_grad():
                self.model(*inputs, **named)
        except (Exception, SystemExit) as error:
            raise ValueError(self._failure(error)) from error

    def first_output(self) -> Tensor:
        """Return the first tensor in the result. Raises ValueError if the model fails or returns no tensor."""
        try:
            with torch.no_grad():
                result = copied(self.model)(*self.inputs, **self.named)
        except (CannotCopyError, KeyboardInterrupt):
            raise
        except (Exception, SystemExit) as error:
            raise ValueError(self._failure(error)) from error
        for _, tensor in equivalence.tensors(result):
            return tensor
        raise ValueError(f"the model returns a {type(result).__name__} without tensors: there is nothing to compare")

    def plain_outcome(self) -> Outcome:
        """Return the outcome of the model without fastseg. Raises ValueError if it fails."""
        try:
            return self.outcome(self.model)
        except (Exception, SystemExit) as error:
            raise ValueError(self._failure(error)) from error

    def outcome(self, model: nn.Module) -> Outcome:
        """Return the outcome of a copy of `model`: each call starts from the same state, whatever a forward changes."""
        return equivalence.outcome(copied(model), self.inputs, self.named, self.seed)

    def _failure(self, error: Exception) -> str:
        mode = MODES[not self.model.training]
        return f"the model without fastseg fails on these inputs in {mode}: {describe_error(error)}"


@dataclass(frozen=True)
class SwapOptions:
    """What is swapped and how the result is checked.

    Args:
        ops, compact_indices: as for :func:`fastseg.swap`.
        backend: backend of the swapped copy, see :func:`fastseg.set_backend`.
        modes: a subset of MODES.
    """

    ops: Sequence[str] | None = None
    compact_indices: bool = False
    backend: str = "auto"
    modes: Sequence[str] = MODES


@dataclass(frozen=True)
class Check:
    """The comparison of one mode.

    Args:
        compared: for outputs, gradients and buffers, a Comparison per tensor.
        without_truth: why the comparison is with plain PyTorch instead of float64; None if it is with float64.
    """

    compared: dict[str, list[Comparison]]
    without_truth: str | None

    def as_dict(self) -> dict[str, Any]:
        """The comparison in a form that JSON can represent."""
        compared = {kind: [c.as_dict() for c in comparisons] for kind, comparisons in self.compared.items()}
        return {"against": "plain torch" if self.without_truth else "float64", "reason": self.without_truth} | compared


@dataclass(frozen=True)
class SwapCheck:
    """The result of :func:`check_swap`.

    Args:
        swapped: the copy with fastseg.
        report: what was swapped in it.
        checks: the comparison of each mode in which the copy ran.
        failures: a sentence for each difference; empty if there is none.
    """

    swapped: nn.Module
    report: SwapReport
    checks: dict[str, Check]
    failures: list[str]


def check_swap(trial: Trial, options: SwapOptions) -> SwapCheck:
    """Swap fastseg into a copy of a model, and compare outputs, gradients and buffers with the model without it.

    Args:
        trial: the model and its inputs.
        options: see :class:`SwapOptions`.

    Raises:
        ValueError: the model without fastseg fails, or gives different results each time.
        TypeError, ValueError, RuntimeError: as :func:`fastseg.swap`.
    """
    swapped = copied(trial.model)
    report = swap(swapped, ops=options.ops, compact_indices=options.compact_indices)
    checks, failures = {}, []
    for mode in options.modes:
        set_mode((trial.model, swapped), mode)
        plain = trial.plain_outcome()
        try:
            with dispatch.backend(options.backend):
                found = trial.outcome(swapped)
        except Exception as error:
            failures.append(f"{mode}: the swapped model fails: {describe_error(error)}")
            continue
        checks[mode] = check_outcome(trial, plain, found)
    failures += [f"{mode}: {said}" for mode, check in checks.items() for said in equivalence.failures(check.compared)]
    if not undo_restores(report, trial.model, swapped):
        failures.append("undo does not restore the model")
    return SwapCheck(swapped, report, checks, failures)


def set_mode(models: Sequence[nn.Module], mode: str) -> None:
    """Put models in a mode of MODES."""
    for model in models:
        model.train(mode == "training")


def check_outcome(trial: Trial, plain: Outcome, found: Outcome) -> Check:
    """Compare an outcome of the swapped model with an outcome of the model without fastseg, in its current mode.

    Args:
        trial: the model without fastseg, and its inputs.
        plain: its outcome.
        found: the outcome of the swapped copy.

    Raises:
        ValueError: they differ, and so does a second outcome of the model without fastseg.
    """
    check = _compare(trial, plain, found)
    if equivalence.failures(check.compared):
        again = _compare_with_plain(trial.outcome(trial.model), plain)
        if equivalence.failures(again):
            raise ValueError(
                "the model without fastseg gives different results each time, from the same weights and the same seed: "
                "there is nothing to compare"
            )
    return check


def _compare(trial: Trial, plain: Outcome, found: Outcome) -> Check:
    """Compare with the model in float64 or, if it fails or computes something else there, with plain PyTorch."""
    try:
        truth = equivalence.in_float64(trial.model, trial.inputs, trial.named, trial.seed)
    except Exception as error:
        return Check(_compare_with_plain(found, plain), f"the model fails in float64: {describe_error(error)}")
    limit = NOT_THE_SAME * WITHOUT_TRUTH[_dtype(plain)]
    if any(c.error > limit for c in equivalence.compare_outcomes(plain, plain, truth)["outputs"]):
        return Check(_compare_with_plain(found, plain), "the model computes something else in float64")
    return Check(equivalence.compare_outcomes(found, plain, truth, FLIPS), None)


def _compare_with_plain(found: Outcome, plain: Outcome) -> dict[str, list[Comparison]]:
    """Compare with plain PyTorch, with the tolerance WITHOUT_TRUTH."""
    allowed = WITHOUT_TRUTH[_dtype(plain)]
    return {
        kind: [Comparison(c.tensor, c.error, c.torch_error, allowed if c.allowed else 0.0) for c in comparisons]
        for kind, comparisons in equivalence.compare_outcomes(found, plain, plain, FLIPS).items()
    }


def _dtype(outcome: Outcome) -> torch.dtype:
    """The dtype of the first floating-point output; float32 if there is none."""
    return next((y.dtype for y in outcome["outputs"].values() if y.is_floating_point()), torch.float32)


def explain_calls(trial: Trial, swapped: nn.Module, backend: str) -> list[dict[str, Any]] | None:
    """Return the operators that the swapped model calls, each with its backend, the reason, and how often.

    Returns:
        list or None: None if the model does not run on fake tensors, which :func:`fastseg.explain` uses.
    """
    try:
        with dispatch.backend(backend), torch.random.fork_rng():
            choices = dispatch.explain(swapped, *trial.inputs, **trial.named)
    except Exception:
        return None
    return [
        {"operator": choice.operator, "backend": choice.backend, "reason": choice.reason, "calls": calls}
        for choice, calls in Counter(choices).items()
    ]


def undo_restores(report: SwapReport, plain: nn.Module, swapped: nn.Module) -> bool:
    """Whether the swapped model has the classes and the state_dict of the model without fastseg after an undo."""
    with report.undone():
        same = [type(m) for m in plain.modules()] == [type(m) for m in swapped.modules()]
        first, second = plain.state_dict(), swapped.state_dict()
    same &= list(first) == list(second)
    tensors = [(a, second[name]) for name, a in first.items() if same and isinstance(a, Tensor)]
    return same and all(_same_values(a, b) for a, b in tensors)


def _same_values(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors are equal; NaN equals NaN."""
    if first.is_quantized:  # has no NaN, and no nan_to_num
        return torch.equal(first, second)
    return torch.equal(first.nan_to_num(), second.nan_to_num())
