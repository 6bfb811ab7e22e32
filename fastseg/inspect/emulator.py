"""How often each instruction of a kernel runs: its machine code, executed for one thread of a warp.

The emulator knows what a launch knows: the arguments, the number of the program and of the thread. From these it
computes loop counters, branch conditions and addresses exactly (effects.py). What a kernel loads from memory is
unknown, and so is all that is computed from it, with one exception: a tensor of one element holds 1, as the gradient of
a loss does, or 0 if it is an integer, as the flag of a failed check does.

A warp runs the way of its first thread. A branch whose condition is unknown is run both ways until they join again, as
a warp runs it whose threads disagree; a way that ends in a failed assertion is left out, and an unknown condition does
not repeat a loop. A wait for a barrier in memory succeeds at once. All instructions that are reached take an issue
slot, also those whose predicate is false.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
from dataclasses import dataclass, field

from . import arithmetic
from .arithmetic import MASK, Value
from .effects import EFFECTS
from .sass import RETURN, STEP, Code, Instruction, Operand, following

LIMIT = 3_000_000  # instructions of one thread; more is taken for an endless loop
ZERO = {"RZ": 0, "URZ": 0, "PT": 1, "UPT": 1}


@dataclass
class Thread:
    """Where a thread runs.

    constants: the words of constant bank 0 by offset. sole: the value of each tensor of one element, by its address.
    """

    number: int
    program: int
    constants: dict[int, Value]
    sole: dict[int, int] = field(default_factory=dict)

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
            found = None if base is None else self.constant(base + op.value)
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
            low, high = (self.constant(op.value + at) for at in (0, 4))
        else:
            return self.value(op)
        if low is None or high is None:
            return None
        number = high << 32 | low
        return -number & (1 << 64) - 1 if op.negative else number

    def constant(self, offset: int) -> Value:
        """A word of constant bank 0, which holds the arguments."""
        return self.thread.constants.get(offset & MASK)

    def special(self, name: str) -> Value:
        """A special register."""
        return self.thread.special(name)

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

    def _results(self, one: Instruction) -> tuple[Sequence[str], list[Value]]:
        """The registers and predicates that an instruction writes, and their values."""
        compute = EFFECTS.get(one.opcode)
        if compute is not None:
            return compute(self, one)
        return one.written, [None] * len(one.written)

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
            known = one.guard is None and one.registers == 1
            self._write(name, self.thread.sole.get(address) if known else None)
            if fresh and name not in ZERO:
                self.waiting[name] = number

    def _wait(self, one: Instruction) -> None:
        """Note that an instruction needs a load's result: a new batch of loads begins."""
        if not self.waiting:
            return
        if one.name.startswith(("DEPBAR", "LDGDEPBAR")):
            needed = [self.waiting["asynchronous"]] if "asynchronous" in self.waiting and one.opcode == "DEPBAR" else []
        else:
            names = one.reads
            needed = [self.waiting[name] for name in names & self.waiting.keys()]
        if needed:
            last = max(needed)
            self.waiting = {name: number for name, number in self.waiting.items() if number > last}
            if self.trace.batches[-1]:
                self.trace.batches.append([])
