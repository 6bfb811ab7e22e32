"""The instrument that counts instructions: against counts by hand, loops of known length, and bad kernels."""

import json
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from support.machine_code import compiled

from fastseg.commands import cli
from fastseg.inspect import arithmetic, budget, cuda_codegen, gpus, instructions_report
from fastseg.inspect.codegen import Compiled, listings
from fastseg.inspect.emulator import Emulator, Thread
from fastseg.inspect.instructions import count
from fastseg.inspect.sass import Code, parse
from fastseg.kernels.cuda import launch
from fastseg.kernels.triton_internals import VERSION

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here, not interpreted")
needs_nvrtc = pytest.mark.skipif(cuda_codegen.library_path() is None, reason="no NVRTC (nvidia-cuda-nvrtc)")

# A loop that runs c[0x0][0x168] times, a call in it, a branch on what was loaded, and a failed assertion.
BY_HAND = """
        /*0000*/                   MOV R4, RZ ;
        /*0010*/                   IMAD.WIDE R2, R4, 0x4, c[0x0][0x160] ;
        /*0020*/                   LDG.E R6, [R2.64] ;
        /*0030*/                   CALL.REL.NOINC 0xd0 ;
        /*0040*/                   IADD3 R4, R4, 0x1, RZ ;
        /*0050*/                   ISETP.GE.AND P0, PT, R4, c[0x0][0x168], PT ;
        /*0060*/              @!P0 BRA 0x10 ;
        /*0070*/                   ISETP.NE.AND P1, PT, R6, RZ, PT ;
        /*0080*/               @P1 BRA 0xb0 ;
        /*0090*/                   FADD R6, R6, R6 ;
        /*00a0*/                   BRA 0xc0 ;
        /*00b0*/                   FMUL R6, R6, R6 ;
        /*00c0*/                   EXIT ;
        /*00d0*/                   MUFU.RCP R6, R6 ;
        /*00e0*/                   RET.REL.NODEC R20 0x0 ;
"""


@pytest.mark.parametrize("turns", [1, 2, 7])
def test_a_listing_counted_by_hand(turns):
    words = {0x160: 0x1000, 0x164: 0x10, 0x168: turns}
    trace = Emulator(Code(parse(BY_HAND)), Thread(0, 0, words)).run()
    loop = {0x10: turns, 0x20: turns, 0x30: turns, 0x40: turns, 0x50: turns, 0x60: turns, 0xD0: turns, 0xE0: turns}
    once = dict.fromkeys((0x0, 0x70, 0x80, 0x90, 0xA0, 0xB0, 0xC0), 1)  # both ways of the branch on loaded data
    assert trace.times == Counter(loop | once)
    assert [address for _, address in trace.loads] == [(0x10 << 32) + 0x1000 + 4 * turn for turn in range(turns)]
    assert trace.both_ways == {0x80} and len([batch for batch in trace.batches if batch]) == turns


LOOPS = """
template <int UNROLL> __global__ void plain(const float* x, float* y, int turns) {
    float sum = 0;
#pragma unroll 1
    for (int k = 0; k < turns; ++k) sum = exp2f(sum * x[k]);
    y[threadIdx.x] = sum;
}
template <int UNROLL> __global__ void unrolled(const float* x, float* y, int turns) {
    float sum = 0;
#pragma unroll UNROLL
    for (int k = 0; k < turns; ++k) sum = exp2f(sum * x[k]);
    y[threadIdx.x] = sum;
}
template <int UNROLL> __global__ void divided(const float* x, float* y, int turns) {
    float sum = 0;
    for (int k = 0; k < (turns * 1234567 + int(blockIdx.x)) / turns % 16; ++k) sum = exp2f(sum * x[k]);
    y[threadIdx.x] = sum;
}
template <int UNROLL> __global__ void failing(const int* x, int* y, int turns) {
    if (x[threadIdx.x] > turns) __trap();
    y[threadIdx.x] = 0;
}
template <int UNROLL> __global__ void narrow(const unsigned char* x, unsigned char* y, int turns) {
    y[blockIdx.x * 256 + threadIdx.x] = x[blockIdx.x * 256 + threadIdx.x] + 1;
}
"""


