"""Which cases a report covers."""

from __future__ import annotations

from dataclasses import dataclass

from ..verification.cases import DTYPES, LAYOUTS, Case, Placement


@dataclass(frozen=True)
class Selection:
    """Cases by operator, dtype and memory format.

    dtype: a name of `cases.DTYPES`. layouts: names of `cases.LAYOUTS`. operators: what the names of operators start
    with; empty for all operators.
    """

    dtype: str = "bfloat16"
    layouts: tuple[str, ...] = tuple(LAYOUTS)
    operators: tuple[str, ...] = ()

    def placement(self, layout: str, device: str) -> Placement:
        """The dtype, memory format and device of tensors in one of the layouts."""
        return Placement(DTYPES[self.dtype], LAYOUTS[layout], device)

    def includes(self, case: Case) -> bool:
        """Whether the case's operator is selected."""
        return not self.operators or case.operator.startswith(self.operators)
