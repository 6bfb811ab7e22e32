"""Rule for transposed convolutions, and convolution biases that move into the batch norm after them."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from ... import dispatch, functional
from ...ops.convolution import conv_transpose_operators
from ...ops.convolution.options import ConvTransposeGeometry, Epilogue, conv_transpose_geometry
from .. import availability
from ..graph import (
    CONV_TRANSPOSE,
    arguments_of,
    example_value,
    function_name,
    no_side_effect_between,
    only_data_user,
)
from ..rewriter import Rewriter, Rule

DEFAULTS = dict(zip(CONV_TRANSPOSE[2:], (None, 1, 0, 0, 1, 1), strict=True))  # of conv_transpose2d's parameters


class ReplaceConvTranspose(Rule[Node]):
    """conv_transpose2d -> fastseg's conv_transpose2d."""

    function, replacement = "conv_transpose2d", "conv_transpose2d"

    def match(self, rewriter: Rewriter, node: Node) -> Node:
        return node

    def obstacle(self, rewriter: Rewriter, match: Node) -> str | None:
        return conv_transpose_off_kernels(match)

    def rewrite(self, rewriter: Rewriter, match: Node) -> None:
        rewriter.replace(match, functional.conv_transpose2d, arguments_of(match))


def conv_transpose_off_kernels(conv: Node, fused: bool = False) -> str | None:
    """Why the kernels would not run a transposed convolution, or None. fused: with a batch norm and ReLU after it.

    Under "auto" the kernels must be measured to be faster: a fastseg call that falls back to PyTorch would be slower
    than torch's own call, whose bias Inductor fuses.
    """
    given = DEFAULTS | arguments_of(conv)
    input, weight, bias = example_value((given["input"], given["weight"], given["bias"]))
    try:
        geometry = geometry_of(given)
    except TypeError:  # an entry is a node
        return "its stride, padding, output_padding or dilation is not constant"
    unsupported = conv_transpose_operators.unsupported(input, weight, geometry)
    preferred = None
    if unsupported is None and input.is_cuda and dispatch.get_backend() == "auto":
        image, dtype = input if input.dim() == 4 else input.unsqueeze(0), example_value(conv).dtype
        # For a fused call only the existence of bias and scale counts, not their values.
        epilogue = Epilogue(bias=weight, scale=weight, relu=True) if fused else Epilogue(bias)
        preferred = conv_transpose_operators.preferred(
            conv_transpose_operators.FORWARD, image, weight, geometry, epilogue, dtype
        )
    return availability.reason_off_kernels("conv_transpose2d", input, unsupported, preferred)


def geometry_of(arguments: dict[str, Any]) -> ConvTransposeGeometry:
    """The geometry of a call; TypeError if one of its numbers is a node."""
    names = ("stride", "padding", "output_padding", "groups", "dilation")
    return conv_transpose_geometry(*(arguments[name] for name in names))


def absorb_bias(rewriter: Rewriter, norm: Node) -> Node | None:
    """Take the bias out of the convolution in front of a batch norm, and return it for the norm's `input_bias`.

    Returns None, and changes nothing, where there is no bias or something else reads the convolution's output.
    """
    conv = arguments_of(norm)["input"]
    if function_name(conv) not in ("conv2d", "conv_transpose2d") or only_data_user(conv) is not norm:
        return None
    given = arguments_of(conv)
    bias = given.get("bias")
    if bias is None or not no_side_effect_between(conv, norm):
        return None
    if example_value(bias).dtype not in (torch.float32, example_value(conv).dtype):
        return None
    conv.args, conv.kwargs = (), {**given, "bias": None}
    rewriter.report.rewritten["input_bias"] += 1
    return bias
