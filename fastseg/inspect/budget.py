"""How many instructions a memory-bound call may need, and which calls need more, and why.

The figures are thread instructions a byte on sm_90, of the Triton kernels in bfloat16. tests/inspect compares them with
the count of the same machine code, and fails for a call that is above the budget and not listed, above its figure, or
listed and within the budget.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

PER_BYTE = {90: 3.5, 100: 2.5}  # thread instructions a byte of the floor: half of the issue slots of an H200 and a B200
IN_FLIGHT = 0.6  # of the bytes that Little's law asks for
MEMORY_BOUND = ("max_pool2d", "max_unpool2d", "max_unpool2d_with_offsets", "batch_norm", "cross_entropy")
FUSED_CONVOLUTION = "conv2d"  # in the name of an operator that also multiplies matrices


class Excess(NamedTuple):
    """A call above the budget: its figure, and why it needs so much."""

    figure: float
    why: str


ROWS = "rows of pixels that no group of 16 bytes divides are read and written by single elements"
WINDOWS = "a window of nine elements is compared element by element, and a pooled element has few bytes"
CELLS = "a pixel is compared with each window that can hold it, at one comparison a window"
OFFSETS = "one byte an offset leaves few bytes for the comparisons that find it"
INDICES = "64-bit indices are compared, and indices outside their windows are looked up one by one"
FEW_CLASSES = "a pixel has few bytes for the logarithm, divisions and label that each pixel needs"
CLASSES = "about eleven instructions a logit, which has four bytes: maximum, exp2, sum, gradient, label"
GROUPS = "rows of classes that 16 bytes do not divide: groups share two pixels, and lanes are masked"
SMALL_LOSS = "predictions take three more instructions a logit"

EXCESSES: dict[tuple[str, str, str, str], Excess] = {}


def is_memory_bound(operator: str) -> bool:
    """Whether the budget applies to an operator."""
    return operator.startswith(MEMORY_BOUND) and FUSED_CONVOLUTION not in operator


def excess(row: Mapping[str, Any]) -> list[str]:
    """What a row of the report is above the budget in; nothing for an operator or GPU generation that has none."""
    if row["sm"] not in PER_BYTE or not is_memory_bound(row["operator"]):
        return []
    found = []
    if row["per byte"] > PER_BYTE[row["sm"]]:
        found.append(f"{row['per byte']:.2f} instructions a byte are more than {PER_BYTE[row['sm']]}")
    for name, on in row["gpus"].items():
        if on["in flight"] is not None and on["in flight"] < IN_FLIGHT:
            found.append(f"{on['in flight']:.0%} of the bytes in flight that {name} needs")
    return found


def listed(row: Mapping[str, Any]) -> Excess | None:
    """The entry of a row in the list."""
    return EXCESSES.get((row["operator"], row["mode"], row["layout"], row["size"]))
