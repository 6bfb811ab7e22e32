"""What each instruction writes: registers and predicates, and their values as far as they are known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from . import arithmetic
from .arithmetic import MASK, Value
from .sass import Instruction, Operand, following


class Machine(Protocol):
    """What an instruction reads: operands of 32 and 64 bits, and predicates."""

    state: dict[str, Value]

    def value(self, op: Operand) -> Value: ...

    def pair(self, op: Operand) -> Value: ...

    def predicate(self, op: Operand) -> Value: ...

    def constant(self, offset: int) -> Value:
        """A word of constant bank 0, which holds the arguments."""

    def special(self, name: str) -> Value:
        """A special register, such as SR_TID.X."""


Computed = tuple[list[str], list[Value]]


def _split(one: Instruction, trailing: int) -> tuple[str, list[str], list[Operand], list[Operand]]:
    """(result, carries out, sources, predicates behind them), for an instruction that has `trailing` sources."""
    rest = list(one.operands[1:])
    outs = []
    while len(rest) > trailing and rest[0].kind == "predicate":
        outs.append(rest.pop(0).name)
    return one.operands[0].name, outs, rest[:trailing], rest[trailing:]


def _sum(m: Machine, terms: list[Operand], extended: bool, carries: list[Operand]) -> Value:
    """An exact sum of words, carries included; a subtrahend is added as its complement."""
    total = 0
    for op in terms:
        value = m.value(op)
        if value is None:
            return None
        total += (MASK ^ (-value & MASK)) + 1 if op.negative and not extended else value
    for op in carries:
        carry = m.predicate(op)
        if carry is None:
            return None
        total += carry
    return total


def _add(m: Machine, one: Instruction) -> Computed:
    sources = sum(op.kind != "predicate" for op in one.operands[1:])
    result, outs, terms, rest = _split(one, sources)
    if "64" in one.parts:
        numbers = [m.pair(op) for op in terms]
        total = None if None in numbers else sum(numbers)
        low, high = (None, None) if total is None else (total & MASK, total >> 32 & MASK)
        return [result, following(result, 1), *outs], [low, high, *[None] * len(outs)]
    extended = "X" in one.parts
    total = _sum(m, terms, extended, rest if extended else [])
    carries = [None if total is None else int(total >> 32 > k) for k in range(len(outs))]
    return [result, *outs], [None if total is None else total & MASK, *carries]


def _multiply(m: Machine, one: Instruction) -> Computed:
    result, outs, (a, b, c), rest = _split(one, 3)
    wide, high = "WIDE" in one.parts, "HI" in one.parts
    x, y, z = m.value(a), m.value(b), m.pair(c) if wide or high else m.value(c)
    names = [result, *([following(result, 1)] if wide else []), *outs]
    if x == 0 or y == 0:  # a product with 0 is known
        x = y = 0
    if x is None or y is None or z is None:
        return names, [None] * len(names)
    unsigned = "U32" in one.parts and (wide or high)
    product = x * y if unsigned or not (wide or high) else arithmetic.signed(x) * arithmetic.signed(y)
    carry = 0
    if "X" in one.parts:
        known = [m.predicate(op) for op in rest]
        if None in known:
            return names, [None] * len(names)
        carry = sum(known)
    total = (product & (1 << 64) - 1 if wide or high else product & MASK) + z + carry
    carries = [int(total >> (64 if wide or high else 32) > 0)] * len(outs)
    if wide:
        return names, [total & MASK, total >> 32 & MASK, *carries]
    return names, [(total >> 32 if high else total) & MASK, *carries]


def _lea(m: Machine, one: Instruction) -> Computed:
    """The sum of a shifted number and another; HI: of the upper word of the shifted number."""
    upper = "HI" in one.parts
    extended, signs = "X" in one.parts, "SX32" in one.parts
    result, outs, sources, rest = _split(one, 4 if upper and not signs else 3)
    by = sources[-1].value
    a, b = m.value(sources[0]), m.value(sources[1])
    names = [result, *outs]
    c = m.value(sources[2]) if upper and not signs else 0
    carry = m.predicate(rest[0]) if extended else 0
    if a is None or b is None or c is None or carry is None:
        return names, [None] * len(names)
    number = arithmetic.signed(a) if signs else c << 32 | a
    shifted = (number << by >> 32 if upper else a << by) & MASK
    total = shifted + b + carry
    return names, [total & MASK, *[int(total >> 32 > k) for k in range(len(outs))]]


def _compare(m: Machine, one: Instruction) -> Computed:
    first, second, a, b, *rest = one.operands
    combined = m.predicate(rest[0]) if rest else 1
    low = m.predicate(rest[1]) if len(rest) > 1 else None
    if one.opcode == "FSETP":
        found = arithmetic.compare_floats(one.parts, m.value(a), m.value(b))
    else:
        found = arithmetic.compare(one.parts, m.value(a), m.value(b), low)
    join = next((arithmetic.COMBINE[part] for part in one.parts[2:] if part in arithmetic.COMBINE), arithmetic.both)
    opposite = None if found is None else 1 - found
    return [first.name, second.name], [join(found, combined), join(opposite, combined)]


def _logic(m: Machine, one: Instruction) -> Computed:
    operands = list(one.operands)
    outs = [operands.pop(0).name] if operands[0].kind == "predicate" else []
    result = arithmetic.logic(operands[4].value, [m.value(op) for op in operands[1:4]])
    return [operands[0].name, *outs], [result, *[None if result is None else int(result != 0)] * len(outs)]


def _predicate_logic(m: Machine, one: Instruction) -> Computed:
    first, second, *sources, table, other = one.operands
    values = [m.predicate(op) for op in sources]
    return [first.name, second.name], [arithmetic.predicate_logic(t.value, values) for t in (table, other)]


def _select(m: Machine, one: Instruction) -> Computed:
    result, a, b, chosen = one.operands[:4]
    which = m.predicate(chosen)
    x, y = m.value(a), m.value(b)
    return [result.name], [(x if x == y else None) if which is None else x if which else y]


def _extreme(m: Machine, one: Instruction) -> Computed:
    """IMNMX: the smaller of two numbers, or the larger if the predicate is false."""
    result, outs, (a, b), rest = _split(one, 2)
    x, y, least = m.value(a), m.value(b), m.predicate(rest[0])
    names = [result, *outs]
    if x is None or y is None or least is None:
        return names, [None] * len(names)
    order = (lambda v: v) if "U32" in one.parts else arithmetic.signed
    return names, [(min if least else max)(x, y, key=order), *[None] * len(outs)]


def _move(m: Machine, one: Instruction) -> Computed:
    return [one.operands[0].name], [m.value(one.operands[1])]


def _special(m: Machine, one: Instruction) -> Computed:
    value = m.special(one.operands[1].name)
    names = [following(one.operands[0].name, k) for k in range(one.registers)]
    return names, [value, *[None if value is None else 0] * (len(names) - 1)]


def _constant(m: Machine, one: Instruction) -> Computed:
    result, source = one.operands[:2]
    base = m.state.get(source.name) if source.name else 0
    names = [following(result.name, k) for k in range(one.registers)]
    if base is None or source.kind != "constant":
        return names, [None] * len(names)
    words = [m.constant(base + source.value + 4 * k) for k in range(len(names))]
    if one.bytes < 4 and not {"U8", "U16", "S8", "S16"}.isdisjoint(one.parts):
        at = base + source.value
        word = m.constant(at & ~3)
        bits = 8 * one.bytes
        part = None if word is None else word >> 8 * (at & 3) & (1 << bits) - 1
        words = [part if part is None or not {"S8", "S16"} & set(one.parts) else arithmetic.signed(part, bits) & MASK]
    return names, words


def _word(function: Callable[..., Value]) -> Callable[[Machine, Instruction], Computed]:
    """An instruction whose result is a function of its parts and 32-bit operands."""
    return lambda m, one: ([one.operands[0].name], [function(one.parts, *map(m.value, one.operands[1:]))])


def _known(function: Callable[..., int]) -> Callable[..., Value]:
    """A function that is unknown if one of its operands is."""
    return lambda parts, *values: None if None in values else function(parts, *values)


def _sign_extend(parts: tuple[str, ...], a: int, bits: int) -> int:
    return a & (1 << bits) - 1 if "U32" in parts else arithmetic.signed(a, bits) & MASK


def _reciprocal(parts: tuple[str, ...], a: Value, *rest: Value) -> Value:
    if parts[1] != "RCP" or a is None or arithmetic.single(a) == 0:
        return None
    return arithmetic.bits_of(1.0 / arithmetic.single(a))


def _absolute(parts: tuple[str, ...], a: int) -> int:
    return abs(arithmetic.signed(a)) & MASK


def _pack_predicates(m: Machine, one: Instruction) -> Computed:
    """P2R: predicates as bits of a byte."""
    kept, mask = m.value(one.operands[2]), one.operands[3].value
    values = [m.state.get(f"P{n}") if mask >> n & 1 else 0 for n in range(7)]
    if kept is None or None in values:
        return [one.operands[0].name], [None]
    at = next((8 * int(part[1]) for part in one.parts if part in ("B1", "B2", "B3")), 0)
    return [one.operands[0].name], [kept & ~(mask << at) & MASK | sum(v << n for n, v in enumerate(values)) << at]


def _unpack_predicates(m: Machine, one: Instruction) -> Computed:
    """R2P: bits of a byte as predicates."""
    source, mask = one.operands[1], one.operands[2].value
    at = next((8 * int(part[1]) for part in one.parts if part in ("B1", "B2", "B3")), 0)
    value = m.value(source)
    chosen = [n for n in range(7) if mask >> n & 1]
    return [f"P{n}" for n in chosen], [None if value is None else value >> at + n & 1 for n in chosen]


def _vote(m: Machine, one: Instruction) -> Computed:
    """A vote of a warp whose threads agree; a first thread that is elected."""
    last = m.predicate(one.operands[-1]) if one.operands[-1].kind == "predicate" else None
    names = [op.name for op in one.operands[:2] if op.kind in ("predicate", "register")]
    return names, [last if op.kind == "predicate" else None for op in one.operands[: len(names)]]


def _half_constant(m: Machine, one: Instruction) -> Computed:
    """HFMA2 of zeros: how the compiler makes a constant, in two halves."""
    result, *factors, high, low = one.operands
    zero = len(factors) == 2 and all(op.name == "RZ" for op in factors)
    if not zero or high.kind != "number" or low.kind != "number" or one.parts[1:] not in ((), ("MMA",)):
        return [result.name], [None]
    upper, lower = (arithmetic.half_bits(op.value) for op in (high, low))
    return [result.name], [upper << 16 | lower]


def _elect(m: Machine, one: Instruction) -> Computed:
    return [one.operands[0].name], [1]


EFFECTS: dict[str, Callable[[Machine, Instruction], Computed]] = {
    **dict.fromkeys(("IADD3", "UIADD3", "IADD", "VIADD"), _add),
    **dict.fromkeys(("IMAD", "UIMAD"), _multiply),
    **dict.fromkeys(("LEA", "ULEA"), _lea),
    **dict.fromkeys(("ISETP", "UISETP", "FSETP"), _compare),
    **dict.fromkeys(("LOP3", "ULOP3"), _logic),
    **dict.fromkeys(("PLOP3", "UPLOP3"), _predicate_logic),
    **dict.fromkeys(("SEL", "USEL", "FSEL"), _select),
    **dict.fromkeys(("IMNMX", "VIMNMX", "UIMNMX"), _extreme),
    **dict.fromkeys(("MOV", "UMOV", "R2UR"), _move),
    **dict.fromkeys(("S2R", "S2UR", "CS2R"), _special),
    **dict.fromkeys(("LDC", "ULDC", "LDCU"), _constant),
    **dict.fromkeys(("SHF", "USHF"), _word(arithmetic.shift)),
    **dict.fromkeys(("PRMT", "UPRMT"), _word(_known(lambda parts, a, by, b: arithmetic.permute(a, by, b)))),
    **dict.fromkeys(("SGXT", "USGXT"), _word(_known(_sign_extend))),
    "IABS": _word(_known(_absolute)), "MUFU": _word(_reciprocal),
    **dict.fromkeys(("I2F", "I2FP"), _word(arithmetic.to_float)), "F2I": _word(arithmetic.to_integer),
    "HFMA2": _half_constant, "P2R": _pack_predicates, "R2P": _unpack_predicates,
    **dict.fromkeys(("VOTE", "VOTEU"), _vote), "ELECT": _elect, "SYNCS": _elect,
}  # fmt: skip
