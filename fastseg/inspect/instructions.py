"""Instructions that a launch issues, counted from its machine code and weighed by how often each of them runs.

The code is executed for the first thread of the warps of one program in the middle of the grid (emulator.py). Other
programs are taken to run the same instructions, which is so for all but those at the edges of a tensor.
"""

from __future__ import annotations

import collections
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .arithmetic import MASK, Value, bits_of
from .codegen import Compiled, sections
from .emulator import Emulator, Thread, Trace
from .gpus import LATENCY, SHARED, Gpu, pipe
from .sass import Code, Instruction, access_bytes

PARAMETERS = {80: 0x160, 86: 0x160, 89: 0x160, 90: 0x210, 100: 0x380, 120: 0x380}  # where they begin in bank 0
SIZES = {80: (0x0, 0xC), 90: (0x0, 0xC), 100: (0x360, 0x370)}  # where threads of a block and blocks are
WARP = 32
SECTOR = 32
PARAMETER = 0x17  # the kind of an entry of .nv.info that describes a parameter


@dataclass(frozen=True)
class Count:
    """What one launch does. Numbers are of one program, and of warps: a warp's instruction is 32 threads'.

    issued: instructions by opcode. in_flight: bytes that a warp's loads ask for before it waits, the mean over these
    bytes. waits: how often a warp waits for memory. asked: bytes that loads (each address once) and stores ask for.
    both_ways: branches on data, of which both ways are counted.
    """

    kernel: str
    programs: int
    warps: int
    registers: int
    occupancy: float
    resident: float
    issued: dict[str, int]
    in_flight: float
    waits: int
    asked: float
    loads: dict[int, int]
    stores: dict[int, int]
    both_ways: int

    @property
    def asked_in_all(self) -> float:
        """`asked` of all programs."""
        return self.programs * self.asked

    @cached_property
    def instructions(self) -> int:
        """Thread instructions of the launch."""
        return WARP * self.programs * sum(self.issued.values())

    def of(self, opcodes: frozenset[str] | set[str]) -> int:
        """Thread instructions of these opcodes in the launch."""
        return WARP * self.programs * sum(n for opcode, n in self.issued.items() if opcode in opcodes)

    @cached_property
    def pipes(self) -> dict[str, int]:
        """Thread instructions of each pipe. Multiplications of integers use half of the pipe of fp32 too."""
        found: collections.Counter[str] = collections.Counter()
        for opcode, n in self.issued.items():
            if name := pipe(opcode):
                found[name] += WARP * self.programs * n
        return dict(found)

    @property
    def shared(self) -> int:
        """Accesses of threads to shared memory."""
        return self.of(SHARED)

    @property
    def barriers(self) -> int:
        """Barriers that a program waits at."""
        return self.issued.get("BAR", 0) // self.warps

    def kept_in_flight(self, gpu: Gpu) -> float:
        """Bytes in flight on a multiprocessor, over what the bandwidth needs."""
        return self.resident * self.in_flight / gpu.needed_in_flight

    def seconds(self, gpu: Gpu) -> float:
        """The least time of the instructions: of all, of each pipe, and of the waits of one program after the other."""
        waves = max(1.0, self.programs * self.warps / (gpu.multiprocessors * self.resident))
        busy = [gpu.seconds(n, gpu.rates[name]) for name, n in self.pipes.items()]
        return max(gpu.seconds(self.instructions), waves * self.waits * LATENCY, *busy, 0.0)


def parameters(cubin: bytes) -> list[tuple[int, int]]:
    """(offset, bytes) of each parameter of a kernel, in order."""
    (info,) = sections(cubin, b".nv.info.")
    found, at = {}, 0
    while at < len(info):
        form, kind, size = struct.unpack_from("<BBH", info, at)
        if form == 4:  # an entry with `size` bytes behind it
            if kind == PARAMETER:
                _, ordinal, offset, flags = struct.unpack_from("<IHHI", info, at + 4)
                found[ordinal] = offset, flags >> 18
            at += size
        at += 4
    return [found[ordinal] for ordinal in sorted(found)]


