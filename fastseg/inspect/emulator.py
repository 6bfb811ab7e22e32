"""How often each instruction of a kernel runs: its machine code, executed for one thread of a warp.

The emulator knows what a launch knows: the arguments, the number of the program and of the thread. From these it
computes loop counters, branch conditions and addresses exactly (arithmetic.py). What a kernel loads from memory is
unknown, and so is all that is computed from it, with one exception: the elements of tensors of one element are 1, such
as the gradient of a loss.

A warp runs the way of its first thread. A branch whose condition is unknown is run both ways until they join again, as
a warp runs it whose threads disagree; a way that ends in a failed assertion is left out, and an unknown condition does
not repeat a loop. A wait for a barrier in memory succeeds at once. All instructions that are reached take an issue
slot, also those whose predicate is false.
"""

from __future__ import annotations

import collections
from collections.abc import Callable
from dataclasses import dataclass, field

from . import arithmetic
from .arithmetic import MASK, Value
from .sass import RETURN, STEP, Code, Instruction, Operand, following

LIMIT = 3_000_000  # instructions of one thread; more is taken for an endless loop
ZERO = {"RZ": 0, "URZ": 0, "PT": 1, "UPT": 1}
ONES = {2: 0x3F80, 4: 0x3F800000}  # the bits of 1 by size; a float32 1 as an integer is not 0 either


@dataclass
class Thread:
    """Where a thread runs. constants: bank 0, byte by byte. sole: addresses of tensors of one element."""

    number: int
    program: int
    constants: dict[int, Value]  # 32-bit words by offset
    sole: frozenset[int] = frozenset()

    def special(self, name: str) -> Value:
        """A special register."""
        return {
            "SR_TID.X": self.number, "SR_TID.Y": 0, "SR_TID.Z": 0, "SR_CTAID.X": self.program, "SR_CTAID.Y": 0,
            "SR_CTAID.Z": 0, "SR_LANEID": self.number % 32, "SRZ": 0, "SR_CgaCtaId": 0,
        }.get(name)  # fmt: skip


@dataclass
class Trace:
    """What one thread did. times: how often each address ran. loads: (address of the instruction, of the memory)."""

    times: collections.Counter[int] = field(default_factory=collections.Counter)
    loads: list[tuple[int, Value]] = field(default_factory=list)
    batches: list[list[int]] = field(default_factory=lambda: [[]])  # loads (indices) issued between two waits
    both_ways: set[int] = field(default_factory=set)  # branches whose condition is unknown


