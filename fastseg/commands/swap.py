"""`fastseg swap`: swap into a model of yours, check it against the model as it was, time both."""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import sys
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import dispatch
from ..swapping import SwapReport, swap
from ..training.device import pick_device
from ..verification import cases, equivalence
from ..verification.criterion import Comparison
from ..verification.equivalence import Outcome
from . import model_spec, terminal

DTYPES = cases.DTYPES | {"float64": torch.float64}
MODES = ("training", "evaluation")
FLIPS = 0.01
"""How far a gradient may be from float64 beyond what plain torch's errors allow; see equivalence.compare_outcomes."""
WITHOUT_TRUTH = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.1}
"""How far from plain torch a result may be where there is no float64 to compare with."""
SOMETHING_ELSE = 5.0
"""A model whose outputs are so many times that far from its own in float64 computes something else there."""
EXAMPLES = """examples:
  fastseg swap torch.nn:MaxPool2d --args 2 --input 1x8x32x32 --backend triton
  fastseg swap mine.py:UNet --args n_classes=21 --input 2x3x96x128 --loss cross_entropy
  fastseg swap mine.py:make '--args={"depth": 4}' --input image=1x3x64x64 --input labels=1x64x64:int64:19 --json

An INPUT is [NAME=]SHAPE[:DTYPE[:LIMIT]]: random, of --dtype unless it says another, integers below LIMIT (2 without
one); with a NAME it is passed by that name. ARGS are FACTORY's, KEY=VALUE or by position, each read as JSON or Python
and else as a string, or one JSON object or list.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `fastseg swap`."""
    parser.description = (
        "Build a model and swap fastseg's kernels into a copy of it: what was swapped, why the rest was not, whether "
        "outputs, gradients and buffers are those of the model as it was, by float64, and how long both take. "
        "Exit code 1 if anything differs."
    )
    parser.epilog = EXAMPLES
    add = parser.add_argument
    add("model", metavar="MODULE:FACTORY", help="a module or a .py file, and what in it is or makes the model")
    add("--args", nargs="+", default=[], metavar="ARG", help="arguments of FACTORY")
    add("--input", action="append", required=True, help="an input of the model (may be repeated)")
    add("--loss", help="cross_entropy, or MODULE:FACTORY of a module called with the model's first output and the "
        "target: swapped, checked and timed with the model")  # fmt: skip
    add("--target", metavar="INPUT", help="the loss's target (default: labels, of as many classes as the output has)")
    add("--dtype", choices=list(DTYPES), default="float32", help="of the model and its inputs (default: float32)")
    add("--device", help="cuda, cuda:1, cpu (default: cuda where there is one)")
    add("--channels-last", action="store_true", help="model and inputs in channels_last")
    add("--backend", choices=dispatch.BACKENDS, default="auto",
        help="of the swapped copy (default: auto); triton on a CPU interprets the kernels, which is slow")  # fmt: skip
    add("--ops", help="swap these alone: names that fastseg.swap takes, comma-separated")
    add("--compact-indices", action="store_true", help="as of fastseg.swap: uint8 offsets between pools and unpools")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--train", action="store_const", dest="modes", const=MODES[:1], help="in training mode alone")
    only.add_argument("--eval", action="store_const", dest="modes", const=MODES[1:], help="in evaluation mode alone")
    add("--no-time", action="store_true", help="check, and time nothing")
    add("--seconds", type=float, default=1.0, help="to time each form for, in each mode (default: 1)")
    add("--seed", type=int, default=0, help="of weights, inputs and what the model draws (default: 0)")
    add("--json", action="store_true", help="one JSON object on standard output")


# --- what is tried ---------------------------------------------------------------------------------------------------


class WithLoss(nn.Module):
    """A model and its loss: forward(target, *inputs) gives the model's result, and the loss of its first output."""

    def __init__(self, model: nn.Module, loss: nn.Module) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, target: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Tensor]:
        result = self.model(*args, **kwargs)
        return result, self.loss(next(equivalence.tensors(result))[1], target)


