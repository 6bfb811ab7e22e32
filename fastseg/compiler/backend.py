"""torch.compile(model, backend="fastseg"): Dynamo's graph with fastseg's kernels in it, handed on to Inductor."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from torch.fx import GraphModule

from .. import torch_internals

log = logging.getLogger("fastseg")


def compile_backend(
    graph: GraphModule, inputs: Sequence[Any], *, mode: str | None = None, options: dict[str, Any] | None = None
) -> Callable[..., Any]:
    """A backend for torch.compile: rewrites what the graph proves safe and hands the rest to another one.

    torch.compile(model, backend="fastseg") where fastseg is installed, else backend=fastseg.compile_backend. Put in
    are, where the tensors would run on the kernels (as fastseg.backend says when the graph is compiled): the fused
    forms of batch norm, ReLU, pooling and unpooling; convolutions' biases into the batch norm behind them; transposed
    convolution, batch norm and ReLU in evaluation; interpolate and cross_entropy; uint8 offsets for int64 indices that
    only unpools read; and max_pool2d, max_unpool2d, conv_transpose2d and cross_entropy by themselves. docs/compile.md
    says when. Results, gradients and running statistics are the model's own, to rounding.

    mode: torch.compile's. options: "inner", the backend that gets the graph ("inductor", the default; "aot_eager",
    "eager", any that torch._dynamo knows, or a callable); "report", a function that is called with the GraphReport of
    each graph; any others go to the inner backend, mode too. What was done and what was left, and why, is also logged,
    one line a graph at level INFO of the logger "fastseg".
    """
    from .passes import rewrite  # here, since it imports sympy, which takes longer than all of fastseg

    options = dict(options or {})
    inner, tell = options.pop("inner", "inductor"), options.pop("report", None)
    report = rewrite(graph)
    log.info("compile: %s", report)
    if tell is not None:
        tell(report)
    with torch_internals.compiling():
        if inner == "inductor":
            return torch_internals.inductor_backend(mode, options)(graph, inputs)
        given = {name: value for name, value in (("mode", mode), ("options", options)) if value}
        return torch_internals.lookup_backend(inner)(graph, inputs, **given)
