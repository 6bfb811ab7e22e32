"""The report of `fastseg inspect instructions`: instructions of every call, next to what GPUs can issue meanwhile.

The cases are those of codegen, at the sizes of real networks. `diff` compares two of these reports.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from .. import dispatch
from ..atomic_write import atomic_write
from ..kernels.cuda import launch as cuda_launch
from ..kernels.launch import targeting
from ..ops.operator import Operator, observing
from ..verification.cases import Case
from . import cuda_codegen
from .budget import excess
from .codegen import Compiled, Launch, compile_for, listings, recording
from .codegen_report import SMS, in_processes, selected_cases
from .gpus import LAUNCH, SPECIAL, Gpu, gpus_of
from .instructions import Count, count
from .selection import Selection

BACKENDS = ("triton", "cuda")
MAIN = 0.1  # a launch that asks for at least this share of the call's floor counts for the bytes in flight


@dataclass
class Call:
    """The forward or backward of a case on one backend and GPU generation: its launches, and the bytes of its floor."""

    case: Case
    layout: str
    backend: str
    sm: int
    mode: str
    floor: int = 0
    launches: list[Any] = field(default_factory=list)
    counts: list[Count] = field(default_factory=list)


def calls_of(case: Case, layout: str, backend: str, sm: int) -> list[Call]:
    """The forward and the backward of a case; empty if the backend does not support it."""
    modes = [Call(case, layout, backend, sm, mode) for mode in ("forward", "backward")]

    def note(operator: Operator, args: tuple[Any, ...]) -> None:
        call = modes[operator.gradient]
        call.floor += operator.floor(*args)
        call.launches += launches[sum(len(other.launches) for other in modes) :]

    recorded = recording() if backend == "triton" else cuda_recording()
    with dispatch.backend(backend), targeting(sm), recorded as launches:
        try:
            with observing(lambda operator, args: None):
                step = case.step(case.ours, backward=True)  # the forward runs once for the gradients' shapes
            launches.clear()
            with observing(note):
                step()
        except NotImplementedError:
            return []
    return [call for call in modes if call.launches]


@contextlib.contextmanager
def cuda_recording() -> Iterator[list[Any]]:
    """codegen.recording for the CUDA C++ kernels."""
    launches: list[Any] = []
    with cuda_launch.recording(launches.append):
        yield launches


def counted_calls(selection: Selection, sms: Sequence[int], backends: Sequence[str] = BACKENDS) -> list[Call]:
    """Every selected call, with the count of each of its launches. Each kernel is compiled once."""
    if cuda_codegen.library_path() is None:
        backends = [backend for backend in backends if backend != "cuda"]
    found = list(selected_cases(selection))
    calls = [
        call for sm in sms for backend in backends for layout, case in found
        for call in calls_of(case, layout, backend, sm)
    ]  # fmt: skip
    jobs: dict[tuple[int, str], Callable[[], Compiled]] = {}
    for call in calls:
        for launch in call.launches:
            jobs.setdefault((call.sm, _key(launch)), partial(_compile, launch, call.sm))
    compiled = dict(zip(jobs, in_processes(list(jobs.values())), strict=True))
    listed: dict[tuple[int, str], Any] = {}
    for sm in sms:
        keys = [key for key in compiled if key[0] == sm]
        listed |= dict(zip(keys, listings([compiled[key] for key in keys]), strict=True)) if keys else {}
    keys = [(call, launch, (call.sm, _key(launch))) for call in calls for launch in call.launches]
    counts = in_processes([partial(_count, launch, compiled[key], listed[key]) for _, launch, key in keys])
    for (call, _, _), one in zip(keys, counts, strict=True):
        call.counts.append(one)
    return calls


def _key(launch: Any) -> str:
    return launch.key if isinstance(launch, Launch) else f"{launch.file} {launch.instance}"


def _compile(launch: Any, sm: int) -> Compiled:
    return compile_for(launch, sm) if isinstance(launch, Launch) else cuda_codegen.compile_for(launch, sm)


def _count(launch: Any, compiled: Compiled, listing: list[Any]) -> Count:
    if isinstance(launch, Launch):
        return count(compiled, listing, launch.arguments, launch.programs)
    return count(compiled, listing, launch.args, launch.blocks)


def rows(selection: Selection, sms: Sequence[int] = SMS, backends: Sequence[str] = BACKENDS) -> list[dict[str, Any]]:
    """One row for the forward and one for the backward of each case, on each backend and GPU generation."""
    return [row_of(call) for call in counted_calls(selection, sms, backends)]


def row_of(call: Call) -> dict[str, Any]:
    """The row of a call whose launches are counted."""
    total = sum(one.instructions for one in call.counts)
    special = sum(one.of(SPECIAL) for one in call.counts)
    row = {
        "operator": call.case.operator, "mode": call.mode, "layout": call.layout, "size": call.case.size,
        "backend": call.backend, "sm": call.sm, "floor": call.floor, "launches": len(call.counts),
        "instructions": total, "per byte": total / call.floor, "special per byte": special / call.floor,
        "shared per byte": sum(one.shared for one in call.counts) / call.floor,
        "barriers": sum(one.barriers for one in call.counts),
        "gpus": {gpu.name: _on_gpu(call, gpu) for gpu in gpus_of(call.sm)},
        "kernels": [_kernel(one, call) for one in call.counts],
    }  # fmt: skip
    return row | {"above the budget": excess(row)}


def _on_gpu(call: Call, gpu: Gpu) -> dict[str, Any]:
    """What a call takes of one GPU. share: of the issue slots, at the full bandwidth; pipe: the fullest one."""
    pipes = {name: sum(one.pipes.get(name, 0) for one in call.counts) / call.floor / gpu.slots(rate)
             for name, rate in gpu.rates.items()}  # fmt: skip
    fullest = max(pipes, key=lambda name: pipes[name])
    main = [one.kept_in_flight(gpu) for one in call.counts if one.asked_in_all >= MAIN * call.floor]
    bytes_us = call.floor / gpu.bandwidth / 1e6
    busy_us = sum(one.seconds(gpu) for one in call.counts) * 1e6
    return {
        "share": sum(one.instructions for one in call.counts) / call.floor / gpu.slots(),
        "pipe": fullest, "pipe share": pipes[fullest], "in flight": min(main, default=None),
        "bytes us": bytes_us, "model us": max(bytes_us, busy_us) + len(call.counts) * LAUNCH * 1e6,
    }  # fmt: skip


def _kernel(one: Count, call: Call) -> dict[str, Any]:
    return {
        "kernel": one.kernel, "programs": one.programs, "warps": one.warps, "registers": one.registers,
        "occupancy": one.occupancy, "per byte": one.instructions / call.floor,
        "a thread": sum(one.issued.values()) / one.warps, "in flight a warp": one.in_flight, "waits": one.waits,
        "barriers": one.barriers, "both ways": one.both_ways, "loads": one.loads, "stores": one.stores,
    }  # fmt: skip


NOTE = (
    "a byte: thread instructions over the bytes of the call's floor, in all launches; special: of these exp2, log2, "
    "reciprocals and conversions. of slots: the share of all issue slots that this is while the floor's bytes cross "
    "memory at full bandwidth; kernels sustain 60 to 75 %. pipe: the fullest pipe, and its share. in flight: bytes "
    "that loads keep on their way, over what the bandwidth needs (Little's law), of the launch with the least. model: "
    "the larger of the time of the bytes and of the instructions, and 3 us a launch. It is a model, not a measurement. "
    "*: above the budget of memory-bound calls on sm_90 and sm_100."
)


def table(rows: list[dict[str, Any]], dtype: str) -> Any:
    """A rich table of the rows, one line for each GPU."""
    from rich.table import Table

    made = Table(title=f"instructions, {dtype}")
    for column in ("operator", "", "layout", "size", "backend", "GPU"):
        made.add_column(column)
    for column in ("launches", "a byte", "special", "of slots", "pipe", "in flight", "bytes us", "model us"):
        made.add_column(column, justify="right")
    for row in rows:
        for name, on in row["gpus"].items():
            flight = "" if on["in flight"] is None else f"{on['in flight']:.0%}"
            made.add_row(
                row["operator"], row["mode"], row["layout"], row["size"], row["backend"], name, str(row["launches"]),
                f"{row['per byte']:.2f}{'*' * bool(row['above the budget'])}",
                f"{row['special per byte']:.2f}", f"{on['share']:.0%}",
                f"{on['pipe']} {on['pipe share']:.0%}", flight, f"{on['bytes us']:.1f}", f"{on['model us']:.1f}",
            )  # fmt: skip
    return made


def chart(rows: list[dict[str, Any]], dtype: str, path: Path) -> None:
    """Write a bar chart of the thread instructions a byte, beside what each GPU can issue."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('the chart needs matplotlib: pip install "fastseg-kernels[bench]"') from error
    figure = Figure(figsize=(10, 0.2 * len(rows) + 1.5), layout="constrained")
    axes = figure.subplots()
    axes.barh(range(len(rows)), [row["per byte"] for row in rows])
    for gpu in {gpu.name: gpu for row in rows for gpu in gpus_of(row["sm"])}.values():
        axes.axvline(gpu.slots(), color="black", linewidth=0.8)
        axes.text(gpu.slots(), -1, gpu.name, fontsize=7, ha="center")
    labels = [f"{r['operator']} {r['mode']}, {r['layout']}, {r['size']}, {r['backend']} sm_{r['sm']}" for r in rows]
    axes.set_yticks(range(len(rows)), labels, fontsize=6)
    axes.invert_yaxis()
    axes.set_xlabel(f"thread instructions over the bytes of the floor, {dtype}; lines: what a GPU can issue")
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=130)


