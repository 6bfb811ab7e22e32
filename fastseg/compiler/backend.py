"""torch.compile(model, backend="fastseg"): put fastseg's kernels into Dynamo's graph and pass it to Inductor."""

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
    """The backend of ``torch.compile(model, backend="fastseg")``: fastseg's kernels in the graph that Dynamo captured.

    Calls are rewritten where the graph proves that the results stay the same and where the kernels would run them; the
    rest of the graph is unchanged. Then the graph goes to another backend, Inductor by default. The rewrites are:

    - batch_norm, relu and a following max_pool2d or max_unpool2d become one call; the bias of a convolution in front of
      the batch norm moves into it;
    - conv_transpose2d, batch_norm and relu become one call in evaluation;
    - interpolate and cross_entropy become upsample_cross_entropy;
    - int64 indices that only unpools read become uint8 offsets;
    - max_pool2d, max_unpool2d, conv_transpose2d and cross_entropy become fastseg's.

    docs/compile.md lists the conditions. Results, gradients and running statistics are those of the model, to rounding.
    The backend setting (`fastseg.backend`) counts at the time of compilation. Each graph's report is logged in one line
    at level INFO of the logger "fastseg".

    Where fastseg is not installed as a package, its entry point is missing: pass ``backend=fastseg.compile_backend``.

    Args:
        graph: the graph, from torch.compile. It is rewritten in place.
        inputs: example inputs, from torch.compile.
        mode: the `mode` of torch.compile, passed to the inner backend.
        options: the `options` of torch.compile. "inner" is the backend that gets the rewritten graph: "inductor" (the
            default), "aot_eager", "eager", any other name that Dynamo knows, or a callable. "report" is a function
            that is called with the :class:`GraphReport` of each graph. All other options go to the inner backend.

    Returns:
        The compiled callable of the inner backend.

    Raises:
        Whatever the inner backend raises, for instance for an option that it does not know.

    Example:
        >>> import torch, fastseg
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
        >>> options = {"inner": "eager", "report": print}
        >>> compiled = torch.compile(model, backend=fastseg.compile_backend, options=options)
        >>> with fastseg.backend("torch"):  # leaves the graph as it is
        ...     y = compiled(torch.randn(2, 3, 8, 8))
        rewritten: nothing
    """
    from .passes import rewrite  # imported here: it loads sympy, which takes longer than fastseg itself

    options = dict(options or {})
    inner, on_report = options.pop("inner", "inductor"), options.pop("report", None)
    report = rewrite(graph)
    log.info("compile: %s", report)
    if on_report is not None:
        on_report(report)
    with torch_internals.compiling():
        if inner == "inductor":
            return torch_internals.inductor_backend(mode, options)(graph, inputs)
        given = {name: value for name, value in (("mode", mode), ("options", options)) if value}
        return torch_internals.lookup_backend(inner)(graph, inputs, **given)
