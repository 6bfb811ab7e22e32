import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_wheel_holds_the_kernels_and_imports(tmp_path):
    source = tmp_path / "source"  # a copy, since setuptools builds beside setup.py
    parts = ("fastseg", "kernels", "setup.py", "pyproject.toml", "README.md", "LICENSE")
    for part in map(ROOT.joinpath, parts):
        source.mkdir(exist_ok=True)
        if part.is_dir():
            shutil.copytree(part, source / part.name, symlinks=True)
        else:
            shutil.copy(part, source / part.name)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", tmp_path, source], check=True)
    (wheel,) = tmp_path.glob("fastseg_kernels-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "installed")
    kernels = [path for path in (ROOT / "kernels").rglob("*") if path.suffix in (".py", ".cu", ".cuh")]
    expected = {f"fastseg/{path.relative_to(ROOT).as_posix()}" for path in kernels}
    assert expected | {"fastseg/py.typed", "fastseg/ops/pooling/pool.py"} <= set(names) and len(kernels) > 40
    assert not [name for name in names if name.startswith(("kernels/", "tests/"))]
    code = "import fastseg, fastseg.kernels; print(fastseg.__file__); print(fastseg.kernels.__file__)"
    env = os.environ | {"PYTHONPATH": str(tmp_path / "installed")}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=tmp_path, check=True
    )
    assert all(line.startswith(str(tmp_path)) for line in run.stdout.split())
