"""What the integer instructions of NVIDIA's machine code compute, on values that may be unknown (None).

Only what loop counters, branch conditions and addresses are computed with is known. The result of any other
instruction is unknown, which the emulator passes on.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable, Sequence

import numpy as np

MASK = 0xFFFFFFFF
Value = int | None
COMPARE: dict[str, Callable[[int, int], bool]] = {
    "LT": lambda a, b: a < b, "LE": lambda a, b: a <= b, "GT": lambda a, b: a > b, "GE": lambda a, b: a >= b,
    "EQ": lambda a, b: a == b, "NE": lambda a, b: a != b,
}  # fmt: skip
COMBINE: dict[str, Callable[[Value, Value], Value]] = {
    "AND": lambda a, b: both(a, b), "OR": lambda a, b: either(a, b),
    "XOR": lambda a, b: None if a is None or b is None else a ^ b,
}  # fmt: skip


def both(a: Value, b: Value) -> Value:
    """a and b, known if one of them is false."""
    return 0 if a == 0 or b == 0 else None if a is None or b is None else 1


def either(a: Value, b: Value) -> Value:
    """a or b, known if one of them is true."""
    return 1 if a == 1 or b == 1 else None if a is None or b is None else 0


def signed(x: int, bits: int = 32) -> int:
    """The two's complement number in the lowest bits of x."""
    x &= (1 << bits) - 1
    return x - (1 << bits) if x >> (bits - 1) else x


def single(bits: int) -> float:
    """The float32 with these bits."""
    return struct.unpack("<f", struct.pack("<I", bits))[0]


def bits_of(x: float) -> int:
    """The bits of a number rounded to float32."""
    return struct.unpack("<I", struct.pack("<f", np.float32(x)))[0]


def half_bits(bits: int) -> int:
    """The bits of a float32, given by its bits, as a float16."""
    return int(np.float16(single(bits)).view(np.uint16))


def compare(parts: Sequence[str], a: Value, b: Value, low: Value) -> Value:
    """ISETP's comparison. EX: of the upper halves of two 64-bit numbers, `low` is that of the lower halves."""
    if a is None or b is None:
        return None
    if "U32" not in parts:
        a, b = signed(a), signed(b)
    if "EX" in parts:
        kind = parts[1]
        if a == b:
            return low
        return int(COMPARE[{"LE": "LT", "GE": "GT"}.get(kind, kind)](a, b))
    return int(COMPARE[parts[1]](a, b))


def compare_floats(parts: Sequence[str], a: Value, b: Value) -> Value:
    """FSETP's comparison; a kind that ends in U is also true for NaN."""
    if a is None or b is None:
        return None
    x, y = single(a), single(b)
    unordered = x != x or y != y
    kind = parts[1]
    if kind in ("NAN", "NUM"):
        return int(unordered == (kind == "NAN"))
    if kind not in COMPARE and kind.endswith("U"):
        return int(unordered or COMPARE[kind[:-1]](x, y))
    return int(not unordered and COMPARE[kind](x, y)) if kind in COMPARE else None


def logic(table: int, operands: Sequence[Value]) -> Value:
    """LOP3: each bit of the result is the table's entry for the three bits of the operands.

    Known if it is the same whatever the unknown operands are.
    """
    choices = [(value,) if value is not None else (0, MASK) for value in operands]
    found = {_lookup(table, *chosen) for chosen in itertools.product(*choices)}
    return found.pop() if len(found) == 1 else None


def _lookup(table: int, a: int, b: int, c: int) -> int:
    result = 0
    for entry in range(8):
        if table >> entry & 1:
            result |= (a if entry & 4 else ~a) & (b if entry & 2 else ~b) & (c if entry & 1 else ~c)
    return result & MASK


def predicate_logic(table: int, operands: Sequence[Value]) -> Value:
    """PLOP3: the table's entry for three predicates; known if it is the same whatever the unknown ones are."""
    found = {
        table >> entry & 1
        for entry in range(8)
        if all(v is None or v == (entry >> (2 - n) & 1) for n, v in enumerate(operands))
    }
    return found.pop() if len(found) == 1 else None


def permute(a: int, selector: int, b: int) -> int:
    """PRMT: four bytes of the eight of b and a; a selector above 7 spreads the byte's sign."""
    source = [(b << 32 | a) >> 8 * n & 0xFF for n in range(8)]
    result = 0
    for n in range(4):
        chosen = selector >> 4 * n & 0xF
        byte = source[chosen & 7]
        result |= ((0xFF if byte & 0x80 else 0) if chosen & 8 else byte) << 8 * n
    return result


def shift(parts: Sequence[str], low: Value, by: Value, high: Value) -> Value:
    """SHF: a word of the 64-bit number (high, low), shifted."""
    left, upper = parts[1] == "L", "HI" in parts
    wide = "U64" in parts or "S64" in parts
    if by is None:
        return None
    by = by & 31 if "W" in parts else min(by, 63 if wide or upper else 32)
    # A word that is shifted out completely need not be known.
    if not left and upper and not wide:
        if high is None:
            return None
        return (signed(high) >> by if "S32" in parts else high >> by) & MASK
    if left and not upper and not wide:
        return None if low is None else low << by & MASK
    if low is None or high is None:
        return None
    number = high << 32 | low
    if left:
        number <<= by
    else:
        number = signed(number, 64) >> by if "S64" in parts or "S32" in parts else number >> by
    return (number >> 32 if upper else number) & MASK


def to_float(parts: Sequence[str], x: Value) -> Value:
    """I2F to float32, rounded to nearest or up (RP)."""
    if x is None or not {"F16", "F64", "U64", "S64", "U16", "U8"}.isdisjoint(parts):
        return None
    number = x if "U32" in parts else signed(x)
    rounded = np.float32(number)
    if "RP" in parts and float(rounded) < number:
        rounded = np.nextafter(rounded, np.float32(np.inf), dtype=np.float32)
    return bits_of(float(rounded))


def to_integer(parts: Sequence[str], bits: Value) -> Value:
    """F2I from float32 toward 0."""
    if bits is None or not {"U64", "S64", "F64", "F16"}.isdisjoint(parts) or "TRUNC" not in parts:
        return None
    x = single(bits)
    if x != x or abs(x) == float("inf"):
        return None
    low, high = (0, MASK) if "U32" in parts else (-(1 << 31), (1 << 31) - 1)
    return max(low, min(high, int(x))) & MASK
