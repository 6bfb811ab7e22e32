"""What GPUs can do in the time in which they move one byte, and a time model from it.

Copy bandwidths of H100 and H200 were measured on such machines; A100 and B200 are close to their data sheets. The
rates are those of CUDA's programming guide for compute capability 8.0 to 9.0; 10.0 is taken for 9.0.
"""

from __future__ import annotations

from dataclasses import dataclass

ISSUE = 128  # thread instructions that a multiprocessor issues a clock: one of each of its four schedulers' warps
LATENCY = 700e-9  # seconds from a load to its data, under load
LAUNCH = 3e-6  # seconds from one kernel to the next


def _names(words: str) -> frozenset[str]:
    return frozenset(words.split())


FMA = _names("FADD FMUL FFMA FADD2 FMUL2 FFMA2 FHADD HADD2 HMUL2 HFMA2 FADD32I FMUL32I FFMA32I")
SPECIAL = _names("MUFU I2F F2I F2F FRND POPC FLO BREV")
SHARED = _names("LDS STS LDSM STSM ATOMS")
MEMORY = SHARED | _names("LDG STG LD ST LDL STL LDGSTS ATOM ATOMG RED REDG SHFL")
NO_PIPE = _names(
    "BRA EXIT BSSY BSYNC BREAK CALL RET BAR NOP WARPSYNC DEPBAR LDGDEPBAR MEMBAR ERRBAR CCTL SYNCS BPT NANOSLEEP FENCE "
    "HMMA IMMA HGMMA WARPGROUP S2R CS2R LDC R2UR VOTE ELECT LEPC YIELD"
)  # nor those of the uniform datapath and the tensor memory, whose names begin with U, LDT and STT


def pipe(opcode: str) -> str | None:
    """The pipe of a multiprocessor that limits instructions of this opcode, or None."""
    if opcode in FMA:
        return "fp32"
    if opcode in SPECIAL:
        return "special"
    if opcode in MEMORY:
        return "load/store"
    if opcode in NO_PIPE or opcode.startswith(("U", "LDT", "STT")) or opcode in ("S2UR", "LDCU", "VOTEU"):
        return None
    return "multiply" if opcode == "IMAD" else "integer"


@dataclass(frozen=True)
class Gpu:
    """clock in GHz, bandwidth of a copy in TB/s, fp32: lanes of that pipe."""

    name: str
    sm: int
    multiprocessors: int
    clock: float
    bandwidth: float
    fp32: int = 128

    @property
    def rates(self) -> dict[str, int]:
        """Thread instructions a clock of each pipe."""
        return {"fp32": self.fp32, "multiply": 64, "integer": 64, "load/store": 32, "special": 16}

    def slots(self, rate: int = ISSUE) -> float:
        """Thread instructions that fit into the time of one byte, at `rate` a clock and multiprocessor."""
        return self.multiprocessors * rate * self.clock * 1e9 / (self.bandwidth * 1e12)

    def seconds(self, instructions: float, rate: int = ISSUE) -> float:
        """The least time of these thread instructions."""
        return instructions / (self.multiprocessors * rate * self.clock * 1e9)

    @property
    def needed_in_flight(self) -> float:
        """Bytes that loads of a multiprocessor must have in flight for the full bandwidth (Little's law)."""
        return self.bandwidth * 1e12 * LATENCY / self.multiprocessors


GPUS = (
    Gpu("A100", 80, 108, 1.41, 1.7, fp32=64),
    Gpu("RTX 4090", 89, 128, 2.5, 0.95),
    Gpu("H100", 90, 132, 1.76, 3.0),
    Gpu("H200", 90, 132, 1.76, 4.3),
    Gpu("B200", 100, 148, 1.85, 7.0),
)


def gpus_of(sm: int) -> list[Gpu]:
    """The GPUs of a compute capability."""
    return [gpu for gpu in GPUS if gpu.sm == sm]
