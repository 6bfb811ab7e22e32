"""No kernel has a race in global memory: every access of every operator, forward and backward, is checked."""

import ast
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from support import bad_kernels, races

from fastseg import functional, kernels
from fastseg.kernels.launch import launch
from fastseg.ops.convolution.options import Epilogue
from fastseg.ops.convolution.unpool_conv import run_one_kernel
from fastseg.ops.pooling.geometry import PoolGeometry
from fastseg.verification import cases, operators
from fastseg.verification.cases import ConvTransposeSpec, LossSpec, PoolSpec, ResizeSpec

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="accesses are seen in the interpreter")

FLAG = "a flag: every program that sets it sets it to 1, and only the next launch reads it"
RUNNING = "each value is stored by the thread that loaded it, or after a barrier in shared memory"
DECLARED = {
    ("two programs write", "max_unpool2d_fwd_kernel", "out_of_window"): FLAG,
    ("lanes collide", "max_unpool2d_fwd_kernel", "out_of_window"): FLAG,
    ("two programs write", "window_gather_kernel", "out_of_window"): FLAG,
    ("lanes collide", "window_gather_kernel", "out_of_window"): FLAG,
    ("two programs write", "window_cells_kernel", "out_of_window"): FLAG,
    ("lanes collide", "window_cells_kernel", "out_of_window"): FLAG,
    ("in place", "batch_norm_stats_merge_kernel", "running_mean"): RUNNING,
    ("in place", "batch_norm_stats_merge_kernel", "running_var"): RUNNING,
}
ALONE = {"cross_entropy_total_kernel", "cross_entropy_counts_kernel"}  # one program adds up the partial results
TYPES = {"WIDE", "NARROW", "UPCAST"}  # flags of types alone: they change no address
ONE_WAY = {  # compile-time flags that have one value in all calls
    (
        "conv_transpose2d_bwd_input_shuffle_kernel",
        "CHANNELS_LAST",
    ),  # channels_last has another kernel
}

# Small blocks, so that small tensors need several programs, several steps of each, and split-K partials.
BLOCKS = {
    "batch_norm.batch_norm": {"TILE": 64, "REDUCED_TILE": 64},
    "batch_norm.batch_norm_pool": {"TILE": 32},
    "batch_norm.batch_norm_unpool": {"TILE": 32},
    "batch_norm.common": {"LANES": 16, "STEPS": 2, "REDUCING_STEPS": 2, "MERGED_CHUNKS": 2, "MERGED_CHANNELS": 4},
    "convolution.conv_transpose_bwd": {"EPILOGUE_BLOCK": 512},
    "convolution.conv_transpose_bwd_shuffle": {"LEAST_PIXELS": 32},
    "convolution.conv_transpose_depthwise": {"BLOCK": 64},
    "convolution.conv_transpose_tma": {"MOST_COVER": 4},
    "convolution.gemm": {"LEAST_STEPS": 1, "COPY_BLOCK": 32, "SUM_BLOCK": 256},
    "crf.message": {"HEIGHT": 4, "WIDTH": 8, "ROWS": 2, "COLUMNS": 8},
    "losses.confusion": {"LEAST_PIXELS": 128},
    "losses.cross_entropy": {"ROWS": 32, "LONG_ROWS": 16, "TOTAL_BLOCK": 4},
    "losses.cross_entropy_bwd": {"GROUPS": 32},
    "losses.cross_entropy_planes": {"HELD": 2, "WARPS": 1},
    "losses.cross_entropy_one_pass": {"ROWS": 32, "LONG_ROWS": 16, "GROUPS": 16, "LABELS": 32},
    "losses.dice_cross_entropy": {"TILE": 64, "FEW_PROGRAMS": 3},
    "boxes.paste": {"HEIGHT": 4, "WIDTH": 8, "CLASSES": 4},
    "losses.softmax_moments": {"TILE": 64},
    "losses.upsample_cross_entropy": {"PATCH_ROWS": 2},
    "pooling.overlapping": {"BLOCK": 128},
    "pooling.pool": {"BLOCK": 128},
    "pooling.tiling": {"BLOCK": 128},
    "pooling.window_cells": {"BLOCK": 128},
    "pooling.unpool": {"BLOCK": 128, "SCATTER_BLOCK": 8, "SCATTER_PROGRAMS": 4},
}


