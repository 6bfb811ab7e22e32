"""`fastseg bench`: timing, checks, result files, and reports."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastseg import dispatch
from fastseg.bench import models, networks, operators, providers, report, results, shapes, timing
from fastseg.bench import run as bench_run
from fastseg.commands import cli
from fastseg.verification import cases
from fastseg.verification.cases import Case

ROOT = Path(__file__).parents[2]
FACTS = {"gpu": "Test GPU", "driver": "1.2", "torch": "2.0", "triton": "3.0", "fastseg": "0.1.0", "commit": "abc"}
SAME = {"part": "operators", "where": "here", "operator": "max_pool2d", "dtype": "bfloat16", "layout": "nchw"}


@pytest.fixture
def fast(monkeypatch):
    """Measure with five calls."""
    once = timing.measure
    monkeypatch.setattr(timing, "measure", lambda call, device, seconds=0, warmup=1: once(call, device, 0, warmup))


def record_into(path, rows, facts=FACTS):
    """Write records to a file. rows: (provider, mode, metric, p50 or None, note)."""
    recorder = results.Recorder(path, facts)
    for provider, mode, metric, value, note in rows:
        values = (None,) * 3 if value is None else (value * 0.9, value, value * 1.1)
        place = {"launch": "eager" if mode else "", "shape": "8x8"}
        recorder.add(metric, values, note, provider=provider, mode=mode, **place, **SAME)
    return recorder.records


# --- timing ----------------------------------------------------------------------------------------------------------


def test_quantiles_on_a_fake_clock(monkeypatch):
    """The calls take 1, 2, 3, 4 and 5 ms."""
    lengths = iter([1, 2, 3, 4, 5])
    now = [0.0]

    def call():
        now[0] += next(lengths) * 1e-3

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    timed = timing.measure(call, "cpu", seconds=0.0, warmup=0)
    assert (timed.p20, timed.p50, timed.p80) == pytest.approx((1.8, 3.0, 4.2)) and timed.peak_bytes is None


def test_measuring_lasts_its_seconds_without_the_warm_up(monkeypatch):
    now, calls = [0.0], []

    def call():
        now[0] += 0.01 if len(calls) >= 3 else 7.0
        calls.append(1)

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    assert timing.measure(call, "cpu", seconds=0.1, warmup=3).p80 == pytest.approx(10.0)
    assert len(calls) == pytest.approx(3 + 10, abs=1)


def test_host_overhead_on_a_fake_clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def call():
        now[0] += 7e-6

    assert timing.host_overhead(call, "cpu") == pytest.approx((7, 7, 7))


def test_rates_are_amounts_over_times(monkeypatch):
    monkeypatch.setattr(timing, "measure", lambda call, device: timing.Timing(1.0, 2.0, 4.0, None))
    assert timing.copy_rates("cpu") == pytest.approx([2 * 2**24 / 1e6 / ms for ms in (4, 2, 1)])
    assert timing.matmul_rates("cpu", torch.float32) == pytest.approx([2 * 512**3 / 1e9 / ms for ms in (4, 2, 1)])


@pytest.mark.gpu
def test_a_graph_replays_the_captured_work():
    x = torch.zeros(4, device="cuda")
    replay = timing.captured(lambda: x.add_(1))
    before = x[0].item()
    replay()
    assert x[0].item() == before + 1


# --- sizes -----------------------------------------------------------------------------------------------------------


def test_every_site_has_a_floor_and_the_required_shapes_exist():
    at = cases.Placement(torch.bfloat16, torch.channels_last, "meta")
    found = {site.shape for site in shapes.SITES}
    assert found >= {(8, 64, 360, 480), (8, 512, 23, 30), (16, 64, 224, 224), (8, 19, 512, 1024), (16, 150, 512, 512)}
    for site in shapes.SITES:
        for case in site.cases(at):
            floors = operators.floors(case)
            assert 0 < floors["forward"] < floors["forward+backward"]
            assert floors["backward"] == floors["forward+backward"] - floors["forward"]
    kinds = {(site.make.__name__, site.headline) for site in shapes.SITES}
    assert {(name, True) for name in ("max_pool2d", "max_unpool2d", "conv_transpose2d", "cross_entropy")} <= kinds
    losses = {case.operator for site in shapes.SITES for case in site.cases(at)}
    assert {"upsample_cross_entropy", "linear_cross_entropy", "dice_cross_entropy"} <= losses


def test_floors_and_flops_by_hand():
    at = cases.Placement(torch.bfloat16, torch.channels_last, "meta")
    pooled = 2 * 8 * 4 * 4
    offsets = list(cases.max_pool2d(at, (2, 8, 8, 8)))[1]
    assert operators.floors(offsets)["forward"] == 4 * pooled * 2 + pooled * (2 + 1)
    (conv,) = cases.conv_transpose2d(at, (2, 8, 4, 4), cases.ConvTransposeSpec(16, kernel=2, stride=2))
    assert operators.flops(conv)["forward"] == 2 * (2 * 8 * 4 * 4) * 16 * 4 and not operators.flops(offsets)


# --- the command -----------------------------------------------------------------------------------------------------


def test_bench_prints_every_operator(capsys, fast, tmp_path):
    path = tmp_path / "cpu.jsonl"
    assert cli.main(["bench", "--json", "--out", str(path)]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert rows == results.read([path])
    timed = [row for row in rows if row["metric"] == "ms"]
    assert {row["operator"] for row in timed} >= {"max_pool2d", "max_unpool2d", "conv_transpose2d", "cross_entropy"}
    assert {row["mode"] for row in timed} == {"forward", "backward", "forward+backward"}
    assert {row["provider"] for row in timed} >= {"torch", "fastseg auto"}
    for row in timed:
        assert 0 < row["p20"] <= row["p50"] <= row["p80"]
    missing = {row["provider"]: row["note"] for row in rows if row["note"].startswith("unable")}
    assert missing["FlagGems"] == missing["Liger-Kernel"] == "unable: not installed"
    copy = next(row["p50"] for row in rows if row["operator"] == "copy")
    for rate in (row for row in rows if row["metric"] == "GB/s" and row["part"] == "operators"):
        place = (*report.CASE, "provider")
        (share,) = (row for row in rows if row["metric"] == "of copy" and all(row[k] == rate[k] for k in place))
        assert share["p50"] == pytest.approx(rate["p50"] / copy)


def test_bench_says_what_a_cpu_cannot_show(capsys, fast, monkeypatch):
    monkeypatch.setattr(shapes, "SITES", [site for site in shapes.SITES if site.where == "FCN 21 classes"])
    assert cli.main(["bench", "--op", "conv"]) == 0
    out = capsys.readouterr().out
    assert "kernels need a GPU" in out and "CPU, float32" in out and "FCN 21 classes" in out


def test_an_unknown_operator(capsys):
    assert cli.main(["bench", "--op", "nothing"]) == 2
    assert "nothing" in capsys.readouterr().err


def one_case(monkeypatch, ours, shape=(2, 3, 4, 4)):
    def make(at, shape):
        yield Case("neg", "x".join(map(str, shape)), ours, lambda x: -x, {"input": at.tensor(*shape)}, lambda x: -x)

    monkeypatch.setattr(bench_run, "sites", lambda small: [shapes.Site("here", make, shape, (), headline=True)])


def oom(x):
    raise torch.OutOfMemoryError("CUDA out of memory")


def broken(x):
    raise RuntimeError("no kernel\nfor this")


@pytest.mark.parametrize(
    "ours, code, note",
    [
        (lambda x: -x, 0, "right"),
        (lambda x: x * 1, 1, "wrong: output 0"),
        (lambda x: -x + (x.shape[0] > 1), 1, "wrong at full size"),
        (oom, 0, "out of memory"),
        (broken, 0, "unable: RuntimeError: no kernel"),
    ],
)
def test_failures_are_reported_and_not_timed(ours, code, note, monkeypatch, capsys, fast):
    one_case(monkeypatch, ours)
    monkeypatch.setattr(operators, "CHECKED_ELEMENTS", 10)  # check at full size too
    assert cli.main(["bench", "--json"]) == code
    rows = [r for r in json.loads(capsys.readouterr().out)["rows"] if r["provider"] == "fastseg auto"]
    assert next(r["note"] for r in rows if r["metric"] == "status").startswith(note)
    assert bool([r for r in rows if r["metric"] == "ms"]) == (note == "right")
    if code:
        assert cli.main(["bench"]) == 1
        assert "WRONG RESULT" in capsys.readouterr().out


def test_measurements_that_a_gpu_adds(monkeypatch):
    """A GPU adds replays of CUDA graphs, except for a backward alone, and the peak memory of eager calls."""
    captured = []
    monkeypatch.setattr(timing, "captured", lambda call: captured.append(1) or call)
    monkeypatch.setattr(timing, "measure", lambda *a: timing.Timing(1.0, 2.0, 4.0, 3 * 2**20))
    recorder = results.Recorder(None, FACTS)
    timer = operators.Bench(recorder, "cpu", "float32", "nchw", float("inf"))
    timer.ceilings()
    timer.device = "cuda"
    site = next(site for site in shapes.SITES if site.where == "FCN 21 classes").small()
    timer.sites([site], None, [provider for provider in providers.providers(False) if provider.name == "torch"])
    rows = [r for r in recorder.records if r["part"] == "operators"]
    assert {(r["mode"], r["launch"]) for r in rows if r["metric"] == "ms"} == {
        *((mode, "eager") for mode in providers.MODES), ("forward", "graph"), ("forward+backward", "graph")
    }  # fmt: skip
    assert len(captured) == 2
    assert {(r["mode"], r["launch"], r["p50"]) for r in rows if r["metric"] == "MiB"} == {
        (mode, "eager", 3.0) for mode in providers.MODES
    }
    forward = {r["metric"]: r for r in rows if (r["mode"], r["launch"]) == ("forward", "eager")}
    elements = 21 * 8 * 8
    assert forward["TFLOP/s"]["p80"] == pytest.approx(2 * elements * 21 * 16 / 1e-3 / 1e12)
    assert forward["GB/s"]["p20"] == pytest.approx(4 * (elements * 5 + 21 * 21 * 16 + 21) / 4e-3 / 1e9)


def test_a_wrong_network_is_not_timed(monkeypatch, fast):
    """The swapped layers scale a gradient; the other variants are right."""

    class Wrong(torch.nn.MaxPool2d):
        def forward(self, x):
            y, indices = super().forward(x)
            return y * 1.5, indices

    def swap(model):
        for module in model.modules():
            if type(module) is torch.nn.MaxPool2d:
                module.__class__ = Wrong

    monkeypatch.setattr(networks, "swap", swap)
    recorder = results.Recorder(None, FACTS)
    whole = models.ModelBench(recorder, "cpu", "float32", "channels_last", float("inf"), small=True, seconds=0)
    whole.run([network for network in networks.NETWORKS if network.name == "segnet-basic"], compile=False)
    notes = {r["provider"]: r["note"] for r in recorder.records if r["metric"] == "status"}
    assert notes["fastseg swap"].startswith("wrong") and notes["torch"] == notes["fastseg"] == "right"
    timed = {(r["provider"], r["mode"]) for r in recorder.records if r["metric"] == "ms"}
    assert timed == {(who, mode) for who in ("torch", "fastseg") for mode in ("inference", "training step")}


def test_nothing_starts_after_the_deadline(monkeypatch, fast, capsys):
    one_case(monkeypatch, lambda x: -x)
    assert cli.main(["bench", "--json", "--seconds", "0", "--part", "operators", "--part", "models"]) == 0
    rows = [r for r in json.loads(capsys.readouterr().out)["rows"] if r["part"] != "ceilings"]
    assert rows and {r["note"] for r in rows} == {operators.OUT_OF_TIME}


def test_the_commands_do_not_import_the_kernels():
    """Importing kernels decides whether they are interpreted, and `fastseg verify` must decide that later."""
    code = "import sys, fastseg.commands.cli as c; c.parser(); print('fastseg.kernels.launch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.strip() == "False"


# --- result files ----------------------------------------------------------------------------------------------------


def test_records_are_read_as_written(tmp_path):
    path = tmp_path / "a.jsonl"
    written = record_into(path, [("torch", "forward", "ms", 2.0, ""), ("x", "", "status", None, "out of memory")])
    assert results.read([path]) == written
    assert list(written[0]) == list(results.FIELDS) and written[0]["gpu"] == "Test GPU"


def test_an_interrupted_run_keeps_its_records(tmp_path):
    path = tmp_path / "a.jsonl"
    first = record_into(path, [("torch", "forward", "ms", 2.0, "")])
    with path.open("a") as file:
        file.write('{"part": "oper')
    assert results.read([path]) == first
    second = record_into(path, [("torch", "backward", "ms", 3.0, "")])
    assert results.read([path]) == first + second


def test_files_that_are_not_result_files(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    for text in ('{"part": 1}\n', "no json\n", ""):
        path.write_text(text)
        assert cli.main(["bench", "report", str(path), "--out", str(tmp_path / "out")]) == 2
        assert str(path) in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", [{"metric": "hours"}, {"p50": None}, {"p50": "3"}, {"extra": 1}])
def test_invalid_records_raise(change, tmp_path):
    (record,) = record_into(None, [("torch", "forward", "ms", 2.0, "")])
    assert results.checked(record) == record
    with pytest.raises(ValueError):
        results.checked(record | change)


# --- reports ---------------------------------------------------------------------------------------------------------

ROWS = [
    ("torch", "forward+backward", "ms", 7.654, ""),
    ("torch", "forward+backward", "MiB", 321.5, ""),
    ("torch", "forward+backward", "GB/s", 456.0, ""),
    ("torch", "forward+backward", "TFLOP/s", 43.21, ""),
    ("fastseg triton", "", "status", None, "right"),
    ("fastseg triton", "forward+backward", "ms", 2.0, ""),
    ("fastseg triton", "forward+backward", "MiB", 123.5, ""),
    ("Liger-Kernel", "", "status", None, "unable: not installed"),
    ("FlagGems", "", "status", None, "wrong: output 0 is off by 3"),
    ("torch.compile", "forward+backward", "status", None, "out of memory"),
]


def test_the_report_has_only_the_numbers_of_the_files(tmp_path, capsys):
    path, out = tmp_path / "a.jsonl", tmp_path / "out"
    record_into(path, ROWS)
    assert cli.main(["bench", "report", str(path), "--out", str(out), "--json"]) == 0
    files = json.loads(capsys.readouterr().out)["files"]
    assert {Path(f).name for f in files} == {
        "report.md", "speedup-operators.png", "memory-operators.png", "roofline.png"
    }  # fmt: skip
    assert all(Path(f).read_bytes().startswith(b"\x89PNG") for f in files if f.endswith("png"))
    text = (out / "report.md").read_text()
    for number in ("7.654 (6.889 to 8.419)", "321.5", "43.21", "456", "123.5", "3.83 (fastseg triton)", "Test GPU"):
        assert number in text, number
    (row,) = (line for line in text.splitlines() if line.startswith("| here") and "7.654" in line)
    cells = [cell.strip() for cell in row.split("|")]
    assert {"not installed", "wrong", "out of memory"} <= set(cells)
    assert "wrong: output 0 is off by 3" in text


def test_the_last_record_counts():
    def ms(*rows):
        found = report.Results(record_into(None, [("torch", "forward", "ms", 1.0, ""), *rows]), "operators")
        return found.cell(found.cases[0], "fastseg", "ms")

    timed, wrong = ("fastseg", "forward", "ms", 2.0, ""), ("fastseg", "", "status", None, "wrong: all")
    assert ms(timed, wrong) == "wrong" and ms(wrong, timed).startswith("2 (")
    assert ms(timed, ("fastseg", "backward", "status", None, "out of memory")).startswith("2 (")


# --- comparison ------------------------------------------------------------------------------------------------------

BEFORE = [("torch", "forward", "ms", 9.0, ""), ("fastseg triton", "forward", "ms", 2.0, "")]


@pytest.mark.parametrize(
    "after, limit, code, verdict",
    [
        ([("fastseg triton", "forward", "ms", 2.2, "")], "5%", 1, "regression"),
        ([("fastseg triton", "forward", "ms", 2.2, "")], "0.2", 0, "same"),
        ([("fastseg triton", "forward", "ms", 1.0, "")], "5%", 0, "faster"),
        ([("fastseg triton", "forward", "ms", 2.0, ""), ("torch", "forward", "ms", 99.0, "")], "5%", 0, "same"),
        ([("fastseg triton", "", "status", None, "wrong: output 0")], "5%", 1, "lost"),
        ([("fastseg triton", "forward", "status", None, "out of memory")], "5%", 1, "lost"),
        ([("fastseg triton", "backward", "ms", 2.0, "")], "5%", 2, None),
        ([("fastseg triton", "", "status", None, "not run: the time is up")], "5%", 2, None),
    ],
)
def test_compare(after, limit, code, verdict, tmp_path, capsys):
    old, new = tmp_path / "old.jsonl", tmp_path / "new.jsonl"
    record_into(old, BEFORE)
    record_into(new, after)
    arguments = ["bench", "compare", str(old), str(new), "--fail-above", limit]
    assert cli.main([*arguments, "--json"]) == code
    if verdict is not None:
        (row,) = json.loads(capsys.readouterr().out)["rows"]
        assert row["verdict"] == verdict and row["old"] == 2.0
        assert cli.main(arguments) == code
        assert (verdict in capsys.readouterr().out) == (verdict != "same")


def test_compare_counts_missing_rows(tmp_path, capsys):
    old, new = tmp_path / "old.jsonl", tmp_path / "new.jsonl"
    record_into(old, [*BEFORE, ("fastseg triton", "backward", "ms", 3.0, "")])
    record_into(new, BEFORE)
    assert cli.main(["bench", "compare", str(old), str(new)]) == 0
    assert "1 not measured again" in capsys.readouterr().out


def test_compare_raises_for_another_gpu_and_an_invalid_limit(tmp_path, capsys):
    old, new = tmp_path / "old.jsonl", tmp_path / "new.jsonl"
    record_into(old, BEFORE)
    record_into(new, BEFORE, FACTS | {"gpu": "another"})
    assert cli.main(["bench", "compare", str(old), str(new)]) == 2
    assert "in common" in capsys.readouterr().err
    assert cli.main(["bench", "compare", str(old), str(old), "--fail-above", "much"]) == 2


# --- providers -------------------------------------------------------------------------------------------------------


def test_providers_are_checked_against_the_right_reference():
    at = cases.Placement(torch.float32, torch.channels_last, "cpu")
    indexed, offsets = cases.max_pool2d(at, (1, 4, 6, 6))
    assert providers.plain(offsets) is offsets.eager and providers.plain(indexed) is indexed.theirs
    names = [provider.name for provider in providers.providers(compile=True)]
    assert names[-2:] == ["torch.compile", "torch.compile max-autotune"] and len(names) == len(set(names)) == 9


def test_the_cuda_provider_has_only_operators_with_cuda_kernels(monkeypatch):
    at = cases.Placement(torch.float32, torch.contiguous_format, "cpu")
    (pooled, *_), (other, *_) = cases.max_pool2d(at, (1, 4, 6, 6)), cases.upsample_argmax(at, (1, 4, 6, 6), (8, 8))
    monkeypatch.setattr(dispatch, "CUPY_INSTALLED", False)
    assert providers._cuda(other) is None
    with pytest.raises(results.Unable, match="CuPy, which is not installed"):
        providers._cuda(pooled)
