"""What the compile backend did to a graph."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple


class NotRewritten(NamedTuple):
    """A candidate that was not rewritten.

    node: the name of the node in the graph. rewrite: the function that would have replaced it. reason: why it was not
    replaced.
    """

    node: str
    rewrite: str
    reason: str

    def __str__(self) -> str:
        return f"{self.node} to {self.rewrite}: {self.reason}"


@dataclass
class GraphReport:
    """What `compile_backend` did to one graph.

    rewritten: how often each function was put in, by its name. "input_bias" counts the biases of convolutions that
    moved into the batch norm after them. left: the candidates that were not rewritten, and why.
    """

    rewritten: Counter[str] = field(default_factory=Counter)
    left: list[NotRewritten] = field(default_factory=list)

    def __str__(self) -> str:
        done = ", ".join(f"{name} {count}" for name, count in sorted(self.rewritten.items())) or "nothing"
        return f"rewritten: {done}" + (f"; not rewritten: {'; '.join(map(str, self.left))}" if self.left else "")