def loops(name, sm, *turns, programs=8):
    """Counts of the kernel for each number of turns."""
    built = cuda_codegen.compile_source(LOOPS, f"{name}<4>", launch.OPTIONS, sm)
    kernel = Compiled(name, sm, *built, 8)
    (listing,) = listings([kernel])
    x, y = torch.empty(1000, device="meta"), torch.empty(1000, device="meta")
    return [count(kernel, listing, (x, y, many), programs) for many in turns]


@needs_nvrtc
@pytest.mark.parametrize("sm", [80, 90, 100])
def test_loops_whose_length_changes(sm):
    """One exp2 a turn, however the compiler unrolls the loop, and the same instructions for each further turn."""
    turns = (0, 1, 2, 3, 4, 5, 16, 61)
    for name in ("plain", "unrolled"):
        found = loops(name, sm, *turns)
        assert [one.issued.get("MUFU", 0) for one in found] == [8 * many for many in turns], name
    seven, eight, nine = loops("plain", sm, 7, 8, 9)
    assert eight.instructions - seven.instructions == nine.instructions - eight.instructions > 0
    (one,) = loops("divided", sm, 1000)  # the compiler divides by multiplying with a reciprocal
    assert one.issued["MUFU"] - 8 == 8 * ((1000 * 1234567 + 4) // 1000 % 16)


@needs_nvrtc
def test_what_is_left_out_and_what_is_not():
    (failing,) = loops("failing", 90, 1)
    assert failing.both_ways == 0 and "BPT" not in failing.issued
    (narrow,) = loops("narrow", 90, 1)
    assert (narrow.loads, narrow.stores, narrow.in_flight, narrow.waits) == ({1: 1}, {1: 1}, 32, 1)
    assert narrow.asked_in_all == 8 * 8 * 64 and narrow.instructions == 8 * 32 * sum(narrow.issued.values())


def test_arithmetic_with_unknown_operands():
    assert arithmetic.logic(0xC0, [0xFF, None, 0]) is None and arithmetic.logic(0xC0, [0, None, 0]) == 0
    assert arithmetic.logic(0x3C, [0xF0, 0xFF, None]) == 0x0F
    assert (
        arithmetic.predicate_logic(0x80, [0, None, None]) == 0
        and arithmetic.predicate_logic(0x80, [1, None, 1]) is None
    )
    assert arithmetic.permute(0x44332211, 0x7610, 0x88776655) == 0x88772211
    assert arithmetic.permute(0x80, 0x8888, 0) == 0xFFFFFFFF


def test_slots_of_the_gpus():
    slots = {gpu.name: round(gpu.slots(), 1) for gpu in gpus.GPUS}
    assert slots == {"A100": 11.5, "RTX 4090": 43.1, "H100": 9.9, "H200": 6.9, "B200": 5.0}
    h200 = next(gpu for gpu in gpus.GPUS if gpu.name == "H200")
    assert round(h200.needed_in_flight) == 22803 and round(h200.slots(h200.rates["special"]), 2) == 0.86


COMMAND = """
import contextlib, io, json, sys
from fastseg.commands import cli

words = "inspect instructions --op upsample_argmax --layout nchw --arch 90".split()
png, old = sys.argv[1:]

def output(*more):
    with contextlib.redirect_stdout(io.StringIO()) as text:
        assert cli.main([*words, *more]) == 0
    return text.getvalue()

report = output("--json", "--png", png)
found = json.loads(report)
for row in found["rows"]:
    row["per byte"] /= 2
with open(old, "w") as file:
    json.dump(found, file)
print(json.dumps([json.loads(report)["rows"], output(), output("--diff", old)]))
"""


def test_the_command(tmp_path):
    png, old = tmp_path / "chart.png", tmp_path / "old.json"
    (row,), table, worse = json.loads(compiled("-c", COMMAND, str(png), str(old)))
    assert png.read_bytes().startswith(b"\x89PNG")
    assert row["backend"] == "triton" and 1 < row["per byte"] < 1000
    assert set(row["gpus"]) == {"H100", "H200"} and row["gpus"]["H200"]["model us"] > row["gpus"]["H200"]["bytes us"]
    assert "upsample_argmax" in table and "H200" in table
    assert worse.startswith("upsample_argmax forward nchw") and worse.count("\n") == 1 and "per byte" in worse


def test_diff_names_what_is_worse():
    kernel = {"kernel": "k", "registers": 40, "occupancy": 0.5, "loads": {"16": 4}, "stores": {"16": 2}}
    row = dict.fromkeys(("operator", "mode", "layout", "size", "backend"), "a") | {
        "sm": 90,
        "per byte": 2,
        "launches": 1,
    }
    old = row | {"kernels": [kernel]}
    assert instructions_report.diff([old], [old]) == []
    better = row | {"per byte": 1, "kernels": [kernel | {"registers": 30, "occupancy": 1.0, "loads": {"16": 5}}]}
    assert instructions_report.diff([old], [better]) == []
    bad = row | {
        "per byte": 3,
        "launches": 2,
        "kernels": [kernel | {"registers": 41, "occupancy": 0.25, "stores": {16: 1, 2: 8}}],
    }
    words = " ".join(instructions_report.diff([old], [bad]))
    for word in (
        "per byte 2 -> 3",
        "launches 1 -> 2",
        "k registers 40 -> 41",
        "k occupancy 0.5 -> 0.25",
        "stores 16 ->",
    ):
        assert word in words


def test_the_options(capsys, tmp_path):
    assert cli.main(["inspect", "instructions"]) == 2
    assert "TRITON_INTERPRET" in capsys.readouterr().err
    for words in ("instructions --first", "instructions --bandwidth 2", "traffic --diff a.json", "codegen --diff a"):
        assert cli.main(["inspect", *words.split()]) == 2
        assert words.split()[1] in capsys.readouterr().err


GATED = """
import json
from fastseg.inspect import budget, instructions_report
from fastseg.inspect.selection import Selection

class MemoryBound(Selection):
    def includes(self, case):
        return budget.is_memory_bound(case.operator)

print(json.dumps(instructions_report.rows(MemoryBound(), [90], ["triton"])))
"""


@pytest.mark.skipif(VERSION != (3, 7), reason="the figures are those of Triton 3.7")
def test_gate_memory_bound_calls_are_within_the_budget_or_listed(facts):
    """After the kernels of `facts` were compiled, whose machine code Triton keeps."""
    rows = json.loads(compiled("-c", GATED))
    known = {call for calls in budget.EXCESSES.values() for call in calls}
    assert known <= {f"{row['operator']} {row['mode']} {row['layout']} {row['size']}" for row in rows}
    for row in rows:
        figure, words = budget.listed(row), f"{row['operator']} {row['mode']} {row['layout']} {row['size']}"
        if row["above the budget"]:
            assert figure is not None, f"{words}: {row['above the budget']}"
            assert 0.9 * figure <= row["per byte"] <= 1.02 * figure, f"{words}: {row['per byte']:.2f}"
        else:
            assert figure is None, f"{words} is within the budget: take it off the list"


@needs_nvrtc
def test_the_gate_sees_a_bad_kernel():
    """A thread that moves two bytes needs too many instructions and keeps too few bytes in flight."""
    (narrow,) = loops("narrow", 90, 1, programs=100_000)
    call = instructions_report.Call(
        SimpleNamespace(operator="max_pool2d", size="bad"), "nchw", "cuda", 90, "forward", 2 * 256 * 100_000, [narrow],
        [narrow],
    )  # fmt: skip
    found = instructions_report.row_of(call)["above the budget"]
    assert len(found) == 3 and "more than 3.5" in found[0] and "H200" in found[2]
