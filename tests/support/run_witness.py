"""The program of `make witness`: `fastseg verify` without a GPU, on the IR that Triton's compiler makes.

    python tests/support/run_witness.py                       faults are found; then verify for 8.0 and 9.0, every dtype
    python tests/support/run_witness.py pytest --sm 80 ARGS   tests under the witness
    python tests/support/run_witness.py verify --sm 90 ARGS   one `fastseg verify` under the witness, as JSON

See witness.py beside this file and docs/verification.md. Exit code 1 if a result is wrong, a launch is stopped, nothing
is launched, or a kernel is not reached; 2 if the environment is not the witness's.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

from support import witness  # noqa: E402

CAPABILITIES = (80, 90)  # the oldest that Triton supports, and the first with TMA
DTYPES = ("float32", "float16", "bfloat16")
SEED = "0"


def verify(sm: int, arguments: list[str]) -> dict[str, Any]:
    """Run `fastseg verify` for a GPU of this compute capability. Returns what was compared, launched and stopped.

    Its seconds are those of the CPU in this process, from the start of Python.
    """
    output = io.StringIO()
    with witness.session(sm) as seen, contextlib.redirect_stdout(output):
        from support.kernel_names import every_kernel

        from fastseg.commands.cli import main

        main(["verify", "--json", *arguments])
        kernels = every_kernel()
    cases = json.loads(output.getvalue())["cases"]
    results = [(case, result) for case in cases for result in case["results"]]
    wrong = [
        f"{case['case']} {case['dtype']} {case['precision']} {case['layout']}: {result['tensor']} is off by "
        f"{result['error']}, allowed {result['allowed']}"
        for case, result in results
        if not result["passed"]
    ]
    return {
        "sm": sm, "dtypes": sorted({case["dtype"] for case in cases}), "cases": len(cases), "results": len(results),
        "wrong": wrong, "launches": dict(seen.launches), "faults": seen.faults, "unchecked": seen.unchecked,
        "kernels": sorted(kernels), "seconds": time.process_time(),
    }  # fmt: skip


def run_tests(sm: int, arguments: list[str]) -> int:
    """Run pytest for a GPU of this compute capability."""
    import pytest

    with witness.session(sm) as seen:
        code = int(pytest.main(arguments))
    print(f"{seen.launches.total()} launches of {len(seen.launches)} kernels, {len(seen.faults)} stopped, "
          f"{seen.unchecked} too large to look for races in")  # fmt: skip
    for fault in dict.fromkeys(map(_first_line, seen.faults)):
        print(f"STOPPED {fault}")
    return code


def _first_line(fault: str) -> str:
    """The first line of a message, without most of the IR that ttsem quotes."""
    return fault.splitlines()[0][:300]


def _job(*words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, *words]
    return subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True)


def problems(rows: list[dict[str, Any]]) -> list[str]:
    """What is wrong with the rows of all verifications, in words."""
    found = []
    for row in rows:
        name = f"compute capability {row['sm'] / 10}, {', '.join(row['dtypes'])}"
        found += [f"{name}: WRONG {wrong}" for wrong in row["wrong"]]
        found += [f"{name}: STOPPED {_first_line(fault)}" for fault in row["faults"]]
        if not row["launches"]:
            found.append(f"{name}: nothing was launched")
    reached = set().union(*(row["launches"] for row in rows))
    every = set().union(*(row["kernels"] for row in rows))
    return found + [f"{kernel} was not reached" for kernel in sorted(every - reached)]


def report(rows: list[dict[str, Any]], seconds: float) -> int:
    """Print the table of all verifications and what is wrong. Returns the exit code."""
    import platform
    from importlib.metadata import version

    from rich.console import Console
    from rich.table import Table

    columns = [
        "capability",
        "dtype",
        "cases",
        "results",
        "wrong",
        "launches",
        "kernels",
        "stopped",
        "unchecked",
        "CPU s",
    ]
    table = Table(*columns, title="fastseg verify on compiled IR")
    for row in rows:
        table.add_row(
            f"{row['sm'] / 10}", ", ".join(row["dtypes"]), str(row["cases"]), str(row["results"]),
            str(len(row["wrong"])), f"{sum(row['launches'].values()):,}", str(len(row["launches"])),
            str(len(row["faults"])), str(row["unchecked"]), f"{row['seconds']:.0f}",
        )  # fmt: skip
    console = Console(width=max(100, Console().width))
    console.print(table)
    reached, every = (set().union(*(row[name] for row in rows)) for name in ("launches", "kernels"))
    launches = sum(sum(row["launches"].values()) for row in rows)
    console.print(f"{launches:,} launches; {len(reached & every)} of {len(every)} kernels reached; {seconds:.0f} s")
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "triton", "ttsem"))
    console.print(f"{versions}, Python {platform.python_version()}, {time.strftime('%Y-%m-%d')}")
    found = problems(rows)
    for line in found:
        console.print(line, markup=False, soft_wrap=True)
    return 1 if found else 0


def everything() -> int:
    """See that the witness finds faults, then verify for each compute capability and dtype, two at a time."""
    started = time.perf_counter()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        tests = pool.submit(
            _job, "pytest", "--sm", "90", "-q", "-p", "no:cacheprovider", "tests/kernels/test_witness.py"
        )
        jobs = [
            (sm, dtype, pool.submit(_job, "verify", "--sm", str(sm), "--dtype", dtype, "--seed", SEED))
            for dtype in DTYPES
            for sm in CAPABILITIES
        ]
        rows, failed = [], []
        for sm, dtype, job in jobs:
            done, name = job.result(), f"compute capability {sm / 10}, {dtype}"
            if done.returncode == 0:
                row = json.loads(done.stdout.splitlines()[-1])
                rows.append(row)
                print(f"{name}: {row['cases']} cases, {len(row['wrong'])} wrong results, {len(row['faults'])} stopped "
                      f"launches, {row['seconds']:.0f} s", flush=True)  # fmt: skip
            else:
                failed.append(f"{name}: the verification ended with\n{done.stderr}")
        tested = tests.result()
    print(tested.stdout + tested.stderr)
    if tested.returncode:
        failed.append("the witness does not see every fault that was put into kernels")
    code = report(rows, time.perf_counter() - started) if rows else 1
    print(*failed, sep="\n")
    return 1 if failed else code


def main(words: list[str]) -> int:
    """Run the program with these arguments. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mode", nargs="?", choices=("everything", "pytest", "verify"), default="everything")
    parser.add_argument(
        "--sm", type=int, default=90, help="compute capability, such as 80 for 8.0 (default: %(default)s)"
    )
    args, rest = parser.parse_known_args(words)
    if (reason := witness.missing()) is not None:
        print(f"no witness here: {reason}", file=sys.stderr)
        return 2
    if args.mode == "pytest":
        return run_tests(args.sm, rest)
    if args.mode == "verify":
        print(json.dumps(verify(args.sm, rest)))
        return 0
    return everything()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
