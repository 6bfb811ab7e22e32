"""Which versions of torch and triton are accepted, which are reported as untested, and how tests/versions.py tells."""

import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
import versions

from fastseg import version
from fastseg.commands import doctor

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("found", ["2.10.1", "1.13.0+cu117"])
def test_an_old_torch_is_refused_in_one_sentence(found):
    with pytest.raises(ImportError, match=rf"needs torch 2.11 or later, but torch {re.escape(found)} is installed"):
        version.require_torch(found)


def test_the_refusal_comes_before_anything_of_torch_is_missing():
    code = "import torch; torch.__version__ = '2.10.0'; del torch.library; import fastseg"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.stderr.splitlines()[-1].startswith("ImportError: fastseg needs torch 2.11 or later"), run.stderr


@pytest.mark.parametrize("found", ["2.11.0", "2.15.0a0+git1234", "3.0.0"])
def test_other_versions_are_accepted(found):
    version.require_torch(found)


def test_untested_versions_are_named():
    assert version.untested("2.13.0+cpu", "3.7.1") is None and version.untested("2.11.0", None) is None
    assert version.untested("2.12.1", "3.6.0") == "torch 2.12.1 is not tested; torch 2.11, 2.13, 2.14 and 2.15 are"
    assert version.untested("2.13.0", "3.6.0") == "torch 2.13.0 is tested with triton 3.7, not with 3.6.0"


def test_doctor_says_whether_the_versions_are_tested(monkeypatch):
    assert doctor.facts()["tested versions"] in ("yes", version.untested(torch.__version__, doctor._triton_version()))
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    assert "torch 2.99.0 is not tested" in doctor.facts()["tested versions"]


def test_requirements_have_no_upper_bounds():
    """pip would replace a newer torch without being asked."""
    for line in re.findall(r'"((?:torch|triton|numpy|rich)\b[^"]*)"', (ROOT / "setup.py").read_text()):
        assert "<" not in line and "==" not in line.split(";")[0], line


@pytest.mark.parametrize("category", [DeprecationWarning, FutureWarning])
def test_our_own_deprecated_calls_are_errors(category):
    """pyproject.toml makes them errors where fastseg or a test causes them, not inside torch."""
    code = compile("import warnings; warnings.warn('old', category)", "file", "exec")
    for module in ("fastseg.ops.operator", "test_version", "support.races"):
        with pytest.raises(category, match="old"):
            exec(code, {"__name__": module, "category": category})
    with pytest.warns(category):
        exec(code, {"__name__": "torch.nn", "category": category})


def test_the_table_of_versions_is_made_from_the_result_file():
    assert versions.table(versions.earlier()) in (ROOT / "docs" / "versions.md").read_text()


def test_the_pairs_that_are_called_tested_are_those_that_passed():
    found = tuple(
        (version.release(row["torch"]), version.release(row["triton"]))
        for row in versions.earlier()
        if versions.passed(row)
    )
    assert found == version.TESTED


GOOD = {
    "torch": "2.99.1+cpu", "triton": "3.99.0", "python": "3.14.1", "numpy": "3.0", "date": "2026-01-02",
    "tests": {"passed": 7, "skipped": 2, "failed": []},
    "wheel": {"installed": ["fastseg-kernels-0.1.0"], "doctor": "yes", "verified": 3, "wrong": []},
}  # fmt: skip


@pytest.mark.parametrize(
    "changed, cells",
    [
        ({}, "7, 2, 0 | 3, 0"),
        ({"tests": {"passed": 6, "skipped": 2, "failed": ["tests.a.b"]}}, "6, 2, 1 | 3, 0"),
        ({"wheel": {"error": "no pip"}}, "7, 2, 0 | no pip"),
        ({"wheel": GOOD["wheel"] | {"wrong": ["a case"]}}, "7, 2, 0 | 3, 1"),
        ({"wheel": GOOD["wheel"] | {"installed": ["fastseg-kernels-0.1.0", "torch-2.13.0"]}}, "7, 2, 0 | 3, 0"),
        ({"not run": "there is no python3.14"}, "not run: there is no python3.14 |"),
    ],
)
def test_a_pair_passes_only_if_everything_does(changed, cells):
    row = GOOD | changed
    assert versions.passed(row) is (not changed)
    assert versions.table([row]).splitlines()[-1] == f"| 2.99.1+cpu | 3.99.0 | 3.14.1 | 3.0 | {cells} | 2026-01-02 |"


def test_results_of_a_pair_replace_its_earlier_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(versions, "RESULTS", tmp_path / "versions.json")
    other = GOOD | {"torch": "2.100.0"}
    for row in (other, GOOD | {"date": "2025-12-31"}, GOOD):
        versions.write(row)
    assert versions.earlier() == [GOOD, other]


def test_counts_are_read_from_pytests_report():
    report = ElementTree.fromstring(
        '<testsuites><testsuite><testcase classname="a.b" name="good"/><testcase classname="a.b" name="bad"><failure/>'
        '</testcase><testcase classname="a" name="broken[1]"><error/></testcase><testcase classname="a" name="left">'
        "<skipped/></testcase></testsuite></testsuites>"
    )
    assert versions.counts(report) == {"passed": 1, "skipped": 1, "failed": ["a.py::broken[1]", "a/b.py::bad"]}


def test_failed_tests_run_again_and_are_named(monkeypatch):
    before = {"passed": 5, "skipped": 1, "failed": ["a.py::one", "b.py::two"]}
    monkeypatch.setattr(versions, "run_tests", lambda *arguments: {"passed": 1, "skipped": 0, "failed": ["b.py::two"]})
    after = {"passed": 6, "skipped": 1, "failed": ["b.py::two"], "again": ["a.py::one", "b.py::two"]}
    assert versions.run_failed_tests("python", "folder", before) == after
    monkeypatch.setattr(versions, "run_tests", lambda *arguments: {"passed": 1, "skipped": 0, "failed": []})
    assert versions.run_failed_tests("python", "folder", after) == after | {"passed": 7, "failed": []}
    assert versions.run_failed_tests("python", "folder", {"failed": []}) == {"failed": []}
