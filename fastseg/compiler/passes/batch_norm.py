"""Rules for batch_norm and relu in a row, with what stands in front of them and after them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.fx import Node

from ... import functional
from ...kernels.batch_norm.arguments import NormArguments
from ...ops.batch_norm.batch_norm import BATCH_NORM_RELU
from ...ops.convolution.conv_transpose_norm import conv_transpose2d_batch_norm_relu
from ...ops.pooling.geometry import PoolGeometry
from .. import availability
from ..graph import (
    BATCH_NORM_VECTORS,
    arguments_of,
    constant_geometry,
    example_value,
    function_name,
    no_side_effect_between,
    nodes_in,
    only_user,
    pool_outputs,
    window_arguments,
)
from ..rewriter import Rewriter, Rule
from . import convolution
from .pooling import convert_to_indices, returns_indices


class NormReLU(NamedTuple):
    """A batch norm and the ReLU that reads its output."""

    norm: Node
    relu: Node

    @property
    def arguments(self) -> dict[str, Any]:
        """The batch norm's arguments; `training` is always among them."""
        arguments = arguments_of(self.norm)
        return {**arguments, "training": bool(arguments.get("training", False))}

    @property
    def training(self) -> bool:
        return self.arguments["training"]


class NormReLUPool(NamedTuple):
    """A batch norm, its ReLU, and the max_pool2d or max_unpool2d that alone reads the ReLU's output."""

    norm: Node
    relu: Node
    pool: Node
    geometry: PoolGeometry


class ConvNormReLU(NamedTuple):
    """A transposed convolution, the batch norm that alone reads its output, and the ReLU."""

    conv: Node
    norm: Node
    relu: Node


def find_norm_relu(norm: Node) -> NormReLU | None:
    """A batch norm and its ReLU, or None if there is no ReLU or the two may not be joined."""
    relu = only_user(norm)
    if function_name(relu) != "relu" or norm_relu_obstacle(norm, relu) is not None:
        return None
    return NormReLU(norm, relu)


def norm_relu_obstacle(norm: Node, relu: Node) -> str | None:
    """Why a batch norm and the ReLU that alone reads its output may not be joined, or None."""
    arguments = arguments_of(norm)
    input = example_value(arguments["input"])
    numbers = [arguments[name] for name in ("training", "momentum", "eps") if name in arguments]
    if not all(isinstance(number, (bool, int, float)) for number in numbers):
        return "its momentum or eps is not constant"
    vectors = {name: example_value(arguments.get(name)) for name in BATCH_NORM_VECTORS}
    if (vectors["running_mean"] is None) != (vectors["running_var"] is None):
        return "it has only one of running_mean and running_var"
    if any(vector is not None and vector.dtype not in (input.dtype, torch.float32) for vector in vectors.values()):
        return "its parameters or running statistics have neither its input's dtype nor float32"
    if not no_side_effect_between(norm, relu):
        return "an in-place write or a change of mode separates it from its ReLU"
    return availability.reason_off_kernels("batch_norm_relu", input, BATCH_NORM_RELU.unsupported("triton", input))


def find_norm_relu_pool(norm: Node, function: str) -> NormReLUPool | None:
    """A batch norm, its ReLU and a call of `function` with a geometry that the fused kernels support, or None."""
    chain = find_norm_relu(norm)
    if chain is None:
        return None
    pool = only_user(chain.relu)
    if function_name(pool) != function or arguments_of(pool)["input"] is not chain.relu:
        return None
    geometry = constant_geometry(arguments_of(pool))
    if geometry is None or not geometry.has_cells:
        return None
    return NormReLUPool(*chain, pool, geometry) if no_side_effect_between(chain.relu, pool) else None


class FuseConvTransposeBatchNormReLU(Rule[ConvNormReLU]):
    """conv_transpose2d, batch_norm, relu in evaluation -> one call, with the norm folded into the epilogue."""

    function, replacement = "batch_norm", "conv_transpose2d_batch_norm_relu"

    def match(self, rewriter: Rewriter, node: Node) -> ConvNormReLU | None:
        chain = find_norm_relu(node)
        if chain is None or chain.training:
            return None
        conv = chain.arguments["input"]
        if function_name(conv) != "conv_transpose2d" or only_user(conv) is not node:
            return None
        if not no_side_effect_between(conv, node):
            return None
        if convolution.conv_transpose_off_kernels(conv, fused=True) is not None:
            return None  # ReplaceConvTranspose reports the reason
        return ConvNormReLU(conv, *chain)

    def rewrite(self, rewriter: Rewriter, match: ConvNormReLU) -> None:
        given = arguments_of(match.norm)
        conv = convolution.DEFAULTS | arguments_of(match.conv)
        norm = NormArguments(
            given.get("running_mean"),
            conv["bias"],
            given.get("running_var"),
            given.get("weight"),
            given.get("bias"),
            given.get("eps", 1e-5),
            relu=True,
        )
        geometry = convolution.geometry_of(conv)
        arguments = {"input": conv["input"], "weight": conv["weight"], "geometry": geometry, "norm": norm}
        rewriter.fuse(match.norm, list(match), conv_transpose2d_batch_norm_relu, arguments)


