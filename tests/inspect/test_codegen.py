"""Gates on the machine code of every kernel: spills, atomics, access widths, tensor cores."""

import json

import pytest
import torch
from support.machine_code import compiled

from fastseg.commands import cli
from fastseg.inspect import codegen_report
from fastseg.verification import cases

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here, not interpreted")

REDUCING = ("batch_norm_stats_kernel", "batch_norm_relu_sums_kernel", "batch_norm_relu_max_pool2d_sums_kernel")


def test_gate_no_kernel_spills(facts):
    assert {row["sm"] for row in facts} == {80, 90, 100}
    assert [row for row in facts if row["spills"]] == []


def test_gate_no_kernel_uses_atomics(facts):
    assert [row for row in facts if row["atomics"]] == []


def test_gate_the_losses_with_predictions_are_compiled_too(facts):
    losses = (
        "cross_entropy_fwd",
        "cross_entropy_one_pass",
        "cross_entropy_one_pass_rows",
        "upsample_cross_entropy_fwd",
    )
    predicting = {row["kernel"] for row in facts if row["constants"].get("PREDICT") is True}
    assert predicting == {f"{name}_kernel" for name in losses}


def test_gate_rows_are_read_and_written_16_bytes_wide(facts):
    """VEC = 8 is 16 bytes of bfloat16. The launchers use it if it divides the rows."""
    wide = [
        row
        for row in facts
        if row["constants"].get("VEC") == 8
        and row["constants"].get("WHOLE_WINDOWS", True)  # otherwise single elements are read at the positions
        and not row["kernel"].endswith("scatter_kernel")
        and not row["kernel"].startswith("conv_transpose2d")  # have their own gate
    ]
    seen = {(row["kernel"], row["layout"]) for row in wide}
    names = ("max_pool2d_fwd", "max_unpool2d_fwd", "max_unpool2d_bwd", "window_gather")
    norms = [f"batch_norm_{name}" for name in ("stats", "relu_fwd", "relu_sums", "relu_bwd")]
    norms += [
        f"batch_norm_relu_max_{name}"
        for name in ("pool2d_fwd", "pool2d_sums", "pool2d_bwd", "unpool2d_fwd", "unpool2d_sums")
    ]
    kernels = {f"{name}_kernel" for name in (*names, *norms)}
    assert {(kernel, layout) for kernel in kernels for layout in cases.LAYOUTS} <= seen
    for name in ("bwd", "one_pass"):
        assert (f"cross_entropy_{name}_kernel", "nchw") in seen
        assert (f"cross_entropy_{name}_rows_kernel", "channels_last") in seen
    for row in wide:
        assert "16" in row["loads"], row
        assert not {"1", "2"} & set(row["stores"]), row  # eight offsets are 8 bytes, a flag 4
        if row["kernel"] not in ("cross_entropy_fwd_kernel", *REDUCING):  # store one float per pixel or channel
            assert "16" in row["stores"], row


def test_gate_gemms_run_on_the_tensor_cores(facts):
    gemms = [row for row in facts if row["kernel"].startswith("conv_transpose2d")]
    assert gemms
    assert [row for row in gemms if not row["tensor core"] and not is_helper(row)] == []
    assert [row for row in gemms if row["sm"] == 90 and not row["wgmma"] and not is_helper(row)] == []


def test_gate_gemms_load_by_tma(facts):
    """In channels_last on sm_90 and later, at the networks' sizes: all three GEMMs use TMA and store 16 bytes wide."""
    gemms = [row for row in facts if row["kernel"].startswith("conv_transpose2d") and not is_helper(row)]
    ours = [row for row in gemms if row["sm"] >= 90 and row["layout"] == "channels_last"]
    shuffles = [row for row in ours if "shuffle" in row["kernel"]]  # masks grad_y before the GEMMs
    assert shuffles
    assert [row for row in shuffles if not {"16"} & set(row["loads"]) or "2" in row["loads"]] == []
    ours = [row for row in ours if row not in shuffles]
    assert {row["kernel"] for row in ours} == {
        f"conv_transpose2d_{n}_tma_kernel" for n in ("fwd", "bwd_input", "bwd_weight")
    }
    for row in ours:
        assert row["copy engine"] and row["wgmma"] and "16" in row["stores"] and not {"1", "2"} & set(row["stores"]), (
            row
        )
    assert [row for row in gemms if row["sm"] == 80 and row["copy engine"]] == []


def is_helper(row):
    return any(word in row["kernel"] for word in ("sum", "reduce", "transpose_kernel", "epilogue", "depthwise"))


def test_the_disassembly_is_printed():
    sass = compiled(
        "-m", "fastseg.commands.cli", "inspect", "codegen", "--op", "max_pool2d", "--sass", "max_pool2d_fwd_kernel"
    )
    assert "LDG.E.128" in sass and "EXIT" in sass


