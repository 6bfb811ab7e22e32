"""What a swap did to each candidate, and how to undo it."""

from __future__ import annotations

import contextlib
import io
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from .class_exchange import exchange, from_picklable, to_picklable

ALREADY_SWAPPED = "is already a layer of fastseg"  # the reason in the report of a second swap


def displayed_name(name: str) -> str:
    """The name of a module for a report; that of the model itself is empty."""
    return name or "(the model)"


@dataclass(frozen=True)
class Candidate:
    """A layer or sequence that swap looked at.

    Attributes:
        module: the module.
        names: all of its names in the model.
        op: the operator, out of the names that swap's `ops` takes.
        found: its class before the swap.
        given: its class after the swap.
        reason: why it was not swapped, or None if it was.
        wanted: False if `ops` or `filter_fn` excluded it.
        together: for a sequence, the names of the children in each group that runs fused.
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
        return vars(self) | {"given": to_picklable(self.given)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state | {"given": from_picklable(state["given"])})

    @property
    def name(self) -> str:
        """The first of its names."""
        return self.names[0]

    @property
    def swapped(self) -> bool:
        return self.reason is None

    @property
    def class_name(self) -> str:
        return f"{self.found.__module__}.{self.found.__qualname__}"

    @property
    def result(self) -> str:
        """The last column of the printed report: "yes" with the fused groups, or "no" with the reason."""
        if self.reason is not None:
            return f"no: {self.reason}"
        return ": ".join(["yes", *filter(None, [", ".join(" + ".join(names) for names in self.together)])])

    def as_dict(self) -> dict[str, Any]:
        """The candidate as plain lists, strings and booleans, for json."""
        return {
            "names": list(self.names),
            "op": self.op,
            "class": self.class_name,
            "swapped": self.swapped,
            "reason": self.reason,
            "together": [list(names) for names in self.together],
        }


class SwapReport:
    """What `swap` did to each candidate, and how to undo it. Printed, it is a table.

    Attributes:
        model: the class name of the model.
        candidates: all layers and sequences that swap looked at, as :class:`Candidate`.
        swapped: the candidates that were swapped.
        left: the candidates that were not swapped; each has a `reason`.
        compact_indices: whether the pools return uint8 offsets to the unpools.
        compact_reason: why they do not, if compact_indices=True was requested; else None.

    Example:
        >>> import fastseg
        >>> from torch import nn
        >>> report = fastseg.swap(nn.ModuleDict({"pool": nn.MaxPool2d(2), "up": nn.MaxUnpool2d(2)}), ops=["max_pool2d"])
        >>> [(layer.name, layer.reason) for layer in report.left]
        [('up', 'is not in ops')]
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
        """Give each swapped layer its old class back. Its weights keep their trained values.

        A layer that has got a third class since the swap keeps it. Parametrizations and fully_shard applied after the
        swap do not count as a third class: they stay, around the old one.
        """
        for candidate in self.swapped:
            exchange(candidate.module, candidate.given, candidate.found)

    @contextlib.contextmanager
    def undone(self) -> Iterator[None]:
        """``with report.undone(): ...`` undoes the swap for the block and swaps again after it.

        For torch.onnx.export, torch.jit.script and other code that depends on the classes of layers. Layers that were
        already undone before stay undone.
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
        text = f"{self.model}: {len(self.swapped)} of {len(self.candidates)} layers swapped"
        if swapped:
            text += f" ({', '.join(f'{count} {op}' for op, count in sorted(swapped.items()))})"
        if self.left:
            text += "; not swapped: " + ", ".join(f"{layer.name} ({layer.reason})" for layer in self.left)
        return text + (f"; indices stay int64: {self.compact_reason}" if self.compact_reason else "")

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
            in_torch_nn = getattr(nn, layer.found.__name__, None) is layer.found
            shown = f"torch.nn.{layer.found.__name__}" if in_torch_nn else layer.class_name
            table.add_row(*map(Text, ("\n".join(layer.names), shown, layer.result)))
        if self.compact_indices:
            table.caption = "the pools return uint8 offsets to the unpools"
        elif self.compact_reason:
            table.caption = f"indices stay int64: {self.compact_reason}"
        return table

    def __str__(self) -> str:
        from rich.console import Console

        width = shutil.get_terminal_size((160, 24)).columns  # 160 without a terminal
        console = Console(file=io.StringIO(), width=width, color_system=None)
        console.print(self)
        return console.file.getvalue().rstrip("\n")
