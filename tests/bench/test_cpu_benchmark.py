"""benchmarks/cpu.py and cpu_report.py: rows that add up, resuming, busy machines, and the table of docs/cpu.md."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from fastseg.kernels.cpu import build

ROOT = Path(__file__).parents[2]
ARGUMENTS = ["--quick", "--threads", "1", "--op", "max_pool2d", "--compile-threads"]


@pytest.fixture
def cpu(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield importlib.import_module("cpu")
    for name in ("cpu", "cpu_cases", "cpu_report", "memory"):
        sys.modules.pop(name, None)


@pytest.fixture
def busy(cpu, monkeypatch):
    """Sets how many cores other processes use."""
    used = {"cores": 0.0}
    monkeypatch.setattr(cpu.Others, "cores", lambda others: used["cores"])
    return used


def run(cpu, out, capsys, *more):
    """The rows that a run printed."""
    assert cpu.main([*ARGUMENTS, "--json", "--out", str(out), *more]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_run_goes_on_where_the_last_one_ended(cpu, busy, tmp_path, capsys):
    out = tmp_path / "new" / "cpu.jsonl"
    first = run(cpu, out, capsys)
    assert [(row["operator"], row["layout"]) for row in first] == [
        ("max_pool2d_with_offsets", "nchw"), ("max_pool2d_with_offsets", "channels_last"),
    ]  # fmt: skip
    assert all(row["ms"]["eager"] > 0 and row["ms"]["fastseg"] > 0 and row["copy_gb_s"] > 0 for row in first)
    assert run(cpu, out, capsys) == []
    out.write_text("\n".join([*out.read_text().splitlines()[:1], '{"part": "tab']))
    assert [row["layout"] for row in run(cpu, out, capsys)] == ["channels_last"]
    assert len(run(cpu, out, capsys, "--again")) == 2 and len(cpu.read(out)) == 2
    assert cpu.main([*ARGUMENTS, "--limit", "0", "--out", str(out), "--again"]) == 0
    assert "2 rows are left" in capsys.readouterr().err


def test_what_was_measured_on_a_busy_machine_is_measured_again(cpu, busy, tmp_path, capsys):
    out = tmp_path / "cpu.jsonl"
    busy["cores"] = 0.5
    assert cpu.main([*ARGUMENTS, "--out", str(out)]) == 0
    assert capsys.readouterr().out.count("NOT QUIET: other processes use 0.5 cores") == 2
    busy["cores"] = 0.01
    assert len(run(cpu, out, capsys)) == 2 and all(cpu.is_quiet(row) for row in cpu.read(out).values())
    assert run(cpu, out, capsys) == []
    busy["cores"] = 0.5
    assert len(run(cpu, out, capsys, "--again")) == 2, "what is asked for is measured"
    busy["cores"] = 0.9
    assert run(cpu, out, capsys) == [] and {row["others"] for row in cpu.read(out).values()} == {0.5}


def test_the_floor_is_every_tensor_once(cpu):
    job = next(job for job in cpu.cpu_cases.table("nchw", True) if job.operator == "cross_entropy")
    logits, labels = 19 * 64 * 96 * 4, 64 * 96 * 8
    assert job.floor == 2 * logits + labels + 2 * 4  # the gradient; the loss and its gradient


@pytest.mark.skipif(build.unavailable() is not None, reason=str(build.unavailable()))
def test_the_kernels_are_called_again_on_the_same_tensors(cpu):
    x = torch.randn(1, 8, 64, 64)
    results = []

    def call():
        results[:] = torch.ops.fastseg.max_pool2d(x, [2, 2], [2, 2], [0, 0], [1, 1], False, "offsets")

    replay = cpu.kernels_alone(call)
    want = results[0].clone()
    results[0].fill_(0)
    replay()
    assert torch.equal(results[0], want) and not torch.equal(want, torch.zeros_like(want))
    assert cpu.kernels_alone(lambda: x + 1) is None


def test_docs_cpu_shows_the_results(cpu):
    report = importlib.import_module("cpu_report")
    rows = list(cpu.read(cpu.OUT).values())
    shown = report.PAGE.read_text().partition(report.BEGIN)[2].partition(report.END)[0]
    assert shown == report.text(rows)
    measured = {(row["operator"], row["layout"], row["threads"]) for row in report.rows_of(rows, "table")}
    assert measured >= {(o, layout, 1) for o in report.LABELS for layout in ("nchw", "channels_last")}
    assert report.readme(report.rows_of(rows, "table")) in report.README.read_text()
