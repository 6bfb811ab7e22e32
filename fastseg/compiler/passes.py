"""What of a graph that Dynamo captured can run on fused kernels, and the graph with those in place.

A rewrite is made where the graph proves it: each tensor between the parts has one reader, nothing is written in place
and no mode is switched in between, and the sizes agree for every input that the graph is for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .. import dispatch, functional
from ..ops.batch_norm import operators as batch_norm
from ..ops.batch_norm.pooling_operators import fusible
from ..ops.convolution import conv_transpose_operators
from ..ops.convolution.conv_transpose_norm import conv_transpose2d_batch_norm_relu
from ..ops.losses import cross_entropy_operators, upsample
from ..ops.pooling import positions
from ..swapping.functions import cross_entropy, with_torch_dtype
from .graph import (
    CONV_TRANSPOSE,
    CONV_TRANSPOSE_DEFAULTS,
    LEGACY,
    PARAMETERS,
    arguments_of,
    asks_size,
    name_of,
    nodes_in,
    off_kernels,
    only_reader,
    only_user,
    outputs_of,
    pair,
    undisturbed,
    value_of,
    windows_of,
)
from .report import GraphReport, Left

CHECKPOINT = torch.ops.higher_order.tag_activation_checkpoint


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


# --- rewriting it ----------------------------------------------------------------------------------------------------


class _Rewriter:
    """The rules, in their order; each gets the nodes of one name and looks at what stands around them."""

    def __init__(self, graph: Graph, report: GraphReport) -> None:
        self.graph, self.report = graph, report
        self.compact: set[Node] = set()  # pools whose indices become offsets, and the unpools that read them

    def run(self) -> None:
        for node in reversed(self.graph.nodes):  # where sizes are not fixed they are asked for in between
            if name_of(node) in ("batch_norm", "relu"):
                for user in filter(asks_size, list(node.users)):
                    user.replace_input_with(node, arguments_of(node)["input"])
        for name, rule in (
            ("max_pool2d", self.find_compact),
            ("batch_norm", self.fuse_batch_norm),
            ("interpolate", self.fuse_upsampling),
            ("max_pool2d", self.replace_pool),
            ("max_unpool2d", self.replace_unpool),
            ("conv_transpose2d", self.replace_conv_transpose),
            ("cross_entropy", self.replace_cross_entropy),
        ):
            for node in [node for node in self.graph.nodes if name_of(node) == name]:
                rule(node, arguments_of(node))

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
        outputs = outputs_of(pool)
        if outputs is None or not isinstance(value_of(pool), tuple):
            return
        indices = outputs[1]
        readers = [] if indices is None else list(indices.users)
        reason = self.needs_indices(arguments, indices, readers)
        if reason is not None:
            self.leave(pool, "max_pool2d_with_offsets", reason)
            return
        self.compact |= {pool, *readers}
        if indices is not None:
            as_offsets(indices)

    def needs_indices(self, arguments: dict[str, Any], indices: Node | None, readers: list[Node]) -> str | None:
        """Why a pool's indices stay int64, in words, or None."""
        input, geometry = value_of(arguments["input"]), windows_of(arguments)
        reason = off_kernels("max_pool2d", input, positions.uncovered(input))
        if reason is not None:
            return reason
        if geometry is None:
            return "it is dilated, or its windows are computed"
        if geometry[0][0] * geometry[0][1] > positions.MAX_OFFSETS:
            return f"a window has more than {positions.MAX_OFFSETS} elements"
        for user in readers:
            given = arguments_of(user) if name_of(user) == "max_unpool2d" else {}
            if given.get("indices") is not indices or given["input"] is indices:
                return f"its indices are read by {user.name}"
            if windows_of(given) != geometry:
                return f"{user.name} has other windows"
            if value_of(user).dtype != value_of(given["input"]).dtype:
                return f"autocast casts what {user.name} unpools"
            size = value_of(given.get("output_size"))
            if size is None:
                pooled = value_of(given["input"]).shape[-2:]
                size = [(o - 1) * s - 2 * p + k for o, k, s, p in zip(pooled, *geometry, strict=True)]
            if not all(statically_known_true(a == b) for a, b in zip(size[-2:], input.shape[-2:], strict=True)):
                return f"{user.name} may give another size than the pool had"
        return None

    # --- batch norm and what follows

    def fuse_batch_norm(self, norm: Node, arguments: dict[str, Any]) -> None:
        relu = only_user(norm)
        if name_of(relu) != "relu":
            if any(name_of(user) == "relu" for user in norm.users):
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
        input = value_of(arguments["input"])
        numbers = [arguments[name] for name in ("training", "momentum", "eps") if name in arguments]
        if not all(isinstance(number, (bool, int, float)) for number in numbers):
            return "its momentum or eps is no plain number"
        vectors = [value_of(arguments.get(name)) for name in PARAMETERS["batch_norm"][1:5]]
        if (vectors[0] is None) != (vectors[1] is None):
            return "it has one of the two running statistics"
        if any(t is not None and t.dtype not in (input.dtype, torch.float32) for t in vectors):
            return "its vectors have neither its input's dtype nor float32"
        if not undisturbed(norm, relu):
            return "something is written in place or switched before its ReLU"
        return off_kernels("batch_norm_relu", input, batch_norm.uncovered(input))

    def fuse_pool(self, norm: Node, arguments: dict[str, Any], relu: Node) -> bool:
        pool = only_user(relu)
        geometry = self.fusible_windows(pool, "max_pool2d", relu)
        if geometry is None:
            return False
        given, indices = arguments_of(pool), None
        positions = isinstance(value_of(pool), tuple)
        if positions:
            outputs = outputs_of(pool)
            if outputs is None:
                return False
            indices = outputs[1]
        elif not arguments["training"] and not value_of(relu).requires_grad:
            return False  # a pass that keeps nothing, and the inner compiler's as well
        bias = self.absorbed_bias(norm, arguments)
        more = {**geometry, "ceil_mode": given.get("ceil_mode", False), "return_offsets": positions, "input_bias": bias}
        compact = pool in self.compact
        self.put(norm, [norm, relu, pool], functional.batch_norm_relu_max_pool2d, arguments | more)
        if indices is not None and not compact:
            self.convert(indices, arguments["input"], geometry)
        return True

    def convert(self, offsets: Node, image: Node, geometry: dict[str, Any]) -> None:
        """Behind offsets, the indices for those who read indices."""
        width = value_of(image).shape[-1]
        with self.graph.inserting_before(offsets.next):
            if not isinstance(width, int):
                meta, width = {"example_value": width}, self.graph.call_method("size", (image, -1))
                width.meta = meta
            indices = self.graph.call_function(functional.offsets_to_indices, (offsets,), {**geometry, "width": width})
        indices.meta = dict(offsets.meta)
        offsets.replace_all_uses_with(indices, delete_user_cb=lambda user: user is not indices)
        as_offsets(offsets)

    def fuse_unpool(self, norm: Node, arguments: dict[str, Any], relu: Node) -> bool:
        unpool = only_user(relu)
        geometry = self.fusible_windows(unpool, "max_unpool2d", relu)
        if geometry is None or unpool not in self.compact:
            return False
        given = arguments_of(unpool)
        size = given.get("output_size")
        at = norm
        if not all(node < norm for node in nodes_in((given["indices"], size))):  # made behind it
            at = unpool
            running = nodes_in((arguments.get("running_mean"), arguments.get("running_var")))
            others = {user for node in running for user in node.users} - {norm}
            if not all(unpool < user or (user < norm and name_of(user) == "batch_norm") for user in others):
                return False  # who reads or moves them in between, or through a view, would not find them moved
        more = {**geometry, "offsets": given["indices"], "output_size": size}
        more["input_bias"] = self.absorbed_bias(norm, arguments)
        self.put(at, [norm, relu, unpool], functional.batch_norm_relu_max_unpool2d, arguments | more)
        return True

    def fusible_windows(self, node: Node | None, name: str, relu: Node) -> dict[str, Any] | None:
        """kernel_size, stride and padding of what follows a ReLU, if it is of that name and goes with a batch norm."""
        if name_of(node) != name or arguments_of(node)["input"] is not relu or not undisturbed(relu, node):
            return None
        geometry = windows_of(arguments_of(node))
        if geometry is None or not fusible(*geometry[:2]):
            return None
        return dict(zip(("kernel_size", "stride", "padding"), geometry, strict=True))

    def absorbed_bias(self, norm: Node, arguments: dict[str, Any]) -> Node | None:
        """The bias of a convolution that the batch norm alone reads, taken out of the convolution."""
        conv = arguments["input"]
        if name_of(conv) not in ("conv2d", "conv_transpose2d") or only_reader(conv) is not norm:
            return None
        given = arguments_of(conv)
        bias = given.get("bias")
        if bias is None or not undisturbed(conv, norm):
            return None
        if value_of(bias).dtype not in (torch.float32, value_of(conv).dtype):
            return None
        conv.args, conv.kwargs = (), {**given, "bias": None}
        self.report.rewritten["input_bias"] += 1
        return bias

    def fold_into_conv_transpose(self, norm: Node, arguments: dict[str, Any], relu: Node) -> bool:
        conv = arguments["input"]
        if name_of(conv) != "conv_transpose2d" or only_user(conv) is not norm or not undisturbed(conv, norm):
            return False
        given = arguments_of(conv)
        if conv_off_kernels(conv, given, fused=True) is not None:
            return False
        names = dict(running_mean="running_mean", running_var="running_var", weight="norm_weight", bias="norm_bias")
        state = {new: arguments.get(name) for name, new in names.items()}
        whole = {**CONV_TRANSPOSE_DEFAULTS, **given, **state, "eps": arguments.get("eps", 1e-5)}
        self.put(norm, [conv, norm, relu], conv_transpose2d_batch_norm_relu, whole)
        return True

    # --- a loss of resized logits

    def fuse_upsampling(self, resized: Node, arguments: dict[str, Any]) -> None:
        losses = [user for user in resized.users if name_of(user) == "cross_entropy"]
        if not losses:
            return
        loss = losses[0]
        given = arguments_of(loss)
        reason = self.unpaired(resized, arguments, loss, given)
        if reason is not None:
            self.leave(resized, "upsample_cross_entropy", reason)
            return
        whole = {"mode": "nearest", **given, **arguments}  # interpolate's default, which is not the other's
        whole = {name: value for name, value in whole.items() if name not in LEGACY}
        self.put(loss, [resized, loss], upsample_cross_entropy, whole)

    def unpaired(self, resized: Node, arguments: dict[str, Any], loss: Node, given: dict[str, Any]) -> str | None:
        """Why resizing and loss stay apart, in words, or None."""
        if only_user(resized) is not loss or given["input"] is not resized:
            return "its output is not read by the loss alone"
        mode = arguments.get("mode", "nearest")
        if mode not in upsample.MODES or arguments.get("antialias"):
            return f"mode {mode!r}" + (" with antialias" if arguments.get("antialias") else "")
        if any(given.get(name) is not None for name in LEGACY[:2]):
            return "the loss has size_average or reduce"
        input, target = value_of((arguments["input"], given["target"]))
        if target.is_floating_point():
            return "a target of class probabilities"
        if input.dim() != 4:
            return f"{input.dim()}-D logits"
        if not undisturbed(resized, loss):
            return "something is written in place or switched before the loss"
        return off_kernels("upsample_cross_entropy", input, upsample.uncovered(input, value_of(resized).shape[-2:]))

    # --- single calls

    def replace_pool(self, pool: Node, arguments: dict[str, Any]) -> None:
        input = value_of(arguments["input"])
        reason = off_kernels("max_pool2d", input, positions.uncovered(input))
        with_indices = isinstance(value_of(pool), tuple)
        if reason is None and not with_indices and not input.requires_grad:
            reason = "without indices or a gradient the inner compiler makes one pass of it as well"
        if reason is not None:
            self.leave(pool, "max_pool2d", reason)
            return
        arguments.pop("return_indices", None)
        if pool in self.compact:
            self.replace(pool, functional.max_pool2d_with_offsets, arguments)
        else:
            self.replace(pool, functional.max_pool2d, {**arguments, "return_indices": with_indices})

    def replace_unpool(self, unpool: Node, arguments: dict[str, Any]) -> None:
        if unpool in self.compact:
            arguments["offsets"] = arguments.pop("indices")
            self.replace(unpool, functional.max_unpool2d_with_offsets, arguments)
            return
        input = value_of(arguments["input"])
        reason = off_kernels("max_unpool2d", input, positions.uncovered(input))
        if value_of(unpool).dtype != input.dtype:
            reason = "autocast casts its input"
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
        input, target, weight = value_of((arguments["input"], arguments["target"], arguments.get("weight")))
        reason = off_kernels("cross_entropy", input, cross_entropy_operators.uncovered(input, target, weight))
        if reason is not None:
            self.leave(loss, "cross_entropy", reason)
            return
        self.replace(loss, cross_entropy, arguments)


