"""What `make witness` counts as a failure. These tests need no ttsem; tests/kernels/test_witness.py does."""

import torch
from support import run_witness, witness

ROW = {
    "sm": 90, "dtypes": ["float32"], "cases": 2, "results": 3, "wrong": [], "launches": {"a_kernel": 2},
    "faults": [], "unchecked": 0, "kernels": ["a_kernel"], "seconds": 1.0,
}  # fmt: skip


def test_a_run_without_faults_passes():
    assert run_witness.problems([ROW, ROW | {"sm": 80}]) == []


def test_a_kernel_may_be_reached_for_one_compute_capability_alone():
    both = ["a_kernel", "tma_kernel"]
    with_tma = ROW | {"launches": {"a_kernel": 1, "tma_kernel": 1}, "kernels": both}
    assert run_witness.problems([ROW | {"sm": 80, "kernels": both}, with_tma]) == []
    assert run_witness.problems([ROW | {"kernels": both}]) == ["tma_kernel was not reached"]


def test_nothing_launched_wrong_results_and_stopped_launches_are_failures():
    idle, wrong, stopped = ROW | {"launches": {}}, ROW | {"wrong": ["x is off"]}, ROW | {"faults": ["race: y\nmore"]}
    name = "compute capability 9.0, float32"
    assert run_witness.problems([idle, ROW]) == [f"{name}: nothing was launched"]
    assert run_witness.problems([wrong]) == [f"{name}: WRONG x is off"]
    assert run_witness.problems([stopped]) == [f"{name}: STOPPED race: y"]


def test_another_version_is_refused(monkeypatch, tmp_path, capsys):
    pins = tmp_path / "requirements.txt"
    monkeypatch.setattr(witness, "REQUIREMENTS", pins)
    pins.write_text("torch==0.1.0\n")
    assert run_witness.main([]) == 2
    installed = torch.__version__.split("+")[0]
    assert f"no witness here: torch is {installed}, and the witness is made for 0.1.0" in capsys.readouterr().err
    pins.write_text(f"torch=={installed}\n")
    assert witness.missing() is None


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(witness.importlib.util, "find_spec", lambda name: None)
    assert witness.missing() == "ttsem is not installed; `make witness` installs it"
