"""Checks fastseg with each pair of torch and triton that it supports: python3 tests/versions.py, or `make versions`.

For each pair it makes an environment in build/versions, unless one is given, and in it runs

- tests: the first set of arguments of each test in TESTS (pytest --quick). They also compile kernels, those among them
  that spilled registers with some version of triton (tests/inspect/test_spills.py);
- wheel: the wheel, installed into a new environment beside that torch. pip must install nothing else, and there
  `fastseg doctor` and `fastseg verify --quick` must run without the checkout.

The results are written to benchmarks/results/versions.json, from which the table in docs/versions.md is made. A pair
that cannot be installed is written as not run, with pip's reason. Needs no package besides Python's own.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "versions.json"
BUILT = ROOT / "build" / "versions"
TESTS = (  # each family against torch, opcheck, torch.compile, and what reaches into torch or triton
    "pooling/test_pool.py", "pooling/test_unpool.py", "batch_norm/test_batch_norm.py",
    "batch_norm/test_batch_norm_operators.py", "convolution/test_conv_transpose.py",
    "convolution/test_conv_transpose_operators.py", "convolution/test_unpool_conv.py", "losses/test_cross_entropy.py",
    "losses/test_cross_entropy_operators.py", "losses/test_cross_entropy_one_pass.py",
    "losses/test_dice_cross_entropy.py", "losses/test_linear_cross_entropy.py", "losses/test_upsample.py",
    "losses/test_upsample_cross_entropy.py", "losses/test_upsample_cross_entropy_memory.py",
    "losses/test_upsample_cross_entropy_predictions.py", "losses/test_confusion.py",
    "compiler/test_compile_backend.py", "swapping/test_swap.py", "kernels/test_interpreter.py",
    "kernels/test_launch.py", "inspect/test_spills.py", "inspect/test_inductor.py", "cuda/test_cuda_sanitized.py",
    "test_devices.py", "test_internals.py", "test_threads.py",
)  # fmt: skip
PARTS = ("tests", "wheel")
LIMIT = 3600  # seconds that one part may take


class Pair(NamedTuple):
    """Versions that are tested together: of torch and triton, and of Python, as in the command python3.13."""

    torch: str
    triton: str
    python: str


PAIRS = (
    Pair("2.11.0", "3.6.0", "3.11"),
    Pair("2.13.0", "3.7.1", "3.11"),
    Pair("2.14.1", "3.8.0", "3.12"),
    Pair("2.15.0", "3.9.0", "3.13"),
)


class CannotRunError(Exception):
    """A pair cannot be installed here, and why."""


def run(command: Sequence[Any], folder: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command with a time limit. Kernels are not interpreted unless the command asks for it."""
    left_out = ("TRITON_INTERPRET", "PYTHONPATH", "FASTSEG_BACKEND")
    env = {name: value for name, value in os.environ.items() if name not in left_out} | variables
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, env=env, cwd=folder, timeout=LIMIT)


