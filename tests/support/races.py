"""A race detector for global memory, in Triton's interpreter.

On a GPU the programs of a launch run in any order and concurrently, and so do the threads of a program. Triton
synchronizes threads for shared memory but not for global memory; only tl.debug_barrier does that. The interpreter runs
everything in order, so the detector records the addresses of each access of each program, and looks for four faults at
the end of a launch:

    "two programs write"   two programs write the same address.
    "another's value"      one program reads an address that another program writes.
    "not in order"         one program reads and writes an address, or writes it twice, by two statements without a
                           barrier between them. It is "in place" if both are in the same lane of the same block.
    "lanes collide"        one store has the same address in two lanes.

Two atomics never race; an atomic and another access may.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastseg.inspect import traffic
from fastseg.kernels import launch
from fastseg.kernels.triton_internals import current_program

LOAD, STORE, ATOMIC = range(3)
KINDS = {"load": LOAD, "store": STORE, "atomic": ATOMIC}
INSTRUMENTS = (str(Path(triton.__file__).parent), traffic.__file__, __file__)

Place = tuple[str, int]  # file and line of a statement


@dataclass(frozen=True)
class Fault:
    """One kind of fault of one kernel in one tensor, with its first address."""

    kind: str
    kernel: str
    tensor: str
    element: int
    programs: tuple[int, int]
    statements: tuple[Place, Place]
    equal: bool  # whether all written values are equal
    addresses: int

    def __str__(self) -> str:
        first, second = self.programs
        who = f"programs {first} and {second}" if first != second else f"program {first}"
        where = " and ".join(f"{file}:{line}" for file, line in dict.fromkeys(self.statements))
        values = ", equal values" if self.equal else ""
        more = f", and {self.addresses - 1} more" if self.addresses > 1 else ""
        return f"{self.kind}: {self.kernel}, {self.tensor}[{self.element}]{more}, {who}, {where}{values}"


@dataclass
class Record:
    """What the detector has recorded."""

    faults: list[Fault] = field(default_factory=list)
    statements: set[Place] = field(default_factory=set)  # statements that accessed anything
    programs: dict[str, int] = field(
        default_factory=dict
    )  # by kernel: the most programs of one launch that stored anything
    branches: dict[tuple[str, str], set[bool]] = field(
        default_factory=dict
    )  # by kernel and flag: the values of compile-time flags

    def undeclared(self, declared: dict[tuple[str, str, str], str]) -> list[str]:
        """The faults without a declaration {(kind, kernel, tensor): reason}. Different values cannot be declared."""
        return [
            str(fault)
            for fault in self.faults
            if (fault.kind, fault.kernel, fault.tensor) not in declared or not (fault.equal or fault.kind == "in place")
        ]


@contextlib.contextmanager
def recording() -> Iterator[Record]:
    """Check all launches inside the block; they are interpreted as usual."""
    record = Record()

    def run(kernel: Any, programs: int, args: tuple[Any, ...], meta: dict[str, Any]) -> None:
        seen = Launch(kernel, args)
        with traffic.watching(seen):
            kernel[(programs,)](*args, **meta)
        record.faults += seen.faults()
        record.statements |= set(seen.places)
        storing = {program for program, kind in zip(seen.program, seen.kind, strict=True) if kind != LOAD}
        for name in set(meta) & set(kernel.arg_names):
            if isinstance(meta[name], bool):
                record.branches.setdefault((kernel.__name__, name), set()).add(meta[name])
        record.programs[kernel.__name__] = max(len(storing), record.programs.get(kernel.__name__, 0))

    with launch.recording(run):
        yield record


class Launch:
    """The accesses of one launch: one entry per access in each list, for the lanes that are not masked."""

    def __init__(self, kernel: Any, args: tuple[Any, ...]) -> None:
        self.kernel = kernel.__name__
        tensors = [
            (name, getattr(a, "base", a) if isinstance(a, TensorDescriptor) else a)
            for name, a in zip(kernel.arg_names, args, strict=False)
        ]
        self.tensors = [(name, a) for name, a in tensors if isinstance(a, Tensor)]
        self.places: dict[Place, int] = {}
        self.shapes: dict[tuple[int, ...], int] = {}
        self.barriers: dict[int, int] = {}
        self.program: list[int] = []
        self.kind: list[int] = []
        self.place: list[int] = []
        self.epoch: list[int] = []  # number of barriers that the program has passed
        self.shape: list[int] = []
        self.size: list[int] = []
        self.addresses: list[np.ndarray] = []
        self.lanes: list[np.ndarray] = []
        self.values: list[np.ndarray] = []

    def access(self, access: str, pointers: Any, mask: np.ndarray, value: Any) -> None:
        """Record one access of one program."""
        addresses = pointers.data[mask].ravel()
        if not addresses.size:
            return
        program = current_program()
        self.program.append(program)
        self.kind.append(KINDS[access])
        self.place.append(self.places.setdefault(_statement(), len(self.places)))
        self.epoch.append(self.barriers.get(program, 0))
        self.shape.append(self.shapes.setdefault(mask.shape, len(self.shapes)))
        self.size.append(max(pointers.get_element_ty().primitive_bitwidth // 8, 1))
        self.addresses.append(addresses.astype(np.int64))
        self.lanes.append(np.flatnonzero(mask))
        self.values.append(_bits(value.data, mask) if value is not None else np.zeros(addresses.shape, np.uint64))

    def dot(self, a: Any, b: Any) -> None:
        """Accesses no global memory."""

    def barrier(self) -> None:
        """Start a new epoch of the running program."""
        program = current_program()
        self.barriers[program] = self.barriers.get(program, 0) + 1

    def faults(self) -> list[Fault]:
        """The faults of the launch."""
        kind = np.array(self.kind)
        if not (kind != LOAD).any():
            return []
        unit = min(self.size)  # bytes; all addresses are multiples of it, since tensors are aligned
        units = [self._units(number, unit) for number in range(len(kind))]
        stored = np.unique(np.concatenate([u[0] for u, k in zip(units, kind, strict=True) if k != LOAD]))
        rows = []
        for number, (address, lane, value) in enumerate(units):
            if kind[number] == LOAD:  # keep only addresses that something is stored to
                there = stored[np.minimum(np.searchsorted(stored, address), len(stored) - 1)] == address
                address, lane, value = address[there], lane[there], value[there]
            rows.append((address, np.full(len(address), number), lane, value))
        address, number, lane, value = map(np.concatenate, zip(*rows, strict=True))
        seen = Accesses(
            address, number, np.array(self.program)[number], np.array(self.epoch)[number], kind[number], lane, value
        )
        return [self._fault(unit, *found) for found in seen.faults()]

    def _units(self, number: int, unit: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(addresses, lanes, values) of an access, with each element divided into units of `unit` bytes."""
        parts = self.size[number] // unit
        address, lane, value = self.addresses[number], 8 * self.lanes[number], self.values[number]
        lane += self.shape[number] << 40  # lanes of blocks of different shapes are different lanes
        if parts == 1:
            return address, lane, value
        part = np.arange(parts)
        split = value[:, None] >> (8 * unit * part).astype(np.uint64) & np.uint64(2 ** (8 * unit) - 1)
        return (address[:, None] + unit * part).ravel(), (lane[:, None] + part).ravel(), split.ravel()

    def _fault(self, unit: int, kind: str, address: int, pair: tuple[int, int], equal: bool, addresses: int) -> Fault:
        names = list(self.places)
        programs, statements = ([rows[i] for i in pair] for rows in (self.program, self.place))
        holding = [(name, t) for name, t in self.tensors if address in _storage(t)]
        name, element = "memory of no tensor", address
        if holding:  # overlapping tensors are named together
            t = holding[-1][1]
            name, element = "/".join(argument for argument, _ in holding), (address - t.data_ptr()) // t.element_size()
        return Fault(
            kind, self.kernel, name, element, tuple(programs), tuple(names[i] for i in statements), equal, addresses
        )


