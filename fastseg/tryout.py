"""`fastseg swap`: swap into a model of yours, check it against the model as it was, time both."""

from __future__ import annotations

import argparse
import ast
import copy
import importlib
import importlib.util
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import cases, dispatch, outcomes, terminal
from .swapping import SwapReport, swap
from .verify import Comparison

DTYPES = cases.DTYPES | {"float64": torch.float64}
OPS = ("max_pool2d", "max_unpool2d", "conv_transpose2d", "cross_entropy", "batch_norm_relu")
FLIPS = 0.01
"""How far a gradient may be from float64 beyond what plain torch allows; see outcomes.compare."""
SOMETHING_ELSE = 0.5
"""Where plain torch's own outputs are so far from float64's, that model computes something else in float64."""
WITHOUT_TRUTH = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.1}
"""Without float64: how far from plain torch's a result may be."""
MODES = ("training", "evaluation")
EXAMPLES = """examples:
  fastseg swap mine.py:UNet --args n_classes=21 --input 2x3x96x128 --loss cross_entropy
  fastseg swap torch.nn:MaxPool2d --args 2 --input 1x8x32x32 --backend triton
  fastseg swap transformers:SegformerForSemanticSegmentation.from_config ...      a class, a method or a function
  fastseg swap mine.py:model --input image=1x3x64x64 --input labels=1x64x64:int64:19 --json

INPUT is [NAME=]SHAPE[:DTYPE[:LIMIT]]: random values, of --dtype where no DTYPE is given; integers from 0 to LIMIT - 1
(2 without one). With a NAME it is passed by that name. ARGS are what FACTORY is called with: KEY=VALUE or values by
position, each read as JSON or Python and else as a string, or one JSON object or list.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `fastseg swap`."""
    parser.description = (
        "Build a model, swap fastseg's kernels into a copy of it, print what was swapped and why the rest was not, "
        "check outputs, gradients and buffers of the copy against the model as it was and against float64, undo the "
        "swap, and time both. Exit code 1 if anything differs."
    )
    parser.epilog = EXAMPLES
    parser.add_argument("model", metavar="MODULE:FACTORY", help="a module or a .py file, and what makes the model")
    parser.add_argument("--args", nargs="+", default=[], metavar="ARG", help="arguments of FACTORY")
    parser.add_argument("--input", action="append", required=True, help="an input of the model (may be repeated)")
    parser.add_argument("--loss", help="cross_entropy, or MODULE:FACTORY of a module that is called with the model's "
                        "first output and the target: swapped, checked and timed with the model")  # fmt: skip
    parser.add_argument("--target", metavar="INPUT", help="the loss's target (default: a label for each place of the "
                        "output's classes)")  # fmt: skip
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32", help="of the model and its inputs")
    parser.add_argument("--device", help="cuda, cuda:1, cpu (default: cuda where there is one)")
    parser.add_argument("--channels-last", action="store_true", help="model and inputs in channels_last")
    parser.add_argument("--backend", choices=dispatch.BACKENDS, default="auto",
                        help="of the swapped copy (default: auto); triton on a CPU interprets, which is slow")  # fmt: skip
    parser.add_argument("--ops", help=f"swap these alone, comma-separated, of {', '.join(OPS)}")
    parser.add_argument("--compact-indices", action="store_true", help="uint8 offsets between pools and unpools")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--train", action="store_const", dest="mode", const="training", help="training alone")
    only.add_argument("--eval", action="store_const", dest="mode", const="evaluation", help="evaluation alone")
    parser.add_argument("--no-time", action="store_true", help="check, and time nothing")
    parser.add_argument("--seconds", type=float, default=1.0, help="to time each for (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, inputs and what the model draws (default: 0)")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")


# --- what was asked for ----------------------------------------------------------------------------------------------


