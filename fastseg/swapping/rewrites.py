"""What of a graph that Dynamo captured can run on fused kernels, and the graph with those in place.

A rewrite is made where the graph proves it: each tensor between the parts has one reader, nothing is written in place
and no mode is switched in between, and the sizes agree for every input that the graph is for.
"""

from __future__ import annotations

import inspect
import operator
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.node import map_arg

from .. import dispatch, functional
from ..ops import batch_norm, conv_transpose_operators, cross_entropy_operators, upsample, windows
from ..ops.batch_norm_windows import fusible
from ..ops.conv_transpose_norm import conv_transpose2d_batch_norm_relu
from .functions import REPLACED, cross_entropy, with_torch_dtype

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
CHECKPOINT = torch.ops.higher_order.tag_activation_checkpoint


class Left(NamedTuple):
    """A place that was looked at and left: the graph's name of it, what it would have become, and why it did not."""

    node: str
    rewrite: str
    reason: str

    def __str__(self) -> str:
        return f"{self.node} to {self.rewrite}: {self.reason}"


@dataclass
class GraphReport:
    """What `compile_backend` did to one graph: how often each function was put in, and what was left and why.

    rewritten counts by the name of the function; "input_bias" are biases of convolutions that a batch norm took over.
    """

    rewritten: Counter[str] = field(default_factory=Counter)
    left: list[Left] = field(default_factory=list)

    def __str__(self) -> str:
        done = ", ".join(f"{name} {count}" for name, count in sorted(self.rewritten.items())) or "nothing"
        return f"rewritten: {done}" + (f"; left: {'; '.join(map(str, self.left))}" if self.left else "")


def rewrite(module: GraphModule) -> GraphReport:
    """Rewrite a graph and the bodies of its checkpoints in place."""
    report = GraphReport()
    if dispatch.get_backend() == "torch":
        return report
    graphs = [module, *(module.get_submodule(node.args[0].target) for node in _checkpoints(module.graph))]
    for inner in graphs:
        before = report.rewritten.total()
        _Rewriter(inner.graph, report).run()
        if report.rewritten.total() > before:
            inner.graph.lint()
            inner.recompile()
    return report


def _checkpoints(graph: Graph) -> Iterator[Node]:
    return (node for node in graph.nodes if node.op == "call_function" and node.target is CHECKPOINT)


# --- reading a graph -------------------------------------------------------------------------------------------------


def _name(node: Any) -> str | None:
    """What a node calls, of the functions that PARAMETERS knows."""
    if isinstance(node, Node) and node.op in ("call_function", "call_method"):
        return NAMES.get(node.target)
    return None


def _arguments(node: Node) -> dict[str, Any]:
    return dict(zip(PARAMETERS[NAMES[node.target]], node.args, strict=False)) | node.kwargs


def _value(argument: Any) -> Any:
    """An argument with the fake tensors and sizes that its nodes stand for."""
    return map_arg(argument, lambda node: node.meta.get("example_value"))


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _outputs(pool: Node) -> tuple[Node | None, Node | None]:
    """The nodes that take a pool's two results out of it, or None where one is not, or not once."""
    found: dict[int, Node] = {}
    for user in pool.users:
        if user.target is not operator.getitem or user.args[1] in found:
            return None, None
        found[user.args[1]] = user
    return found.get(0), found.get(1)


def _pair(value: Any) -> list[Any]:
    values = list(value) if isinstance(value, (tuple, list)) else [value]
    return values * 2 if len(values) == 1 else values


def _windows(arguments: dict[str, Any]) -> tuple[list[int], list[int], list[int]] | None:
    """kernel_size, stride and padding of a pool or unpool; None for a dilated one, or if they are no plain numbers."""
    kernel, stride = arguments["kernel_size"], arguments.get("stride")
    found = [_pair(kernel), _pair(kernel if windows.unset(stride) else stride), _pair(arguments.get("padding", 0))]
    if _pair(arguments.get("dilation", 1)) != [1, 1] or not all(type(n) is int for pair in found for n in pair):
        return None
    return found[0], found[1], found[2]