class Emulator:
    """Runs the code of one kernel for one thread."""

    def __init__(self, code: Code, thread: Thread) -> None:
        self.code, self.thread, self.trace = code, thread, Trace()
        self.state: dict[str, Value] = dict(ZERO)
        self.waiting: dict[str, int] = {}  # registers that a load has not filled yet: number of the load
        self.waited = 0  # loads before this number have arrived
        self.seen: set[int] = set()
        self.calls: list[int] = []

    def run(self) -> Trace:
        """Run to the end. Raises RuntimeError after `LIMIT` instructions."""
        self._run(self.code.start, None)
        return self.trace

    def _run(self, address: int, until: int | None) -> bool:
        """Run from an address up to another. Returns whether it was reached, rather than the end."""
        depth = len(self.calls)
        while address != until or len(self.calls) > depth:
            if address == RETURN:
                address = self.calls.pop()
                continue
            one = self.code.at.get(address)
            if one is None:
                return False
            self.trace.times[address] += 1
            if self.trace.times[address] > LIMIT:
                raise RuntimeError(f"{one.name} at {address:#x} ran {LIMIT:,} times")
            going = self._condition(one)
            if one.opcode == "BRA":
                if going is None:
                    following_address = self._branch_both_ways(one)
                    if following_address is None:
                        return False
                    address = following_address
                else:
                    address = one.target if going else address + STEP
            elif one.opcode == "EXIT" and going is not None and going:
                return False
            elif one.opcode == "CALL" and one.target is not None and going != 0:
                self.calls.append(address + STEP)
                address = one.target
            elif one.opcode == "RET" and going != 0:
                if not self.calls:
                    return False
                if until == RETURN and len(self.calls) == depth:
                    return True
                address = self.calls.pop()
            else:
                self._step(one, going)
                address += STEP
        return True

    def _condition(self, one: Instruction) -> Value:
        """Whether the instruction has an effect."""
        going = 1 if one.guard is None else self.predicate(one.guard)
        if one.opcode == "BRA" and len(one.operands) > 1 and one.operands[0].kind == "predicate":
            going = arithmetic.both(going, self.predicate(one.operands[0]))
        return going

    def _branch_both_ways(self, one: Instruction) -> int | None:
        """Run both ways of a branch up to where they join. Returns that address, or None if both ways end."""
        after, target = one.address + STEP, one.target
        if target in self.code.fails:
            return after
        if after in self.code.fails:
            return target
        self.trace.both_ways.add(one.address)
        if target <= one.address:
            return after
        join = self.code.joins[one.address]
        before, calls = dict(self.state), list(self.calls)
        reached = self._run(after, join)
        first, self.state, self.calls = self.state, before, calls
        if not self._run(target, join):
            self.state = first
            return join if reached else None
        if reached:
            self.state = {name: value for name, value in self.state.items() if first.get(name) == value}
        return join

    # --- values ---

    def predicate(self, op: Operand) -> Value:
        value = self.state.get(op.name)
        return None if value is None else value ^ op.negative

    def value(self, op: Operand) -> Value:
        """A 32-bit operand."""
        if op.kind == "number":
            return op.value & MASK
        if op.kind == "register":
            found = self.state.get(op.name)
        elif op.kind == "constant":
            base = self.state.get(op.name) if op.name else 0
            found = None if base is None else self.thread.constants.get(base + op.value)
        else:
            return None
        if found is None:
            return None
        return -found & MASK if op.negative else ~found & MASK if op.inverted else found

    def pair(self, op: Operand) -> Value:
        """A 64-bit operand."""
        if op.kind == "register":
            low, high = self.state.get(op.name), self.state.get(op.following)
        elif op.kind == "constant" and not op.name:
            low, high = (self.thread.constants.get(op.value + at) for at in (0, 4))
        else:
            return self.value(op)
        if low is None or high is None:
            return None
        number = high << 32 | low
        return -number & (1 << 64) - 1 if op.negative else number

    def _write(self, name: str, value: Value) -> None:
        if name not in ZERO:
            self.state[name] = value

    # --- instructions ---

    def _step(self, one: Instruction, going: Value) -> None:
        """Compute the results of an instruction that is no jump."""
        self._wait(one)
        if one.opcode in ("LDG", "LD", "LDGSTS") and going != 0:
            self._load(one)
            return
        if not one.operands or one.operands[0].kind not in ("register", "predicate"):
            return
        if going == 0:
            return
        names, values = self._results(one)
        for name, value in zip(names, values, strict=True):
            self._write(name, value if going == 1 or self.state.get(name) == value else None)

    def _results(self, one: Instruction) -> tuple[list[str], list[Value]]:
        """The registers and predicates that an instruction writes, and their values."""
        compute = COMPUTE.get(one.opcode)
        first = one.operands[0]
        predicates = [op.name for op in _leading_predicates(one.operands[1:])] if first.kind == "register" else []
        if compute is not None:
            return compute(self, one)
        if first.kind == "predicate":
            names = [op.name for op in _leading_predicates(one.operands)[:2]]
            return names, [None] * len(names)
        names = [following(first.name, k) for k in range(one.registers)] + predicates
        return names, [None] * len(names)

    def _load(self, one: Instruction) -> None:
        """Note a load from global memory."""
        memory = next((op for op in one.operands[::-1] if op.kind == "memory"), None)
        base = None if memory is None else self.pair(Operand("register", memory.name))
        address = None if base is None else (base + memory.value) & (1 << 64) - 1
        number = len(self.trace.loads)
        fresh = address is None or address not in self.seen
        self.trace.loads.append((one.address, address))
        if fresh:
            self.trace.batches[-1].append(number)
            if address is not None:
                self.seen.add(address)
        if one.opcode == "LDGSTS":
            self.waiting.setdefault("asynchronous", number)
            return
        first = one.operands[0].name
        for k in range(one.registers):
            name = following(first, k)
            sole = address in self.thread.sole and one.guard is None and one.registers == 1
            self._write(name, ONES.get(one.bytes, 1) if sole else None)
            if fresh and name not in ZERO:
                self.waiting[name] = number

    def _wait(self, one: Instruction) -> None:
        """Note that an instruction needs a load's result: a new batch of loads begins."""
        if not self.waiting:
            return
        if one.name.startswith(("DEPBAR", "LDGDEPBAR")):
            needed = [self.waiting["asynchronous"]] if "asynchronous" in self.waiting and one.opcode == "DEPBAR" else []
        else:
            stores = one.opcode.startswith(("ST", "RED", "ATOM"))
            read = [op for op in one.operands if op.kind in ("register", "memory")]
            if not stores and one.operands and one.operands[0].kind == "register":
                read = read[1:]
            names = set()
            for op in read:
                wide = 2 if op.kind == "memory" or one.opcode.startswith("D") else one.registers if stores else 1
                names.update(following(op.name, k) for k in range(wide))
            needed = [self.waiting[name] for name in names & self.waiting.keys()]
        if needed:
            last = max(needed)
            self.waiting = {name: number for name, number in self.waiting.items() if number > last}
            if self.trace.batches[-1]:
                self.trace.batches.append([])