def diff(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[str]:
    """One line for each thing that is worse in the new report: instructions, registers, occupancy and access widths.

    Calls are found by operator, mode, layout, size, backend and GPU generation, kernels by their names in a call.
    """

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row[name] for name in ("operator", "mode", "layout", "size", "backend", "sm"))

    before, worse = {key(row): row for row in old}, []
    for row in new:
        was = before.get(key(row))
        if was is None:
            continue
        found = _worse(was, row, (("per byte", 1), ("launches", 1)))
        kernels = {kernel["kernel"]: kernel for kernel in was["kernels"]}
        for kernel in row["kernels"]:
            if kernel["kernel"] in kernels:
                own = _worse(kernels[kernel["kernel"]], kernel, (("registers", 1), ("occupancy", -1)))
                own += _narrower(kernels[kernel["kernel"]], kernel)
                found += [f"{kernel['kernel']} {words}" for words in own]
        worse += [f"{' '.join(map(str, key(row)[:-1]))} sm_{row['sm']}: {words}" for words in found]
    return worse


def _worse(was: dict[str, Any], now: dict[str, Any], names: Sequence[tuple[str, int]]) -> list[str]:
    """Names whose numbers moved the wrong way by more than rounding. A sign of 1: smaller is better."""
    return [
        f"{name} {was[name]:.4g} -> {now[name]:.4g}"
        for name, sign in names
        if sign * (now[name] - was[name]) > 1e-3 * abs(was[name])
    ]


def _narrower(was: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Loads and stores whose bytes per access, on average, became fewer."""
    found = []
    for kind in ("loads", "stores"):
        before, after = (_mean_width(kernel[kind]) for kernel in (was, now))
        if after < before:
            found.append(f"bytes per access of {kind} {before:.3g} -> {after:.3g}")
    return found


def _mean_width(widths: dict[Any, int]) -> float:
    total = sum(widths.values())
    return sum(int(width) * n for width, n in widths.items()) / total if total else 0.0