def _has_effect(node: Node) -> bool:
    """Whether a node does something besides giving its value, or may: nothing is moved across it."""
    if node.op == "call_method":
        return node.target.endswith("_") and not node.target.endswith("__") and _may_float(node.args[0])
    if node.op != "call_function":
        return node.op == "call_module"
    if isinstance(node.target, torch._ops.HigherOrderOperator) or "example_value" not in node.meta:
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
    value = _value(argument)
    return not isinstance(value, Tensor) or value.is_floating_point() or value.is_complex()


def _undisturbed(first: Node, last: Node) -> bool:
    """Whether nothing with an effect stands between two nodes."""
    return not any(_has_effect(node) for node in _between(first, last))


def _between(first: Node, last: Node) -> Iterator[Node]:
    node = first.next
    while node is not last:
        yield node
        node = node.next


def _off_kernels(name: str, tensor: Tensor, uncovered: str | None, preferred: Any = None) -> str | None:
    """Why the kernels would not run a call, in words, or None."""
    try:
        choice = dispatch.choose(name, tensor, uncovered, preferred, asks=True)
    except (NotImplementedError, RuntimeError) as error:  # backend "triton" where it cannot be had
        return str(error)
    return None if choice.backend == "triton" else choice.reason


# --- rewriting it ----------------------------------------------------------------------------------------------------