def as_offsets(indices: Node) -> None:
    """Note that a node's int64 indices are uint8 offsets by now."""
    value = value_of(indices)
    with value.fake_mode:
        indices.meta["example_value"] = torch.empty_like(value, dtype=torch.uint8)


def conv_off_kernels(conv: Node, arguments: dict[str, Any], fused: bool = False) -> str | None:
    """Why a transposed convolution stays torch's, in words, or None.

    A compiled call that torch runs in the end would be worse off than torch's own, whose bias Inductor fuses: so it
    must be known to be the faster here.
    """
    given = CONV_TRANSPOSE_DEFAULTS | arguments
    input, weight, bias = value_of((given["input"], given["weight"], given["bias"]))
    stride, padding, extra, groups, dilation = (given[name] for name in CONV_TRANSPOSE[3:])
    geometry = [pair(stride), pair(padding), pair(extra), groups, pair(dilation)]
    uncovered = conv_transpose_operators.uncovered(input, weight, geometry[0], geometry[4])
    preferred = None
    if uncovered is None and input.is_cuda and dispatch.get_backend() == "auto":
        image, dtype = input if input.dim() == 4 else input.unsqueeze(0), value_of(conv).dtype
        after = (weight, True) if fused else (None, False)  # that there is a scale counts, not what it is
        bias = weight if fused else bias
        preferred = conv_transpose_operators.preferred(
            conv_transpose_operators.FORWARD, image, weight, geometry, bias, *after, dtype
        )
    return off_kernels("conv_transpose2d", input, uncovered, preferred)


def upsample_cross_entropy(input: Tensor, target: Tensor, **rest: Any) -> Tensor:
    """functional.upsample_cross_entropy with a loss of torch's dtype."""
    return with_torch_dtype(functional.upsample_cross_entropy(input, target, **rest), input)
