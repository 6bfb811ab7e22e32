"""Implementations of an operator: fastseg, torch eager and compiled, and other libraries if installed."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from ..verification import cases, criterion
from ..verification.cases import Case
from .results import Unable

Function = Callable[..., Any]
MODES = ("forward", "backward", "forward+backward")
SLACK = 2.0
"""torch's compiler and other libraries may have this many times the error that fastseg may have."""
FULL_SIZE_EPS = 16
"""How many epsilons of the dtype, or of TF32, a result at full size may differ from torch's, which is rounded too."""


@dataclass(frozen=True)
class Provider:
    """One way to run a case.

    function: from a case to the function to time; None if the provider does not support the operator or would repeat
    another provider; raises Unable if it should run but cannot. reference: the function it must equal, which also runs
    in float64. context: active during everything the provider does. library: active only during its calls, because it
    would change the reference too. poison: check with new memory filled with NaN. modes: what is timed. compiles:
    whether each new shape takes seconds.
    """

    name: str
    function: Callable[[Case], Function | None]
    reference: Callable[[Case], Function]
    context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    library: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    poison: bool = False
    slack: float = 1.0
    modes: tuple[str, ...] = MODES
    compiles: bool = False

    @property
    def ours(self) -> bool:
        return self.name.startswith("fastseg")


def plain(case: Case) -> Function:
    """torch's call. For pooling with offsets it is pooling with indices, without a conversion."""
    return case.eager if case.operator == "max_pool2d_with_offsets" else case.theirs


def _in_network(case: Case) -> Function | None:
    return None if case.eager is plain(case) else case.eager


def _compiled(mode: str) -> Callable[[Case], Function]:
    def function(case: Case) -> Function | None:
        if case.operator.endswith("_with_offsets"):
            return None  # torch's call is the same as for the operator with indices
        torch.compiler.reset()  # earlier shapes count against the limit of recompilations
        return torch.compile(plain(case), mode=mode, dynamic=False)

    return function


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Unable("not installed") from error


def _liger(case: Case) -> Function | None:
    if case.operator != "cross_entropy":
        return None
    library = _imported("liger_kernel.transformers.functional")

    def flattened(logits: Tensor, labels: Tensor) -> Tensor:
        flat = logits.permute(0, 2, 3, 1).reshape(-1, logits.shape[1])
        loss = library.liger_cross_entropy(flat, labels.reshape(-1), ignore_index=255)
        return loss[0] if isinstance(loss, tuple) else loss

    return flattened


def _triton(case: Case) -> Function:
    tensor = next(x for x in case.inputs.values() if isinstance(x, Tensor))
    if tensor.device.type != "cuda":
        raise Unable("the kernels need a GPU: interpreted, they have no times")
    return case.ours


def _cuda(case: Case) -> Function | None:
    """fastseg's function; None for an operator without CUDA C++ kernels."""
    try:
        with dispatch.backend("cuda"):
            dispatch.explain(case.ours, *case.inputs.values())
    except NotImplementedError:
        return None
    except RuntimeError as error:  # no GPU, no CuPy
        raise Unable(str(error).partition(": ")[2]) from error
    return case.ours


def _auto(case: Case) -> Function | None:
    """fastseg's function; None if "auto" chooses one backend of kernels for all of it, which is a provider itself."""
    tensor = next(x for x in case.inputs.values() if isinstance(x, Tensor))
    if tensor.device.type == "cuda":
        choices = dispatch.explain(case.ours, *case.inputs.values())
        if {choice.backend for choice in choices} in ({name} for name in dispatch.NAMES):
            return None
    return case.ours


def _theirs(case: Case) -> Function:
    return case.theirs