@pytest.fixture
def small_blocks(monkeypatch):
    for module, sizes in BLOCKS.items():
        for name, size in sizes.items():
            monkeypatch.setattr(f"fastseg.kernels.{module}.{name}", size)


def call(function, *inputs):
    return cases.Case("", "", function, function, {str(number): x for number, x in enumerate(inputs)})


def pools(at):
    """Indices that repeat and lie outside their windows; windows that tile or overlap; dilated windows."""
    for geometry, size in [((2, 2, 0), (8, 10)), ((3, 2, 1), (7, 9)), ((5, 2, 2), (7, 9))]:
        few = (at.labels(7, 2, 3, 4, 5) * (size[0] * size[1] // 7)).contiguous(memory_format=at.layout)
        unpool = partial(functional.max_unpool2d, kernel_size=geometry[0], stride=geometry[1], padding=geometry[2])
        yield call(partial(unpool, output_size=size), at.tensor(2, 3, 4, 5), few)
    for kernel, padding in ((3, 1), (5, 2)):  # few windows share a pixel, or many
        yield from cases.max_unpool2d(at, (1, 4, 9, 16), PoolSpec(kernel=kernel, stride=2, padding=padding))
        yield from cases.max_pool2d(at, (1, 4, 8, 16), PoolSpec(kernel=kernel, stride=2, padding=padding))
    yield call(partial(functional.max_pool2d_with_offsets, kernel_size=3, dilation=2), at.tensor(1, 2, 13, 12))


def batch_norms(at):
    """Without affine parameters and running statistics, in evaluation, and with gaps between windows."""
    yield from cases.batch_norm_relu(at, (2, 2, 12, 16), 2, True)
    x, offsets = at.tensor(2, 3, 8, 9), at.labels(4, 2, 3, 4, 4).to(torch.uint8).contiguous(memory_format=at.layout)
    small, vectors = at.tensor(2, 3, 4, 4), [at.parameters(3) for _ in range(4)]
    evaluated = dict(zip(("running_mean", "running_var"), vectors, strict=False))
    lacking = {"running_mean": None, "running_var": None, "training": True, "relu": False}
    for options, affine in ((evaluated, vectors[2:]), (lacking, [])):
        for function, *inputs in (
            (functional.batch_norm_relu, x),
            (functional.batch_norm_relu_max_pool2d, x),
            (partial(functional.batch_norm_relu_max_unpool2d, offsets=offsets, output_size=(9, 9)), small),
        ):
            named = partial(_affine, function, options)
            yield call(named, *inputs, *affine)
    yield call(lambda x: functional.batch_norm_relu_max_pool2d(x.detach(), **evaluated), x)


def _affine(function, options, x, weight=None, bias=None):
    return function(x, weight=weight, bias=bias, **options)


def convolutions(at):
    """Without a bias, after a ReLU, and with few input and many output channels, whose sums are split (split-K)."""
    depthwise = ConvTransposeSpec(8, kernel=3, stride=2, padding=1, output_padding=1, groups=8)
    yield from cases.conv_transpose2d_affine_relu(at, (1, 8, 3, 4), depthwise)
    yield from cases.conv_transpose2d_affine_relu(at, (2, 24, 3, 8), ConvTransposeSpec(80, kernel=2, stride=2))
    yield from cases.conv_transpose2d(at, (1, 72, 2, 8), ConvTransposeSpec(80, kernel=2, stride=2))
    yield from cases.conv_transpose2d(at, (1, 16, 4, 4), ConvTransposeSpec(64, kernel=4, stride=2, padding=1))
    for shape, channels, kernel, stride in [
        ((2, 16, 5, 8), 16, 2, 2),
        ((1, 5, 4, 5), 3, 3, 2),
        ((1, 4, 3, 4), 4, 4, 3),
        ((1, 16, 8, 8), 16, 1, 1),
    ]:
        weight = at.tensor(shape[1], channels, kernel, kernel)
        yield call(partial(functional.conv_transpose2d, bias=None, stride=stride), at.tensor(*shape), weight)
        yield call(partial(functional.conv_transpose2d_affine_relu, stride=stride), at.tensor(*shape), weight)


def unpooled_convolutions(at):
    offsets = at.labels(4, 1, 16, 5, 8).to(torch.uint8).contiguous(memory_format=at.layout)
    inputs = at.tensor(1, 16, 5, 8), offsets, at.tensor(80, 16, 3, 3)
    rest = (PoolGeometry([2, 2], [2, 2], [0, 0]), [10, 16], Epilogue(scale=at.parameters(80), relu=True))
    yield call(lambda *t: run_one_kernel(*(x.detach() for x in t), *rest), *inputs)


def losses(at):
    """One pass in the dtypes that support it, two terms of the log-sum-exp, and another normalization."""
    probabilities = LossSpec(ignore_index=-100, probabilities=True)
    for dtype in (torch.bfloat16, torch.float32):
        there = replace(at, dtype=dtype)
        yield from cases.cross_entropy(there, (2, 5, 5, 31), LossSpec(weighted=True, predicted=True))
        yield from cases.cross_entropy(there, (1, 40, 5, 16), LossSpec(label_smoothing=0.1))
        yield from cases.cross_entropy(there, (2, 5, 5, 16), probabilities)
        yield from cases.cross_entropy(there, (2, 5, 5, 31), probabilities._replace(one_pass=False))
    yield from cases.cross_entropy(at, (2, 5, 9, 31), LossSpec(weighted=True, predicted=True))
    by_number = partial(functional.cross_entropy, weight=at.parameters(5), normalization="valid", z_loss=0.1)
    yield call(by_number, at.tensor(2, 5, 9, 31), at.labels(5, 2, 9, 31))


def dice(at):
    weighted = partial(functional.dice_cross_entropy, weight=at.parameters(5))
    yield call(weighted, at.tensor(1, 5, 7, 9), at.labels(5, 1, 7, 9))


def resized_losses(at):
    there = replace(at, dtype=torch.float32)
    yield from cases.upsample_cross_entropy(there, (2, 5, 3, 4), ResizeSpec((9, 35)), LossSpec(predicted=True))
    yield call(partial(functional.upsample_argmax, size=(9, 35), align_corners=True), at.tensor(2, 5, 3, 4))


def pasted(at):
    """With weights."""
    boxes, weights = [(0, 0, 5, 9), (3, -2, 12, 7)], at.parameters(2)
    weighted = partial(functional.paste_boxes, boxes=boxes, size=(9, 13), reduce="sum", weights=weights)
    yield call(weighted, at.tensor(2, 5, 4, 6))


def counts(at):
    yield call(partial(functional.confusion_matrix, num_classes=3), at.labels(3, 300), at.labels(3, 300))


class Family(NamedTuple):
    """Operators of verify, the kernel modules whose every statement they must reach, and calls that verify lacks."""

    operators: list[str]
    modules: list[str]
    more: Callable[[cases.Placement], Iterable[cases.Case]] = lambda at: ()


FAMILIES = {
    "pools": Family(["max_pool2d", "max_unpool2d"], ["pooling/pool", "pooling/unpool", "pooling/overlapping",
        "pooling/window_cells"], pools),
    "batch_norms": Family(
        ["batch_norm_relu"],
        [f"batch_norm/{name}" for name in ("batch_norm", "batch_norm_pool", "batch_norm_unpool", "common")],
        batch_norms,
    ),
    "convolutions": Family(
        ["conv_transpose2d", "conv_transpose2d_affine_relu"],
        [
            f"convolution/{name}"
            for name in (
                "conv_transpose", "conv_transpose_bwd", "conv_transpose_bwd_shuffle", "conv_transpose_depthwise",
                "conv_transpose_tma", "gemm",
            )
        ], convolutions,
    ),
    "unpool_conv": Family(["max_unpool2d_conv2d"], ["convolution/unpool_conv"], unpooled_convolutions),
    "cross_entropy": Family(["cross_entropy", "linear_cross_entropy"], [
        "losses/cross_entropy", "losses/cross_entropy_bwd", "losses/cross_entropy_one_pass",
        "losses/cross_entropy_planes", "losses/common"], losses),
    "dice": Family(["dice_cross_entropy"], ["losses/dice_cross_entropy"], dice),
    "upsample": Family(
        ["upsample_argmax", "upsample_cross_entropy"],
        ["losses/upsample", "losses/upsample_cross_entropy"],
        resized_losses,
    ),
    "crf": Family(["mean_field_message"], ["crf/message"]),
    "paste_boxes": Family(["paste_boxes"], ["boxes/paste"], pasted),
    "softmax_moments": Family(["softmax_moments"], ["losses/softmax_moments"]),
    "confusion": Family(["confusion_matrix"], ["losses/confusion"], counts),
}  # fmt: skip


def calls(names, more):
    for layout in cases.LAYOUTS.values():
        at = cases.Placement(torch.float16, layout, "cpu")
        for name in names:
            for make in operators.SIZES[name]:
                yield from make(at)
        yield from more(at)


def run(case):
    """Run the forward, and the backward for random gradients."""
    leaves = [
        x.detach().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for x in case.inputs.values()
    ]
    result = case.ours(*leaves)
    outputs = [y for y in (result if isinstance(result, (tuple, list)) else [result]) if y.requires_grad]
    if outputs:
        torch.autograd.backward(outputs, [torch.randn_like(y) for y in outputs])


def statements(module):
    """(names of the kernels, {(file, line)} of every load, store and atomic) of a module."""
    file = Path(kernels.__file__).parent / f"{module}.py"
    functions = [
        node
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.FunctionDef) and any(ast.unparse(d) == "triton.jit" for d in node.decorator_list)
    ]
    calls = [node for function in functions for node in ast.walk(function) if isinstance(node, ast.Call)]
    accesses = [
        call
        for call in calls
        if isinstance(call.func, ast.Attribute)
        and call.func.attr.startswith(("load", "store", "atomic", "gather"))
        and ast.unparse(call.func) != "tl.gather"
    ]
    return {f.name for f in functions if f.name.endswith("_kernel")}, {(file.name, call.lineno) for call in accesses}


@pytest.mark.parametrize("family", FAMILIES)
def test_no_races(family, small_blocks, triton_backend):
    """All statements of the family's kernels run, in more than one program and with both values of each flag."""
    names, modules, more = FAMILIES[family]
    with races.recording() as record:
        for case in calls(names, more):
            run(case)
    assert not record.undeclared(DECLARED)
    kernel_names, places = (set().union(*found) for found in zip(*map(statements, modules), strict=True))
    assert places - record.statements == set()
    assert {name for name in kernel_names if record.programs.get(name, 0) < 2} <= ALONE
    one_way = {branch for branch, ways in record.branches.items() if len(ways) < 2 and branch[0] in kernel_names}
    assert {branch for branch in one_way if branch[1] not in TYPES} <= ONE_WAY


def test_every_kernel_belongs_to_a_family():
    """So does every operator that verify runs, and every module with kernels."""
    names, modules = (list(chain(*(family[i] for family in FAMILIES.values()))) for i in (0, 1))
    assert sorted(names) == sorted(operators.SIZES)
    root = Path(kernels.__file__).parent
    files = {path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.py")}
    assert sorted(modules) == sorted(name for name in files if not name.startswith("cuda/") and statements(name)[1])


# --- the recorder itself ---------------------------------------------------------------------------------------------


def faults(kernel, programs, *args, **meta):
    """(kind, tensor, element, programs, whether equal values are written, elements) of each fault of one launch."""
    with races.recording() as record:
        launch(kernel, programs, *args, **meta)
    for fault in record.faults:
        assert kernel.__name__ in str(fault) and "bad_kernels.py:" in str(fault)
    return [(f.kind, f.tensor, f.element, f.programs, f.equal, f.addresses) for f in record.faults]


@pytest.mark.parametrize("value, equal", [(1.0, True), (None, False)])
def test_two_programs_write_one_element(value, equal):
    x, y = torch.arange(32.0) if value is None else torch.full((32,), value), torch.zeros(4)
    shared = faults(bad_kernels.shared_sum_kernel, 4, x, y, 32, BLOCK=8)
    assert shared == [("two programs write", "y", 0, (0, 1), equal, 2)]
    assert y[:2].equal(x.view(4, 8).sum(1)[1::2])  # in the interpreter the last program's value remains


def test_a_program_reads_what_another_one_writes():
    x = torch.arange(32.0)
    found = faults(bad_kernels.shifted_in_place_kernel, 2, x, 32, BLOCK=16)
    assert found[0] == ("another's value", "x", 16, (0, 1), False, 1)
    assert [kind for kind, *_ in found[1:]] == ["not in order"]
    assert [kind for kind, *_ in faults(bad_kernels.shifted_in_place_kernel, 1, x, 16, BLOCK=16)] == ["not in order"]


def test_a_barrier_orders_accesses():
    def found(barrier):
        tensors = torch.arange(16.0), torch.zeros(16)
        return faults(bad_kernels.reversed_in_place_kernel, 2, *tensors, BARRIER=barrier, BLOCK=8)

    assert found(False) == [
        ("not in order", "y", 0, (0, 0), False, 16),
        ("in place", "x", 0, (0, 0), False, 16),
    ]
    assert found(True) == []


def test_in_place_is_distinguished_from_not_in_order():
    x = torch.arange(16.0)
    assert faults(bad_kernels.doubling_kernel, 2, x, BLOCK=8) == [("in place", "x", 0, (0, 0), False, 16)]
    assert x.equal(2 * torch.arange(16.0))


@pytest.mark.parametrize("equal", [True, False])
def test_lanes_collide(equal):
    x = torch.ones(16) if equal else torch.arange(16.0)
    indices = torch.arange(16)
    indices[5] = 3
    assert faults(bad_kernels.scatter_kernel, 2, x, indices, torch.zeros(16), BLOCK=8) == [
        ("lanes collide", "y", 3, (0, 0), equal, 1)
    ]
    indices[5] = 13  # an element of another program
    assert faults(bad_kernels.scatter_kernel, 2, x, indices, torch.zeros(16), BLOCK=8) == [
        ("two programs write", "y", 13, (0, 1), equal, 1)
    ]


def test_types_of_two_sizes_share_bytes():
    """float16 elements 8 to 15, which program 1 writes, are float32 elements 4 to 7 of program 0."""
    x = torch.ones(16)
    found = faults(bad_kernels.two_types_of_a_workspace_kernel, 2, x, x.view(torch.float16), 16, BLOCK=8)
    assert ("another's value", "x/y", 8, (0, 1), False, 8) in found
    assert ("in place", "x/y", 0, (0, 0), False, 1) in found  # half of the first element


def test_atomics_do_not_race_with_each_other():
    x, y = torch.ones(64), torch.zeros(8)
    assert faults(bad_kernels.atomic_sum_kernel, 4, x, y, 64, BLOCK=16) == []
    assert [kind for kind, *_ in faults(bad_kernels.atomic_sum_kernel, 4, x, x, 64, BLOCK=16)] == [
        "another's value", "not in order",
    ]  # fmt: skip


def test_a_declaration_applies_to_one_tensor_of_one_kernel():
    with races.recording() as record:
        launch(bad_kernels.doubling_kernel, 2, torch.ones(16), BLOCK=8)
    declared = ("in place", "doubling_kernel", "x")
    assert record.undeclared({declared: "each thread for itself"}) == []
    (words,) = record.undeclared({(*declared[:2], "y"): ""})
    lines = Path(bad_kernels.__file__).read_text().splitlines()
    line = next(number for number, text in enumerate(lines, 1) if "2 * tl.load" in text)
    assert words == f"in place: doubling_kernel, x[0], and 15 more, program 0, bad_kernels.py:{line}"


def test_different_values_at_one_address_cannot_be_declared():
    declared = {("two programs write", "shared_sum_kernel", "y"): "a flag"}
    for x, allowed in ((torch.ones(32), True), (torch.arange(32.0), False)):
        with races.recording() as record:
            launch(bad_kernels.shared_sum_kernel, 4, x, torch.zeros(4), 32, BLOCK=8)
        assert record.faults and (record.undeclared(declared) == []) == allowed