def load(spec: str) -> Any:
    """The object that MODULE:NAME or FILE.py:NAME names; ValueError in a sentence where there is none."""
    where, _, name = spec.rpartition(":")
    if not where or not name:
        raise ValueError(f"{spec!r} must be MODULE:FACTORY, such as segnet:SegNet or path/segnet.py:SegNet")
    path = Path(where)
    folder = str(path.parent.resolve() if path.suffix == ".py" else Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        if path.suffix == ".py":
            found = importlib.util.spec_from_file_location(path.stem, path)
            module = sys.modules[path.stem] = importlib.util.module_from_spec(found)
            found.loader.exec_module(module)
        else:
            module = importlib.import_module(where)
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{where} cannot be imported: {_said(error)}") from error
    thing = module
    for part in name.split("."):
        if not hasattr(thing, part):
            raise ValueError(f"{where} has no {name}")
        thing = getattr(thing, part)
    return thing


def _said(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def arguments(given: Sequence[str]) -> tuple[list[Any], dict[str, Any]]:
    """(by position, by name) from ARG: KEY=VALUE, VALUE, or one JSON object or list."""
    if len(given) == 1 and given[0].lstrip()[:1] in ("{", "["):
        try:
            read = json.loads(given[0])
        except json.JSONDecodeError as error:
            raise ValueError(f"--args is no JSON: {error}") from error
        return ([], read) if isinstance(read, dict) else (read, {})
    by_place, by_name = [], {}
    for text in given:
        key, equals, value = text.partition("=")
        if equals and key.isidentifier():
            by_name[key] = _value(value)
        else:
            by_place.append(_value(text))
    return by_place, by_name


def _value(text: str) -> Any:
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError):
            pass
    return text


def build(spec: str, given: Sequence[str]) -> nn.Module:
    """The model, or loss, that MODULE:FACTORY is or makes from `given`. ValueError for anything else."""
    made = load(spec)
    if not isinstance(made, nn.Module):
        if not callable(made):
            raise ValueError(f"{spec} is of type {type(made).__name__}; it must be a model or make one")
        by_place, by_name = arguments(given)
        try:
            made = made(*by_place, **by_name)
        except Exception as error:
            raise ValueError(f"{spec} could not be called with {' '.join(given) or 'no --args'}: {_said(error)}") from error
    elif given:
        raise ValueError(f"{spec} is a model already, which takes no --args")
    if not isinstance(made, nn.Module):
        raise ValueError(f"{spec} gave a {type(made).__name__}; it must give a torch.nn.Module")
    return made


def draw(text: str, dtype: torch.dtype) -> tuple[str | None, Tensor]:
    """(name or None, random tensor) of INPUT, [NAME=]SHAPE[:DTYPE[:LIMIT]]."""
    name, equals, rest = text.rpartition("=")
    shape, *kind = rest.split(":")
    sizes = shape.split("x")
    named = getattr(torch, kind[0], None) if kind else dtype
    fine = all(size.isdigit() for size in sizes) and len(kind) < 3 and isinstance(named, torch.dtype)
    fine &= len(kind) < 2 or (kind[1].isdigit() and int(kind[1]) > 0 and not named.is_floating_point)
    if not fine or (equals and not name.isidentifier()):
        raise ValueError(f"input {text!r} must be [NAME=]SHAPE[:DTYPE[:LIMIT]], such as 1x3x64x64 or labels=1x64x64:int64:19")
    size = [int(n) for n in sizes]
    if named.is_floating_point:
        return name or None, torch.randn(size).to(named)
    return name or None, torch.randint(int(kind[1]) if len(kind) == 2 else 2, size).to(named)


class WithLoss(nn.Module):
    """A model and its loss: forward(target, ...) gives the model's outputs and the loss of the first."""

    def __init__(self, model: nn.Module, loss: nn.Module) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, target: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Tensor]:
        outputs = self.model(*args, **kwargs)
        return outputs, self.loss(next(outcomes.tensors(outputs))[1], target)


@dataclass
class Trial:
    """A model, what it is called with, and the seed of what it draws."""

    model: nn.Module
    inputs: list[Any]
    named: dict[str, Any]
    seed: int

    def outcome(self, model: nn.Module) -> outcomes.Outcome:
        return outcomes.outcome(model, self.inputs, self.named, self.seed)