class FuseBatchNormReLUMaxPool(Rule[NormReLUPool]):
    """batch_norm, relu, max_pool2d -> batch_norm_relu_max_pool2d."""

    function, replacement = "batch_norm", "batch_norm_relu_max_pool2d"

    def match(self, rewriter: Rewriter, node: Node) -> NormReLUPool | None:
        found = find_norm_relu_pool(node, "max_pool2d")
        if found is None:
            return None
        if returns_indices(found.pool):
            return found if pool_outputs(found.pool) is not None else None
        # In evaluation without a gradient nothing is saved for the backward: the inner compiler's one pass is as good.
        saves = NormReLU(node, found.relu).training or example_value(found.relu).requires_grad
        return found if saves else None

    def rewrite(self, rewriter: Rewriter, match: NormReLUPool) -> None:
        norm, relu, pool, geometry = match
        outputs = pool_outputs(pool) if returns_indices(pool) else None
        arguments = {
            **NormReLU(norm, relu).arguments,
            **window_arguments(geometry),
            "ceil_mode": arguments_of(pool).get("ceil_mode", False),
            "return_offsets": outputs is not None,
            "input_bias": convolution.absorb_bias(rewriter, norm),
        }
        needs_indices = pool not in rewriter.with_offsets
        rewriter.fuse(norm, [norm, relu, pool], functional.batch_norm_relu_max_pool2d, arguments)
        if outputs is not None and outputs.indices is not None and needs_indices:
            convert_to_indices(rewriter, outputs.indices, arguments["input"], geometry)


class FuseBatchNormReLUMaxUnpool(Rule[NormReLUPool]):
    """batch_norm, relu, max_unpool2d with offsets -> batch_norm_relu_max_unpool2d."""

    function, replacement = "batch_norm", "batch_norm_relu_max_unpool2d"

    def match(self, rewriter: Rewriter, node: Node) -> NormReLUPool | None:
        found = find_norm_relu_pool(node, "max_unpool2d")
        if found is None or found.pool not in rewriter.with_offsets:
            return None
        if not self._inputs_stand_before(found) and not self._may_move_to(found):
            return None
        return found

    def _inputs_stand_before(self, found: NormReLUPool) -> bool:
        """Whether the unpool's other inputs are computed before the batch norm, so that the norm can stay in place."""
        given = arguments_of(found.pool)
        return all(node < found.norm for node in nodes_in((given["indices"], given.get("output_size"))))

    def _may_move_to(self, found: NormReLUPool) -> bool:
        """Whether the batch norm may be computed where the unpool stands.

        It may if nothing reads or moves its running statistics in between, not even through a view.
        """
        given = arguments_of(found.norm)
        statistics = nodes_in((given.get("running_mean"), given.get("running_var")))
        others = {user for node in statistics for user in node.users} - {found.norm}
        return all(found.pool < user or (user < found.norm and function_name(user) == "batch_norm") for user in others)

    def rewrite(self, rewriter: Rewriter, match: NormReLUPool) -> None:
        norm, relu, unpool, geometry = match
        given = arguments_of(unpool)
        at = norm if self._inputs_stand_before(match) else unpool
        arguments = {
            **NormReLU(norm, relu).arguments,
            **window_arguments(geometry),
            "offsets": given["indices"],
            "output_size": given.get("output_size"),
            "input_bias": convolution.absorb_bias(rewriter, norm),
        }
        rewriter.fuse(at, [norm, relu, unpool], functional.batch_norm_relu_max_unpool2d, arguments)


class FuseBatchNormReLU(Rule[NormReLU]):
    """batch_norm, relu in training -> batch_norm_relu. Reports why none of the rules for batch norms could be used."""

    function, replacement = "batch_norm", "batch_norm_relu"

    def match(self, rewriter: Rewriter, node: Node) -> NormReLU | None:
        relu = next((user for user in node.users if function_name(user) == "relu"), None)
        return None if relu is None else NormReLU(node, relu)

    def obstacle(self, rewriter: Rewriter, match: NormReLU) -> str | None:
        if only_user(match.norm) is not match.relu:
            return "its ReLU is not the only reader of its output"
        reason = norm_relu_obstacle(match.norm, match.relu)
        if reason is None and not match.training:
            return "in evaluation the inner compiler runs it in one pass too"
        return reason

    def rewrite(self, rewriter: Rewriter, match: NormReLU) -> None:
        arguments = {**match.arguments, "input_bias": convolution.absorb_bias(rewriter, match.norm)}
        rewriter.fuse(match.norm, [match.norm, match.relu], functional.batch_norm_relu, arguments)