@dataclass
class Trial:
    """A model, its inputs by position and by name, and the seed of what it draws."""

    model: nn.Module
    inputs: list[Any]
    named: dict[str, Any]
    seed: int

    def first_output(self) -> Tensor:
        """ValueError where the model, as it is, does not run, or gives no tensor."""
        try:
            with torch.no_grad():
                result = copy.deepcopy(self.model)(*self.inputs, **self.named)
        except Exception as error:
            raise ValueError(f"{self.failing(self.model)} {model_spec.said(error)}") from error
        for _, tensor in equivalence.tensors(result):
            return tensor
        raise ValueError(f"the model gives a {type(result).__name__} without tensors: there is nothing to compare")

    @staticmethod
    def failing(model: nn.Module) -> str:
        return f"the model, not swapped, fails on these inputs in {MODES[not model.training]}:"

    def outcome(self, model: nn.Module) -> Outcome:
        """Of a copy: each begins with the same state, whatever a forward changes."""
        return equivalence.outcome(copy.deepcopy(model), self.inputs, self.named, self.seed)


def prepare(args: argparse.Namespace) -> Trial:
    """The model with its loss and its inputs, placed; both were called once."""
    if args.target is not None and args.loss is None:
        raise ValueError("--target is for --loss, which is not given")
    device, dtype = pick_device(args.device), DTYPES[args.dtype]
    torch.manual_seed(args.seed)

    def placed(x: Any) -> Any:
        if args.channels_last and (isinstance(x, nn.Module) or x.dim() == 4):
            x = x.to(memory_format=torch.channels_last)
        return x.to(device)

    model = placed(model_spec.model(args.model, args.args).to(dtype)).train((args.modes or MODES)[0] == "training")
    drawn = [model_spec.tensor(text, dtype) for text in args.input]
    inputs = [placed(x) for name, x in drawn if name is None]
    trial = Trial(model, inputs, {name: placed(x) for name, x in drawn if name is not None}, args.seed)
    output = trial.first_output()
    if args.loss is not None:
        loss = nn.CrossEntropyLoss() if args.loss == "cross_entropy" else model_spec.model(args.loss)
        if args.target is not None:
            target = model_spec.tensor(args.target, dtype)[1]
        elif output.dim() < 2 or not output.is_floating_point():
            raise ValueError(f"--target is needed: the first output, of shape {tuple(output.shape)}, has no classes")
        else:
            target = torch.randint(output.shape[1], (output.shape[0], *output.shape[2:]))
        trial.model, trial.inputs = WithLoss(model, placed(loss.to(dtype))), [placed(target), *inputs]
        trial.first_output()
    return trial


# --- checked ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """One mode: comparisons by kind, and why they are not with float64 but with plain torch, or None."""

    compared: dict[str, list[Comparison]]
    without_truth: str | None

    def as_dict(self) -> dict[str, Any]:
        compared = {kind: [c.as_dict() for c in comparisons] for kind, comparisons in self.compared.items()}
        return {"against": "plain torch" if self.without_truth else "float64", "reason": self.without_truth} | compared


def check(trial: Trial, plain: nn.Module, own: Outcome, found: Outcome) -> Check:
    """Compare what another form of a model gave, `found`, with what the model gave, `own`, in the mode that it is in.

    ValueError where what the model gives is another thing each time.
    """
    done = _checked(trial, plain, own, found)
    if equivalence.failures(done.compared) and equivalence.failures(_against(trial.outcome(plain), own)):
        raise ValueError(
            "the model, not swapped, gives something else each time, from the same weights and torch's seed: there is "
            "nothing to compare"
        )
    return done


def _checked(trial: Trial, plain: nn.Module, own: Outcome, found: Outcome) -> Check:
    try:
        truth = equivalence.in_float64(plain, trial.inputs, trial.named, trial.seed)
    except Exception as error:
        return Check(_against(found, own), f"in float64 the model fails: {model_spec.said(error)}")
    enough = SOMETHING_ELSE * WITHOUT_TRUTH[_dtype(own)]
    if any(c.error > enough for c in equivalence.compare_outcomes(own, own, truth)["outputs"]):
        return Check(_against(found, own), "in float64 the model computes something else")
    return Check(equivalence.compare_outcomes(found, own, truth, FLIPS), None)


