"""The report of `fastseg inspect codegen`: machine code of every kernel, for several generations of GPUs.

Each kernel is compiled in the configurations that it launches with at the sizes of real networks.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from .. import dispatch
from ..kernels.launch import targeting
from ..ops.operator import observing
from ..verification import cases
from ..verification.cases import Case, ConvTransposeSpec, LossSpec, Placement, PoolSpec, ResizeSpec
from . import cuda_codegen
from .codegen import Compiled, Launch, compile_for, compile_for_amd, disassemble, record
from .selection import Selection

SMS = (80, 90, 100)
# Not ATOMS, an atomic in shared memory, by which sm_100 manages its tensor memory.
GLOBAL_ATOMICS = ("ATOM.", "ATOMG", "RED.", "REDG")


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
    yield from cases.paste_boxes(at, (50, 21, 224, 224), (375, 500))
    yield from cases.paste_boxes(at, (8, 21, 224, 224), (375, 500), "sum", again=True)
    for classes in (11, 150):
        yield from cases.softmax_moments(at, (1, classes, 360, 480), passes=16, chunk=8)
    for classes in (11, 21):
        yield from cases.mean_field_message(at, (8, classes, 360, 480), sigma=20.0)
        yield from cases.mean_field_message(at, (8, classes, 360, 480), sigma=3.0, sigma_color=None)


def selected_cases(selection: Selection) -> Iterator[tuple[str, Case]]:
    """(layout, case) of the selected cases at the networks' sizes, on the meta device."""
    for layout in selection.layouts:
        for case in network_cases(selection.placement(layout, "meta")):
            if selection.includes(case):
                yield layout, case


def triton_launches(selection: Selection, sm: int, first: bool = False) -> list[tuple[str, Launch]]:
    """(layout, launch) of the distinct launches of the selected cases, forward and backward, on GPUs of sm_<sm>.

    first: only the first launch of each kernel in each layout.
    """
    found: dict[str, tuple[str, Launch]] = {}
    for layout, case in selected_cases(selection):
        with dispatch.backend("triton"), targeting(sm), observing(lambda operator, call: None):
            recorded = record(lambda case=case: case.step(case.ours, backward=True)())
        for launch in recorded:
            found.setdefault(f"{layout} {launch.name}" if first else launch.key, (layout, launch))
    return list(found.values())


def cuda_launches(selection: Selection, first: bool = False) -> list[tuple[str, Any]]:
    """(layout, launch) of the distinct launches of the CUDA C++ kernels; empty if NVRTC is not installed.

    first: only the first launch of each kernel in each layout.
    """
    if cuda_codegen.library_path() is None:
        return []
    found: dict[str, tuple[str, Any]] = {}
    seen: set[tuple[str, str]] = set()
    for layout, case in selected_cases(selection):
        for request in cuda_codegen.record(case.step(case.ours, backward=True)):
            if not first or (layout, request.kernel) not in seen:
                seen.add((layout, request.kernel))
                found.setdefault(request.instance, (layout, request))
    return list(found.values())


_jobs: list[Callable[[], Any]] = []


def _job(index: int) -> Any:
    return _jobs[index]()


def in_processes(jobs: list[Callable[[], Any]]) -> list[Any]:
    """The results of the jobs, each run in a fork of this process: kernels cannot be pickled."""
    _jobs[:] = jobs
    with multiprocessing.get_context("fork").Pool() as pool:
        return pool.map(_job, range(len(jobs)), chunksize=1)