BAD = """
import collections, json, torch
from fastseg.inspect.codegen import INSTRUCTION, compile_for, disassemble, record
from fastseg.inspect.codegen_report import GLOBAL_ATOMICS, facts_of
from fastseg.kernels.launch import launch
import sys; sys.path.insert(0, "tests")
from support import bad_kernels
x = torch.empty(1 << 16, device="meta", dtype=torch.bfloat16)
f = torch.empty(1 << 16, device="meta")
found = record(lambda: (
    launch(bad_kernels.strided_copy_kernel, 4, x, x, 4096, BLOCK=1024),
    launch(bad_kernels.spilling_kernel, 1, x, x, x, BLOCK=128, num_warps=1),
    launch(bad_kernels.atomic_sum_kernel, 4, f, f, 4096, BLOCK=1024),
    launch(bad_kernels.scalar_product_kernel, 1, x, x, x, 64, BLOCK=64),
))
strided, spilling, atomic, product = kernels = [compile_for(launch, 90) for launch in found]
disassemble(kernels)
alone = [collections.Counter(name for _, name in INSTRUCTION.findall(kernel.sass)) for kernel in kernels]
facts = facts_of(product)
print(json.dumps([strided.widths("LDG"), spilling.spills, atomic.count(*GLOBAL_ATOMICS), facts["wgmma"],
                  facts["copy engine"], alone == [kernel.instructions for kernel in kernels]]))
"""


DOUBLE = """
import json, torch
from fastseg import dispatch
from fastseg.inspect.codegen import compile_for, disassemble, record
from fastseg.kernels.launch import targeting
from fastseg.ops.operator import observing
from fastseg.verification import cases
at = cases.Placement(torch.float64, torch.contiguous_format, "meta")
spills = []
for sm, classes in ((90, 4), (100, 150)):
    (case,) = cases.dice_cross_entropy(at, (8, classes, 360, 480), 255)
    with dispatch.backend("triton"), targeting(sm), observing(lambda operator, call: None):
        found = record(lambda: case.step(case.ours, backward=True)())
    kernels = [compile_for(launch, sm) for launch in found[1:]]
    disassemble(kernels)
    spills.append([kernel.spills for kernel in kernels])
print(json.dumps(spills))
"""


def test_dice_in_float64_does_not_spill():
    """The command does not compile float64; without a register limit the assembler spilled on both GPUs."""
    assert json.loads(compiled("-c", DOUBLE)) == [[0, 0], [0, 0]]


def test_the_gates_see_bad_kernels():
    widths, spills, atomics, wgmma, copies, same = json.loads(compiled("-c", BAD))
    assert list(widths) == ["2"] and spills > 0 and atomics > 0 and wgmma == copies == 0
    assert same, "kernels disassembled together have other instructions than one by one"


def test_the_table_uses_the_name_of_the_hardware():
    """The key of --json stays as it is: other programs read it."""
    row = {"kernel": "k", "layout": "nchw", "sm": 90, "gfx942": "compiles"}
    row |= {"occupancy": 0.5, "loads": {"16": 2}, "stores": {}}
    row |= dict.fromkeys(("registers", "spills", "shared", "tensor core", "atomics"), 0) | {"copy engine": 7}
    columns = {str(column.header): list(column.cells) for column in codegen_report.table([row], "bfloat16").columns}
    assert columns["TMA"] == ["7"] and columns["loads"] == ["16Bx2"] and "copy engine" not in columns


def test_codegen_says_what_it_needs(capsys):
    assert cli.main(["inspect", "codegen"]) == 2
    assert "TRITON_INTERPRET" in capsys.readouterr().err


def test_gate_every_kernel_compiles_for_amd(facts):
    """For gfx942, data centers' GPUs with 64 lanes; kernels with tensor descriptors are not launched there."""
    found = {row["kernel"]: row["gfx942"] for row in facts if row["gfx942"] != "not tried"}
    assert {row["kernel"] for row in facts if ".cu " not in row["kernel"]} <= found.keys()
    assert set(found.values()) <= {"compiles", "not launched"}, found
    assert {name for name, answer in found.items() if answer == "not launched" and ".cu " not in name} == {
        f"conv_transpose2d_{name}_tma_kernel" for name in ("fwd", "bwd_input", "bwd_weight")
    }


AMD = """
import json, sys
import torch
from fastseg import dispatch
from fastseg.inspect.codegen import compile_for_amd, record
from fastseg.kernels.launch import targeting
from fastseg.ops.operator import observing
from fastseg.verification import cases

at = cases.Placement(torch.bfloat16, torch.channels_last, "meta")
made = (
    cases.max_unpool2d(at, (8, 64, 360, 480)), cases.batch_norm_relu(at, (8, 64, 360, 480)),
    cases.conv_transpose2d(at, (8, 128, 90, 120), cases.ConvTransposeSpec(64, kernel=3, stride=2)),
    cases.upsample_cross_entropy(at, (8, 19, 128, 256), cases.ResizeSpec((512, 1024))),
)
found = {}
torch.backends.cudnn.conv.fp32_precision = "tf32"  # which these GPUs do not have
exact = cases.Placement(torch.float32, torch.contiguous_format, "meta")
products = cases.conv_transpose2d(exact, (8, 128, 90, 120), cases.ConvTransposeSpec(64, kernel=3, stride=2))
for case in (*map(next, made), next(products)):
    with dispatch.backend("triton"), targeting(0), observing(lambda operator, call: None):
        for launch in record(lambda: case.step(case.ours, backward=True)()):
            if (name := f"{launch.name} {sorted(set(launch.signature.values()))}") not in found:
                found[name] = compile_for_amd(launch, "gfx1100")
print(json.dumps(found))
"""


def test_a_case_of_each_family_compiles_for_amd_gpus_with_32_lanes():
    found = json.loads(compiled("-c", AMD))
    assert len(found) >= 8 and set(found.values()) == {None}, found
