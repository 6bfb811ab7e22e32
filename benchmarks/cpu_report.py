"""The table of docs/cpu.md and the chart of the README, from the results of benchmarks/cpu.py.

    python3 benchmarks/cpu_report.py                     # prints the table and how many calls are slower than torch's
    python3 benchmarks/cpu_report.py --write             # puts them into docs/cpu.md and README.md; draws the chart

Every ratio is of two times of the same run: the least of all turns.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cpu import OUT, is_quiet, read

Row = dict[str, Any]
ROOT = Path(__file__).parents[1]
README, README_ROW = ROOT / "README.md", "times as fast as torch** | on one thread of a CPU"
PAGE, CHART = ROOT / "docs" / "cpu.md", ROOT / "docs" / "images" / "cpu.png"
BEGIN, END = "<!-- from benchmarks/cpu_report.py --write -->\n", "<!-- end -->\n"
LABELS = {
    "cross_entropy": "cross_entropy",
    "upsample_cross_entropy": "upsample + cross_entropy",
    "dice_cross_entropy": "dice_cross_entropy (MONAI's formula)",
    "batch_norm_relu_max_pool2d": "batch norm + ReLU + pool",
    "batch_norm_relu": "batch norm + ReLU",
    "max_pool2d_with_offsets": "pool with offsets (torch: indices)",
    "max_unpool2d_with_offsets": "unpool from offsets (torch: indices)",
    "SegNet, training step": "SegNet swapped, training step",
    "SegNet, inference": "SegNet swapped, inference",
    "fastseg.models.SegNet, training step": "SegNet of fastseg.models, training step",
    "fastseg.models.SegNet, inference": "SegNet of fastseg.models, inference",
}
LEAST = 0.95  # of torch's speed, that no call may be below


def rows_of(rows: Iterable[Row], part: str) -> list[Row]:
    return [row for row in rows if row["part"] == part and row["backend"] == "auto"]


def speed_up(row: Row, over: str) -> float:
    """How many times faster fastseg is."""
    return row["ms"][over] / row["ms"]["fastseg"]


def over_floor(row: Row, name: str) -> str:
    """A time over that of copying the floor's bytes once."""
    if row["floor_bytes"] is None or name not in row["ms"]:
        return ""
    return f"{row['ms'][name] * 1e-3 * row['copy_gb_s'] * 1e9 / row['floor_bytes']:.1f}"