class _Rewriter:
    """The rules, in their order; each gets the nodes of one name and looks at what stands around them."""

    def __init__(self, graph: Graph, report: GraphReport) -> None:
        self.graph, self.report = graph, report
        self.compact: set[Node] = set()  # pools whose indices become offsets, and the unpools that read them

    def run(self) -> None:
        for name, rule in (
            ("max_pool2d", self.find_compact),
            ("batch_norm", self.fuse_batch_norm),
            ("interpolate", self.fuse_upsampling),
            ("max_pool2d", self.replace_pool),
            ("max_unpool2d", self.replace_unpool),
            ("conv_transpose2d", self.replace_conv_transpose),
            ("cross_entropy", self.replace_cross_entropy),
        ):
            for node in [node for node in self.graph.nodes if _name(node) == name]:
                rule(node, _arguments(node))

    def leave(self, node: Node, rewrite: str, reason: str) -> None:
        self.report.left.append(Left(node.name, rewrite, reason))

    def replace(self, node: Node, function: Callable[..., Any], arguments: dict[str, Any]) -> None:
        node.op, node.target, node.args, node.kwargs = "call_function", function, (), arguments
        self.report.rewritten[function.__name__] += 1

    def put(self, at: Node, chain: list[Node], function: Callable[..., Any], arguments: dict[str, Any]) -> Node:
        """A call of the function where `at` stands, in place of a chain of nodes, the last of which it gives."""
        with self.graph.inserting_before(at):
            new = self.graph.call_function(function, (), arguments)
        new.meta = dict(chain[-1].meta)
        chain[-1].replace_all_uses_with(new)
        for node in reversed(chain):
            self.graph.erase_node(node)
        self.report.rewritten[function.__name__] += 1
        return new

    # --- uint8 offsets in place of int64 indices

    def find_compact(self, pool: Node, arguments: dict[str, Any]) -> None:
        """A pool's indices become offsets where unpools of its own windows, back to its own size, alone read them."""
        indices = _outputs(pool)[1]
        if indices is None:
            return
        reason = self.needs_indices(arguments, indices)
        if reason is not None:
            self.leave(pool, "max_pool2d_with_offsets", reason)
            return
        self.compact |= {pool, *indices.users}
        value = _value(indices)
        with value.fake_mode:
            indices.meta["example_value"] = torch.empty_like(value, dtype=torch.uint8)

    def needs_indices(self, arguments: dict[str, Any], indices: Node) -> str | None:
        """Why a pool's indices stay int64, in words, or None."""
        input, geometry = _value(arguments["input"]), _windows(arguments)
        reason = _off_kernels("max_pool2d", input, windows.uncovered(input))
        if reason is not None:
            return reason
        if geometry is None:
            return "it is dilated, or its windows are computed"
        if geometry[0][0] * geometry[0][1] > windows.MAX_OFFSETS:
            return f"a window has more than {windows.MAX_OFFSETS} elements"
        for user in indices.users:
            given = _arguments(user) if _name(user) == "max_unpool2d" else {}
            if given.get("indices") is not indices or given["input"] is indices:
                return f"its indices are read by {user.name}"
            if _windows(given) != geometry:
                return f"{user.name} has other windows"
            size = _value(given.get("output_size"))
            if size is None:
                pooled = _value(given["input"]).shape[-2:]
                size = [(o - 1) * s - 2 * p + k for o, k, s, p in zip(pooled, *geometry, strict=True)]
            if not all(statically_known_true(a == b) for a, b in zip(size[-2:], input.shape[-2:], strict=True)):
                return f"{user.name} may give another size than the pool had"
        return None

    # --- batch norm and what follows

    def fuse_batch_norm(self, norm: Node, arguments: dict[str, Any]) -> None:
        relu = _only_user(norm)
        if _name(relu) != "relu":
            if any(_name(user) == "relu" for user in norm.users):
                self.leave(norm, "batch_norm_relu", "its output is not read by the ReLU alone")
            return
        reason = self.unfusible(norm, arguments, relu)
        if reason is not None:
            self.leave(norm, "batch_norm_relu", reason)
            return
        training = bool(arguments.get("training", False))
        if not training and self.fold_into_conv_transpose(norm, arguments, relu):
            return
        arguments = {**arguments, "training": training}
        if not (self.fuse_pool(norm, arguments, relu) or self.fuse_unpool(norm, arguments, relu)):
            if not training:
                self.leave(norm, "batch_norm_relu", "in evaluation the inner compiler makes one pass of it as well")
                return
            arguments["input_bias"] = self.absorbed_bias(norm, arguments)
            self.put(norm, [norm, relu], functional.batch_norm_relu, arguments)

    def unfusible(self, norm: Node, arguments: dict[str, Any], relu: Node) -> str | None:
        """Why a batch norm and its ReLU stay, in words, or None."""
        input = _value(arguments["input"])
        numbers = [arguments[name] for name in ("training", "momentum", "eps") if name in arguments]
        if not all(isinstance(number, (bool, int, float)) for number in numbers):
            return "its momentum or eps is no plain number"
        vectors = [_value(arguments.get(name)) for name in PARAMETERS["batch_norm"][1:5]]
        if (vectors[0] is None) != (vectors[1] is None):
            return "it has one of the two running statistics"
        if any(t is not None and t.dtype not in (input.dtype, torch.float32) for t in vectors):
            return "its vectors have neither its input's dtype nor float32"
        if not _undisturbed(norm, relu):
            return "something is written in place or switched before its ReLU"
        return _off_kernels("batch_norm_relu", input, batch_norm.uncovered(input))

    def fuse_pool(self, norm: Node, arguments: dict[str, Any], relu: Node) -> bool:
        pool = _only_user(relu)
        geometry = self.fusible_windows(pool, "max_pool2d", relu)
        if geometry is None:
            return False
        given, indices = _arguments(pool), None
        positions = isinstance(_value(pool), tuple)
        if positions:
            indices = _outputs(pool)[1]
            if indices is None:
                return False
        elif not arguments["training"] and not _value(relu).requires_grad:
            return False  # a pass that keeps nothing, and the inner compiler's as well
        bias = self.absorbed_bias(norm, arguments)
        more = {**geometry, "ceil_mode": given.get("ceil_mode", False), "return_offsets": positions, "input_bias": bias}
        compact = pool in self.compact
        self.put(norm, [norm, relu, pool], functional.batch_norm_relu_max_pool2d, arguments | more)
        if positions and not compact:
            self.convert(indices, arguments["input"], geometry)
        return True

    def convert(self, offsets: Node, image: Node, geometry: dict[str, Any]) -> None:
        """Behind offsets, the indices for those who read indices."""
        width = _value(image).shape[-1]
        with self.graph.inserting_before(offsets.next):
            if not isinstance(width, int):
                meta, width = {"example_value": width}, self.graph.call_method("size", (image, -1))
                width.meta = meta
            indices = self.graph.call_function(functional.offsets_to_indices, (offsets,), {**geometry, "width": width})
        indices.meta = dict(offsets.meta)
        offsets.replace_all_uses_with(indices, delete_user_cb=lambda user: user is not indices)
        value = _value(offsets)
        with value.fake_mode:
            offsets.meta["example_value"] = torch.empty_like(value, dtype=torch.uint8)

    def fuse_unpool(self, norm: Node, arguments: dict[str, Any], relu: Node) -> bool:
        unpool = _only_user(relu)
        geometry = self.fusible_windows(unpool, "max_unpool2d", relu)
        if geometry is None or unpool not in self.compact:
            return False
        given = _arguments(unpool)
        size = given.get("output_size")
        at = norm
        if not all(node < norm for node in _nodes((given["indices"], size))):  # made behind it
            at = unpool
            if any(_name(node) == "batch_norm" for node in _between(norm, unpool)):
                return False  # which may move the same running statistics, before or after
        more = {**geometry, "offsets": given["indices"], "output_size": size}
        more["input_bias"] = self.absorbed_bias(norm, arguments)
        self.put(at, [norm, relu, unpool], functional.batch_norm_relu_max_unpool2d, arguments | more)
        return True

    def fusible_windows(self, node: Node | None, name: str, relu: Node) -> dict[str, Any] | None:
        """kernel_size, stride and padding of what follows a ReLU, if it is of that name and goes with a batch norm."""
        if _name(node) != name or _arguments(node)["input"] is not relu or not _undisturbed(relu, node):
            return None
        geometry = _windows(_arguments(node))
        if geometry is None or not fusible(*geometry[:2]):
            return None
        return dict(zip(("kernel_size", "stride", "padding"), geometry, strict=True))

    def absorbed_bias(self, norm: Node, arguments: dict[str, Any]) -> Node | None:
        """The bias of a convolution that the batch norm alone reads, taken out of the convolution."""
        conv = arguments["input"]
        if _name(conv) not in ("conv2d", "conv_transpose2d") or _only_user(conv) is not norm:
            return None
        given = _arguments(conv)
        bias = given.get("bias")
        if (
            bias is None
            or not _undisturbed(conv, norm)
            or _value(bias).dtype not in (torch.float32, _value(conv).dtype)
        ):
            return None
        conv.args, conv.kwargs = (), {**given, "bias": None}
        self.report.rewritten["input_bias"] += 1
        return bias

    def fold_into_conv_transpose(self, norm: Node, arguments: dict[str, Any], relu: Node) -> bool:
        conv = arguments["input"]
        if _name(conv) != "conv_transpose2d" or _only_user(conv) is not norm or not _undisturbed(conv, norm):
            return False
        given = _arguments(conv)
        if conv_off_kernels(conv, given, fused=True) is not None:
            return False
        names = dict(running_mean="running_mean", running_var="running_var", weight="norm_weight", bias="norm_bias")
        state = {new: arguments.get(name) for name, new in names.items()}
        whole = {**CONV_TRANSPOSE_DEFAULTS, **given, **state, "eps": arguments.get("eps", 1e-5)}
        self.put(norm, [conv, norm, relu], conv_transpose2d_batch_norm_relu, whole)
        return True

    # --- a loss of resized logits

    def fuse_upsampling(self, resized: Node, arguments: dict[str, Any]) -> None:
        losses = [user for user in resized.users if _name(user) == "cross_entropy"]
        if not losses:
            return
        loss = losses[0]
        given = _arguments(loss)
        reason = self.unpaired(resized, arguments, loss, given)
        if reason is not None:
            self.leave(resized, "upsample_cross_entropy", reason)
            return
        whole = {name: value for name, value in (given | arguments).items() if name not in LEGACY}
        self.put(loss, [resized, loss], upsample_cross_entropy, whole)

    def unpaired(self, resized: Node, arguments: dict[str, Any], loss: Node, given: dict[str, Any]) -> str | None:
        """Why resizing and loss stay apart, in words, or None."""
        if _only_user(resized) is not loss or given["input"] is not resized or given["target"] is resized:
            return "its output is not read by the loss alone"
        mode = arguments.get("mode", "nearest")
        if mode not in upsample.MODES or arguments.get("antialias"):
            return f"mode {mode!r}" + (" with antialias" if arguments.get("antialias") else "")
        if any(given.get(name) is not None for name in LEGACY[:2]):
            return "the loss has size_average or reduce"
        input, target, weight = _value((arguments["input"], given["target"], given.get("weight")))
        if target.is_floating_point():
            return "a target of class probabilities"
        if input.dim() != 4:
            return f"{input.dim()}-D logits"
        if weight is not None and (weight.requires_grad or weight.dtype not in (torch.float32, input.dtype)):
            return "a weight that needs a gradient, or of another dtype"
        if not _undisturbed(resized, loss):
            return "something is written in place or switched before the loss"
        return _off_kernels("upsample_cross_entropy", input, upsample.uncovered(input, _value(resized).shape[-2:]))

    # --- single calls

    def replace_pool(self, pool: Node, arguments: dict[str, Any]) -> None:
        input = _value(arguments["input"])
        reason = _off_kernels("max_pool2d", input, windows.uncovered(input))
        positions = isinstance(_value(pool), tuple)
        if reason is None and not positions and not input.requires_grad:
            reason = "without indices or a gradient the inner compiler makes one pass of it as well"
        if reason is not None:
            self.leave(pool, "max_pool2d", reason)
            return
        arguments.pop("return_indices", None)
        if pool in self.compact:
            self.replace(pool, functional.max_pool2d_with_offsets, arguments)
        else:
            self.replace(pool, functional.max_pool2d, {**arguments, "return_indices": positions})

    def replace_unpool(self, unpool: Node, arguments: dict[str, Any]) -> None:
        if unpool in self.compact:
            arguments["offsets"] = arguments.pop("indices")
            self.replace(unpool, functional.max_unpool2d_with_offsets, arguments)
            return
        input = _value(arguments["input"])
        reason = _off_kernels("max_unpool2d", input, windows.uncovered(input))
        if reason is not None:
            self.leave(unpool, "max_unpool2d", reason)
            return
        self.replace(unpool, functional.max_unpool2d, arguments)

    def replace_conv_transpose(self, conv: Node, arguments: dict[str, Any]) -> None:
        reason = conv_off_kernels(conv, arguments)
        if reason is not None:
            self.leave(conv, "conv_transpose2d", reason)
            return
        self.replace(conv, functional.conv_transpose2d, arguments)

    def replace_cross_entropy(self, loss: Node, arguments: dict[str, Any]) -> None:
        input, target, weight = _value((arguments["input"], arguments["target"], arguments.get("weight")))
        reason = _off_kernels("cross_entropy", input, cross_entropy_operators.uncovered(input, target, weight))
        if reason is not None:
            self.leave(loss, "cross_entropy", reason)
            return
        self.replace(loss, cross_entropy, arguments)


