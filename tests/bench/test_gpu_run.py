"""benchmarks/gpu.py, the run for a GPU machine: what it runs, and that a failing part does not stop the others."""

import importlib.util
import json
import signal
import sys
from pathlib import Path

import pytest

from fastseg.commands import cli

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def gpu():
    spec = importlib.util.spec_from_file_location("gpu", ROOT / "benchmarks" / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu"] = module  # dataclasses look up their module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["gpu"]


TELLS = """
import time
try:
    time.sleep(600)
except KeyboardInterrupt:
    print("told when it was interrupted")
"""


def test_a_part_that_fails_or_hangs_does_not_stop_the_others(gpu, tmp_path, monkeypatch, capfd):
    def plan(chosen, quick, path):
        python = [sys.executable, "-c"]
        return [
            gpu.Part("fails", [*python, "print('half'); raise SystemExit(3)"], 0.1),
            gpu.Part("hangs", [*python, "import time; print('begun', flush=True); time.sleep(600)"], 0.05),
            gpu.Part("tells", [*python, TELLS], 0.1),
            gpu.Part("is not there", [str(tmp_path / "nothing")], 0.1),
            gpu.Part("works", [*python, "import sys; print('{}'); print('said', file=sys.stderr)"], 0.5, "works.json"),
        ]

    monkeypatch.setattr(gpu, "plan", plan)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a process that a shell starts in the background
    try:
        assert gpu.main(["--out", str(tmp_path / "out"), "--budget", "30"]) == 1
    finally:
        signal.signal(signal.SIGINT, before)
    found = json.loads((tmp_path / "out" / "summary.json").read_text())
    parts = {part["name"]: part for part in found["parts"]}
    assert not found["passed"] and parts["fails"]["status"] == "failed with code 3"
    assert parts["fails"]["last_lines"] == ["half"]
    assert parts["hangs"]["status"] == "stopped at its time limit" and parts["hangs"]["seconds"] < 20
    assert parts["tells"]["status"] == parts["hangs"]["status"]
    assert parts["tells"]["last_lines"] == ["told when it was interrupted"]
    assert parts["is not there"]["status"].startswith("failed to start")
    assert parts["works"]["status"] == "ok" and (tmp_path / "out" / "works.json").read_text() == "{}\n"
    log = (tmp_path / "out" / "log.txt").read_text()
    assert all(word in log for word in ("half", "begun", "said")) and "works: ok" in capfd.readouterr().out


def test_the_quick_run_writes_its_files(gpu, tmp_path, monkeypatch):
    """With the real parts that take only seconds."""
    whole = gpu.plan

    def plan(chosen, quick, path):
        return [part for part in whole(chosen, quick, path) if part.name in ("doctor", "verify")]

    monkeypatch.setattr(gpu, "plan", plan)
    assert gpu.main(["--out", str(tmp_path), "--quick", "--budget", "120"]) == 0
    names = {path.name for path in tmp_path.iterdir()} - {"cpu"}  # the CPU kernels that were compiled
    assert names == {"summary.json", "log.txt", "doctor.json", "verify.json"}
    assert json.loads((tmp_path / "verify.json").read_text())["passed"] is True
    assert json.loads((tmp_path / "doctor.json").read_text())["fastseg"]


@pytest.mark.parametrize("cupy", [False, True])
def test_the_plan(cupy, gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: object() if cupy or name != "cupy" else None)
    whole = gpu.plan(gpu.PARTS, False, tmp_path / "results.jsonl")
    assert sum(part.share for part in whole) == pytest.approx(1) and gpu.BUDGET < 540
    assert sum(part.name == "verify-cuda" for part in whole) == cupy
    outputs = {part.output for part in whole if part.output} | {"summary.json", "log.txt", "results.jsonl", "times-"}
    assert len(outputs) <= 8 and gpu.LOG_BYTES * len(whole) < 15 * 2**20
    names = [part.name for part in gpu.plan(["models"], False, tmp_path / "results.jsonl")]
    assert names == ["doctor", "models"]
    tests = next(part.command for part in whole if part.name == "tests-operators")
    files = [ROOT / word for word in tests if word.startswith("tests/")]
    assert len(files) >= len(gpu.OPERATOR_TESTS) and all(file.is_file() for file in files)
    assert all(list((ROOT / "tests").glob(pattern)) for pattern in gpu.OPERATOR_TESTS)
    for part in whole:  # the command line accepts each command
        arguments = part.command[part.command.index("-m") + 1 :]
        if arguments[0] == "fastseg.commands.cli":
            extra = ["--seconds", "5"] if part.seconds_option else []
            assert cli.parser().parse_args([*arguments[1:], *extra]).command == arguments[1]