Computed = tuple[list[str], list[Value]]


def _leading_predicates(operands: tuple[Operand, ...]) -> list[Operand]:
    found = []
    for op in operands:
        if op.kind != "predicate" or op.negative:
            break
        found.append(op)
    return found


def _split(one: Instruction, trailing: int) -> tuple[str, list[str], list[Operand], list[Operand]]:
    """(result, carries out, sources, predicates behind them), for an instruction that has `trailing` sources."""
    rest = list(one.operands[1:])
    outs = []
    while len(rest) > trailing and rest[0].kind == "predicate":
        outs.append(rest.pop(0).name)
    return one.operands[0].name, outs, rest[:trailing], rest[trailing:]


def _sum(m: Emulator, terms: list[Operand], extended: bool, carries: list[Operand]) -> Value:
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


def _add(m: Emulator, one: Instruction) -> Computed:
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


def _multiply(m: Emulator, one: Instruction) -> Computed:
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


def _lea(m: Emulator, one: Instruction) -> Computed:
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


def _compare(m: Emulator, one: Instruction) -> Computed:
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


def _logic(m: Emulator, one: Instruction) -> Computed:
    operands = list(one.operands)
    outs = [operands.pop(0).name] if operands[0].kind == "predicate" else []
    result = arithmetic.logic(operands[4].value, [m.value(op) for op in operands[1:4]])
    return [operands[0].name, *outs], [result, *[None if result is None else int(result != 0)] * len(outs)]


def _predicate_logic(m: Emulator, one: Instruction) -> Computed:
    first, second, *sources, table, other = one.operands
    values = [m.predicate(op) for op in sources]
    return [first.name, second.name], [arithmetic.predicate_logic(t.value, values) for t in (table, other)]


def _select(m: Emulator, one: Instruction) -> Computed:
    result, a, b, chosen = one.operands[:4]
    which = m.predicate(chosen)
    x, y = m.value(a), m.value(b)
    return [result.name], [(x if x == y else None) if which is None else x if which else y]


