import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_the_wheel_holds_the_kernels_and_imports(tmp_path):
    source = tmp_path / "source"  # a copy, since setuptools builds beside setup.py
    parts = ("fastseg", "kernels", "setup.py", "pyproject.toml", "README.md", "LICENSE")
    for part in map(ROOT.joinpath, parts):
        copy = shutil.copytree if part.is_dir() else shutil.copy
        source.mkdir(exist_ok=True)
        copy(part, source / part.name)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", tmp_path, source], check=True)
    (wheel,) = tmp_path.glob("fastseg_kernels-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "installed")
    assert {"fastseg/kernels/pool.py", "fastseg/py.typed", "fastseg/ops/pooling/pool.py"} <= set(names)
    cuda = [path for path in (ROOT / "kernels" / "cuda").iterdir() if path.suffix in (".py", ".cu", ".cuh")]
    assert {f"fastseg/kernels/cuda/{path.name}" for path in cuda} <= set(names) and len(cuda) > 9
    assert not [name for name in names if name.startswith(("kernels/", "tests/"))]
    code = "import fastseg, fastseg.kernels; print(fastseg.__file__); print(fastseg.kernels.__file__)"
    env = os.environ | {"PYTHONPATH": str(tmp_path / "installed")}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=tmp_path, check=True
    )
    assert all(line.startswith(str(tmp_path)) for line in run.stdout.split())


@pytest.mark.parametrize("folder", [ROOT, ROOT / "tests"])
def test_device_code_is_not_imported_under_a_name_that_is_taken(folder):
    """The package index has another project named kernels, which transformers looks for, and asks for its version."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    code = "import kernels; print(getattr(kernels, '__version__', None)); from kernels import pool"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=folder)
    assert run.returncode == 1 and run.stdout == "None\n" and "imported as fastseg.kernels" in run.stderr
