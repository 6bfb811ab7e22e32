"""What the compile backend did to a graph."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple


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