@dataclass
class Accesses:
    """Accesses to units of memory that are stored to: one entry per access in each array."""

    address: np.ndarray
    number: np.ndarray  # index of the access in its launch
    program: np.ndarray
    epoch: np.ndarray
    kind: np.ndarray
    lane: np.ndarray
    value: np.ndarray

    def faults(self) -> Iterator[tuple[str, int, tuple[int, int], bool, int]]:
        """(kind, first address, two accesses to it, whether all written values are equal, number of addresses)."""
        writes, reads, plain = self.kind != LOAD, self.kind == LOAD, self.kind == STORE
        at = Groups(self.address)
        apart = at.differ(self.program, writes) & at.any(plain)
        yield from self._found("two programs write", at, apart, writes, self.program)
        others = at.differ(self.program, writes | reads) & at.any(reads) & ~apart
        yield from self._found("another's value", at, others, None, self.program)
        at = Groups(self.address, self.program, self.epoch)
        unordered = at.differ(self.number, writes | reads) & (at.any(plain) | (at.any(writes) & at.any(reads)))
        moved = at.differ(self.lane, writes | reads)
        yield from self._found("not in order", at, unordered & moved, None, self.number)
        yield from self._found("in place", at, unordered & ~moved, None, self.number)
        at = Groups(self.address, self.number)
        yield from self._found("lanes collide", at, at.differ(self.lane, plain), plain, self.lane)

    def _found(self, kind: str, at: Groups, wrong: np.ndarray, among: np.ndarray | None, apart: np.ndarray):
        if not wrong.any():
            return
        among = np.ones(len(self.address), dtype=bool) if among is None else among
        written = among & (self.kind != LOAD)
        equal = not at.differ(self.value, written)[wrong].any() and kind in ("two programs write", "lanes collide")
        rows = at.members(np.flatnonzero(wrong)[0])
        rows = rows[among[rows]]
        store = rows[np.argmax(self.kind[rows] != LOAD)]
        other = rows[np.argmax(apart[rows] != apart[store])]
        pair = sorted((int(self.number[store]), int(self.number[other])))
        yield kind, int(self.address[store]), tuple(pair), equal, int(wrong.sum())