def last_line(text: str) -> str:
    """The last line of an output that is not empty."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def make_wheel(python: Path, folder: Path) -> tuple[Path, Path]:
    """(sdist, wheel) of this checkout, the wheel built from the sdist, as `python -m build` does it.

    They are made from a copy, since setuptools builds beside setup.py.
    """
    source = folder / "source"
    source.mkdir(parents=True)
    for part in ("fastseg", "kernels"):
        shutil.copytree(ROOT / part, source / part, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for part in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / part, source / part)
    build_sdist = f"from setuptools.build_meta import build_sdist; build_sdist({str(folder)!r})"
    _succeed(run([python, "-c", build_sdist], source))
    (sdist,) = folder.glob("fastseg?kernels-*.tar.gz")  # older setuptools write it with a hyphen
    command = [python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder, sdist]
    _succeed(run(command))
    (wheel,) = folder.glob("fastseg_kernels-*.whl")
    return sdist, wheel


def _succeed(ran: subprocess.CompletedProcess[str]) -> None:
    if ran.returncode:
        raise SystemExit(ran.stdout + ran.stderr)


def environment(pair: Pair) -> Path:
    """The Python of an environment with the pair and what the tests need, made the first time."""
    folder = BUILT / pair.torch
    python = folder / "bin" / "python"
    if (folder / "installed").exists():
        return python
    base = shutil.which(f"python{pair.python}")
    if base is None:
        raise CannotRunError(f"there is no python{pair.python}")
    run([base, "-m", "venv", "--clear", folder])
    needed = [f"torch=={pair.torch}", f"triton=={pair.triton}", "setuptools", "wheel"]
    installed = run([python, "-m", "pip", "install", "--quiet", *needed, f"{ROOT}[test]"])
    if installed.returncode:
        raise CannotRunError(last_line(installed.stderr))
    run([python, "-m", "pip", "uninstall", "--quiet", "--yes", "fastseg-kernels"])  # the tests take the checkout
    (folder / "installed").touch()
    return python


def installed_versions(python: Path) -> dict[str, str]:
    """The versions of Python, torch, triton and numpy in an environment."""
    code = (
        "import json, platform, torch, triton, numpy; print(json.dumps({'python': platform.python_version(), "
        "'torch': torch.__version__, 'triton': triton.__version__, 'numpy': numpy.__version__}))"
    )
    found = run([python, "-c", code])
    if found.returncode:
        raise CannotRunError(last_line(found.stderr))
    return json.loads(found.stdout)


def run_tests(python: Path, folder: Path, chosen: Sequence[str]) -> dict[str, Any]:
    """How many of the chosen tests passed, were skipped and failed, and the names of those that failed."""
    report = folder / "tests.xml"
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--quick", f"--junitxml={report}"]
    ran = run([*command, *chosen], PYTHONPATH=str(ROOT))
    if not report.exists():
        raise SystemExit(ran.stdout[-3000:] + ran.stderr[-3000:])
    (folder / "tests.log").write_text(ran.stdout + ran.stderr)
    return counts(ElementTree.parse(report).getroot())


def run_failed_tests(python: Path, folder: Path, before: dict[str, Any]) -> dict[str, Any]:
    """The results with those of the failed tests replaced, which alone run again; `again` names them."""
    if not before["failed"]:
        return before
    found = run_tests(python, folder, before["failed"])
    summed = {word: before[word] + found[word] for word in ("passed", "skipped")}
    return summed | {"failed": found["failed"], "again": sorted({*before.get("again", ()), *before["failed"]})}


def counts(report: ElementTree.Element) -> dict[str, Any]:
    """The numbers of a JUnit report, and pytest's names of the failed tests."""
    cases = list(report.iter("testcase"))
    failed = [
        f"{case.get('classname').replace('.', '/')}.py::{case.get('name')}"
        for case in cases
        if case.find("failure") is not None or case.find("error") is not None
    ]
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {"passed": len(cases) - len(failed) - skipped, "skipped": skipped, "failed": sorted(set(failed))}


def check_wheel(python: Path, wheel: Path, folder: Path) -> dict[str, Any]:
    """What pip installs with the wheel beside the environment's packages, and what fastseg then says there."""
    beside = folder / "beside"
    run([python, "-m", "venv", "--without-pip", beside])  # nor setuptools, which may be older than torch's
    own = beside / "bin" / "python"
    site = "import site; print(site.getsitepackages()[0])"
    theirs, ours = (Path(run([p, "-c", site]).stdout.strip()) for p in (python, own))
    (ours / "beside.pth").write_text(f"{theirs}\n")
    # The user's own configuration may limit versions, and pip would then replace a newer torch.
    installed = run([own, "-m", "pip", "install", "--no-input", wheel], PIP_CONFIG_FILE=os.devnull)
    if installed.returncode:
        return {"error": last_line(installed.stderr)}
    prefix = "Successfully installed "
    lines = [line for line in installed.stdout.splitlines() if line.startswith(prefix)]
    found: dict[str, Any] = {"installed": lines[0].removeprefix(prefix).split() if lines else []}
    command = beside / "bin" / "fastseg"
    doctor = run([command, "doctor", "--json"], folder)
    found["doctor"] = json.loads(doctor.stdout)["tested versions"] if doctor.returncode == 0 else "failed"
    verified = run([command, "verify", "--quick", "--seed", 1, "--json"], folder)
    try:
        report = json.loads(verified.stdout)
    except ValueError:
        return found | {"error": last_line(verified.stderr)}
    failed = [case["case"] for case in report["cases"] if not all(r["passed"] for r in case["results"])]
    return found | {"verified": len(report["cases"]), "wrong": failed}