def prepare(args: argparse.Namespace) -> Trial:
    """The model and its inputs, placed and called once; ValueError where that fails."""
    if args.target is not None and args.loss is None:
        raise ValueError("--target is for --loss, which is not given")
    device, dtype = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu")), DTYPES[args.dtype]
    torch.manual_seed(args.seed)
    model = build(args.model, args.args)
    layout = torch.channels_last if args.channels_last else torch.contiguous_format

    def place(x: Tensor) -> Tensor:
        return x.to(device, memory_format=layout if x.dim() == 4 else torch.contiguous_format)

    drawn = [draw(text, dtype) for text in args.input]
    inputs = [place(x) for name, x in drawn if name is None]
    named = {name: place(x) for name, x in drawn if name is not None}
    trial = Trial(model.to(device=device, dtype=dtype, memory_format=layout), inputs, named, args.seed)
    first = _first_output(trial)
    if args.loss is not None:
        loss = nn.CrossEntropyLoss() if args.loss == "cross_entropy" else build(args.loss, [])
        if args.target is not None:
            target = place(draw(args.target, dtype)[1])
        elif first.dim() > 1 and first.is_floating_point():
            target = torch.randint(first.shape[1], (first.shape[0], *first.shape[2:]), device=device)
        else:
            raise ValueError(f"--target is needed: the first output, of shape {tuple(first.shape)}, has no classes")
        trial.model, trial.inputs = WithLoss(trial.model, loss.to(device=device, dtype=dtype)), [target, *inputs]
        _first_output(trial)
    return trial


def _first_output(trial: Trial) -> Tensor:
    try:
        with torch.no_grad():
            result = copy.deepcopy(trial.model)(*trial.inputs, **trial.named)
    except Exception as error:
        raise ValueError(f"the model, before any swap, fails on these inputs: {_said(error)}") from error
    first = next(outcomes.tensors(result), None)
    if first is None:
        raise ValueError(f"the model gives a {type(result).__name__} without a tensor: there is nothing to compare")
    return first[1]


# --- checked ---------------------------------------------------------------------------------------------------------


def check(
    trial: Trial, plain: nn.Module, swapped: nn.Module, backend: str
) -> tuple[dict[str, list[Comparison]], str | None]:
    """Comparisons by kind, in the mode that both models are in, and why float64 is not what they are compared with."""
    own = trial.outcome(plain)
    truth, reason = _truth(trial, plain, own)
    with dispatch.backend(backend):
        found = trial.outcome(swapped)
    if truth is not None:
        return outcomes.compare(found, own, truth, FLIPS), None
    dtype = next((t.dtype for t in own["outputs"].values() if t.is_floating_point()), torch.float32)
    against = outcomes.compare(found, own, own, FLIPS)
    least = WITHOUT_TRUTH[dtype]
    return {
        kind: [Comparison(c.tensor, c.error, c.torch_error, max(c.allowed, least)) for c in comparisons]
        for kind, comparisons in against.items()
    }, reason


def _truth(trial: Trial, plain: nn.Module, own: outcomes.Outcome) -> tuple[outcomes.Outcome | None, str | None]:
    try:
        truth = outcomes.in_float64(plain, trial.inputs, trial.named, trial.seed)
    except Exception as error:
        return None, f"the model does not run in float64 ({_said(error)})"
    worst = max((c.error for c in outcomes.compare(own, own, truth)["outputs"]), default=0.0)
    if not worst < SOMETHING_ELSE:
        return None, "in float64 the model computes something else"
    return truth, None


def choices(trial: Trial, model: nn.Module, backend: str) -> list[dispatch.Choice] | None:
    """What each call in the swapped model runs on, or None where the model does not run on fake tensors."""
    try:
        with dispatch.backend(backend), torch.random.fork_rng():
            return dispatch.explain(model, *trial.inputs, **trial.named)
    except Exception:
        return None


def timed(trial: Trial, model: nn.Module, seconds: float) -> Any:
    """Time of a call, in training with its backward, in evaluation without gradients."""
    from .bench import timing

    def run() -> None:
        with torch.set_grad_enabled(model.training):
            found = [y for _, y in outcomes.tensors(model(*trial.inputs, **trial.named))]
            if model.training:
                torch.autograd.backward([y for y in found if y.requires_grad and y.dim() == 0] or [
                    y for y in found if y.requires_grad], None)

    return timing.measure(run, trial_device(trial), seconds)
