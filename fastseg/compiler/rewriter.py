"""The base class of the rewrite rules, and the edits that rules make to a graph."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Generic, TypeVar

from torch.fx import Graph, Node

from .graph import function_name
from .report import GraphReport, NotRewritten

Match = TypeVar("Match")


class Rewriter:
    """One graph while its calls are rewritten, and the report of what was done.

    with_offsets: the pools whose indices are known to become uint8 offsets, and the unpools that read these.
    """

    def __init__(self, graph: Graph, report: GraphReport) -> None:
        self.graph, self.report = graph, report
        self.with_offsets: set[Node] = set()

    def apply(self, alternatives: Sequence[Rule[Any]]) -> None:
        """Apply the first rule that rewrites it to each call; all of the rules are for calls of one function."""
        (function,) = {rule.function for rule in alternatives}
        for node in [node for node in self.graph.nodes if function_name(node) == function]:
            for rule in alternatives:
                if self._rewrites(rule, node):
                    break

    def _rewrites(self, rule: Rule[Match], node: Node) -> bool:
        match = rule.match(self, node)
        if match is None:
            return False
        reason = rule.obstacle(self, match)
        if reason is not None:
            self.report.left.append(NotRewritten(node.name, rule.replacement, reason))
            return False
        rule.rewrite(self, match)
        return True

    def replace(self, node: Node, function: Callable[..., Any], arguments: dict[str, Any]) -> None:
        """Let a node call another function."""
        node.op, node.target, node.args, node.kwargs = "call_function", function, (), arguments
        self.report.rewritten[function.__name__] += 1

    def fuse(self, at: Node, chain: list[Node], function: Callable[..., Any], arguments: dict[str, Any]) -> None:
        """Replace a chain of nodes by one call, inserted in front of `at`, that returns what the last node returned."""
        with self.graph.inserting_before(at):
            fused = self.graph.call_function(function, (), arguments)
        fused.meta = dict(chain[-1].meta)
        chain[-1].replace_all_uses_with(fused)
        for node in reversed(chain):
            self.graph.erase_node(node)
        self.report.rewritten[function.__name__] += 1


class Rule(ABC, Generic[Match]):
    """A rewrite rule: what it matches, why a match may not be rewritten, and what is put in.

    function: the function whose calls it looks at. replacement: what such a call becomes, as reports name it.
    """

    function: ClassVar[str]
    replacement: ClassVar[str]

    @abstractmethod
    def match(self, rewriter: Rewriter, node: Node) -> Match | None:
        """The calls around `node` that the rule is about, or None where it does not apply; that is not reported."""

    def obstacle(self, rewriter: Rewriter, match: Match) -> str | None:
        """Why a match is not rewritten, for the report, or None if the rewrite is proven to be safe."""
        return None

    @abstractmethod
    def rewrite(self, rewriter: Rewriter, match: Match) -> None:
        """Put the fused call into the graph."""
