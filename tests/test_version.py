"""Which versions of torch and triton are accepted, and which are reported as untested."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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
    assert version.untested("2.12.1", "3.6.0") == "torch 2.12.1 is not tested; torch 2.11 and 2.13 are"
    assert version.untested("2.13.0", "3.6.0") == "torch 2.13.0 is tested with triton 3.7, not with 3.6.0"


def test_doctor_says_whether_the_versions_are_tested(monkeypatch):
    assert doctor.facts()["tested versions"] in ("yes", version.untested(torch.__version__, doctor._triton_version()))
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    assert "torch 2.99.0 is not tested" in doctor.facts()["tested versions"]


def test_requirements_have_no_upper_bounds():
    """pip would replace a newer torch without being asked."""
    for line in re.findall(r'"((?:torch|triton|numpy|rich)\b[^"]*)"', (ROOT / "setup.py").read_text()):
        assert "<" not in line and "==" not in line.split(";")[0], line