def rows(selection: Selection, sms: Sequence[int] = SMS, first: bool = False) -> list[dict[str, Any]]:
    """One row for each distinct launch on each GPU generation. AMD's compiler runs on the first launch of each kernel.

    first: only the first launch of each kernel in each layout.
    """
    triton = [(sm, layout, recorded) for sm in sms for layout, recorded in triton_launches(selection, sm, first)]
    cuda = [(sm, layout, request) for sm in sms for layout, request in cuda_launches(selection, first)]
    first_of_kernel: dict[str, Launch] = {}
    for _, _, recorded in triton:
        first_of_kernel.setdefault(recorded.name, recorded)
    jobs: list[Callable[[], Any]] = [partial(compile_for, recorded, sm) for sm, _, recorded in triton]
    jobs += [partial(cuda_codegen.compile_for, request, sm) for sm, _, request in cuda]
    jobs += [partial(_compiles_for_amd, recorded) for recorded in first_of_kernel.values()]
    results = in_processes(jobs)
    compiled, amd = results[: len(triton) + len(cuda)], results[len(triton) + len(cuda) :]
    facts, amd = facts_of_all(compiled), dict(zip(map(repr, first_of_kernel.values()), amd, strict=True))
    table = []
    for (sm, layout, recorded), found in zip(triton, facts[: len(triton)], strict=True):
        row = {"kernel": recorded.name, "layout": layout, "sm": sm, "programs": recorded.programs}
        row["constants"] = recorded.constants
        table.append(row | found | {"gfx942": amd.get(repr(recorded), "not tried")})
    for (sm, layout, request), found in zip(cuda, facts[len(triton) :], strict=True):
        row = {"kernel": f"{request.file}.cu {request.kernel}", "layout": layout, "sm": sm}
        row |= {"programs": request.blocks, "constants": {"instance": request.instance}}
        table.append(row | found | {"gfx942": "not launched"})
    return table


def _compiles_for_amd(recorded: Launch) -> str:
    """What AMD's compiler says. Launches with tensor descriptors are made on NVIDIA's GPUs only."""
    if any(kind.startswith("tensordesc") for kind in recorded.signature.values()):
        return "not launched"
    return compile_for_amd(recorded) or "compiles"


def facts_of_all(compiled: list[Compiled]) -> list[dict[str, Any]]:
    """The facts of each kernel, in order. Kernels of one generation are disassembled together."""
    generations: dict[int, list[Compiled]] = {}
    for kernel in compiled:
        generations.setdefault(kernel.capability, []).append(kernel)
    found = in_processes([partial(_facts_of_generation, kernels) for kernels in generations.values()])
    facts = dict(zip(generations, map(iter, found), strict=True))
    return [next(facts[kernel.capability]) for kernel in compiled]


def _facts_of_generation(kernels: list[Compiled]) -> list[dict[str, Any]]:
    disassemble(kernels)
    return [facts_of(kernel) for kernel in kernels]


def facts_of(compiled: Compiled) -> dict[str, Any]:
    """The columns of the report that the machine code gives."""
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


def source(selection: Selection, sm: int, kernel: str, form: str) -> str:
    """The disassembly ("sass") or PTX ("ptx") of the first launch of a kernel on sm_<sm>.

    Raises ValueError if no kernel has this name.
    """
    made: dict[str, Callable[[], Compiled]] = {}
    for _, launch in triton_launches(selection, sm):
        made.setdefault(launch.name, lambda launch=launch: compile_for(launch, sm))
    for _, request in cuda_launches(selection):
        made.setdefault(request.kernel, lambda request=request: cuda_codegen.compile_for(request, sm))
    if kernel not in made:
        raise ValueError(f"no kernel is named {kernel!r}; there are {', '.join(sorted(made))}")
    return getattr(made[kernel](), form)


NOTE = (
    "registers: per thread. spills: bytes of stack, and instructions that access it. loads, stores: bytes per access x "
    "number of instructions. occupancy: the share of a multiprocessor's warps that registers and shared memory allow. "
    "Kernels of a .cu file belong to backend 'cuda'; they are compiled if the package nvidia-cuda-nvrtc is installed."
)


def table(rows: list[dict[str, Any]], dtype: str) -> Any:
    """A rich table of the rows."""
    from rich.table import Table

    made = Table(title=f"machine code, {dtype}")
    for column in ("kernel", "layout", "sm"):
        made.add_column(column)
    columns = ("registers", "spills", "shared", "occupancy", "loads", "stores", "tensor core", "copy engine", "atomics")
    for column in columns:
        made.add_column({"copy engine": "TMA"}.get(column, column), justify="right")
    made.add_column("gfx942")
    for row in rows:
        cells = {**row, "occupancy": f"{row['occupancy']:.0%}"}
        for kind in ("loads", "stores"):
            cells[kind] = " ".join(f"{width}Bx{count}" for width, count in row[kind].items())
        made.add_row(row["kernel"], row["layout"], str(row["sm"]), *(str(cells[c]) for c in columns), row["gfx942"])
    return made
