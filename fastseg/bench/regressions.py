"""`fastseg bench compare`: what became slower, larger or wrong between two result files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .report import CASE, Results
from .results import Record

LESS_IS_BETTER = {"operators": ("ms", "MiB"), "models": ("ms", "MiB"), "overhead": ("us",)}
NOT_MEASURED = ("not run", "unable: not installed")


@dataclass(frozen=True)
class Change:
    """One number of fastseg in both files.

    verdict: "same", "faster", "regression", "lost" (the new file says why there is no number) or "missing".
    """

    case: tuple[Any, ...]
    provider: str
    metric: str
    old: float
    new: float | None
    verdict: str
    note: str = ""

    @property
    def failed(self) -> bool:
        return self.verdict in ("regression", "lost")

    @property
    def name(self) -> str:
        return " ".join(str(x) for x in self.case[: CASE.index("gpu")] if x)


def fraction(text: str) -> float:
    """0.05 for "5%" and for "0.05". Raises ValueError for other text and for negative numbers."""
    try:
        value = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise ValueError(f"the limit must be a fraction such as 5% or 0.05, but is {text!r}")
    return value


def find_changes(old: list[Record], new: list[Record], limit: float) -> list[Change]:
    """The change of every number of fastseg in `old`. Raises ValueError if the files have no number in common."""
    changes = []
    for part, metrics in LESS_IS_BETTER.items():
        before, after = Results(old, part), Results(new, part)
        notes = _notes(new, part)
        for (case, who, metric), record in before.values.items():
            if metric not in metrics or not who.startswith("fastseg"):
                continue
            value = after.p50(case, who, metric)
            place = (*case[:3], *case[5:], who)
            note = "" if value is not None else notes.get((*place, case[3]), notes.get((*place, ""), ""))
            note = note if value is not None else after.failed.get((case, who), note)
            changes.append(
                Change(case, who, metric, record["p50"], value, _verdict(record["p50"], value, note, limit), note)
            )
    if not any(change.new is not None or change.verdict == "lost" for change in changes):
        raise ValueError("the two files have no number of fastseg in common: they are of different GPUs or cases")
    return changes


def _notes(records: list[Record], part: str) -> dict[tuple[Any, ...], str]:
    """Why providers have no time, by case."""
    found = {}
    for r in records:
        if r["part"] == part and r["metric"] == "status":
            key = tuple(
                r[name] for name in ("where", "operator", "shape", "dtype", "layout", "gpu", "provider", "mode")
            )
            found[key] = "" if r["note"] == "right" else r["note"]
    return found


def _verdict(old: float, new: float | None, note: str, limit: float) -> str:
    if new is None:
        return "lost" if note and not note.startswith(NOT_MEASURED) else "missing"
    if new > old * (1 + limit):
        return "regression"
    return "faster" if new < old * (1 - limit) else "same"


def table(changes: list[Change], limit: float) -> Any:
    """A rich table of the changes beyond the limit, the worst first."""
    from rich.table import Table

    made = Table(title=f"fastseg before and after, beyond {limit:.1%}")
    for column in ("case", "provider", ""):
        made.add_column(column)
    for column in ("old", "new", "change"):
        made.add_column(column, justify="right")
    made.add_column("verdict")
    shown = [change for change in changes if change.verdict != "same"]
    for c in sorted(shown, key=lambda c: (not c.failed, -(c.new / c.old if c.new and c.old else float("inf")))):
        numbers = ("", "") if c.new is None else (f"{c.new:.4g}", f"{c.new / c.old - 1:+.1%}" if c.old else "")
        verdict = f"{c.verdict}: {c.note}" if c.note else c.verdict
        made.add_row(c.name, c.provider, c.metric, f"{c.old:.4g}", *numbers, verdict)
    return made
