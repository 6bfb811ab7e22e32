"""Times of a model with and without fastseg swapped in: what `fastseg swap` measures."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import dispatch
from ..verification import equivalence
from ..verification.swapped_model import SwapOptions, Trial, set_mode
from . import timing

Times = dict[str, float | None]
"""Milliseconds of a call ("ms", "p20", "p80") and peak memory in MiB ("peak_mib", None on a CPU)."""


def time_swap(trial: Trial, swapped: nn.Module, options: SwapOptions, seconds: float) -> dict[str, dict[str, Times]]:
    """Time the model on plain PyTorch and its swapped copy on `options.backend`, in each mode.

    Args:
        trial: the model without fastseg, and its inputs.
        swapped: the copy with fastseg.
        options: its `backend` and `modes` are used.
        seconds: for how long each form is timed in each mode.

    Returns:
        dict: by mode, the times of ``"plain"`` and ``"swapped"``.
    """
    times: dict[str, dict[str, Times]] = {mode: {} for mode in options.modes}
    for mode, forms in times.items():
        for name, model, backend in (("plain", trial.model, "torch"), ("swapped", swapped, options.backend)):
            set_mode((model,), mode)
            with dispatch.backend(backend):
                forms[name] = time_model(trial, model, seconds)
    return times


def time_model(trial: Trial, model: nn.Module, seconds: float) -> Times:
    """Time a call of `model` in its current mode: the forward and, in training mode, the backward too."""
    gradients: list[Tensor] = []

    def run() -> None:
        with torch.set_grad_enabled(model.training):
            outputs = [y for _, y in equivalence.tensors(model(*trial.inputs, **trial.named)) if y.requires_grad]
        if outputs:
            gradients[:] = gradients or [torch.ones_like(y) for y in outputs]
            model.zero_grad(set_to_none=True)
            torch.autograd.backward(outputs, gradients)

    device = next(equivalence.tensors((trial.inputs, trial.named)))[1].device
    took = timing.measure(run, device.type, seconds)
    peak = None if took.peak_bytes is None else took.peak_bytes / 2**20
    return {"ms": took.p50, "p20": took.p20, "p80": took.p80, "peak_mib": peak}
