"""No kernel races through global memory: every operator, forward and backward, looked at access by access."""

import ast
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import bad_kernels
import pytest
import races
import torch

from fastseg import cases, functional, kernels, verify
from fastseg.kernels.launch import launch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="accesses are seen in the interpreter")

FLAG = "a flag, which whoever sets sets to 1, and which the launch behind reads"
RUNNING = "a thread stores what it made of its own load of the same element"
DECLARED = {
    ("two programs write", "max_unpool2d_fwd_kernel", "foreign"): FLAG,
    ("lanes collide", "max_unpool2d_fwd_kernel", "foreign"): FLAG,
    ("two programs write", "window_gather_kernel", "foreign"): FLAG,
    ("lanes collide", "window_gather_kernel", "foreign"): FLAG,
    ("in place", "batch_norm_stats_merge_kernel", "running_mean"): RUNNING,
    ("in place", "batch_norm_stats_merge_kernel", "running_var"): RUNNING,
}
ALONE = {"cross_entropy_total_kernel", "cross_entropy_counts_kernel"}  # one program adds up what the others left

# Small, so that small tensors make several programs, several steps of each, and shares.
BLOCKS = {
    "batch_norm": {"TILE": 32, "REDUCED_TILE": 64},
    "batch_norm_pool": {"TILE": 16},
    "batch_norm_unpool": {"TILE": 16},
    "confusion": {"LEAST_PIXELS": 128},
    "conv_transpose_bwd": {"EPILOGUE_BLOCK": 256},
    "conv_transpose_bwd_shuffle": {"LEAST_PIXELS": 32},
    "conv_transpose_depthwise": {"BLOCK": 64},
    "conv_transpose_tma": {"SPARE": 4},
    "cross_entropy": {"ROWS": 32, "LONG_ROWS": 16, "TOTAL_BLOCK": 4},
    "cross_entropy_bwd": {"CHUNKS": 32},
    "cross_entropy_one_pass": {"TILE": 64, "ROWS": 32, "LONG_ROWS": 16, "CHUNKS": 16, "LABELS": 32},
    "dice_cross_entropy": {"TILE": 64, "FEW_PROGRAMS": 3},
    "norm": {"LANES": 16, "STEPS": 2, "REDUCING_STEPS": 2, "MERGED_CHUNKS": 2, "MERGED_CHANNELS": 4},
    "overlap": {"BLOCK": 64},
    "pool": {"BLOCK": 64},
    "products": {"LEAST_STEPS": 1, "COPY_BLOCK": 16, "SUM_BLOCK": 64},
    "unpool": {"BLOCK": 64, "FOREIGN_BLOCK": 8, "FOREIGN_PROGRAMS": 4},
    "upsample_cross_entropy": {"PATCH_ROWS": 2},
    "windows": {"BLOCK": 64},
}


@pytest.fixture
def small_blocks(monkeypatch):
    for module, sizes in BLOCKS.items():
        for name, size in sizes.items():
            monkeypatch.setattr(getattr(kernels, module), name, size, raising=True)


class Family(NamedTuple):
    """Operators of verify, modules whose every statement they are to reach, and calls that verify has not."""

    operators: list[str]
    modules: list[str]
    more: Callable[[cases.Placement], Iterable[cases.Case]] = lambda at: ()


def none(at):
    return ()


FAMILIES = {
    "pools": Family(["max_pool2d", "max_unpool2d"], ["pool", "unpool", "overlap"]),
    "batch_norms": Family(["batch_norm_relu"], ["batch_norm", "batch_norm_pool", "batch_norm_unpool", "norm"]),
    "convolutions": Family(
        ["conv_transpose2d", "conv_transpose2d_affine_relu"],
        ["conv_transpose", "conv_transpose_bwd", "conv_transpose_bwd_shuffle", "conv_transpose_depthwise",
         "conv_transpose_geometry", "conv_transpose_tma", "products"],
    ),
    "unpool_conv": Family(["max_unpool2d_conv2d"], ["unpool_conv"]),
    "cross_entropy": Family(["cross_entropy", "linear_cross_entropy"], [
        "cross_entropy", "cross_entropy_bwd", "cross_entropy_one_pass", "cross_entropy_parts"]),
    "dice": Family(["dice_cross_entropy"], ["dice_cross_entropy"]),
    "upsample": Family(["upsample_argmax", "upsample_cross_entropy"], ["upsample", "upsample_cross_entropy"]),
    "confusion": Family(["confusion_matrix"], ["confusion"]),
}  # fmt: skip


def run(case):
    """Forward, and backward of any gradient."""
    leaves = [
        x.detach().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for x in case.inputs.values()
    ]
    result = case.ours(*leaves)
    outputs = [y for y in (result if isinstance(result, (tuple, list)) else [result]) if y.requires_grad]
    if outputs:
        torch.autograd.backward(outputs, [torch.randn_like(y) for y in outputs])


def statements(module):
    """(kernels, {(file, line)} of every load, store and atomic) of a module of kernels."""
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
        if isinstance(call.func, ast.Attribute) and call.func.attr.startswith(("load", "store", "atomic", "gather"))
        and ast.unparse(call.func) != "tl.gather"
    ]
    return {f.name for f in functions if f.name.endswith("_kernel")}, {(file.name, call.lineno) for call in accesses}


@pytest.mark.parametrize("family", FAMILIES)
def test_no_races(family, small_blocks, triton_backend):
    """In both layouts, with every statement of the family's kernels run, and more than one program of each kernel."""
    operators, modules, more = FAMILIES[family]
    with races.recording() as record:
        for layout in cases.LAYOUTS.values():
            at = cases.Placement(torch.float16, layout, "cpu")
            for operator in operators:
                for make, size in verify.SIZES[operator]:
                    for case in make(at, *size):
                        run(case)
            for case in more(at):
                run(case)
    assert not record.undeclared(DECLARED)
    found = [statements(module) for module in modules]
    names, places = (set().union(*sets) for sets in zip(*found, strict=True))
    print(sorted(places - record.statements), record.programs)
    assert places <= record.statements, sorted(places - record.statements)
    assert names <= set(record.programs)
    assert not [name for name in names - ALONE if record.programs[name] < 2]
