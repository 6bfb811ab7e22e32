"""NVIDIA's machine code (SASS) as data: instructions, their operands, and the basic blocks that they form."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from functools import cached_property

from .arithmetic import bits_of

LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);", re.M)
STEP = 16  # bytes of an instruction
FAILURES = ("CALL.ABS", "BPT")  # an assertion that failed
DEFAULT_BYTES = 4  # of an access whose name has no width
END, RETURN = -1, -2  # where the kernel ends, and where a function of the kernel returns


@dataclass(frozen=True)
class Operand:
    """One operand. kind: "register", "predicate", "number", "constant" (bank 0), "memory" or "other".

    value: the number, or the offset in the constant bank or from the address register. name: the register.
    """

    kind: str
    name: str = ""
    value: int = 0
    negative: bool = False  # minus a register, or not a predicate
    inverted: bool = False  # ~, each bit

    @cached_property
    def following(self) -> str:
        """The next register, the upper half of a pair."""
        return following(self.name, 1)


@functools.cache
def following(name: str, by: int) -> str:
    """The register `by` numbers after this one."""
    prefix, number = re.fullmatch(r"(U?R)(\d+|Z)", name).groups()
    return name if number == "Z" else f"{prefix}{int(number) + by}"


def operand(text: str) -> Operand:
    """Parse one operand."""
    text = text.strip().replace(".reuse", "")
    sign, bare = (text[0], text[1:]) if text[:1] in "-~!" and text[1:2] not in "0123456789" else ("", text)
    flags = {"negative": sign in ("-", "!") and sign != "", "inverted": sign == "~"}
    if re.fullmatch(r"U?P(\d|T)", bare):
        return Operand("predicate", bare, **flags)
    if found := re.fullmatch(r"(U?R(?:\d+|Z))(?:\.64|\.U32|\.S32)?", bare):
        return Operand("register", found[1], **flags)
    if re.fullmatch(r"-?0x[0-9a-f]+", bare):
        return Operand("number", value=int(bare, 16), **flags)
    if re.fullmatch(r"-?\d+(\.\d+)?(e[+-]?\d+)?", bare):
        return Operand("number", value=bits_of(float(bare)), **flags)
    if found := re.fullmatch(r"c\[0x0\]\[(?:(U?R(?:\d+|Z))\+?)?(0x[0-9a-f]+)?\]", bare):
        return Operand("constant", found[1] or "", int(found[2] or "0", 16), **flags)
    if found := re.search(r"\[(U?R(?:\d+|Z))(?:\.64|\.U32|\.X\d+)*(?:\+?(-?0x[0-9a-f]+))?\]$", bare):
        return Operand("memory", found[1], int(found[2] or "0", 16), **flags)
    return Operand("other", bare)


@dataclass(frozen=True)
class Instruction:
    """One instruction. guard: the predicate under which it has an effect, or None."""

    address: int
    guard: Operand | None
    name: str
    operands: tuple[Operand, ...]

    @cached_property
    def parts(self) -> tuple[str, ...]:
        """The name's parts: IMAD, WIDE, U32."""
        return tuple(self.name.split("."))

    @cached_property
    def opcode(self) -> str:
        return self.parts[0]

    @cached_property
    def reads(self) -> frozenset[str]:
        """The registers that it reads, but for those of the uniform datapath."""
        stores = self.opcode.startswith(("ST", "RED", "ATOM"))
        read = [op for op in self.operands if op.kind in ("register", "memory")]
        if not stores and self.operands and self.operands[0].kind == "register":
            read = read[1:]
        names = set()
        for op in read:
            wide = 2 if op.kind == "memory" or self.opcode.startswith("D") else self.registers if stores else 1
            names.update(following(op.name, k) for k in range(wide))
        return frozenset(name for name in names if name != "RZ" and not name.startswith("U"))

    @cached_property
    def written(self) -> tuple[str, ...]:
        """The registers and predicates that it writes, if the emulator does not know better."""
        first = self.operands[0]
        predicates = [op.name for op in leading_predicates(self.operands[first.kind == "register" :])]
        if first.kind == "predicate":
            return tuple(predicates[:2])
        return (*(following(first.name, k) for k in range(self.registers)), *predicates)

    @cached_property
    def target(self) -> int | None:
        """Where a branch or call goes, if it is in the code; else None."""
        if self.opcode not in ("BRA", "CALL") or self.name.startswith("CALL.ABS"):
            return None
        numbers = [op.value for op in self.operands if op.kind == "number"]
        return numbers[-1] if numbers else None

    @cached_property
    def bytes(self) -> int:
        """Bytes of a memory access by one thread."""
        return access_bytes(self.name)

    @cached_property
    def registers(self) -> int:
        """The number of 32-bit registers that hold the result."""
        wide = {"64": 2, "128": 4, "256": 8}
        for part in self.parts[1:]:
            if part in wide and self.opcode not in ("SYNCS",):
                return wide[part]
        if "WIDE" in self.parts or (self.opcode in ("DADD", "DMUL", "DFMA", "CS2R") and "32" not in self.parts):
            return 2
        return 4 if self.opcode in ("LDSM", "HMMA", "LDTM", "HGMMA") else 2 if self.name.startswith("F2F.F64") else 1