def _nodes(argument: Any) -> list[Node]:
    found: list[Node] = []
    map_arg(argument, found.append)
    return found


def conv_off_kernels(conv: Node, arguments: dict[str, Any], fused: bool = False) -> str | None:
    """Why a transposed convolution stays torch's, in words, or None.

    A compiled call that torch runs in the end would be worse off than torch's own, whose bias Inductor fuses: so it
    must be known to be the faster here.
    """
    given = CONV_TRANSPOSE_DEFAULTS | arguments
    input, weight, bias = _value((given["input"], given["weight"], given["bias"]))
    stride, padding, extra, groups, dilation = (given[name] for name in CONV_TRANSPOSE[3:])
    geometry = [_pair(stride), _pair(padding), _pair(extra), groups, _pair(dilation)]
    uncovered = conv_transpose_operators.uncovered(input, weight, geometry[0], geometry[4])
    preferred = None
    if uncovered is None and dispatch.get_backend() == "auto":
        image, dtype = input if input.dim() == 4 else input.unsqueeze(0), _value(conv).dtype
        after = (weight, True) if fused else (None, False)  # that there is a scale counts, not what it is
        bias = weight if fused else bias
        preferred = conv_transpose_operators.preferred(
            conv_transpose_operators.FORWARD, image, weight, geometry, bias, *after, dtype
        )
    return _off_kernels("conv_transpose2d", input, uncovered, preferred)


def upsample_cross_entropy(input: Tensor, target: Tensor, **rest: Any) -> Tensor:
    """functional.upsample_cross_entropy with a loss of torch's dtype."""
    return with_torch_dtype(functional.upsample_cross_entropy(input, target, **rest), input)
