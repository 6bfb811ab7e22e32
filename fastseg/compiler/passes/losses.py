"""Rules for cross_entropy, and for interpolate with a cross_entropy after it."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor
from torch.fx import Node

from ... import functional
from ...ops.losses import cross_entropy_operators, resizing
from ...swapping.functions import cross_entropy, with_torch_dtype
from .. import availability
from ..graph import arguments_of, example_value, function_name, no_side_effect_between, only_user, written_after
from ..rewriter import Rewriter, Rule

# torch's cross_entropy saves the log-softmax of the logits for its backward, fastseg's the logits themselves.
WRITTEN_LATER = "its logits are written in place later, and the backward needs them"
DEPRECATED = ("size_average", "reduce")  # arguments of cross_entropy that upsample_cross_entropy does not have


class ResizedLoss(NamedTuple):
    """An interpolate, and the cross_entropy that reads its output."""

    resize: Node
    loss: Node


class FuseUpsampleCrossEntropy(Rule[ResizedLoss]):
    """interpolate, cross_entropy -> upsample_cross_entropy."""

    function, replacement = "interpolate", "upsample_cross_entropy"

    def match(self, rewriter: Rewriter, node: Node) -> ResizedLoss | None:
        loss = next((user for user in node.users if function_name(user) == "cross_entropy"), None)
        return None if loss is None else ResizedLoss(node, loss)

    def obstacle(self, rewriter: Rewriter, match: ResizedLoss) -> str | None:
        resize, given = arguments_of(match.resize), arguments_of(match.loss)
        if only_user(match.resize) is not match.loss or given["input"] is not match.resize:
            return "the loss is not the only reader of its output"
        mode, antialias = resize.get("mode", "nearest"), resize.get("antialias")
        if mode not in resizing.MODES or antialias:
            return f"mode {mode!r}" + (" with antialias" if antialias else "")
        if any(given.get(name) is not None for name in DEPRECATED):
            return "the loss has size_average or reduce"
        input, target = example_value((resize["input"], given["target"]))
        if target.is_floating_point():
            return "a target of class probabilities"
        if input.dim() != 4:
            return f"{input.dim()}-D logits"
        if not no_side_effect_between(match.resize, match.loss):
            return "an in-place write or a change of mode separates it from the loss"
        if written_after(match.loss, resize["input"]):
            return WRITTEN_LATER
        unsupported = resizing.unsupported_resizing(input, example_value(match.resize).shape[-2:])
        return availability.reason_off_kernels("upsample_cross_entropy", input, unsupported)

    def rewrite(self, rewriter: Rewriter, match: ResizedLoss) -> None:
        # interpolate's default mode is "nearest", that of upsample_cross_entropy "bilinear".
        arguments = {"mode": "nearest", **arguments_of(match.loss), **arguments_of(match.resize)}
        arguments = {name: value for name, value in arguments.items() if name not in (*DEPRECATED, "antialias")}
        rewriter.fuse(match.loss, list(match), upsample_cross_entropy, arguments)


class ReplaceCrossEntropy(Rule[Node]):
    """cross_entropy -> fastseg's cross_entropy."""

    function, replacement = "cross_entropy", "cross_entropy"

    def match(self, rewriter: Rewriter, node: Node) -> Node:
        return node

    def obstacle(self, rewriter: Rewriter, match: Node) -> str | None:
        given = arguments_of(match)
        if written_after(match, given["input"]):
            return WRITTEN_LATER
        input, target, weight = example_value((given["input"], given["target"], given.get("weight")))
        unsupported = cross_entropy_operators.unsupported(input, target, weight)
        return availability.reason_off_kernels("cross_entropy", input, unsupported)

    def rewrite(self, rewriter: Rewriter, match: Node) -> None:
        rewriter.replace(match, cross_entropy, arguments_of(match))


def upsample_cross_entropy(input: Tensor, target: Tensor, **rest: Any) -> Tensor:
    """functional.upsample_cross_entropy with a loss of torch's dtype."""
    return with_torch_dtype(functional.upsample_cross_entropy(input, target, **rest), input)