class Groups:
    """Groups of rows that agree in all keys."""

    def __init__(self, *keys: np.ndarray) -> None:
        self.order = np.lexsort(keys[::-1])
        keys = [key[self.order] for key in keys]
        new = np.ones(len(self.order), dtype=bool)
        new[1:] = np.any([key[1:] != key[:-1] for key in keys], axis=0)
        self.starts = np.flatnonzero(new)

    def any(self, flags: np.ndarray) -> np.ndarray:
        return np.logical_or.reduceat(flags[self.order], self.starts)

    def differ(self, column: np.ndarray, among: np.ndarray) -> np.ndarray:
        """For each group, whether a column has two different values in the rows where `among` is set."""
        column, among = column[self.order], among[self.order]
        info = np.iinfo(column.dtype)
        low = np.minimum.reduceat(np.where(among, column, info.max), self.starts)
        high = np.maximum.reduceat(np.where(among, column, info.min), self.starts)
        return low < high

    def members(self, group: int) -> np.ndarray:
        ends = np.append(self.starts, len(self.order))
        return np.sort(self.order[ends[group] : ends[group + 1]])


def _storage(t: Tensor) -> range:
    begin = t.untyped_storage().data_ptr()
    return range(begin, begin + t.untyped_storage().nbytes())


def _statement() -> Place:
    """The statement of the kernel, or of the function that it calls, which is running."""
    frame = sys._getframe(2)
    while frame.f_code.co_filename.startswith(INSTRUMENTS):
        frame = frame.f_back
    return Path(frame.f_code.co_filename).name, frame.f_lineno


def _bits(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The values that are not masked, as unsigned integers of the same bytes."""
    live = np.ascontiguousarray(np.broadcast_to(values, mask.shape)[mask])
    return live.view(f"u{live.itemsize}").astype(np.uint64)
