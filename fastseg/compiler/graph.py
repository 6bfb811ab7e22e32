"""Reading a graph that Dynamo captured: which function a node calls, its arguments, its users and its side effects."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from .. import torch_internals
from ..ops.pooling.geometry import PoolGeometry, pool_geometry
from ..swapping.functions import REPLACEMENTS

POOL = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
UNPOOL = ("input", "indices", "kernel_size", "stride", "padding", "output_size")
CONV_TRANSPOSE = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
BATCH_NORM_VECTORS = ("running_mean", "running_var", "weight", "bias")
# The parameters of the functions that the rules know, by the names used in reports.
PARAMETERS: dict[str, tuple[str, ...]] = {
    "max_pool2d": POOL,
    "max_unpool2d": UNPOOL,
    "conv_transpose2d": CONV_TRANSPOSE,
    "conv2d": ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    "batch_norm": ("input", *BATCH_NORM_VECTORS, "training", "momentum", "eps"),
    "relu": ("input", "inplace"),
    "interpolate": (
        "input", "size", "scale_factor", "mode", "align_corners", "recompute_scale_factor", "antialias",
    ),
    "cross_entropy": (
        "input", "target", "weight", "size_average", "ignore_index", "reduce", "reduction", "label_smoothing",
    ),
}  # fmt: skip
# Call targets (functions, and methods by name) and the function that each of them is.
FUNCTIONS: dict[Any, str] = {
    **{function: replacement.name for function, replacement in REPLACEMENTS.items()},
    torch.conv2d: "conv2d",
    F.batch_norm: "batch_norm",
    F.relu: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    "relu": "relu",
    "relu_": "relu",
    F.interpolate: "interpolate",
}


# --- what a node calls -----------------------------------------------------------------------------------------------


def function_name(node: Any) -> str | None:
    """The name of the function that a node calls, if it is a key of PARAMETERS, else None."""
    if isinstance(node, Node) and node.op in ("call_function", "call_method"):
        return FUNCTIONS.get(node.target)
    return None


def arguments_of(node: Node) -> dict[str, Any]:
    """The arguments of a call by parameter name. Defaults that the call does not pass are missing."""
    return dict(zip(PARAMETERS[FUNCTIONS[node.target]], node.args, strict=False)) | node.kwargs


def example_value(argument: Any) -> Any:
    """An argument with each node in it replaced by that node's fake tensor or symbolic size."""
    return map_arg(argument, lambda node: node.meta.get("example_value"))


def nodes_in(argument: Any) -> list[Node]:
    """All nodes in a (nested) argument."""
    found: list[Node] = []
    map_arg(argument, found.append)
    return found


def constant_geometry(arguments: dict[str, Any]) -> PoolGeometry | None:
    """The geometry of a pool or unpool, or None if it is dilated or not made of constants."""
    padding, dilation = arguments.get("padding", 0), arguments.get("dilation", 1)
    try:
        geometry = pool_geometry("max_pool2d", arguments["kernel_size"], arguments.get("stride"), padding, dilation)
    except (TypeError, RuntimeError):  # an entry is a node, or a value that the pool itself rejects
        return None
    return geometry if geometry.dilation == [1, 1] else None


def window_arguments(geometry: PoolGeometry) -> dict[str, Any]:
    """The arguments kernel_size, stride and padding of a call."""
    return {"kernel_size": geometry.kernel_size, "stride": geometry.stride, "padding": geometry.padding}


# --- who uses a node -------------------------------------------------------------------------------------------------


def only_user(node: Node) -> Node | None:
    """The single user of a node, or None if there is another number of users."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def only_data_user(node: Node) -> Node | None:
    """The single user of a node's elements, or None. Queries of its size do not count as users."""
    users = [user for user in node.users if not is_size_query(user)]
    return users[0] if len(users) == 1 else None


def is_size_query(node: Node) -> bool:
    return node.op == "call_method" and node.target == "size"


def query_sizes_at_inputs(graph: Graph) -> None:
    """Let size queries on the output of a batch norm or ReLU read the input, whose size is the same.

    With dynamic shapes Dynamo puts such queries between the calls that the rules fuse.
    """
    for node in reversed(graph.nodes):
        if function_name(node) in ("batch_norm", "relu"):
            for user in filter(is_size_query, list(node.users)):
                user.replace_input_with(node, arguments_of(node)["input"])


class PoolOutputs(NamedTuple):
    """The nodes that take the two results out of a pool's tuple; None for a result that is not taken out."""

    output: Node | None
    indices: Node | None


def pool_outputs(pool: Node) -> PoolOutputs | None:
    """The results of a pool that returns (output, indices), or None if the tuple is used in any other way."""
    found: dict[int, Node] = {}
    for user in pool.users:
        if user.target is not operator.getitem or user.args[1] in found:
            return None
        found[user.args[1]] = user
    return PoolOutputs(found.get(0), found.get(1))


# --- side effects ----------------------------------------------------------------------------------------------------


def no_side_effect_between(first: Node, last: Node) -> bool:
    """Whether no node between two nodes has a side effect, so that the two may be joined."""
    return not any(has_side_effect(node) for node in nodes_between(first, last))


def nodes_between(first: Node, last: Node) -> Iterator[Node]:
    node = first.next
    while node is not last:
        yield node
        node = node.next


def written_after(node: Node, tensor: Node) -> bool:
    """Whether anything after `node` may write to the memory of a tensor, directly or through a view of it.

    Then a call at `node` must not save the tensor for its backward.
    """
    storage = example_value(tensor).untyped_storage()
    end = node.graph.output_node()
    return any(
        isinstance(value := example_value(argument), Tensor) and value.untyped_storage() is storage
        for later in nodes_between(node, end)
        if has_side_effect(later)
        for argument in nodes_in((later.args, later.kwargs))
    )


def has_side_effect(node: Node) -> bool:
    """Whether a node may do more than return its value: write to a tensor, or switch a mode."""
    if node.op == "call_method":
        return node.target.endswith("_") and not node.target.endswith("__") and _may_be_float(node.args[0])
    if node.op != "call_function":
        return node.op == "call_module"
    if torch_internals.is_higher_order(node.target) or "example_value" not in node.meta:
        return True
    return _writes(node) or node.is_impure()


def _writes(node: Node) -> bool:
    """Whether a function call writes to one of its arguments."""
    name = getattr(node.target, "__name__", "")
    if getattr(node.target, "__module__", None) == "_operator":
        in_place = name.startswith("i") and (hasattr(operator, name[1:]) or hasattr(operator, f"{name[1:]}_"))
        return (in_place or name == "setitem") and _may_be_float(node.args[0])
    if name.endswith("_") or "out" in node.kwargs:
        return True
    try:
        parameters = list(inspect.signature(node.target).parameters)
    except (TypeError, ValueError):  # a builtin of torch; none of those has an `inplace` parameter
        return False
    return bool((dict(zip(parameters, node.args, strict=False)) | node.kwargs).get("inplace"))


def _may_be_float(argument: Any) -> bool:
    """Whether an argument may hold floating-point values. The batch counter of a batch norm does not."""
    value = example_value(argument)
    return not isinstance(value, Tensor) or value.is_floating_point() or value.is_complex()
