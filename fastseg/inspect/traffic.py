"""Bytes that kernels move, counted exactly in Triton's interpreter on any machine.

The interpreter reports the addresses and the mask of each load, store and atomic of each program, including scalar
loads and loads through tensor descriptors. *Requested* bytes are what the programs request from the caches. *Sectors*
are the distinct 32-byte sectors that a kernel accesses in one launch: the traffic of device memory if the cache is
perfect. A sector that is both read and written counts twice. *FLOPs* are those of tl.dot, including masked lanes, as
the tensor cores execute them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..kernels import launch, triton_internals

SECTOR = 32
ACCESSES = ("load", "store", "atomic")


@dataclass
class KernelTraffic:
    """Bytes that one launch of a kernel moved."""

    kernel: str
    programs: int | None  # None if unknown
    requested: dict[str, int] = field(default_factory=lambda: dict.fromkeys(ACCESSES, 0))
    touched: dict[str, list[np.ndarray]] = field(default_factory=lambda: {access: [] for access in ACCESSES})
    ranges: list[tuple[int, int]] = field(default_factory=list)
    outside: int = 0  # accesses to memory outside the tensors of the launch
    flops: int = 0  # multiplications and additions of tl.dot

    def sectors(self, access: str | None = None) -> int:
        """Bytes of the distinct sectors that one kind of access, or all kinds, reach."""
        if access is None:
            return sum(map(self.sectors, ACCESSES)) + self.sectors("atomic")  # atomics read and write
        found = self.touched[access]
        return SECTOR * len(np.unique(np.concatenate(found))) if found else 0

    def access(self, access: str, pointers: Any, mask: np.ndarray, value: Any) -> None:
        """Count one access of one program."""
        live = pointers.data[mask].ravel()
        size = max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
        inside = np.zeros(live.shape, dtype=bool)
        for start, end in self.ranges:
            inside |= (live >= start) & (live + np.uint64(size) <= end)
        self.outside += int(live.size - inside.sum())
        self.requested[access] += live.size * size
        self.touched[access].append(np.unique(live.astype(np.int64) // SECTOR))

    def dot(self, a: Any, b: Any) -> None:
        """Count the FLOPs of one tl.dot."""
        self.flops += 2 * a.data.size * b.data.shape[-1]

    def barrier(self) -> None:
        """A barrier moves nothing."""


@contextlib.contextmanager
def metering() -> Iterator[list[KernelTraffic]]:
    """Yield a list that gets the traffic of each launch inside the block, in order.

    Raises RuntimeError if kernels are not interpreted.
    """
    if not triton_internals.INTERPRETED:
        raise RuntimeError(
            "traffic is counted in Triton's interpreter: set TRITON_INTERPRET=1 before triton is imported"
        )
    launches: list[KernelTraffic] = []

    def run(kernel: Any, programs: int, args: tuple[Any, ...], meta: dict[str, Any]) -> None:
        with counting(kernel.__name__, args, programs) as traffic:
            launches.append(traffic)
            kernel[(programs,)](*args, **meta)

    with launch.recording(run):
        yield launches


@contextlib.contextmanager
def counting(kernel: str, args: Sequence[Any], programs: int | None = None) -> Iterator[KernelTraffic]:
    """Yield the traffic of the one launch, with these arguments, that is interpreted inside the block."""
    tensors = [a.base if isinstance(a, TensorDescriptor) else a for a in args]
    tensors = [a for a in tensors if isinstance(a, Tensor)]
    ranges = [(t.data_ptr(), t.data_ptr() + _extent(t) * t.element_size()) for t in tensors]
    traffic = KernelTraffic(kernel, programs, ranges=ranges)
    with watching(traffic):
        yield traffic


class Watcher(Protocol):
    """Gets every access, tl.dot and barrier of the interpreted programs, in order."""

    def access(self, access: str, pointers: Any, mask: np.ndarray, value: Any) -> None:
        """A load, store or atomic will access `pointers` where `mask` is set. value: what a store writes."""

    def dot(self, a: Any, b: Any) -> None: ...

    def barrier(self) -> None: ...


@contextlib.contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    """Pass every access, tl.dot and barrier inside the block to the watcher."""
    builder = triton_internals.interpreter().InterpreterBuilder
    names = ("masked_load", "masked_store", "atomic_rmw", "atomic_cas", "dot", "barrier")
    load, store, rmw, cas, dot, barrier = originals = [getattr(builder, f"create_{name}") for name in names]

    def tell(access: str, pointers: Any, mask: Any, value: Any = None) -> None:
        live = mask if isinstance(mask, np.ndarray) else mask.data  # for tensor descriptors it is a plain array
        watcher.access(access, pointers, np.broadcast_to(live.astype(bool), pointers.data.shape), value)

    def masked_load(self: Any, pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        tell("load", pointers, mask)
        return load(self, pointers, mask, *rest, **named)

    def masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        tell("store", pointers, mask, value)
        return store(self, pointers, value, mask, *rest, **named)

    def atomic_rmw(self: Any, op: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        tell("atomic", pointers, mask)
        return rmw(self, op, pointers, value, mask, *rest)

    def atomic_cas(self: Any, pointers: Any, *rest: Any) -> Any:
        tell("atomic", pointers, np.ones(1, dtype=bool))
        return cas(self, pointers, *rest)

    def watched_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        watcher.dot(a, b)
        return dot(self, a, b, *rest)

    def watched_barrier(self: Any) -> Any:
        watcher.barrier()
        return barrier(self)

    replacements = (masked_load, masked_store, atomic_rmw, atomic_cas, watched_dot, watched_barrier)
    for name, replacement in zip(names, replacements, strict=True):
        setattr(builder, f"create_{name}", replacement)
    try:
        yield
    finally:
        for name, original in zip(names, originals, strict=True):
            setattr(builder, f"create_{name}", original)


def _extent(t: Tensor) -> int:
    """The number of elements from a tensor's first to its last, gaps between rows included."""
    return 1 + sum((size - 1) * step for size, step in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