def table(rows: Sequence[Row]) -> list[str]:
    """Markdown: one line per operator, memory format and number of threads."""
    head = [
        "operator", "size", "layout", "threads", "eager ms", "fastseg ms", "x eager", "x compile", "kernels x eager",
        "over floor", "kernels over floor", "peak memory", "cores used by others",
    ]  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|---|---|---|" + "---:|" * (len(head) - 3)]
    order = list(LABELS)
    for row in sorted(rows, key=lambda r: (order.index(r["operator"]), r["layout"] != "nchw", r["threads"])):
        ms, peak = row["ms"], row.get("peak_bytes")
        cells = [
            LABELS[row["operator"]], row["size"], row["layout"], str(row["threads"]),
            f"{ms['eager']:.1f}", f"{ms['fastseg']:.1f}", f"**{speed_up(row, 'eager'):.2f}**",
            f"{speed_up(row, 'compile'):.2f}" if "compile" in ms else "",
            f"{ms['eager'] / ms['kernels']:.1f}" if "kernels" in ms and row["floor_bytes"] else "",
            over_floor(row, "fastseg"), over_floor(row, "kernels"),
            f"{peak['fastseg'] / peak['eager']:.3f}" if peak else "",
        ]  # fmt: skip
        cells.append("unknown" if row["others"] is None else f"{row['others']:.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def conditions(rows: Sequence[Row]) -> str:
    """Where the rows were measured, in a sentence."""
    machines = sorted({f"{row['processor']}, {row['cores']} cores, torch {row['torch']}" for row in rows})
    rates = [row["copy_gb_s"] for row in rows]
    busy = sum(not is_quiet(row) for row in rows)
    noise = f"Other programs kept the cores busy in {busy} of {len(rows)} rows." if busy else "The machine was quiet."
    return f"Measured on {'; '.join(machines)}; copies of 64 MiB at {min(rates):.1f} to {max(rates):.1f} GB/s. {noise}"


def slower(rows: Sequence[Row], threads: int) -> list[Row]:
    """The calls of the part "sizes" that are below LEAST of eager's speed, the slowest first."""
    found = [row for row in rows if row["threads"] == threads and speed_up(row, "eager") < LEAST]
    return sorted(found, key=lambda row: speed_up(row, "eager"))


def of_sizes(rows: Sequence[Row]) -> list[str]:
    """Sentences about the calls that are slower than torch's."""
    lines = []
    for threads in sorted({row["threads"] for row in rows}):
        of = [row for row in rows if row["threads"] == threads]
        found = slower(rows, threads)
        lost = [1e3 * (row["ms"]["fastseg"] - row["ms"]["eager"]) for row in found]
        more = f"; they take {min(lost):.0f} to {max(lost):.0f} us more" if lost else ""
        large = sum(row["ms"]["eager"] > 0.3 for row in found)
        lines.append(
            f"- {threads} thread{'s' * (threads > 1)}: {len(found)} of {len(of)} calls are below {LEAST} of eager's "
            f"speed{more}; {large} of them are calls of more than 0.3 ms."
        )
    return lines


def text(rows: Sequence[Row]) -> str:
    """What docs/cpu.md shows."""
    main, sizes = rows_of(rows, "table"), rows_of(rows, "sizes")
    lines = [conditions(main), "", *table(main)]
    if sizes:
        lines += ["", "Every function from small maps to large ones (`--part sizes`):", "", *of_sizes(sizes)]
    return "\n".join(lines) + "\n"


def readme(rows: Sequence[Row]) -> str:
    """The row of the README's first table."""
    found = {row["operator"]: row for row in rows if row["layout"] == "nchw" and row["threads"] == 1}
    loss, resized, pool = (
        f"{speed_up(found[name], 'eager'):.1f}"
        for name in ("cross_entropy", "upsample_cross_entropy", "batch_norm_relu_max_pool2d")
    )
    return (
        f"| **{loss}, {resized} and {pool} times as fast as torch** | on one thread of a CPU: cross-entropy, "
        "upsampling + cross-entropy, batch norm + ReLU + pool, forward and backward, float32, NCHW "
        "([table](docs/cpu.md)) |\n"
    )


def draw(rows: Sequence[Row], path: Path, threads: int) -> None:
    """Speed over torch eager, of torch.compile and fastseg, by operator and memory format."""
    from matplotlib.figure import Figure

    figure = Figure((9, 3.8), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    colours = {"torch.compile": "0.6", "fastseg": "tab:blue"}
    for axes, layout in zip(panels, ("nchw", "channels_last"), strict=True):
        chosen = {row["operator"]: row for row in rows if row["layout"] == layout and row["threads"] == threads}
        names = [name for name in LABELS if name in chosen]
        for place, who in enumerate(colours):
            key = "compile" if who == "torch.compile" else who
            shown = [(len(names) - i, chosen[name]["ms"]) for i, name in enumerate(names) if key in chosen[name]["ms"]]
            ratios = [ms["eager"] / ms[key] for _, ms in shown]
            heights = [height - 0.36 * place for height, _ in shown]
            bars = axes.barh(heights, ratios, 0.34, color=colours[who], label=who)
            axes.bar_label(bars, fmt="%.1f", padding=2, fontsize=8)
        axes.axvline(1, color="0.3", linewidth=0.8)
        axes.set_xscale("log")
        axes.set_xlim(0.15, 60)
        axes.set_title(layout, fontsize=9)
        axes.set_yticks([height - 0.18 for height in range(len(names), 0, -1)], [LABELS[name] for name in names])
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(f"speed over torch eager, float32, forward and backward, {threads} thread(s) of a CPU", fontsize=9)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=OUT)
    parser.add_argument("--threads", type=int, default=1, help="of the chart (default: %(default)s)")
    parser.add_argument("--write", action="store_true", help="write docs/cpu.md and docs/images/cpu.png")
    args = parser.parse_args()
    rows = list(read(args.results).values())
    print(text(rows))
    for row in slower(rows_of(rows, "sizes"), args.threads)[:40]:
        what = f"{row['operator']} {row['size']} {row['layout']}"
        print(f"{speed_up(row, 'eager'):.2f} of {row['ms']['eager']:.3f} ms: {what}")
    if args.write:
        page = PAGE.read_text()
        start, stop = page.index(BEGIN) + len(BEGIN), page.index(END)
        PAGE.write_text(page[:start] + text(rows) + page[stop:])
        draw(rows_of(rows, "table"), CHART, args.threads)
        lines = README.read_text().splitlines(keepends=True)
        README.write_text("".join(readme(rows_of(rows, "table")) if README_ROW in x else x for x in lines))


if __name__ == "__main__":
    main()
