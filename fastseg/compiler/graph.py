"""Reading a graph that Dynamo captured: what a node calls, with which arguments, and what it does besides."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from .. import dispatch, torch_internals
from ..ops.pooling.positions import unset
from ..swapping.functions import REPLACED

POOL = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
UNPOOL = ("input", "indices", "kernel_size", "stride", "padding", "output_size")
CONV_TRANSPOSE = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
PARAMETERS: dict[str, tuple[str, ...]] = {
    "max_pool2d": POOL,
    "max_unpool2d": UNPOOL,
    "conv_transpose2d": CONV_TRANSPOSE,
    "conv2d": ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    "batch_norm": ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    "relu": ("input", "inplace"),
    "interpolate": (
        "input", "size", "scale_factor", "mode", "align_corners", "recompute_scale_factor", "antialias",
    ),
    "cross_entropy": (
        "input", "target", "weight", "size_average", "ignore_index", "reduce", "reduction", "label_smoothing",
    ),
}  # fmt: skip
NAMES: dict[Any, str] = {
    **{function: name for function, (name, _) in REPLACED.items()},
    torch.conv2d: "conv2d",
    F.batch_norm: "batch_norm",
    F.relu: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    "relu": "relu",
    "relu_": "relu",
    F.interpolate: "interpolate",
}
CONV_TRANSPOSE_DEFAULTS = dict(zip(CONV_TRANSPOSE[2:], (None, 1, 0, 0, 1, 1), strict=True))
LEGACY = ("size_average", "reduce", "antialias")  # arguments that upsample_cross_entropy has not


def name_of(node: Any) -> str | None:
    """What a node calls, of the functions that PARAMETERS knows."""
    if isinstance(node, Node) and node.op in ("call_function", "call_method"):
        return NAMES.get(node.target)
    return None


def arguments_of(node: Node) -> dict[str, Any]:
    return dict(zip(PARAMETERS[NAMES[node.target]], node.args, strict=False)) | node.kwargs


def value_of(argument: Any) -> Any:
    """An argument with the fake tensors and sizes that its nodes stand for."""
    return map_arg(argument, lambda node: node.meta.get("example_value"))


def only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def only_reader(node: Node) -> Node | None:
    """The one node that reads a node's elements, whoever asks for its size."""
    readers = [user for user in node.users if not asks_size(user)]
    return readers[0] if len(readers) == 1 else None


def asks_size(node: Node) -> bool:
    return node.op == "call_method" and node.target == "size"


def outputs_of(pool: Node) -> tuple[Node | None, Node | None] | None:
    """The nodes that take a pool's two results out of it, each or none; None where it is used in another way."""
    found: dict[int, Node] = {}
    for user in pool.users:
        if user.target is not operator.getitem or user.args[1] in found:
            return None
        found[user.args[1]] = user
    return found.get(0), found.get(1)


def pair(value: Any) -> list[Any]:
    values = list(value) if isinstance(value, (tuple, list)) else [value]
    return values * 2 if len(values) == 1 else values


def windows_of(arguments: dict[str, Any]) -> tuple[list[int], list[int], list[int]] | None:
    """kernel_size, stride and padding of a pool or unpool; None for a dilated one, or if they are no plain numbers."""
    kernel, stride = arguments["kernel_size"], arguments.get("stride")
    found = [pair(kernel), pair(kernel if unset(stride) else stride), pair(arguments.get("padding", 0))]
    if pair(arguments.get("dilation", 1)) != [1, 1] or not all(type(n) is int for pair in found for n in pair):
        return None
    return found[0], found[1], found[2]


def has_effect(node: Node) -> bool:
    """Whether a node does something besides giving its value, or may: nothing is moved across it."""
    if node.op == "call_method":
        return node.target.endswith("_") and not node.target.endswith("__") and _may_float(node.args[0])
    if node.op != "call_function":
        return node.op == "call_module"
    if torch_internals.is_higher_order(node.target) or "example_value" not in node.meta:
        return True
    return _writes(node) or node.is_impure()


def _writes(node: Node) -> bool:
    """Whether a call of a function writes to one of its arguments."""
    name = getattr(node.target, "__name__", "")
    if getattr(node.target, "__module__", None) == "_operator":
        in_place = name.startswith("i") and (hasattr(operator, name[1:]) or hasattr(operator, f"{name[1:]}_"))
        return (in_place or name == "setitem") and _may_float(node.args[0])
    if name.endswith("_") or "out" in node.kwargs:
        return True
    try:
        parameters = list(inspect.signature(node.target).parameters)
    except (TypeError, ValueError):  # one of torch's builtins, none of which has a switch `inplace`
        return False
    return bool((dict(zip(parameters, node.args, strict=False)) | node.kwargs).get("inplace"))


def _may_float(argument: Any) -> bool:
    """Whether an argument may hold floats: batch norm's counter of batches does not."""
    value = value_of(argument)
    return not isinstance(value, Tensor) or value.is_floating_point() or value.is_complex()


def undisturbed(first: Node, last: Node) -> bool:
    """Whether nothing with an effect stands between two nodes."""
    return not any(has_effect(node) for node in between(first, last))


def between(first: Node, last: Node) -> Iterator[Node]:
    node = first.next
    while node is not last:
        yield node
        node = node.next


def off_kernels(name: str, tensor: Tensor, uncovered: str | None, preferred: Any = None) -> str | None:
    """Why the kernels would not run a call, in words, or None."""
    try:
        choice = dispatch.choose(name, tensor, uncovered, preferred, asks=True)
    except (NotImplementedError, RuntimeError) as error:  # backend "triton" where it cannot be had
        return str(error)
    return None if choice.backend == "triton" else choice.reason


def nodes_in(argument: Any) -> list[Node]:
    found: list[Node] = []
    map_arg(argument, found.append)
    return found