def _extreme(m: Emulator, one: Instruction) -> Computed:
    """IMNMX: the smaller of two numbers, or the larger if the predicate is false."""
    result, outs, (a, b), rest = _split(one, 2)
    x, y, least = m.value(a), m.value(b), m.predicate(rest[0])
    names = [result, *outs]
    if x is None or y is None or least is None:
        return names, [None] * len(names)
    order = (lambda v: v) if "U32" in one.parts else arithmetic.signed
    return names, [(min if least else max)(x, y, key=order), *[None] * len(outs)]


def _move(m: Emulator, one: Instruction) -> Computed:
    return [one.operands[0].name], [m.value(one.operands[1])]


def _special(m: Emulator, one: Instruction) -> Computed:
    value = m.thread.special(one.operands[1].name)
    names = [following(one.operands[0].name, k) for k in range(one.registers)]
    return names, [value, *[None if value is None else 0] * (len(names) - 1)]


def _constant(m: Emulator, one: Instruction) -> Computed:
    result, source = one.operands[:2]
    base = m.state.get(source.name) if source.name else 0
    names = [following(result.name, k) for k in range(one.registers)]
    if base is None or source.kind != "constant":
        return names, [None] * len(names)
    words = [m.thread.constants.get((base + source.value + 4 * k) & MASK) for k in range(len(names))]
    if one.bytes < 4 and not {"U8", "U16", "S8", "S16"}.isdisjoint(one.parts):
        at = base + source.value
        word = m.thread.constants.get(at & ~3)
        bits = 8 * one.bytes
        part = None if word is None else word >> 8 * (at & 3) & (1 << bits) - 1
        words = [part if part is None or not {"S8", "S16"} & set(one.parts) else arithmetic.signed(part, bits) & MASK]
    return names, words


def _word(function: Callable[..., Value]) -> Callable[[Emulator, Instruction], Computed]:
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


def _pack_predicates(m: Emulator, one: Instruction) -> Computed:
    """P2R: predicates as bits of a byte."""
    kept, mask = m.value(one.operands[2]), one.operands[3].value
    values = [m.state.get(f"P{n}") if mask >> n & 1 else 0 for n in range(7)]
    if kept is None or None in values:
        return [one.operands[0].name], [None]
    at = next((8 * int(part[1]) for part in one.parts if part in ("B1", "B2", "B3")), 0)
    return [one.operands[0].name], [kept & ~(mask << at) & MASK | sum(v << n for n, v in enumerate(values)) << at]


def _unpack_predicates(m: Emulator, one: Instruction) -> Computed:
    """R2P: bits of a byte as predicates."""
    source, mask = one.operands[1], one.operands[2].value
    at = next((8 * int(part[1]) for part in one.parts if part in ("B1", "B2", "B3")), 0)
    value = m.value(source)
    chosen = [n for n in range(7) if mask >> n & 1]
    return [f"P{n}" for n in chosen], [None if value is None else value >> at + n & 1 for n in chosen]


def _vote(m: Emulator, one: Instruction) -> Computed:
    """A vote of a warp whose threads agree; a first thread that is elected."""
    last = m.predicate(one.operands[-1]) if one.operands[-1].kind == "predicate" else None
    names = [op.name for op in one.operands[:2] if op.kind in ("predicate", "register")]
    return names, [last if op.kind == "predicate" else None for op in one.operands[: len(names)]]


def _half_constant(m: Emulator, one: Instruction) -> Computed:
    """HFMA2 of zeros: how the compiler makes a constant, in two halves."""
    result, *factors, high, low = one.operands
    zero = len(factors) == 2 and all(op.name == "RZ" for op in factors)
    if not zero or high.kind != "number" or low.kind != "number" or one.parts[1:] not in ((), ("MMA",)):
        return [result.name], [None]
    upper, lower = (arithmetic.half_bits(op.value) for op in (high, low))
    return [result.name], [upper << 16 | lower]


def _elect(m: Emulator, one: Instruction) -> Computed:
    return [one.operands[0].name], [1]


COMPUTE: dict[str, Callable[[Emulator, Instruction], Computed]] = {
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
