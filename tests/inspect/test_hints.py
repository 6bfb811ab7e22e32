"""The hints that kernels give the compiler about offsets and masks are true. They decide how wide loads and stores are.

A false hint gives wrong results only on a GPU, so each hint is checked against the interpreter's values.
"""

import random
import sys
from pathlib import Path

import pytest
import torch

import fastseg.functional as FS
from fastseg import kernels
from fastseg.kernels.triton_internals import interpreter
from fastseg.ops.arguments import MAX_FLOAT_SIDE
from fastseg.ops.convolution.conv_transpose_operators import unsupported
from fastseg.ops.convolution.options import ConvTransposeGeometry

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="reads the values that the interpreter holds")

HOLDS = {
    "tt.divisibility": lambda runs: runs[:, 0] % runs.shape[1] == 0,
    "tt.contiguity": lambda runs: runs[:, 1:] == runs[:, :-1] + 1,
    "tt.constancy": lambda runs: runs == runs[:, :1],
}
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}

# shape, channels, kernel, stride, padding, output_padding, groups, dilation
GEOMETRIES = [
    ((2, 8, 3, 8), 12, 2, 2),
    ((1, 5, 3, 8), 20, 4, 2, 1),
    ((2, 8, 2, 6), 40, 3, 2, 1, 1),
    ((1, 8, 3, 12), 8, 3, 1, 1),
    ((1, 3, 1, 4), 6, (3, 2), (2, 3)),
    ((3, 16, 4, 8), 8, 2, 2),  # blocks of pixels that span images
    ((3, 8, 5, 4), 7, (1, 4), (1, 4)),
    ((1, 24, 7, 24), 3, (4, 2), (4, 2)),  # pixels after the last one
    ((2, 160, 4, 8), 72, 2, 2),  # too many columns for one kernel to compute both gradients
    ((1, 8, 8, 8), 16, 3, 1, 1),  # box tiles
    ((1, 8, 4, 4), 16, 3, 1, 1),
]


@pytest.fixture
def told(monkeypatch):
    """{(file, line): the longest run} of the hints so far; a false hint fails the test."""
    found = {}

    def check(handle, name, lengths):
        runs = handle.data.reshape(-1, lengths[-1])
        frame = sys._getframe()
        while "kernels" not in Path(frame.f_code.co_filename).parts:
            frame = frame.f_back
        place = Path(frame.f_code.co_filename).name, frame.f_lineno
        assert handle.data.shape[-1] % lengths[-1] == 0, (place, name)
        assert HOLDS[name](runs).all(), (place, name)
        found[place] = max(found.get(place, 0), lengths[-1])

    monkeypatch.setattr(interpreter().TensorHandle, "set_attr", check)
    return found


def step(layout, dtype, shape, channels, kernel, stride=1, padding=0, extra=0, groups=1, dilation=1, asked=(0, 1, 2)):
    kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
    leaves = [
        torch.randn(shape, dtype=dtype).contiguous(memory_format=layout),
        torch.randn(shape[1], channels // groups, *kernel, dtype=dtype).contiguous(memory_format=layout),
        torch.randn(channels, dtype=dtype),
    ]
    for i in asked:
        leaves[i].requires_grad_()
    y = FS.conv_transpose2d(*leaves, stride, padding, extra, groups, dilation)
    y.backward(torch.randn_like(y))


def given():
    """(file, line) of each hint in the kernels' sources."""
    for file in Path(kernels.__file__).parent.rglob("*.py"):
        for number, line in enumerate(file.read_text().splitlines(), 1):
            if any(f"tl.{hint}(" in line for hint in ("multiple_of", "max_contiguous", "max_constancy")):
                yield file.name, number


def test_all_hints_are_reached_and_true(told, triton_backend):
    """The calls reach every hint, each with full 16-byte accesses."""
    for geometry in GEOMETRIES:
        for layout in LAYOUTS.values():
            step(layout, torch.float16, *geometry)
    step(torch.contiguous_format, torch.float16, *GEOMETRIES[0], asked=[0])
    assert set(told) == set(given())
    assert set(told.values()) == {8}


def test_hints_are_true_for_random_calls(told, triton_backend, seed):
    """Sizes that no block divides, and rows of two, four and eight elements."""
    draw = random.Random(seed)
    for _ in range(12):
        groups = draw.choice([1, 1, 2])
        inner, outer = (groups * draw.choice([1, 4, 5, 8, 20]) for _ in range(2))
        shape = draw.randint(1, 3), inner, draw.randint(1, 7), draw.choice([1, 2, 3, 4, 6, 8, 16, 20])
        kernel, stride = ([draw.choice([1, 2, 3, 4]) for _ in range(2)] for _ in range(2))
        if draw.random() < 0.4:
            kernel, stride = (shuffled := [draw.choice([1, 2, 4]) for _ in range(2)]), shuffled
        size = [(n - 1) * s + k for n, s, k in zip(shape[2:], stride, kernel, strict=True)]
        padding = [draw.randint(0, min(k - 1, (n - 1) // 2)) for k, n in zip(kernel, size, strict=True)]
        extra = [draw.randint(0, s - 1) for s in stride]
        dtype = draw.choice([torch.float16, torch.float32])
        layout = draw.choice(list(LAYOUTS))
        print(layout, dtype, shape, outer, kernel, stride, padding, extra, groups)
        step(LAYOUTS[layout], dtype, shape, outer, tuple(kernel), stride, padding, extra, groups)
    assert told


def test_rows_and_columns_are_exact_up_to_the_longest_side():
    """Kernels compute rows and columns in float32, by a reciprocal that a GPU may round by two units in the last place.

    This emulates it for the largest supported maps. A block of pixels may exceed the columns by its own length.
    """
    for b in [1, 3, 7, 127, 1000, 99_991, MAX_FLOAT_SIDE - 1, MAX_FLOAT_SIDE]:
        edges = torch.arange(b, MAX_FLOAT_SIDE + 1024, b)
        a = torch.cat([edges - 1, edges, torch.arange(max(0, b - 2), b + 1024)])
        for ulps in (-2, 0, 2):
            reciprocal = torch.tensor(1.0 / b)
            reciprocal *= 1 + ulps * 2.0**-23
            assert torch.equal(((a.float() + 0.5) * reciprocal).int(), (a // b).int()), b


@pytest.mark.parametrize("side", [2, 3])
def test_longer_maps_fall_back_to_torch(side, triton_backend):
    shape, words = [1, 1, 1, 1], f"maps of more than {MAX_FLOAT_SIDE} rows or columns"
    shape[side] = MAX_FLOAT_SIDE // 2 + 1
    x, weight = torch.randn(shape, requires_grad=True), torch.ones(1, 1, 3, 3)
    with pytest.raises(NotImplementedError, match=words):
        FS.conv_transpose2d(x, weight, None, 2, 1)
    with pytest.raises(NotImplementedError, match=words):
        FS.max_unpool2d_conv2d(x.detach(), torch.zeros(shape, dtype=torch.uint8), weight)
    geometry = ConvTransposeGeometry([1, 1], [0, 0], [0, 0], 1, [1, 1])
    assert unsupported(x, weight, geometry) is None
    plane = torch.empty(1, 1, 2**16, 2**15, device="meta")
    assert unsupported(plane, weight, geometry) == f"maps of more than {2**31 - 1} pixels"
