"""The rewrite rules of the compile backend, and the order in which they run.

A call is rewritten where the graph proves that results stay the same: each tensor between the fused calls has one
reader, nothing between them writes in place or switches a mode, and the sizes agree for every input that the graph
accepts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from ... import dispatch
from ..graph import query_sizes_at_inputs
from ..report import GraphReport
from ..rewriter import Rewriter, Rule
from .batch_norm import (
    FuseBatchNormReLU,
    FuseBatchNormReLUMaxPool,
    FuseBatchNormReLUMaxUnpool,
    FuseConvTransposeBatchNormReLU,
)
from .convolution import ReplaceConvTranspose
from .losses import FuseUpsampleCrossEntropy, ReplaceCrossEntropy
from .pooling import FindOffsets, ReplaceMaxPool, ReplaceMaxUnpool

CHECKPOINT = torch.ops.higher_order.tag_activation_checkpoint

# In this order; the rules of one row are alternatives for the same call, and the first that rewrites it wins.
RULES: tuple[tuple[Rule[Any], ...], ...] = (
    (FindOffsets(),),
    (
        FuseConvTransposeBatchNormReLU(),
        FuseBatchNormReLUMaxPool(),
        FuseBatchNormReLUMaxUnpool(),
        FuseBatchNormReLU(),
    ),
    (FuseUpsampleCrossEntropy(),),
    (ReplaceMaxPool(),),
    (ReplaceMaxUnpool(),),
    (ReplaceConvTranspose(),),
    (ReplaceCrossEntropy(),),
)


def rewrite(module: GraphModule) -> GraphReport:
    """Rewrite a graph, and the bodies of its activation checkpoints, in place."""
    report = GraphReport()
    if dispatch.get_backend() == "torch":
        return report
    bodies = [module.get_submodule(node.args[0].target) for node in _checkpoints(module.graph)]
    for inner in (module, *bodies):
        before = report.rewritten.total()
        rewriter = Rewriter(inner.graph, report)
        query_sizes_at_inputs(inner.graph)
        for alternatives in RULES:
            rewriter.apply(alternatives)
        if report.rewritten.total() > before:
            inner.graph.lint()
            inner.recompile()
    return report


def _checkpoints(graph: Graph) -> Iterator[Node]:
    return (node for node in graph.nodes if node.op == "call_function" and node.target is CHECKPOINT)