def leading_predicates(operands: tuple[Operand, ...]) -> list[Operand]:
    """The predicates that begin a list of operands: results, unless one is negated."""
    found = []
    for op in operands:
        if op.kind != "predicate" or op.negative:
            break
        found.append(op)
    return found


def access_bytes(name: str) -> int:
    """Bytes of the access of a load or store of this name, by one thread."""
    bits = re.search(r"\.(?:U|S)?(8|16|64|128|256)(?:\.|$)", name)
    return int(bits[1]) // 8 if bits else DEFAULT_BYTES


def parse(text: str) -> list[Instruction]:
    """The instructions of a disassembly, in order."""
    return [
        Instruction(
            int(address, 16),
            operand(guard) if guard else None,
            name,
            tuple(operand(word) for word in operands.split(",")) if operands.strip() else (),
        )
        for address, guard, name, operands in LINE.findall(text)
    ]


class Code:
    """The instructions of one kernel by address, and where its branches join again."""

    def __init__(self, instructions: list[Instruction]) -> None:
        self.instructions = instructions
        self.start = instructions[0].address
        self.at = {one.address: one for one in instructions}

    def successors(self, one: Instruction) -> list[int]:
        """The addresses that may follow an instruction; a call returns, so the next one follows it."""
        after = one.address + STEP
        conditional = one.guard is not None
        if one.opcode == "BRA":
            both = conditional or len(one.operands) > 1  # "BRA UP0, target" has its condition as an operand
            return [after, one.target] if both else [one.target]
        if one.opcode in ("EXIT", "RET"):
            end = END if one.opcode == "EXIT" else RETURN
            return [after, end] if conditional else [end]
        return [after] if after in self.at else [END]

    @cached_property
    def fails(self) -> frozenset[int]:
        """Addresses from which only a failed assertion can follow, until the code joins the rest again."""
        found = set()
        run: list[int] = []
        targets = {one.target for one in self.instructions if one.target is not None}
        for one in self.instructions:
            if one.address in targets:
                run = []
            run.append(one.address)
            if one.name.startswith(FAILURES):
                found.update(run)
            if one.opcode in ("BRA", "EXIT", "RET"):
                run = []
        return frozenset(found)

    @cached_property
    def joins(self) -> dict[int, int | None]:
        """For each branch the first address that both of its ways reach (its immediate postdominator), or None."""
        end = END
        after = {one.address: self.successors(one) for one in self.instructions} | {RETURN: [END]}
        order: list[int] = []  # of the reversed graph, from the end
        before: dict[int, list[int]] = {}
        for address, nexts in after.items():
            for other in nexts:
                before.setdefault(other, []).append(address)
        seen, stack = {end}, [(end, iter(before.get(end, ())))]
        while stack:
            node, rest = stack[-1]
            for other in rest:
                if other not in seen:
                    seen.add(other)
                    stack.append((other, iter(before.get(other, ()))))
                    break
            else:
                order.append(node)
                stack.pop()
        rank = {node: n for n, node in enumerate(order)}  # postorder: the end has the highest rank
        dominator: dict[int, int] = {end: end}
        changed = True
        while changed:
            changed = False
            for node in reversed(order[:-1]):
                known = [other for other in after[node] if other in dominator]
                best = known[0]
                for other in known[1:]:
                    while best != other:
                        while rank[best] < rank[other]:
                            best = dominator[best]
                        while rank[other] < rank[best]:
                            other = dominator[other]
                if dominator.get(node) != best:
                    dominator[node], changed = best, True
        return {
            one.address: None if dominator.get(one.address, END) == END else dominator[one.address]
            for one in self.instructions
            if len(after[one.address]) > 1
        }
