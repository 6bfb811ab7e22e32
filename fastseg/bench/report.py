"""`fastseg bench report`: markdown tables and plots from result files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..atomic_write import atomic_write
from .results import Record

CASE = ("where", "operator", "shape", "mode", "launch", "dtype", "layout", "gpu")
WHO_ORDER = ("torch", "torch in network", "torch.compile", "torch.compile max-autotune", "Liger-Kernel", "FlagGems")
OURS = ("fastseg", "fastseg swap", "fastseg triton", "fastseg auto")  # the first one with a time is compared with torch
BARS_OF = {"operators": "forward+backward", "models": "training step"}

Key = tuple[Any, ...]


class Results:
    """The records of one part by case, provider and metric, and the text of a cell: a number or why there is none."""

    def __init__(self, records: Iterable[Record], part: str) -> None:
        self.values: dict[tuple[Key, str, str], Record] = {}
        self.failed: dict[tuple[Key, str], str] = {}
        self.providers: list[str] = []
        records = [record for record in records if record["part"] == part]
        self.cases = list(dict.fromkeys(_key(r) for r in records if r["metric"] != "status"))
        for record in records:  # in order of time: the last one counts
            who = record["provider"]
            if record["metric"] != "status":
                self.values[_key(record), who, record["metric"]] = record
            elif record["note"] != "right":
                self._fail(record)
        names = dict.fromkeys(r["provider"] for r in records if r["provider"] != "inputs")
        self.providers = sorted(names, key=_rank)

    def _fail(self, record: Record) -> None:
        named = {name: record[name] for name in CASE if record[name]}
        for case in self.cases:
            if all(case[CASE.index(name)] == value for name, value in named.items()):
                self.failed[case, record["provider"]] = record["note"]
                for key in [key for key in self.values if key[:2] == (case, record["provider"])]:
                    del self.values[key]

    def p50(self, case: Key, who: str, metric: str = "ms") -> float | None:
        record = self.values.get((case, who, metric))
        return None if record is None else record["p50"]

    def ours(self, case: Key) -> str | None:
        """The provider of fastseg that is compared with torch."""
        return next((who for who in OURS if self.p50(case, who) is not None), None)

    def speed_up(self, case: Key) -> float | None:
        who, base = self.ours(case), self.p50(case, "torch")
        return None if who is None or base is None else base / self.p50(case, who)

    def cell(self, case: Key, who: str, metric: str) -> str:
        record = self.values.get((case, who, metric))
        if record is None:
            return brief(self.failed.get((case, who), ""))
        if record["p20"] == record["p80"]:
            return number(record["p50"])
        return f"{number(record['p50'])} ({number(record['p20'])} to {number(record['p80'])})"


def _key(record: Record) -> Key:
    return tuple(record[name] for name in CASE)


def _rank(name: str) -> tuple[int, int]:
    return (name.startswith("fastseg"), WHO_ORDER.index(name) if name in WHO_ORDER else len(WHO_ORDER))


def number(value: float) -> str:
    """Four significant digits, without an exponent for large numbers."""
    return f"{value:.4g}" if value < 1e4 else f"{value:.0f}"


def brief(note: str) -> str:
    """A short form of a note for a cell. The list below the tables has the whole note."""
    if not note:
        return ""
    return note.partition(":")[0] if not note.startswith("unable: not installed") else "not installed"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return lines + [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]


def _metric_table(found: Results, title: str, metric: str, with_speed_up: bool = False) -> list[str]:
    cases = [case for case in found.cases if any((case, who, metric) in found.values for who in found.providers)]
    if not cases:
        return []
    several = len({case[-1] for case in cases}) > 1
    names = [*CASE[: None if several else -1]]
    rows = []
    for case in cases:
        row = [str(case[CASE.index(name)] or "") for name in names]
        row += [found.cell(case, who, metric) for who in found.providers]
        if with_speed_up:
            ratio = found.speed_up(case)
            row.append("" if ratio is None else f"{ratio:.2f} ({found.ours(case)})")
        rows.append(row)
    head = [*names, *found.providers, *["torch / fastseg"] * with_speed_up]
    return ["", f"## {title}", "", *_table(head, rows)]


def markdown(records: list[Record]) -> str:
    """All tables. Every number is in the records or is the ratio of two numbers in them."""
    lines = ["# Measured", ""]
    machines = dict.fromkeys(tuple(r[name] for name in ("gpu", "driver", "torch", "triton", "commit")) for r in records)
    for gpu, driver, torch, triton, commit in machines:
        times = [r["time"] for r in records if (r["gpu"], r["commit"], r["torch"]) == (gpu, commit, torch)]
        lines.append(
            f"- {gpu or 'CPU (the Triton kernels have no times there)'}, driver {driver or 'none'}, "
            f"torch {torch}, triton {triton or 'none'}, fastseg commit {commit}, {min(times)} to {max(times)}"
        )
    tops = [r for r in records if r["part"] == "ceilings"]
    if tops:
        lines += ["", "Peak rates of this device, measured in the same run: " + ", ".join(
            f"{r['operator']} {number(r['p50'])} {r['metric']} ({r['dtype']})" for r in tops) + "."]  # fmt: skip
    lines += [
        "",
        "Median (20 % to 80 %). An empty cell was not measured; a word instead of a number is explained below.",
    ]
    operators, networks = Results(records, "operators"), Results(records, "models")
    overhead = Results(records, "overhead")
    lines += _metric_table(networks, "Networks, milliseconds", "ms", with_speed_up=True)
    lines += _metric_table(networks, "Networks, peak MiB", "MiB")
    lines += _metric_table(operators, "Operators, milliseconds", "ms", with_speed_up=True)
    lines += _metric_table(operators, "Operators, GB/s of the fewest bytes", "GB/s")
    lines += _metric_table(operators, "Operators, share of the copy's bandwidth", "of copy")
    lines += _metric_table(operators, "Operators, TFLOP/s", "TFLOP/s")
    lines += _metric_table(operators, "Operators, share of the matmul's speed", "of matmul")
    lines += _metric_table(operators, "Operators, peak MiB", "MiB")
    lines += _metric_table(overhead, "Host overhead, microseconds per call, tiny inputs", "us")
    lines += _failures(records)
    return "\n".join(lines) + "\n"


def _failures(records: list[Record]) -> list[str]:
    """Why numbers are missing: one line for each provider and reason, with the cases."""
    last: dict[Key, Record] = {}
    for r in records:
        if r["metric"] == "status":
            last[r["part"], r["provider"], _key(r)] = r
    reasons: dict[tuple[str, str], list[str]] = {}
    for r in last.values():
        if r["note"] != "right":
            case = " ".join(x for x in (r["where"], r["operator"], r["mode"], r["launch"], r["layout"]) if x)
            reasons.setdefault((r["provider"], r["note"]), []).append(case)
    if not reasons:
        return []
    rows = []
    for (who, note), cases in reasons.items():
        rest = f" and {len(cases) - 4} more" if len(cases) > 4 else ""
        rows.append((who, note, "; ".join(cases[:4]) + rest))
    return ["", "## Missing numbers, and why", "", *_table(("provider", "why", "cases"), rows)]


# --- plots -----------------------------------------------------------------------------------------------------------


def _figure(inches: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('the plots need matplotlib: pip install "fastseg-kernels[bench]"') from error
    return Figure(figsize=(10, inches), layout="constrained")


def _label(case: Key) -> str:
    return " ".join(str(part) for part in (case[0], case[1], case[2], case[6]) if part)


def _bars(found: list[tuple[str, dict[str, float]]], xlabel: str, line: float | None, path: Path) -> None:
    names = list(dict.fromkeys(name for _, values in found for name in values))
    figure = _figure(1.5 + sum(0.1 + 0.12 * len(names) for _ in found))
    axes = figure.subplots()
    height = 0.8 / len(names)
    for offset, name in enumerate(names):
        places = [
            (row + (offset - (len(names) - 1) / 2) * height, v[name]) for row, (_, v) in enumerate(found) if name in v
        ]
        axes.barh(*zip(*places, strict=True), height, label=name)
    if line is not None:
        axes.axvline(line, color="black", linewidth=0.8)
    axes.set_yticks(range(len(found)), [label for label, _ in found], fontsize=7)
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.set_xlabel(xlabel)
    axes.legend(fontsize=7, loc="lower left", bbox_to_anchor=(0, 1), ncols=3)  # above the bars
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")


def plots(records: list[Record], out: Path) -> list[Path]:
    """Write the plots that the records have numbers for: speed-up and memory by part, and a roofline."""
    written = []
    where = ", ".join(dict.fromkeys(r["gpu"] or "CPU" for r in records))
    for part, mode in BARS_OF.items():
        found = Results(records, part)
        cases = [case for case in found.cases if case[3:5] == (mode, "eager")]
        speed = [(_label(case), _ratios(found, case)) for case in cases]
        memory = [(_label(case), _p50s(found, case, "MiB")) for case in cases]
        titles = {
            "speedup": f"speed-up over torch eager, {mode}, {where}",
            "memory": f"peak MiB, {mode}, {where}",
        }
        for kind, rows, line in (("speedup", speed, 1.0), ("memory", memory, None)):
            if rows := [row for row in rows if row[1]]:
                written.append(out / f"{kind}-{part}.png")
                _bars(rows, titles[kind], line, written[-1])
    if any(r["metric"] == "GB/s" and r["part"] == "operators" for r in records):
        written.append(out / "roofline.png")
        _roofline(records, written[-1])
    return written


def _p50s(found: Results, case: Key, metric: str) -> dict[str, float]:
    values = {who: found.p50(case, who, metric) for who in found.providers}
    return {who: value for who, value in values.items() if value is not None}


def _ratios(found: Results, case: Key) -> dict[str, float]:
    times = _p50s(found, case, "ms")
    base = times.pop("torch", None)
    return {} if base is None else {who: base / ms for who, ms in times.items()}


def _roofline(records: list[Record], path: Path) -> None:
    """Left: GB/s by bytes of the floor, with the copy's rate. Right: TFLOP/s of the convolutions by FLOP per byte."""
    results = Results(records, "operators")
    figure = _figure(5.5)
    bandwidth, compute = figure.subplots(1, 2)
    for who in results.providers:
        points, gemms = [], []
        for case in results.cases:
            rate, ms, flops = (results.p50(case, who, metric) for metric in ("GB/s", "ms", "TFLOP/s"))
            if rate and ms:
                points.append((rate * ms, rate))  # GB/s times ms: MB
                if flops:
                    gemms.append((flops / rate * 1e3, flops))
        for axes, found in ((bandwidth, points), (compute, gemms)):
            if found:
                axes.scatter(*zip(*found, strict=True), s=14, label=who)
    tops = {r["operator"]: r["p50"] for r in records if r["part"] == "ceilings"}
    if "copy" in tops:
        bandwidth.axhline(tops["copy"], color="black", linewidth=0.8, label="copy, measured")
    if {"copy", "matmul"} <= set(tops):
        knee = tops["matmul"] / tops["copy"] * 1e3
        compute.plot([knee / 100, knee, knee * 10], [tops["matmul"] / 100, tops["matmul"], tops["matmul"]], "k-",
                     linewidth=0.8, label="copy and matmul, measured")  # fmt: skip
    bandwidth.set(xscale="log", yscale="log", xlabel="MB, fewest possible", ylabel="GB/s of these bytes")
    compute.set(xscale="log", yscale="log", xlabel="FLOP per byte, fewest possible", ylabel="TFLOP/s")
    for axes in (bandwidth, compute):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7)
    _save(figure, path)


def write(records: list[Record], out: Path) -> list[Path]:
    """Write report.md and the plots to the folder `out`."""
    text = markdown(records)
    drawn = plots(records, out)
    text += "".join(f"\n![{path.stem}]({path.name})\n" for path in drawn)
    with atomic_write(out / "report.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    return [out / "report.md", *drawn]