def check(pair: Pair, given: Path | None, parts: Sequence[str], failed: bool) -> dict[str, Any]:
    """The results of one pair. Those of parts that do not run are the earlier ones, as with `failed` those of the tests
    that passed.
    """
    BUILT.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILT) as name:
        folder = Path(name)
        row: dict[str, Any] = {"torch": pair.torch, "triton": pair.triton, "python": pair.python}
        row["date"] = datetime.date.today().isoformat()
        try:
            python = given or environment(pair)
            row |= installed_versions(python)
        except CannotRunError as error:
            return row | {"not run": str(error)}
        if (row["torch"].partition("+")[0], row["triton"]) != (pair.torch, pair.triton):
            return row | {"not run": f"this environment should have torch {pair.torch} and triton {pair.triton}"}
        row = {part: old[part] for old in earlier() if _key(old) == _key(row) for part in PARTS if part in old} | row
        if "tests" in parts:
            if failed:
                row["tests"] = run_failed_tests(python, folder, row["tests"])
            else:
                row["tests"] = run_tests(python, folder, [f"tests/{part}" for part in TESTS])
            shutil.copy(folder / "tests.log", BUILT / f"{pair.torch}.log")
        if "wheel" in parts:
            _, wheel = make_wheel(python, folder / "built")
            row["wheel"] = check_wheel(python, wheel, folder)
        return row


def passed(row: dict[str, Any]) -> bool:
    """Whether everything ran and nothing failed."""
    if "not run" in row or any(part not in row or "error" in row[part] for part in PARTS):
        return False
    only_fastseg = [name.rpartition("-")[0] for name in row["wheel"]["installed"]] == ["fastseg-kernels"]
    return only_fastseg and not (row["tests"]["failed"] or row["wheel"]["wrong"])


HEADER = (
    "| torch | triton | Python | numpy | tests: passed, skipped, failed | "
    "`verify --quick` from the wheel: cases, failed | date |",
    "|---|---|---|---|---|---|---|",
)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The table of docs/versions.md."""
    return "\n".join([*HEADER, *map(_table_row, rows)]) + "\n"


def _table_row(row: dict[str, Any]) -> str:
    versions = [row["torch"], row["triton"], row["python"], row.get("numpy", "")]
    if "not run" in row:
        return f"| {' | '.join(versions)} | not run: {row['not run']} | | {row['date']} |"
    tests, wheel = (row.get(part, {"error": "not run"}) for part in PARTS)
    cells = [
        tests.get("error") or f"{tests['passed']}, {tests['skipped']}, {len(tests['failed'])}",
        wheel.get("error") or f"{wheel['verified']}, {len(wheel['wrong'])}",
    ]
    return f"| {' | '.join([*versions, *cells, row['date']])} |"


def earlier() -> list[dict[str, Any]]:
    """The rows of the result file."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else []


def write(row: dict[str, Any]) -> None:
    """Put a pair's results in the place of its earlier ones; the other pairs' stay."""
    rows = {_key(old): old for old in earlier()} | {_key(row): row}
    temporary = RESULTS.with_suffix(".tmp")
    temporary.write_text(json.dumps([rows[key] for key in sorted(rows)], indent=1) + "\n")
    os.replace(temporary, RESULTS)


def _key(row: dict[str, Any]) -> tuple[int, ...]:
    """The version of torch, for sorting."""
    return tuple(map(int, row["torch"].partition("+")[0].split(".")))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--part", choices=PARTS, action="append", help="run this alone, and keep the other's results")
    parser.add_argument("--failed", action="store_true", help="of the tests run those again that failed")
    parser.add_argument("--only", action="append", help="the version of torch of a pair (may be repeated)")
    parser.add_argument(
        "--environment", action="append", default=[], metavar="TORCH=PYTHON",
        help="use the environment of this python for a pair, for instance 2.15.0=/venvs/new/bin/python",
    )  # fmt: skip
    args = parser.parse_args()
    given = dict(word.split("=", 1) for word in args.environment)
    chosen = [pair for pair in PAIRS if args.only is None or pair.torch in args.only]
    unknown = {*given, *(args.only or [])} - {pair.torch for pair in PAIRS}
    if unknown:
        parser.error(f"no pair has torch {', '.join(sorted(unknown))}")
    good = True
    for pair in chosen:
        row = check(
            pair, Path(given[pair.torch]).absolute() if pair.torch in given else None, args.part or PARTS, args.failed
        )
        write(row)
        good = good and passed(row)
        print(json.dumps(row, indent=1), flush=True)
    print(table(earlier()))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
