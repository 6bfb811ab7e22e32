"""The machine code of kernels, compiled without a GPU: registers, spills, access widths, tensor-core use.

Launches are recorded on tensors without data, so that each kernel is compiled as it would be launched: with the same
argument types, divisibility by 16, compile-time constants, warps and stages.
"""

from __future__ import annotations

import bisect
import collections
import contextlib
import itertools
import re
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..kernels import launch, triton_internals
from .sass import Instruction, parse

POINTERS = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.float64: "*fp64",
    torch.uint8: "*u8", torch.int16: "*i16", torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip
OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg", "debug", "sanitize_overflow", "enable_fp_fusion")
REGISTERS_PER_SM = 65536
# KiB of shared memory and warps of a multiprocessor, by compute capability. Each program takes 1 KiB of shared memory
# more than it requests.
MULTIPROCESSORS = {80: (164, 64), 86: (100, 48), 89: (100, 48), 90: (228, 64), 100: (228, 64), 120: (100, 48)}


@dataclass(frozen=True)
class Launch:
    """One recorded launch: what is needed to compile its kernel."""

    kernel: Any
    programs: int
    signature: dict[str, str]
    constants: dict[str, Any]
    divisible: tuple[int, ...]
    options: dict[str, Any]
    arguments: tuple[Any, ...] = field(default=(), repr=False, compare=False)  # those of the machine code, in order

    @property
    def name(self) -> str:
        return self.kernel.__name__

    @property
    def key(self) -> str:
        """What the machine code depends on."""
        return repr((self.name, self.signature, self.constants, self.divisible, self.options))


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Yield a list that gets each launch inside the block. No kernel runs, so tensors may be on the meta device."""
    launches: list[Launch] = []

    def note(kernel: Any, programs: int, args: tuple[Any, ...], meta: dict[str, Any]) -> None:
        options = {name: meta[name] for name in OPTIONS if name in meta}
        constants = {name: value for name, value in meta.items() if name not in OPTIONS}
        signature, divisible, passed = {}, [], []
        for position, name in enumerate(kernel.arg_names):
            if name in constants:
                signature[name] = "constexpr"
                continue
            value = args[position]
            passed.append(value)
            if isinstance(value, TensorDescriptor):
                signature[name] = f"tensordesc<{POINTERS[value.base.dtype][1:]}{list(value.block_shape)}>"
            elif isinstance(value, Tensor):
                signature[name] = POINTERS[value.dtype]
                divisible.append(position)
            elif isinstance(value, float):
                signature[name] = "fp32"
            elif value is None or value == 1:  # Triton makes these values compile-time constants
                signature[name], constants[name] = "constexpr", value
                passed.pop()
            else:
                signature[name] = "i32" if value <= launch.INT32_MAX else "i64"
                if value % 16 == 0:
                    divisible.append(position)
        launches.append(Launch(kernel, programs, signature, constants, tuple(divisible), options, tuple(passed)))

    with launch.recording(note):
        yield launches


def record(function: Callable[[], Any]) -> list[Launch]:
    """The launches that `function` makes."""
    with recording() as launches:
        function()
    return launches


@dataclass(frozen=True)
class Compiled:
    """A kernel compiled for one NVIDIA architecture, and facts of its machine code."""

    name: str
    capability: int
    ptx: str
    cubin: bytes
    warps: int

    @cached_property
    def sass(self) -> str:
        """The disassembly."""
        return self._cuobjdump("--dump-sass")

    @cached_property
    def resources(self) -> dict[str, int]:
        """REG (registers per thread), STACK (spilled bytes per thread), SHARED (static bytes per block)."""
        last = self._cuobjdump("--dump-resource-usage").strip().splitlines()[-1]
        return {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", last)}

    @cached_property
    def instructions(self) -> collections.Counter[str]:
        """The number of instructions by name. `disassemble` counts them for many kernels at once."""
        return _instructions(self.capability, [self.cubin])[0]

    @property
    def spills(self) -> int:
        """Bytes of stack per thread plus the number of loads and stores that access it."""
        return self.resources["STACK"] + sum(n for op, n in self.instructions.items() if op.startswith(("LDL", "STL")))

    def widths(self, kind: str) -> dict[int, int]:
        """{bytes per access: number of instructions} for "LDG" (loads and asynchronous copies) or "STG" (stores)."""
        found: collections.Counter[int] = collections.Counter()
        for op, count in self.instructions.items():
            if op.startswith(("LDG", "LDGSTS") if kind == "LDG" else "STG"):
                bits = re.search(r"\.(?:U|S)?(8|16|64|128|256)(?:\.|$)", op)
                found[int(bits[1]) // 8 if bits else 4] += count
        return dict(sorted(found.items()))

    def count(self, *prefixes: str) -> int:
        """The number of instructions whose names start with one of the prefixes."""
        return sum(n for op, n in self.instructions.items() if op.startswith(prefixes))

    @property
    def occupancy(self) -> float:
        """The share of a multiprocessor's warps that registers and shared memory allow to be resident."""
        return self.resident_warps / MULTIPROCESSORS[self.capability][1]

    @property
    def resident_warps(self) -> int:
        """The warps that registers and shared memory allow on a multiprocessor at a time."""
        shared, warps = MULTIPROCESSORS[self.capability]
        registers = -(-self.resources["REG"] // 8) * 8 * 32 * self.warps
        blocks = min(REGISTERS_PER_SM // registers, warps // self.warps)
        if self.shared:
            blocks = min(blocks, shared * 1024 // (self.shared + 1024))
        return blocks * self.warps

    shared: int = 0

    def _cuobjdump(self, flag: str) -> str:
        return _nvidia("cuobjdump", self.cubin, flag)


def disassemble(kernels: Sequence[Compiled]) -> None:
    """Count the instructions of kernels for one architecture in one call, since the disassembler is slow to start."""
    found = _instructions(kernels[0].capability, [kernel.cubin for kernel in kernels]) if kernels else []
    for kernel, instructions in zip(kernels, found, strict=True):
        kernel.__dict__["instructions"] = instructions  # where cached_property stores its value


def listings(kernels: Sequence[Compiled]) -> list[list[Instruction]]:
    """The instructions of kernels for one architecture, in order of their addresses."""
    codes = [_code(kernel.cubin) for kernel in kernels]
    lines = parse(_disassembled(kernels[0].capability, codes))
    ends = list(itertools.accumulate(map(len, codes)))
    found: list[list[Instruction]] = [[] for _ in codes]
    for one in lines:
        found[bisect.bisect_right(ends, one.address)].append(one)
    return found


INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\d+\s+)?([A-Z][\w.]*)", re.M)


def _instructions(capability: int, cubins: Sequence[bytes]) -> list[collections.Counter[str]]:
    """The number of instructions by name for each cubin. Their concatenated code is disassembled in one call."""
    codes = [_code(cubin) for cubin in cubins]
    lines = INSTRUCTION.findall(_disassembled(capability, codes))
    found: list[collections.Counter[str]] = [collections.Counter() for _ in codes]
    ends = list(itertools.accumulate(map(len, codes)))
    for address, name in lines:
        found[bisect.bisect_right(ends, int(address, 16))][name] += 1
    return found


def _disassembled(capability: int, codes: Sequence[bytes]) -> str:
    """The disassembly of the codes, one after the other."""
    # Triton compiles for sm_90a: instructions of one generation alone, such as wgmma, need the letter.
    architecture = f"SM{capability}{'a' if capability >= 90 else ''}"
    return _nvidia("nvdisasm", b"".join(codes), "--binary", architecture)


def _code(cubin: bytes) -> bytes:
    """The contents of the .text.* sections of a 64-bit ELF file."""
    return b"".join(sections(cubin, b".text."))


def sections(cubin: bytes, prefix: bytes) -> list[bytes]:
    """The contents of the sections of a 64-bit ELF file whose names start with `prefix`."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<HHH", cubin, 58)
    headers = [struct.unpack_from("<IIQQQQ", cubin, table + n * size) for n in range(count)]
    name_at = headers[names][4]
    return [
        cubin[offset : offset + length]
        for name, *_, offset, length in headers
        if cubin.startswith(prefix, name_at + name)
    ]


def _nvidia(tool: str, content: bytes, *options: str) -> str:
    """The output of one of NVIDIA's tools for a file with this content."""
    path = triton_internals.nvidia_tool(tool)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(content)
        file.flush()
        return subprocess.run([path, *options, file.name], capture_output=True, text=True, check=True).stdout


def _source(recorded: Launch) -> Any:
    attributes = {(position,): [["tt.divisibility", 16]] for position in recorded.divisible}
    return triton_internals.source(recorded.kernel, recorded.signature, recorded.constants, attributes)


def compile_for(recorded: Launch, capability: int) -> Compiled:
    """Compile for sm_<capability>. Raises RuntimeError in a process where kernels are interpreted."""
    if triton_internals.INTERPRETED:
        raise RuntimeError("kernels cannot be compiled in a process where TRITON_INTERPRET=1")
    target = triton_internals.gpu_target("cuda", capability, 32)
    built = triton.compile(_source(recorded), target=target, options=recorded.options)
    return Compiled(
        recorded.name, capability, built.asm["ptx"], built.asm["cubin"], built.metadata.num_warps, built.metadata.shared
    )


def compile_for_amd(recorded: Launch, architecture: str = "gfx942") -> str | None:
    """Compile for an AMD GPU. Returns None, or the first line of the error.

    Products in three parts of TF32 exist on NVIDIA's GPUs alone; launchers ask AMD's for exact ones.
    """
    if recorded.constants.get("PRECISION") == "tf32x3":
        recorded = replace(recorded, constants=recorded.constants | {"PRECISION": "ieee"})
    warp = 64 if architecture.startswith("gfx9") else 32  # lanes: 64 in data centers (CDNA), 32 elsewhere (RDNA)
    try:
        triton.compile(
            _source(recorded), target=triton_internals.gpu_target("hip", architecture, warp), options=recorded.options
        )
    except Exception as error:  # any error of the compiler is reported
        return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return None
