"""The bar chart of the README: bytes that four fused operators move, beside torch eager and torch.compile.

    fastseg inspect traffic --compile --json > benchmarks/results/traffic.json
    python3 benchmarks/bytes_chart.py --png docs/images/bytes.png

Every number is in the result file, as counted in Triton's interpreter: distinct 32-byte sectors of all kernels of
forward and backward together, in bfloat16 and channels_last. torch eager is shown at its smallest possible bytes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

CASES = {  # label: operator, case
    "batch norm + ReLU + pool": ("batch_norm_relu_max_pool2d", "2x16x32x64 k2 ceil"),
    "max-unpool from offsets": ("max_unpool2d_with_offsets", "2x64x32x64 k2 s2 p0"),
    "cross-entropy, 19 classes": ("cross_entropy", "1x19x32x64 ignore 255 mean"),
    "upsample + cross-entropy": ("upsample_cross_entropy", "1x11x4x8 to 32x64 bilinear mean"),
}
PROVIDERS = {"torch eager": "eager least", "torch.compile": "compiled sectors", "fastseg": "moved"}
LAYOUT = "channels_last"


def total(rows: list[dict[str, Any]], operator: str, size: str, column: str) -> int:
    """Bytes of forward and backward of one case."""
    found = [r[column] for r in rows if (r["operator"], r["size"], r["layout"]) == (operator, size, LAYOUT)]
    if len(found) != 2:
        raise ValueError(
            f"the result file must have a forward and a backward of {operator} {size}, but has {len(found)}"
        )
    return sum(found)


def ratios(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """For each case and provider, the bytes divided by torch eager's."""
    bytes_of = {
        label: {name: total(rows, *case, column) for name, column in PROVIDERS.items()} for label, case in CASES.items()
    }
    return {label: {name: b / row["torch eager"] for name, b in row.items()} for label, row in bytes_of.items()}


def draw(found: dict[str, dict[str, float]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure((7.5, 3.2), layout="constrained")
    axes = figure.subplots()
    colours = {"torch eager": "0.75", "torch.compile": "0.5", "fastseg": "tab:blue"}
    for place, name in enumerate(PROVIDERS):
        rows = [row - 0.26 * (place - 1) for row in range(len(found), 0, -1)]
        bars = axes.barh(rows, [ratio[name] for ratio in found.values()], 0.24, color=colours[name], label=name)
        axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=8)
    axes.set_yticks(range(len(found), 0, -1), found)
    axes.set_xlabel("bytes moved, forward and backward, divided by torch eager's")
    axes.set_xlim(0, 1.2 * max(max(ratio.values()) for ratio in found.values()))
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/traffic.json"))
    parser.add_argument("--png", type=Path, default=Path("docs/images/bytes.png"))
    args = parser.parse_args()
    found = ratios(json.loads(args.results.read_text())["rows"])
    draw(found, args.png)
    for label, row in found.items():
        print(f"{label}: " + ", ".join(f"{name} {ratio:.2f}" for name, ratio in row.items()))


if __name__ == "__main__":
    main()