def _bytes_of(value: Any, size: int) -> bytes:
    """A scalar argument as the machine code reads it."""
    if isinstance(value, np.generic):
        return value.tobytes()
    if isinstance(value, float):
        return struct.pack("<I", bits_of(value))
    return (int(value) & (1 << 8 * size) - 1).to_bytes(size, "little")


def constants(compiled: Compiled, arguments: Sequence[Any], programs: int) -> tuple[dict[int, Value], dict[int, int]]:
    """(words of constant bank 0 by offset, values of the tensors of one element by address) of a launch.

    Tensors are given addresses of their own, 2^32 bytes apart. Descriptors are unknown.
    """
    slots, start = parameters(compiled.cubin), PARAMETERS[compiled.capability]
    words: dict[int, Value] = {}
    sole: dict[int, int] = {}
    at = 0
    threads_at, programs_at = SIZES[max(sm for sm in SIZES if sm <= compiled.capability)]
    for offset, value in ((threads_at, compiled.warps * WARP), (programs_at, programs)):
        words |= {offset: value, offset + 4: 1, offset + 8: 1}
    for number, argument in enumerate(arguments):
        if isinstance(argument, TensorDescriptor):
            at += 1 + 2 * len(argument.block_shape)
            continue
        offset, size = slots[at]
        at += 1
        if isinstance(argument, Tensor):
            address = number + 1 << 44
            if argument.numel() == 1:
                sole[address] = bits_of(1.0) if argument.dtype == torch.float32 else 0
            content = address.to_bytes(8, "little")
        else:
            content = _bytes_of(0 if argument is None else argument, size)
        content = content.ljust(max(size, 4), b"\0")
        for k in range(0, len(content), 4):
            words[start + offset + k] = int.from_bytes(content[k : k + 4], "little") & MASK
    if at > len(slots):
        raise RuntimeError(f"{compiled.name} has {len(slots)} parameters, but the launch passes {at}")
    return words, sole


def count(compiled: Compiled, listing: list[Instruction], arguments: Sequence[Any], programs: int) -> Count:
    """Count what one launch issues.

    Args:
        compiled: the kernel.
        listing: its instructions (codegen.listings).
        arguments: those of its launch that are parameters of the machine code, in order.
        programs: the programs (blocks) of the launch.
    """
    code = Code(listing)
    words, sole = constants(compiled, arguments, programs)

    def run(thread: int) -> Trace:
        return Emulator(code, Thread(thread, programs // 2, words, sole)).run()

    first, last = run(0), run(WARP * (compiled.warps - 1))
    if compiled.warps == 1 or first.times == last.times == run(WARP).times:
        traces = [first] * compiled.warps
    else:
        traces = [run(WARP * warp) for warp in range(compiled.warps)]
    issued: collections.Counter[str] = collections.Counter()
    for trace in traces:
        for address, times in trace.times.items():
            issued[code.at[address].opcode] += times
    sizes = _load_sizes(code, first, run(1))
    batches = [total for batch in first.batches if (total := sum(sizes[number] for number in batch))]
    widths = {kind: _widths(code, first, kind) for kind in ("LDG", "STG")}
    stored = WARP * sum(size * times for size, times in widths["STG"].items())
    return Count(
        compiled.name, programs, compiled.warps, compiled.resources["REG"], compiled.occupancy,
        compiled.resident_warps, dict(issued), sum(b * b for b in batches) / sum(batches) if batches else 0.0,
        len(batches), (sum(batches) + stored) * compiled.warps, *widths.values(), len(first.both_ways),
    )  # fmt: skip


def _widths(code: Code, trace: Trace, kind: str) -> dict[int, int]:
    """{bytes per access of a thread: how many there are}."""
    found: collections.Counter[int] = collections.Counter()
    for address, times in trace.times.items():
        if code.at[address].opcode.startswith(kind):
            found[code.at[address].bytes] += times
    return dict(sorted(found.items()))


def _load_sizes(code: Code, first: Trace, second: Trace) -> list[int]:
    """Bytes that a warp asks for with each load: one sector if its first two threads load from the same address."""
    others = second.loads if len(second.loads) == len(first.loads) else first.loads
    sizes = []
    for (at, address), (_, other) in zip(first.loads, others, strict=True):
        same = address is not None and address == other and others is not first.loads
        sizes.append(SECTOR if same else WARP * access_bytes(code.at[at].name))
    return sizes
