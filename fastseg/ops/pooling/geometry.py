"""What pooling and unpooling share: their geometry as an argument, sizes, and the mapping over a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...kernels.pooling.geometry import PoolGeometry
from ..arguments import FLOAT_AND_DOUBLE_DTYPES, IntOrPair, as_pair, is_unset
from ..operator import LIB, Operator, register_options

register_options(PoolGeometry, "int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation")


def pool_geometry(
    function: str,
    kernel_size: IntOrPair,
    stride: IntOrPair | None,
    padding: IntOrPair,
    dilation: IntOrPair = 1,
) -> PoolGeometry:
    """The geometry that a function's arguments describe. Raises TypeError or RuntimeError as torch does."""
    return PoolGeometry(
        as_pair(kernel_size, function, "kernel_size", 1),
        as_pair(kernel_size if is_unset(stride) else stride, function, "stride", 1),
        as_pair(padding, function, "padding", 0),
        as_pair(dilation, function, "dilation", 1),
    )


def pooled_size(size: Sequence[int], geometry: PoolGeometry, ceil_mode: bool) -> list[int]:
    """Height and width of the pooled map. With ceil_mode a window may start inside the image or its left padding."""
    result = []
    for length, k, s, p, d in zip(size, *geometry, strict=True):
        room = length + 2 * p - d * (k - 1) - 1
        out = (room + (s - 1 if ceil_mode else 0)) // s + 1
        if ceil_mode and (out - 1) * s >= length + p:
            out -= 1
        result.append(out)
    return result


def unsupported_dtype(input: Tensor) -> str | None:
    """What of a call the kernels do not support, in words, or None: they support every geometry."""
    return None if input.dtype in FLOAT_AND_DOUBLE_DTYPES else f"dtype {input.dtype}"


def as_batch(x: Tensor) -> Tensor:
    """(C, H, W) as a batch of one, without a copy."""
    return x if x.dim() == 4 else x.unsqueeze(0)


def map_over_batch(operator: Operator) -> None:
    """Let torch.func.vmap call an operator on images once: the mapped dimension joins the batch."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        size, batched = info.batch_size, False

        def fold(x: Any, dim: int | None) -> Any:
            nonlocal batched
            if not isinstance(x, Tensor):
                return x
            x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
            batched = x.dim() == 5
            return x.flatten(0, 1) if batched else x

        result = operator.op(*(fold(x, dim) for x, dim in zip(args, in_dims, strict=True)))
        outputs = result if isinstance(result, tuple) else (result,)
        dims = tuple(0 if x.dim() == 4 else None for x in outputs)  # a pool without positions returns a (0,) tensor
        outputs = tuple(
            x.unflatten(0, (size, -1 if x.shape[0] else 0)) if batched and dim == 0 else x
            for x, dim in zip(outputs, dims, strict=True)
        )
        return (outputs, dims) if isinstance(result, tuple) else (outputs[0], dims[0])

    torch.library.register_vmap(operator.op, rule, lib=LIB)
