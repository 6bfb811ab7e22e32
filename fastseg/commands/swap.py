"""`fastseg swap`: swap fastseg into a model, check it against the model without fastseg, and time both."""

from __future__ import annotations

import argparse
import contextlib
import sys
from dataclasses import replace
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from .. import dispatch
from ..bench.swapped_model import time_swap
from ..training.device import pick_device
from ..verification import cases
from ..verification.swapped_model import MODES, SwapCheck, SwapOptions, Trial, WithLoss, check_swap, explain_calls
from . import model_spec, terminal
from .options import add_device, add_json

DTYPES = cases.DTYPES | {"float64": torch.float64}
EXAMPLES = """examples:
  fastseg swap torch.nn:MaxPool2d --args 2 --input 1x8x32x32 --backend triton
  fastseg swap mine.py:UNet --args n_classes=21 --input 2x3x96x128 --loss cross_entropy
  fastseg swap mine.py:make '--args={"depth": 4}' --input image=1x3x64x64 --input labels=1x64x64:int64:19 --json

An INPUT is [NAME=]SHAPE[:DTYPE[:LIMIT]], filled with random numbers: of --dtype unless it has its own, integers below
LIMIT (default: 2). With a NAME it is passed as a keyword argument. ARGS are FACTORY's arguments, KEY=VALUE or
positional, each read as JSON or Python, otherwise as a string; or one JSON object or list.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `fastseg swap`."""
    parser.description = (
        "Build a model and swap fastseg's kernels into a copy of it. Reports what was swapped, why the rest was not, "
        "whether outputs, gradients and buffers agree with those of the original model (compared with float64), and "
        "how long both take. Exit code 1 if anything differs."
    )
    parser.epilog = EXAMPLES
    add = parser.add_argument
    add("model", metavar="MODULE:FACTORY", help="a module or a .py file, and the name of a model or its constructor")
    add("--args", nargs="+", default=[], metavar="ARG", help="arguments of FACTORY")
    add("--input", action="append", required=True, help="an input of the model (may be repeated)")
    add("--loss", help="cross_entropy, or MODULE:FACTORY of a module that is called with the model's first output and "
        "the target: swapped, checked and timed together with the model")  # fmt: skip
    add("--target", metavar="INPUT", help="target of the loss (default: random labels, one class per output channel)")
    add("--dtype", choices=list(DTYPES), default="float32", help="dtype of the model and its inputs (default: float32)")
    add_device(parser)
    add("--channels-last", action="store_true", help="model and inputs in channels_last")
    add("--backend", choices=dispatch.BACKENDS, default="auto",
        help="of the swapped copy (default: auto); triton on a CPU interprets the kernels, which is slow")  # fmt: skip
    add("--ops", help="swap only these: names as for fastseg.swap, separated by commas")
    add("--compact-indices", action="store_true", help="as for fastseg.swap: uint8 offsets between pools and unpools")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--train", action="store_const", dest="modes", const=MODES[:1], help="only in training mode")
    only.add_argument("--eval", action="store_const", dest="modes", const=MODES[1:], help="only in evaluation mode")
    add("--no-time", action="store_true", help="check only, without timing")
    add("--seconds", type=float, default=1.0, help="time per model and mode (default: 1)")
    add("--seed", type=int, default=0, help="seed of weights, inputs and the model's random numbers (default: 0)")
    add_json(parser)


def main(args: argparse.Namespace) -> int:
    """Run `fastseg swap`. Returns 0, or 1 if the swapped copy differs."""
    if not args.seconds > 0:
        raise ValueError(f"--seconds must be above 0, but is {args.seconds}")
    with contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext():  # a model may print
        check, result = run(args)
    if args.json:
        terminal.print_json(result)
    else:
        print_result(check, result)
    return 0 if result["passed"] else 1


def run(args: argparse.Namespace) -> tuple[SwapCheck, dict[str, Any]]:
    """Check and time the swap; return the check, and all results as one JSON object."""
    on_gpu = pick_device(args.device).type == "cuda"
    interpreted = args.backend == "triton" and not on_gpu
    if interpreted:
        dispatch.interpret_kernels()
    trial = make_trial(args)
    ops = None if args.ops is None else [name.strip() for name in args.ops.split(",")]
    options = SwapOptions(ops, args.compact_indices, args.backend, args.modes or MODES)
    check = check_swap(trial, options)
    not_timed = reason_not_timed(args, check, interpreted)
    times = {} if not_timed else time_swap(trial, check.swapped, options, args.seconds)
    where = torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} threads of the CPU"
    result = {
        "model": args.model, "device": "the CPU, kernels interpreted" if interpreted else where, "dtype": args.dtype,
        "channels_last": args.channels_last, "inputs": args.input, "backend": args.backend, "seed": args.seed,
        "passed": not check.failures, "failures": check.failures, "swap": check.report.as_dict(),
        "ran": explain_calls(trial, check.swapped, args.backend), "times": times, "not_timed": not_timed,
        "checked": {mode: compared.as_dict() for mode, compared in check.checks.items()},
    }  # fmt: skip
    return check, result


