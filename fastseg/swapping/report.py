"""What a swap did, layer by layer, and the way back; what the compile backend did to a graph."""

from __future__ import annotations

import contextlib
import io
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from .class_exchange import exchange, named, of_name


@dataclass(frozen=True)
class Candidate:
    """A layer that swap looked at.

    names: all of its names in the model. op: which of swap's operators it belongs to. found: its class before; given:
    the one it got. reason: why it was left, or None; wanted: False where that is what ops or filter_fn asked for.
    together: of a sequence, the names of the children that run as one, for each such group.
    """

    module: nn.Module
    names: tuple[str, ...]
    op: str
    found: type[nn.Module]
    given: type[nn.Module]
    reason: str | None = None
    wanted: bool = True
    together: tuple[tuple[str, ...], ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"given": named(self.given)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state | {"given": of_name(state["given"])})

    @property
    def swapped(self) -> bool:
        return self.reason is None

    @property
    def class_name(self) -> str:
        return f"{self.found.__module__}.{self.found.__qualname__}"

    @property
    def result(self) -> str:
        if self.reason is not None:
            return f"no: {self.reason}"
        return ": ".join(["yes", *filter(None, [", ".join(" + ".join(names) for names in self.together)])])

    def as_dict(self) -> dict[str, Any]:
        return {
            "names": list(self.names),
            "op": self.op,
            "class": self.class_name,
            "swapped": self.swapped,
            "reason": self.reason,
            "together": [list(names) for names in self.together],
        }


class SwapReport:
    """What `swap` did, layer by layer, and the way back.

    candidates: all of them; swapped, left: the two kinds. compact_indices: whether uint8 offsets flow from the pools to
    the unpools, and compact_reason: why they do not although asked for. Printed, it is a table.
    """

    def __init__(self, model: str, candidates: list[Candidate], compact: bool, compact_reason: str | None) -> None:
        self.model, self.candidates = model, candidates
        self.compact_indices, self.compact_reason = compact, compact_reason

    @property
    def swapped(self) -> list[Candidate]:
        return [candidate for candidate in self.candidates if candidate.swapped]

    @property
    def left(self) -> list[Candidate]:
        return [candidate for candidate in self.candidates if not candidate.swapped]

    def undo(self) -> None:
        """Give each swapped layer its old class back, unless it has another one by now. Trained weights stay.

        Parametrizations and fully_shard that came after the swap are no other class: they stay, around the old one.
        """
        for candidate in self.swapped:
            exchange(candidate.module, candidate.given, candidate.found)

    @contextlib.contextmanager
    def undone(self) -> Iterator[None]:
        """`with report.undone(): ...` is undo, and the swap again behind it: the plain model, for torch.onnx.export,
        torch.jit.script and everything else that looks at classes. What was undone before stays so.
        """
        swapped = [type(candidate.module) for candidate in self.swapped]
        self.undo()
        plain = [type(candidate.module) for candidate in self.swapped]
        try:
            yield
        finally:
            for candidate, before, after in zip(self.swapped, swapped, plain, strict=True):
                if before is not after:
                    exchange(candidate.module, candidate.found, candidate.given)

    @property
    def summary(self) -> str:
        """The report in one line."""
        swapped = Counter(candidate.op for candidate in self.swapped)
        said = f"{self.model}: {len(self.swapped)} of {len(self.candidates)} layers swapped"
        if swapped:
            said += f" ({', '.join(f'{count} {op}' for op, count in sorted(swapped.items()))})"
        if self.left:
            said += "; left: " + ", ".join(f"{layer.names[0]} ({layer.reason})" for layer in self.left)
        return said + (f"; indices stay int64: {self.compact_reason}" if self.compact_reason else "")

    def as_dict(self) -> dict[str, Any]:
        """The report as plain lists, strings and booleans, for json."""
        return {
            "model": self.model,
            "layers": [candidate.as_dict() for candidate in self.candidates],
            "compact_indices": self.compact_indices,
            "compact_reason": self.compact_reason,
        }

    def __rich__(self) -> Any:
        from rich.table import Table
        from rich.text import Text

        table = Table(title=f"{self.model}: {len(self.swapped)} of {len(self.candidates)} layers swapped")
        for column in ("layer", "class", "swapped"):
            table.add_column(column, overflow="fold")
        for layer in self.candidates:
            public = getattr(nn, layer.found.__name__, None) is layer.found  # which has a shorter name
            shown = f"torch.nn.{layer.found.__name__}" if public else layer.class_name
            table.add_row(*map(Text, ("\n".join(layer.names), shown, layer.result)))
        if self.compact_indices:
            table.caption = "uint8 offsets flow from the pools to the unpools"
        elif self.compact_reason:
            table.caption = f"indices stay int64: {self.compact_reason}"
        return table

    def __str__(self) -> str:
        from rich.console import Console

        width = shutil.get_terminal_size((160, 24)).columns  # 160 where there is no terminal
        console = Console(file=io.StringIO(), width=width, color_system=None)
        console.print(self)
        return console.file.getvalue().rstrip("\n")