def _against(found: Outcome, own: Outcome) -> dict[str, list[Comparison]]:
    """`found` compared with plain torch's."""
    allowed = WITHOUT_TRUTH[_dtype(own)]
    return {
        kind: [Comparison(c.tensor, c.error, c.torch_error, allowed if c.allowed else 0.0) for c in comparisons]
        for kind, comparisons in equivalence.compare_outcomes(found, own, own, FLIPS).items()
    }


def _dtype(own: Outcome) -> torch.dtype:
    return next((y.dtype for y in own["outputs"].values() if y.is_floating_point()), torch.float32)


def ran(trial: Trial, swapped: nn.Module, backend: str) -> list[dict[str, Any]] | None:
    """What the calls of the swapped model run on, counted, or None for a model that does not run on fake tensors."""
    try:
        with dispatch.backend(backend), torch.random.fork_rng():
            choices = dispatch.explain(swapped, *trial.inputs, **trial.named)
    except Exception:
        return None
    return [
        {"operator": choice.operator, "backend": choice.backend, "reason": choice.reason, "calls": calls}
        for choice, calls in Counter(choices).items()
    ]


def undoes(report: SwapReport, plain: nn.Module, swapped: nn.Module) -> bool:
    """Whether an undo gives the classes and the state_dict of the model as it was."""
    with report.undone():
        same = [type(m) for m in plain.modules()] == [type(m) for m in swapped.modules()]
        first, second = plain.state_dict(), swapped.state_dict()
    same &= list(first) == list(second)
    tensors = [(a, second[name]) for name, a in first.items() if same and isinstance(a, Tensor)]
    return same and all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in tensors)


# --- timed -----------------------------------------------------------------------------------------------------------


def measured(trial: Trial, model: nn.Module, seconds: float) -> dict[str, float | None]:
    """Milliseconds of a call in the mode that the model is in, in training with its backward, and MiB at the peak."""
    from ..bench import timing

    gradients: list[Tensor] = []

    def run() -> None:
        with torch.set_grad_enabled(model.training):
            found = [y for _, y in equivalence.tensors(model(*trial.inputs, **trial.named)) if y.requires_grad]
        if found:
            gradients[:] = gradients or [torch.ones_like(y) for y in found]
            model.zero_grad(set_to_none=True)
            torch.autograd.backward(found, gradients)

    device = next(equivalence.tensors((trial.inputs, trial.named)))[1].device
    took = timing.measure(run, device.type, seconds)
    peak = None if took.peak_bytes is None else took.peak_bytes / 2**20
    return {"ms": took.p50, "p20": took.p20, "p80": took.p80, "peak_mib": peak}


# --- the command -----------------------------------------------------------------------------------------------------


def main(args: argparse.Namespace) -> int:
    """Run `fastseg swap`; 0, or 1 where the swapped copy differs."""
    if not args.seconds > 0:
        raise ValueError(f"--seconds must be above 0, but is {args.seconds}")
    with contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext():  # a model may print
        report, checks, result = _tried(args)
    if args.json:
        print(json.dumps(result))
    else:
        _show(report, checks, result)
    return 0 if result["passed"] else 1


