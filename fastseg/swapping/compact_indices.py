"""swap(compact_indices=True): whether uint8 offsets can replace the int64 indices of a model's pools."""

from __future__ import annotations

from torch import nn

from .. import nn as fused
from ..ops.pooling.geometry import PoolGeometry, pool_geometry
from ..ops.pooling.positions import MAX_OFFSETS
from .class_exchange import fused_class
from .report import ALREADY_SWAPPED, Candidate


def geometry_of(module: nn.Module) -> PoolGeometry:
    """The geometry of a pool or unpool."""
    return pool_geometry("swap", module.kernel_size, module.stride, module.padding, getattr(module, "dilation", 1))


def returns_indices(candidate: Candidate) -> bool:
    """Whether a candidate is a pool that is swapped and returns indices."""
    return candidate.swapped and isinstance(candidate.module, nn.MaxPool2d) and candidate.module.return_indices


def with_offsets(candidate: Candidate) -> Candidate:
    """The candidate of a pool, with the class that returns offsets."""
    given = fused_class(candidate.found, nn.MaxPool2d, fused.MaxPool2dWithOffsets)
    return Candidate(candidate.module, candidate.names, candidate.op, candidate.found, given)


def obstacle_to_offsets(candidates: list[Candidate]) -> str | None:
    """Why the pools of a model cannot return offsets in place of indices, or None if they can."""
    pools = [candidate for candidate in candidates if returns_indices(candidate)]
    unpools = [candidate for candidate in candidates if candidate.op == "max_unpool2d"]
    if not pools:
        return _obstacle_without_pools(candidates)
    if not unpools:
        return "no MaxUnpool2d reads them"
    for unpool in unpools:
        if not unpool.swapped and unpool.reason != ALREADY_SWAPPED:
            return f"{unpool.name} is not swapped, and torch's MaxUnpool2d only takes int64 indices"
    geometry = geometry_of(pools[0].module)
    for pool in pools:
        if geometry_of(pool.module).dilation != [1, 1]:
            return f"{pool.name} is dilated"
    for candidate in (*pools, *unpools):
        if geometry_of(candidate.module) != geometry:
            return (
                f"{pools[0].name} and {candidate.name} differ in kernel_size, stride or padding, and an offset is a "
                "position in one kind of window"
            )
    if geometry.taps > MAX_OFFSETS:
        return f"windows of {'x'.join(map(str, geometry.kernel_size))} have more than {MAX_OFFSETS} elements"
    return None


def _obstacle_without_pools(candidates: list[Candidate]) -> str | None:
    """The obstacle where this swap changes no pool that returns indices; None if an earlier swap gave it offsets."""
    earlier = [
        candidate
        for candidate in candidates
        if candidate.reason == ALREADY_SWAPPED and isinstance(candidate.module, nn.MaxPool2d)
        if candidate.module.return_indices
    ]
    if any(isinstance(candidate.module, fused.MaxPool2dWithOffsets) for candidate in earlier):
        return None
    if earlier:
        return f"{earlier[0].name} {ALREADY_SWAPPED}; undo that swap first"
    return "no MaxPool2d that was swapped has return_indices"
