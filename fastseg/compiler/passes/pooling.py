"""Rules for max_pool2d and max_unpool2d, and uint8 offsets in place of int64 indices."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ... import functional
from ...ops.pooling import positions
from ...ops.pooling.geometry import PoolGeometry, unsupported_dtype
from .. import availability
from ..graph import (
    arguments_of,
    constant_geometry,
    example_value,
    function_name,
    pool_outputs,
    window_arguments,
)
from ..rewriter import Rewriter, Rule


class IndicesReaders(NamedTuple):
    """A pool that returns indices, and the users of these indices."""

    pool: Node
    indices: Node | None
    readers: list[Node]


class FindOffsets(Rule[IndicesReaders]):
    """max_pool2d with indices whose only readers are unpools: the indices become uint8 offsets.

    This rule only marks the pool and the unpools; the rules after it put in the functions that use offsets.
    """

    function, replacement = "max_pool2d", "max_pool2d_with_offsets"

    def match(self, rewriter: Rewriter, node: Node) -> IndicesReaders | None:
        outputs = pool_outputs(node)
        if outputs is None or not isinstance(example_value(node), tuple):
            return None
        return IndicesReaders(node, outputs.indices, list(outputs.indices.users) if outputs.indices else [])

    def obstacle(self, rewriter: Rewriter, match: IndicesReaders) -> str | None:
        arguments = arguments_of(match.pool)
        input, geometry = example_value(arguments["input"]), constant_geometry(arguments)
        reason = availability.reason_off_kernels("max_pool2d", input, unsupported_dtype(input))
        if reason is not None:
            return reason
        if geometry is None:
            return "it is dilated, or its kernel_size, stride or padding is not constant"
        if geometry.taps > positions.MAX_OFFSETS:
            return f"a window has more than {positions.MAX_OFFSETS} elements"
        reasons = (self._reader_obstacle(reader, match.indices, input, geometry) for reader in match.readers)
        return next((reason for reason in reasons if reason is not None), None)

    def _reader_obstacle(self, reader: Node, indices: Node, pool_input: Tensor, geometry: PoolGeometry) -> str | None:
        """Why a user of the indices needs them to be int64, or None: an unpool that inverts the pool takes offsets."""
        if function_name(reader) != "max_unpool2d":
            return f"its indices are read by {reader.name}"
        arguments = arguments_of(reader)
        if arguments.get("indices") is not indices or arguments["input"] is indices:
            return f"its indices are read by {reader.name}"
        if constant_geometry(arguments) != geometry:
            return f"{reader.name} has another kernel_size, stride or padding"
        input = example_value(arguments["input"])
        if example_value(reader).dtype != input.dtype:
            return f"autocast casts the input of {reader.name}"
        size = example_value(arguments.get("output_size"))
        if size is None:
            size = [(o - 1) * s - 2 * p + k for o, k, s, p, _ in zip(input.shape[-2:], *geometry, strict=True)]
        if not all(statically_known_true(a == b) for a, b in zip(size[-2:], pool_input.shape[-2:], strict=True)):
            return f"the output of {reader.name} is not proven to have the size of the pool's input"
        return None

    def rewrite(self, rewriter: Rewriter, match: IndicesReaders) -> None:
        rewriter.with_offsets |= {match.pool, *match.readers}
        if match.indices is not None:
            mark_as_offsets(match.indices)


class ReplaceMaxPool(Rule[Node]):
    """max_pool2d -> max_pool2d, or max_pool2d_with_offsets where FindOffsets marked it."""

    function, replacement = "max_pool2d", "max_pool2d"

    def match(self, rewriter: Rewriter, node: Node) -> Node:
        return node

    def obstacle(self, rewriter: Rewriter, match: Node) -> str | None:
        input = example_value(arguments_of(match)["input"])
        reason = availability.reason_off_kernels("max_pool2d", input, unsupported_dtype(input))
        if reason is None and not returns_indices(match) and not input.requires_grad:
            return "without indices or a gradient the inner compiler runs it in one pass too"
        return reason

    def rewrite(self, rewriter: Rewriter, match: Node) -> None:
        arguments = arguments_of(match)
        arguments.pop("return_indices", None)
        if match in rewriter.with_offsets:
            rewriter.replace(match, functional.max_pool2d_with_offsets, arguments)
        else:
            arguments["return_indices"] = returns_indices(match)
            rewriter.replace(match, functional.max_pool2d, arguments)


class ReplaceMaxUnpool(Rule[Node]):
    """max_unpool2d -> max_unpool2d, or max_unpool2d_with_offsets where FindOffsets marked it."""

    function, replacement = "max_unpool2d", "max_unpool2d"

    def match(self, rewriter: Rewriter, node: Node) -> Node:
        return node

    def obstacle(self, rewriter: Rewriter, match: Node) -> str | None:
        if match in rewriter.with_offsets:
            return None
        input = example_value(arguments_of(match)["input"])
        if example_value(match).dtype != input.dtype:
            return "autocast casts its input"
        return availability.reason_off_kernels("max_unpool2d", input, unsupported_dtype(input))

    def rewrite(self, rewriter: Rewriter, match: Node) -> None:
        arguments = arguments_of(match)
        if match in rewriter.with_offsets:
            arguments["offsets"] = arguments.pop("indices")
            rewriter.replace(match, functional.max_unpool2d_with_offsets, arguments)
        else:
            rewriter.replace(match, functional.max_unpool2d, arguments)


def returns_indices(pool: Node) -> bool:
    """Whether a pool returns (output, indices) and not just its output."""
    return isinstance(example_value(pool), tuple)


def mark_as_offsets(indices: Node) -> None:
    """Record that a node whose value was int64 indices now returns uint8 offsets."""
    value = example_value(indices)
    with value.fake_mode:
        indices.meta["example_value"] = torch.empty_like(value, dtype=torch.uint8)


def convert_to_indices(rewriter: Rewriter, offsets: Node, image: Node, geometry: PoolGeometry) -> None:
    """Insert offsets_to_indices after a pool that now returns offsets, for users that read int64 indices.

    image: the pool's input, whose width the indices are computed with.
    """
    width = example_value(image).shape[-1]
    with rewriter.graph.inserting_before(offsets.next):
        if not isinstance(width, int):
            meta, width = {"example_value": width}, rewriter.graph.call_method("size", (image, -1))
            width.meta = meta
        arguments = {**window_arguments(geometry), "width": width}
        indices = rewriter.graph.call_function(functional.offsets_to_indices, (offsets,), arguments)
    indices.meta = dict(offsets.meta)
    offsets.replace_all_uses_with(indices, delete_user_cb=lambda user: user is not indices)
    mark_as_offsets(offsets)
