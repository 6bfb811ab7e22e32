"""That Triton's interpreter, hastened, computes what it computed, and refuses integers that overflow."""

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


EDGES = {  # two pairs that fit, of the least and the most, and one that does not
    "+": lambda least, most: ((least, 0), (most - 1, 1), (most, 1)),
    "-": lambda least, most: ((least + 1, 1), (most, 0), (least, 1)),
    "*": lambda least, most: ((least, 1), (most // 2, 2), (most // 2 + 1, 2)),
}


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32], ids=str)
@pytest.mark.parametrize("operation, name", [("+", "add"), ("-", "sub"), ("*", "mul")])
def test_integers_that_overflow_are_refused_and_others_are_right(operation, name, dtype):
    """In one lane of four."""
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


def test_the_language_is_as_before_after_a_launch(monkeypatch):
    """And what a test puts in place of a builtin is what runs."""
    called, x = [], torch.zeros(4, dtype=torch.int32)
    monkeypatch.setattr(tl, "debug_barrier", lambda: called.append(1))
    before = vars(tl) | vars(tl.tensor)
    run(x, x, "+")
    assert called == [1] and triton_internals.is_builtin(tl.load) and vars(tl) | vars(tl.tensor) == before


def test_triton_asks_for_all_that_is_replaced(monkeypatch):
    """Else it would do nothing."""
    asked, semantic = set(), tritons.TritonSemantic
    names = {"_patch_builtin": tritons, "_get_np_dtype": tritons, "binary_op_sanitize_overflow_impl": semantic}
    for name, owner in names.items():
        ours = getattr(owner, name)
        assert ours.__module__ in ("fastseg.kernels.interpreter", "support.overflow")
        monkeypatch.setattr(owner, name, lambda *args, ours=ours, name=name: asked.add(name) or ours(*args))
    x = torch.zeros(4, dtype=torch.int32)
    run(x, x, "+")
    assert asked == names.keys()


def test_a_triton_that_is_not_known_is_left_alone(monkeypatch):
    before = vars(tritons) | vars(tritons.TritonSemantic)
    monkeypatch.setattr(triton_internals, "VERSION", (3, 8))
    interpreter.prepare()
    assert vars(tritons) | vars(tritons.TritonSemantic) == before