def _tried(args: argparse.Namespace) -> tuple[SwapReport, dict[str, Check], dict[str, Any]]:
    """The swap's report, a check a mode, and all of it as one JSON object."""
    on_gpu = pick_device(args.device).type == "cuda"
    if args.backend == "triton" and not on_gpu:
        dispatch.interpret_kernels()
    trial = prepare(args)
    plain, swapped = trial.model, copy.deepcopy(trial.model)
    ops = None if args.ops is None else [name.strip() for name in args.ops.split(",")]
    report = swap(swapped, ops=ops, compact_indices=args.compact_indices)
    modes = args.modes or MODES
    checks, failures, times = {}, [], {}
    for mode in modes:
        for model in (plain, swapped):
            model.train(mode == "training")
        try:
            own = trial.outcome(plain)
        except Exception as error:
            raise ValueError(f"{trial.failing(plain)} {model_spec.said(error)}") from error
        try:
            with dispatch.backend(args.backend):
                found = trial.outcome(swapped)
        except Exception as error:
            failures.append(f"{mode}: the swapped model fails: {model_spec.said(error)}")
            continue
        checks[mode] = check(trial, plain, own, found)
    failures += [f"{mode}: {said}" for mode, done in checks.items() for said in equivalence.failures(done.compared)]
    if not undoes(report, plain, swapped):
        failures.append("undo does not give the model as it was")
    not_timed = _not_timed(args, on_gpu, failures)
    for mode in () if not_timed else modes:
        for name, model, backend in (("plain", plain, "torch"), ("swapped", swapped, args.backend)):
            model.train(mode == "training")
            with dispatch.backend(backend):
                times.setdefault(mode, {})[name] = measured(trial, model, args.seconds)
    where = torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} threads of the CPU"
    if args.backend == "triton" and not on_gpu:
        where = "the CPU, kernels interpreted"
    result = {
        "model": args.model, "device": where, "dtype": args.dtype, "channels_last": args.channels_last,
        "inputs": args.input, "backend": args.backend, "seed": args.seed, "passed": not failures, "failures": failures,
        "swap": report.as_dict(), "ran": ran(trial, swapped, args.backend), "times": times, "not_timed": not_timed,
        "checked": {mode: done.as_dict() for mode, done in checks.items()},
    }  # fmt: skip
    return report, checks, result


def _not_timed(args: argparse.Namespace, on_gpu: bool, failures: list[str]) -> str | None:
    if args.no_time:
        return "not asked for"
    if failures:
        return "what differs has no time"
    if not on_gpu and args.backend == "triton":
        return "interpreted kernels have no time; a GPU is needed"
    return None


def _show(report: SwapReport, checks: dict[str, Check], result: dict[str, Any]) -> None:
    from rich.table import Table

    console = terminal.console()
    console.print(report if report.candidates else report.summary)
    if not report.swapped:
        console.print(
            "no layer was swapped; functional calls: fastseg.swap_functions, torch.compile(backend='fastseg')"
        )
    if result["ran"] is None:
        console.print("which backend each call takes is not known: the model does not run on fake tensors")
    for call in result["ran"] or ():
        console.print(f"{call['calls']} x {call['operator']}: {call['backend']} ({call['reason']})", markup=False)
    table = Table(title=f"largest error, {result['dtype']}, on {result['device']}, seed {result['seed']}")
    for column in ("mode", "of", "tensors", "compared with", "swapped", "plain torch", ""):
        table.add_column(column)
    for mode, done in checks.items():
        for kind, found in done.compared.items():
            if found:
                table.add_row(
                    mode, kind, str(len(found)), "plain torch" if done.without_truth else "float64",
                    f"{max(c.error for c in found):.1e}",
                    "" if done.without_truth else f"{max(c.torch_error for c in found):.1e}",
                    "ok" if all(c.passed for c in found) else "[red]FAILED",
                )  # fmt: skip
    if checks:
        console.print(table)
    for mode, done in checks.items():
        if done.without_truth:
            console.print(f"{mode}: {done.without_truth}", markup=False)
    for failure in result["failures"]:
        console.print(f"FAILED {failure}", markup=False)
    for mode, forms in result["times"].items():
        for name, took in forms.items():
            peak = "" if took["peak_mib"] is None else f", {took['peak_mib']:.1f} MiB at the peak"
            console.print(
                f"{mode}, {name}: {took['ms']:.3g} ms ({took['p20']:.3g} to {took['p80']:.3g}){peak}", markup=False
            )
    if result["not_timed"]:
        console.print(f"not timed: {result['not_timed']}")
    elif result["times"] and "CPU" in result["device"]:
        console.print(f"timed on {result['device']}, where fastseg takes torch's own functions: the kernels need a GPU")
