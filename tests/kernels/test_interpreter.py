"""Triton's interpreter with the speed patches computes the same results, and raises if an integer overflows."""

import pytest
import torch
import triton
import triton.language as tl

from fastseg.kernels import interpreter, triton_internals
from fastseg.kernels.triton_internals import InterpreterError

tritons = triton_internals.interpreter()

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here, not interpreted")


@triton.jit
def combined(a, b, OPERATION: tl.constexpr):
    if OPERATION == "+":
        return a + b
    elif OPERATION == "-":
        return a - b
    else:
        return a * b


@triton.jit
def combine_kernel(a, b, out, OPERATION: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, combined(tl.load(a + at), tl.load(b + at), OPERATION))
    tl.debug_barrier()


def run(x, y, operation):
    out = torch.zeros_like(x)
    combine_kernel[(1,)](x, y, out, operation, BLOCK=4)
    return out


EDGES = {  # for the smallest and the largest integer: two pairs of operands that fit, and one that overflows
    "+": lambda least, most: ((least, 0), (most - 1, 1), (most, 1)),
    "-": lambda least, most: ((least + 1, 1), (most, 0), (least, 1)),
    "*": lambda least, most: ((least, 1), (most // 2, 2), (most // 2 + 1, 2)),
}


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32], ids=str)
@pytest.mark.parametrize("operation, name", [("+", "add"), ("-", "sub"), ("*", "mul")])
def test_integers_that_overflow_raise_and_others_are_right(operation, name, dtype):
    """The overflow is in one of four lanes."""
    limits = torch.iinfo(dtype)
    *pairs, wrong = EDGES[operation](limits.min, limits.max)
    for a, b in pairs:
        x, y = torch.tensor([1, 2, a, 1], dtype=dtype), torch.tensor([1, 1, b, 1], dtype=dtype)
        assert torch.equal(run(x, y, operation), {"+": x + y, "-": x - y, "*": x * y}[operation])
    x[2], y[2] = wrong
    with pytest.raises(InterpreterError, match=f"int{limits.bits} overflow detected for operation {name}"):
        run(x, y, operation)


def test_64_bits_wrap_around():
    x, one = torch.full((4,), torch.iinfo(torch.int64).max), torch.ones(4, dtype=torch.int64)
    assert torch.equal(run(x, one, "+"), x + one)


def test_a_launch_leaves_the_language_unchanged(monkeypatch):
    """Also, a function that a test puts in the place of a builtin is called."""
    called, x = [], torch.zeros(4, dtype=torch.int32)
    run(x, x, "+")  # the first launch of a process makes Python create __annotations__
    monkeypatch.setattr(tl, "debug_barrier", lambda: called.append(1))
    before = vars(tl) | vars(tl.tensor)
    run(x, x, "+")
    assert called == [1] and triton_internals.is_builtin(tl.load) and vars(tl) | vars(tl.tensor) == before


@triton.jit
def table_kernel(out, SIZE: tl.constexpr):
    """A column times a row, one shape from two; a block from a size that is given."""
    at = tl.arange(0, 4)
    tl.store(out + at[:, None] * 4 + at[None, :], (at + 1)[:, None] * (at + 1)[None, :] + tl.zeros([SIZE, 4], tl.int32))


def test_shapes_that_differ_are_broadcast_and_wrong_ones_raise_each_time():
    """Also after the same call was right: sizes and types of earlier blocks are remembered."""
    numbers = torch.arange(1, 5, dtype=torch.int32)
    for _ in range(2):
        out = torch.zeros(4, 4, dtype=torch.int32)
        table_kernel[(1,)](out, SIZE=4)
        assert torch.equal(out, numbers[:, None] * numbers)
        for wrong, message in ((3, "must be a power of 2"), (4.0, "must have type"), (2, "incompatible dimensions")):
            with pytest.raises(InterpreterError, match=message):
                table_kernel[(1,)](out, SIZE=wrong)


def test_pointers_and_values_of_one_shape_keep_their_types():
    scope = tl.block_type(tl.pointer_type(tl.int32), [4]), tl.block_type(tl.int32, [4]), tl.block_type(tl.int64, [4])
    assert [kind.scalar.name for kind in scope] == ["pointer<int32>", "int32", "int64"]
    shared = tl.block_type(tl.pointer_type(tl.int32, "shared"), [4])  # in triton 3.9 a name, before that a number
    assert shared.element_ty.address_space == "shared" != scope[0].element_ty.address_space
    with pytest.raises(TypeError, match="must have type"):
        tl.block_type(tl.int32, [4.0])


def test_triton_calls_everything_that_is_patched(monkeypatch):
    """Otherwise the patches would have no effect."""
    called, semantic = set(), tritons.TritonSemantic
    names = {
        **dict.fromkeys(("_patch_builtin", "_patch_lang", "_get_np_dtype"), tritons),
        **dict.fromkeys(("binary_op_sanitize_overflow_impl", "broadcast_impl_value"), semantic),
    }
    for name, owner in names.items():
        ours = getattr(owner, name)
        assert ours.__module__ in ("fastseg.kernels.interpreter", "support.overflow")
        monkeypatch.setattr(owner, name, lambda *args, ours=ours, name=name: called.add(name) or ours(*args))
    x = torch.zeros(4, dtype=torch.int32)
    run(x, x, "+")
    assert called == names.keys()


def test_an_unknown_version_of_triton_is_not_patched(monkeypatch):
    before = vars(tritons) | vars(tritons.TritonSemantic)
    monkeypatch.setattr(triton_internals, "VERSION", (99, 0))
    interpreter.prepare()
    assert vars(tritons) | vars(tritons.TritonSemantic) == before