def providers(compile: bool) -> list[Provider]:
    """All providers. compile: those that use torch.compile too."""
    found = [
        Provider("torch", plain, plain, slack=SLACK),
        Provider("torch in network", _in_network, _theirs, slack=SLACK),
        Provider("fastseg triton", _triton, _theirs, lambda: dispatch.backend("triton"), poison=True),
        Provider("fastseg cuda", _cuda, _theirs, lambda: dispatch.backend("cuda"), poison=True),
        Provider("fastseg auto", _auto, _theirs, lambda: dispatch.backend("auto")),
        Provider("Liger-Kernel", _liger, plain, slack=SLACK),
        # The check runs the backward outside `library`, with torch's kernels, so only the forward is timed.
        Provider(
            "FlagGems", plain, plain, library=lambda: _imported("flag_gems").use_gems(), slack=SLACK, modes=("forward",)
        ),
    ]
    modes = ("forward", "forward+backward")  # a compiled backward cannot keep its graph
    for name, mode in (("", "default"), (" max-autotune", "max-autotune-no-cudagraphs")):
        if compile:
            found.append(
                Provider(f"torch.compile{name}", _compiled(mode), plain, slack=SLACK, modes=modes, compiles=True)
            )
    return found


def _inside(provider: Provider, function: Function) -> Function:
    def call(*inputs: Any) -> Any:
        with provider.library():
            return function(*inputs)

    return call


def check(provider: Provider, case: Case, function: Function) -> tuple[float, str]:
    """(largest error against float64, "right" or "wrong: ..."), by fastseg.verification.criterion."""
    reference, function = provider.reference(case), _inside(provider, function)
    found = criterion.compare_to_torch(
        function, reference, list(case.inputs.values()), list(case.inputs), provider.poison, case.precision
    )
    wrong = [c for c in found if not c.error <= c.allowed * provider.slack]
    worst = max((c.error for c in found), default=0.0)
    if wrong:
        return worst, f"wrong: {wrong[0].tensor} is off by {wrong[0].error:.2g}, allowed {wrong[0].allowed:.2g}"
    return worst, "right"


@torch.no_grad()
def check_full_size(provider: Provider, case: Case, function: Function) -> str:
    """Compare results and gradients at full size with torch's, without float64. "right", or what is wrong."""
    grads: list[Tensor] = []
    epsilon = criterion.TF32_EPSILON if case.precision == "tf32" else torch.finfo(_dtype(case)).eps
    calls = (provider.reference(case), _inside(provider, function))
    results = [_results(call, list(case.inputs.values()), grads) for call in calls]
    for number, (want, got) in enumerate(zip(*results, strict=True)):
        if want is None or want.numel() == 0:
            continue
        if got is None or got.shape != want.shape:
            return f"wrong at full size: result {number} has another shape"
        scale = float(want.abs().max()) if want.is_floating_point() else 0.0
        for ours, theirs in zip(_pictures(got), _pictures(want), strict=True):
            if not want.is_floating_point():
                off = 0.0 if torch.equal(ours, theirs) else float("inf")
            else:
                off = float((ours - theirs).abs().max()) / max(scale, 1e-30)
            if not off <= FULL_SIZE_EPS * epsilon:  # true for NaN
                return f"wrong at full size: result {number} differs from torch's by {off:.2g}"
    return "right"


def _pictures(x: Tensor) -> list[Tensor]:
    """The images one by one, so that differences need memory for one image only."""
    return list(x) if x.dim() == 4 else [x]


def _dtype(case: Case) -> torch.dtype:
    return next(x.dtype for x in case.inputs.values() if isinstance(x, Tensor) and x.is_floating_point())


@torch.enable_grad()
def _results(function: Function, inputs: list[Any], grads: list[Tensor]) -> list[Tensor | None]:
    """Outputs and gradients. The first call draws the gradients of the outputs, which the second call uses too."""
    leaves = [
        x.detach().clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs
    ]
    result = function(*leaves)
    outputs = list(result) if isinstance(result, (tuple, list)) else [result]
    differentiable = [y for y in outputs if y.requires_grad]
    if not grads:
        grads += [torch.randn_like(y) for y in differentiable]
    wanted = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
    back = [g.to(y.dtype) for g, y in zip(grads, differentiable, strict=True)]
    return [y.detach() for y in outputs] + list(torch.autograd.grad(differentiable, wanted, back, allow_unused=True))


def labels(case: Case, at: cases.Placement, layout: str) -> dict[str, str]:
    """The fields of a record that identify a case."""
    return {
        "operator": case.operator,
        "shape": case.size,
        "dtype": str(at.dtype).removeprefix("torch."),
        "layout": layout,
    }
