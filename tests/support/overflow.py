"""An overflow check for Triton's interpreter in NumPy. Triton's own check takes half of the interpreter's time."""

from typing import Any

import numpy as np

from fastseg.kernels import triton_internals

IN_NUMPY = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


def check(self: Any, lhs: Any, rhs: Any, operation: Any) -> None:
    """Raise if an integer sum, difference or product does not fit its type. 64-bit integers are not checked."""
    kind = lhs.type.scalar
    if kind.int_bitwidth >= 64:
        return
    assert kind == rhs.type.scalar and kind.is_int()
    exact = IN_NUMPY[operation.__name__](lhs.handle.data, rhs.handle.data, dtype=np.int64)
    fits = exact.min() >= kind.get_int_min_value() and exact.max() <= kind.get_int_max_value()
    assert fits, f"int{kind.int_bitwidth} overflow detected for operation {operation.__name__}"


def install() -> None:
    """Replace fastseg's patch, which lets Triton check only in debug mode."""
    triton_internals.replace_overflow_check(lambda original: check)
