"""Machine code of every kernel in the configurations that it would launch with, for three generations of GPUs."""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from .. import dispatch
from ..kernels.launch import targeting
from ..ops.operator import observing
from ..verification import cases
from ..verification.cases import Case, ConvTransposeSpec, LossSpec, Placement, PoolSpec, ResizeSpec
from . import cuda_codegen
from .codegen import Compiled, Launch, compile_for, compile_for_amd, disassemble, record

SMS = (80, 90, 100)
GLOBAL_ATOMICS = ("ATOM.", "ATOMG", "RED.", "REDG")  # ATOMS is of shared memory, where sm_100 manages its tensor memory


def network_cases(at: Placement) -> Iterator[Case]:
    """Every operator at sizes of SegNet, DeconvNet and a U-Net, and pools of an odd size."""
    ceil, overlapping = PoolSpec(ceil_mode=True), PoolSpec(kernel=3, stride=2, padding=1)
    for shape in ((8, 64, 360, 480), (8, 256, 45, 60)):
        yield from cases.max_pool2d(at, shape, ceil)
        yield from cases.max_unpool2d(at, shape, ceil)
        yield from cases.batch_norm_relu(at, shape)
    yield from cases.max_pool2d(at, (8, 64, 112, 112), overlapping)
    yield from cases.max_unpool2d(at, (8, 64, 112, 112), overlapping)
    yield from cases.max_unpool2d_conv2d(at, (8, 128, 90, 120), 64)
    yield from cases.conv_transpose2d_affine_relu(at, (8, 128, 180, 240), ConvTransposeSpec(64, kernel=2, stride=2))
    yield from cases.conv_transpose2d(at, (8, 256, 90, 120), ConvTransposeSpec(128, kernel=2, stride=2))
    yield from cases.conv_transpose2d(at, (16, 512, 14, 14), ConvTransposeSpec(512, kernel=3, padding=1))
    odd_stride = ConvTransposeSpec(64, kernel=3, stride=2, padding=1, output_padding=1)
    yield from cases.conv_transpose2d(at, (8, 128, 90, 120), odd_stride)
    depthwise = ConvTransposeSpec(32, kernel=4, stride=2, padding=1, groups=32)
    yield from cases.conv_transpose2d(at, (8, 32, 64, 64), depthwise)
    for classes, one_pass in ((11, False), (19, False), (19, None), (150, False), (150, None)):
        yield from cases.cross_entropy(at, (8, classes, 360, 480), LossSpec(one_pass=one_pass))
    for one_pass in (False, None):
        yield from cases.cross_entropy(at, (8, 19, 360, 480), LossSpec(one_pass=one_pass, predicted=True))
    for classes in (4, 150):
        yield from cases.dice_cross_entropy(at, (8, classes, 360, 480))
    for classes in (11, 19, 150):
        yield from cases.confusion_matrix(at, (8, 360, 480), classes)
    yield from cases.upsample_cross_entropy(at, (16, 150, 64, 64), ResizeSpec((512, 512)))
    yield from cases.upsample_cross_entropy(at, (8, 19, 128, 256), ResizeSpec((512, 1024)), LossSpec(predicted=True))
    yield from cases.upsample_cross_entropy(
        at, (8, 19, 128, 256), ResizeSpec((512, 1024), align_corners=True),
        LossSpec(weighted=True, reduction="none", label_smoothing=0.1),
    )  # fmt: skip
    nearest = ResizeSpec((67, 67), mode="nearest")
    yield from cases.upsample_cross_entropy(at, (8, 21, 33, 33), nearest, LossSpec(weighted=True))
    yield from cases.upsample_argmax(at, (16, 150, 128, 128), (512, 512))


def launches(args: argparse.Namespace, sm: int) -> list[tuple[str, Launch]]:
    """Distinct launches, forward and backward, of the asked operators on GPUs of sm_<sm>: (layout, launch)."""
    found: dict[str, tuple[str, Launch]] = {}
    for layout in [args.layout] if args.layout else cases.LAYOUTS:
        for case in network_cases(Placement(cases.DTYPES[args.dtype], cases.LAYOUTS[layout], "meta")):
            if args.op and not case.operator.startswith(tuple(args.op)):
                continue
            with dispatch.backend("triton"), targeting(sm), observing(lambda operator, call: None):
                recorded = record(lambda case=case: case.step(case.ours, backward=True)())
            for launch in recorded:
                key = (launch.name, launch.signature, launch.constants, launch.divisible, launch.options)
                found.setdefault(f"{layout} {launch.name}" if args.first else repr(key), (layout, launch))
    return list(found.values())


_jobs: list[Callable[[], Any]] = []


def _job(index: int) -> Any:
    return _jobs[index]()


def _in_processes(jobs: list[Callable[[], Any]]) -> list[Any]:
    """The jobs' results, each made in a fork of this process, since kernels cannot be sent to another."""
    _jobs[:] = jobs
    with multiprocessing.get_context("fork").Pool() as pool:
        return pool.map(_job, range(len(jobs)), chunksize=1)


def rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each GPU generation and distinct launch there; the AMD target for each kernel's first launch."""
    found = [(sm, layout, recorded) for sm in args.sm or SMS for layout, recorded in launches(args, sm)]
    firsts: dict[str, Launch] = {}
    for _, _, recorded in found:
        firsts.setdefault(recorded.name, recorded)
    own = [(sm, *entry) for sm in args.sm or SMS for entry in _cuda_launches(args)]
    triton = [lambda recorded=recorded, sm=sm: compile_for(recorded, sm) for sm, _, recorded in found]
    cuda = [lambda request=request, sm=sm: cuda_codegen.compile_for(request, sm) for sm, _, request in own]
    amd = [lambda recorded=recorded: _elsewhere(recorded) for recorded in firsts.values()]
    results = _in_processes(triton + cuda + amd)
    compiled, amd = results[: len(found) + len(own)], results[len(found) + len(own) :]
    facts, elsewhere = _facts_of_all(compiled), dict(zip(map(repr, firsts.values()), amd, strict=True))
    table = []
    for (sm, layout, recorded), known in zip(found, facts[: len(found)], strict=True):
        row = {"kernel": recorded.name, "layout": layout, "sm": sm, "programs": recorded.programs}
        row["constants"] = recorded.constants
        table.append(row | known | {"gfx942": elsewhere.get(repr(recorded), "not tried")})
    for (sm, layout, request), known in zip(own, facts[len(found) :], strict=True):
        row = {"kernel": f"{request.file}.cu {request.kernel}", "layout": layout, "sm": sm}
        row |= {"programs": request.blocks, "constants": {"instance": request.instance}}
        table.append(row | known | {"gfx942": "not launched"})
    return table


def _cuda_launches(args: argparse.Namespace) -> list[tuple[str, Any]]:
    """Distinct launches of the CUDA C++ kernels, none where there is nothing to compile them with."""
    if cuda_codegen.library_path() is None:
        return []
    found: dict[str, tuple[str, Any]] = {}
    firsts: set[tuple[str, str]] = set()
    for layout in [args.layout] if args.layout else cases.LAYOUTS:
        for case in network_cases(Placement(cases.DTYPES[args.dtype], cases.LAYOUTS[layout], "meta")):
            if args.op and not case.operator.startswith(tuple(args.op)):
                continue
            for request in cuda_codegen.record(case.step(case.ours, backward=True)):
                if not args.first or (layout, request.kernel) not in firsts:
                    firsts.add((layout, request.kernel))
                    found.setdefault(request.instance, (layout, request))
    return list(found.values())


def _elsewhere(recorded: Launch) -> str:
    """Whether AMD's compiler takes it; launches with tensor descriptors are made on NVIDIA's GPUs alone."""
    if any(kind.startswith("tensordesc") for kind in recorded.signature.values()):
        return "not launched"
    return compile_for_amd(recorded) or "compiles"


def _facts_of_all(compiled: list[Compiled]) -> list[dict[str, Any]]:
    """Of each kernel, in their order; those of one generation are disassembled together."""
    generations: dict[int, list[Compiled]] = {}
    for kernel in compiled:
        generations.setdefault(kernel.capability, []).append(kernel)
    found = _in_processes([partial(_facts_of, kernels) for kernels in generations.values()])
    facts = dict(zip(generations, map(iter, found), strict=True))
    return [next(facts[kernel.capability]) for kernel in compiled]


def _facts_of(kernels: list[Compiled]) -> list[dict[str, Any]]:
    disassemble(kernels)
    return [_facts(compiled) for compiled in kernels]


def _facts(compiled: Compiled) -> dict[str, Any]:
    return {
        "registers": compiled.resources["REG"],
        "spills": compiled.spills,
        "shared": compiled.shared,
        "warps": compiled.warps,
        "occupancy": compiled.occupancy,
        "loads": compiled.widths("LDG"),
        "stores": compiled.widths("STG"),
        "tensor core": compiled.count("HMMA", "HGMMA", "UTCHMMA", "IMMA"),
        "wgmma": compiled.count("HGMMA", "UTCHMMA"),
        "copy engine": compiled.count("UTMALDG", "UTMASTG", "UBLKCP"),
        "atomics": compiled.count(*GLOBAL_ATOMICS),
    }


def source(args: argparse.Namespace, kernel: str, form: str) -> str:
    """The disassembly ("sass") or PTX of the first launch of a kernel, for the first asked architecture."""
    sm = (args.sm or [90])[0]
    made: dict[str, Callable[[], Compiled]] = {}
    for _, launch in launches(args, sm):
        made.setdefault(launch.name, lambda launch=launch: compile_for(launch, sm))
    for _, request in _cuda_launches(args):
        made.setdefault(request.kernel, lambda request=request: cuda_codegen.compile_for(request, sm))
    if kernel not in made:
        raise ValueError(f"no kernel is named {kernel!r}; there are {', '.join(sorted(made))}")
    return getattr(made[kernel](), form)


NOTE = (
    "registers a thread; spills: bytes of stack and instructions that touch it; loads, stores: bytes of one access x "
    "number of instructions; occupancy: share of warps that registers and shared memory let reside. Kernels of a .cu "
    "file are those of backend 'cuda', compiled where the package nvidia-cuda-nvrtc is installed."
)


def table(rows: list[dict[str, Any]], args: argparse.Namespace) -> Any:
    from rich.table import Table

    made = Table(title=f"machine code, {args.dtype}")
    for column in ("kernel", "layout", "sm"):
        made.add_column(column)
    columns = ("registers", "spills", "shared", "occupancy", "loads", "stores", "tensor core", "copy engine", "atomics")
    for column in columns:
        made.add_column(column, justify="right")
    made.add_column("gfx942")
    for row in rows:
        cells = {**row, "occupancy": f"{row['occupancy']:.0%}"}
        for kind in ("loads", "stores"):
            cells[kind] = " ".join(f"{width}Bx{count}" for width, count in row[kind].items())
        made.add_row(row["kernel"], row["layout"], str(row["sm"]), *(str(cells[c]) for c in columns), row["gfx942"])
    return made