def make_trial(args: argparse.Namespace) -> Trial:
    """Build the model, its loss and its inputs, and call them once. Raises ValueError if that fails."""
    if args.target is not None and args.loss is None:
        raise ValueError("--target needs --loss")
    device, dtype = pick_device(args.device), DTYPES[args.dtype]
    torch.manual_seed(args.seed)

    def place(x: Any) -> Any:
        if args.channels_last and (isinstance(x, nn.Module) or x.dim() == 4):
            x = x.to(memory_format=torch.channels_last)
        return x.to(device)

    model = model_spec.model(args.model, args.args).to(dtype).to(device).train((args.modes or MODES)[0] == "training")
    drawn = [model_spec.tensor(text, dtype) for text in args.input]
    named = {name: place(x) for name, x in drawn if name is not None}
    trial = Trial(model, [place(x) for name, x in drawn if name is None], named, args.seed)
    trial.initialise()
    place(model)  # after that, because lazy parameters have no memory format
    output = trial.first_output()
    if args.loss is None:
        return trial
    loss = nn.CrossEntropyLoss() if args.loss == "cross_entropy" else model_spec.model(args.loss)
    target = make_target(args.target, output, dtype)
    trial = replace(trial, model=WithLoss(model, place(loss.to(dtype))), inputs=[place(target), *trial.inputs])
    trial.first_output()
    return trial


def make_target(text: str | None, output: Tensor, dtype: torch.dtype) -> Tensor:
    """The target that `text` specifies; without it, random labels for the classes of `output`."""
    if text is not None:
        return model_spec.tensor(text, dtype)[1]
    if output.dim() < 2 or not output.is_floating_point():
        raise ValueError(f"--target is needed: the first output, of shape {tuple(output.shape)}, has no classes")
    return torch.randint(output.shape[1], (output.shape[0], *output.shape[2:]))


def reason_not_timed(args: argparse.Namespace, check: SwapCheck, interpreted: bool) -> str | None:
    """Why nothing is timed; None if both are timed."""
    if args.no_time:
        return "not requested"
    if check.failures:
        return "results differ"
    if interpreted:
        return "the kernels are interpreted; their times need a GPU"
    return None


def print_result(check: SwapCheck, result: dict[str, Any]) -> None:
    """Print all results as tables and sentences."""
    console = terminal.console()
    console.print(check.report if check.report.candidates else check.report.summary)
    if not check.report.swapped:
        console.print(
            "no layer was swapped; functional calls: fastseg.swap_functions, torch.compile(backend='fastseg')"
        )
    if result["ran"] is None:
        console.print("the backend of each call is unknown, because the model does not run on fake tensors")
    for call in result["ran"] or ():
        console.print(f"{call['calls']} x {call['operator']}: {call['backend']} ({call['reason']})", markup=False)
    if check.checks:
        title = f"largest error, {result['dtype']}, on {result['device']}, seed {result['seed']}"
        console.print(error_table(check, title))
    for mode, compared in check.checks.items():
        if compared.without_truth:
            console.print(f"{mode}: {compared.without_truth}", markup=False)
    for failure in check.failures:
        console.print(f"FAILED {failure}", markup=False)
    for mode, forms in result["times"].items():
        for name, took in forms.items():
            peak = "" if took["peak_mib"] is None else f", peak memory {took['peak_mib']:.1f} MiB"
            console.print(
                f"{mode}, {name}: {took['ms']:.3g} ms ({took['p20']:.3g} to {took['p80']:.3g}){peak}", markup=False
            )
    if result["not_timed"]:
        console.print(f"not timed: {result['not_timed']}")
    elif result["times"] and "CPU" in result["device"]:
        console.print(f"timed on {result['device']}: the Triton and CUDA C++ kernels need a GPU")


def error_table(check: SwapCheck, title: str) -> Table:
    """A table with the largest error of the outputs, gradients and buffers in each mode."""
    table = Table(title=title)
    for column in ("mode", "of", "tensors", "compared with", "swapped", "plain torch", ""):
        table.add_column(column)
    for mode, compared in check.checks.items():
        for kind, found in compared.compared.items():
            if found:
                table.add_row(
                    mode, kind, str(len(found)), "plain torch" if compared.without_truth else "float64",
                    f"{max(c.error for c in found):.1e}",
                    "" if compared.without_truth else f"{max(c.torch_error for c in found):.1e}",
                    "ok" if all(c.passed for c in found) else "[red]FAILED",
                )  # fmt: skip
    return table
