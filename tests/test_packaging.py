"""The sdist and the wheel hold the kernels, where the link fastseg/kernels puts them, and the wheel imports."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import versions

ROOT = Path(__file__).parent.parent
SUFFIXES = (".py", ".cu", ".cuh", ".cpp", ".h")


def test_the_sdist_and_the_wheel_hold_the_kernels_and_the_wheel_imports(tmp_path):
    sdist, wheel = versions.make_wheel(sys.executable, tmp_path)
    sources = [path for folder in ("fastseg", "kernels") for path in (ROOT / folder).rglob("*") if path.is_file()]
    package = {path for path in sources if path.suffix in SUFFIXES and "__pycache__" not in path.parts}
    assert {path.suffix for path in package} == set(SUFFIXES) and len(package) > 200
    kernels = {path.relative_to(ROOT) for path in package if not path.is_relative_to(ROOT / "fastseg")}
    others = {path.relative_to(ROOT) for path in package if path.is_relative_to(ROOT / "fastseg")}
    recorded = {path.relative_to(ROOT) for path in (ROOT / "fastseg" / "recorded").glob("*.json")}
    expected = {f"fastseg/{path.as_posix()}" for path in kernels} | {path.as_posix() for path in others | recorded}
    expected |= {"fastseg/py.typed"}

    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        archive.extractall(tmp_path / "installed")
    assert names == expected
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
    assert expected <= {member.name.partition("/")[2] for member in members if member.isfile()}
    assert not [member.name for member in members if member.issym() or "/tests/" in member.name]

    code = "import fastseg, fastseg.kernels; print(fastseg.__file__); print(fastseg.kernels.__file__)"
    env = os.environ | {"PYTHONPATH": str(tmp_path / "installed")}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=tmp_path, check=True
    )
    assert all(line.startswith(str(tmp_path)) for line in run.stdout.split())
