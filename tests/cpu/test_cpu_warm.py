"""Compiling all CPU kernels ahead, and what `fastseg doctor --warm` and FASTSEG_LOG say of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastseg
from fastseg.commands import cli
from fastseg.kernels.cpu import build, launch, warm
from fastseg.verification import cases, operators
from fastseg.verification.cases import Placement

NEEDS_COMPILER = pytest.mark.skipif(build.unavailable() is not None, reason=str(build.unavailable()))
ROOT = Path(__file__).parents[2]
FEW = [("losses/confusion", {}), ("probe", {"DTYPE": torch.float32})]


@pytest.fixture
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTSEG_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "_libraries", build._Libraries())
    monkeypatch.setattr(warm, "libraries", lambda: iter(FEW))
    return tmp_path / "cpu"


def test_every_source_is_among_the_libraries():
    sources = {str(path.relative_to(build.FOLDER).with_suffix("")) for path in build.FOLDER.rglob("*.cpp")}
    assert {name for name, _ in warm.libraries()} == sources - {"probe"}
    keys = [(name, *sorted(parameters.items())) for name, parameters in warm.libraries()]
    assert len(keys) == len(set(keys))


WITHOUT = ("conv_transpose2d", "max_unpool2d_conv2d", "linear", "paste_boxes", "softmax_moments")  # no CPU kernels


@NEEDS_COMPILER
def test_no_call_uses_another_library(monkeypatch):
    """All cases of verify, in every dtype, with kernels that are never compiled and return 0."""
    used = set()

    class Library:
        def __init__(self, name, parameters):
            used.add((name, *sorted(parameters.items())))

        def __getattr__(self, function):
            def kernel(*args):
                return 0

            return kernel

    monkeypatch.setattr(launch, "library", Library)
    monkeypatch.setattr(launch, "_functions", {})
    with fastseg.backend("cpu"):
        for dtype in warm.DTYPES:
            for layout in cases.LAYOUTS.values():
                for name, sizes in operators.SIZES.items():
                    if name.startswith(WITHOUT):
                        continue
                    for case in (case for make in sizes for case in make(Placement(dtype, layout, "cpu"))):
                        case.step(case.ours, True)()
    made = {(name, *sorted(parameters.items())) for name, parameters in warm.libraries()}
    assert used == made


@NEEDS_COMPILER
def test_doctor_compiles_once_and_says_what_and_how_long(empty_cache, capsys):
    assert cli.main(["doctor", "--warm", "--json"]) == 0
    printed = capsys.readouterr()
    first = json.loads(printed.out)
    assert first["unavailable"] is None and first["folder"] == str(empty_cache)
    assert set(first["libraries"]) == {"losses/confusion", "probe DTYPE=float32"}
    assert all(seconds > 0 for seconds in first["libraries"].values())
    assert "compiled 2 of 2 libraries" in printed.err
    assert len(list(empty_cache.iterdir())) == 3, "the two and the probe"
    assert cli.main(["doctor", "--warm"]) == 0
    assert "losses/confusion: was there already" in (out := capsys.readouterr().out)
    assert "compiled 0 of 2 libraries" in out
    assert len(list(empty_cache.iterdir())) == 3


def test_doctor_says_why_nothing_can_be_compiled(empty_cache, capsys, monkeypatch):
    monkeypatch.setattr(fastseg.dispatch, "without_cpu_kernels", lambda: "no C++ compiler is found (CXX=missing)")
    assert cli.main(["doctor", "--warm", "--json"]) == 1
    printed = capsys.readouterr()
    assert json.loads(printed.out)["unavailable"] == "no C++ compiler is found (CXX=missing)"
    assert "no CPU kernel can be compiled: no C++ compiler" in printed.err


@NEEDS_COMPILER
@pytest.mark.parametrize("value, said", [("compile", True), ("", False), ("all", False)])
def test_the_log_on_stderr(tmp_path, value, said):
    code = "from fastseg.kernels.cpu.launch import launch; launch('probe', 'probe', {}, 10)"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "FASTSEG_CACHE": str(tmp_path), "FASTSEG_LOG": value}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert ("compiled kernels/cpu/probe.cpp" in done.stderr) == said
    assert ("FASTSEG_LOG must be 'compile', but is 'all'" in done.stderr) == (value == "all")
