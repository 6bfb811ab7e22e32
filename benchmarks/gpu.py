"""Tests, benchmarks and checks that need a GPU, in one command: python3 benchmarks/gpu.py --out DIR

It runs from a checkout, which need not be installed, with the python3 that starts it, and needs torch, triton, numpy,
rich and pytest. Each part is a separate process with a time limit; if one fails or hangs, the others still run. The
results are in DIR: summary.json, doctor.json, verify.json, results.jsonl, codegen.json, log.txt, and the measured times
by which fastseg chose between its convolutions and cuDNN's.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# verify also checks the CUDA C++ kernels if CuPy is installed
PARTS = ("doctor", "tests", "verify", "operators", "models", "codegen", "sanitizer")
BUDGET = 510.0
# Fractions of the budget. The doctor's is for the first import of torch. Unused time passes to later parts.
SHARES = {
    "doctor": 0.12,
    "tests": 0.22,
    "verify": 0.10,
    "operators": 0.24,
    "models": 0.19,
    "codegen": 0.07,
    "sanitizer": 0.06,
}
LEAST = 10.0  # seconds; a part does not start if less time is left
MARGIN = 12.0  # seconds before its limit from which a benchmark starts nothing new
GRACE = 8.0  # seconds that an interrupted part has to report its results
LOG_BYTES = 1_000_000  # per part; further output is dropped
OPERATOR_TESTS = (  # below tests/
    "pooling/test_pool.py",
    "pooling/test_unpool.py",
    "pooling/test_geometry.py",
    "batch_norm/test_batch_norm.py",
    "batch_norm/test_batch_norm_modules.py",
    "models/test_models.py",
    "convolution/test_conv_transpose.py",
    "convolution/test_conv_transpose_tma.py",
    "convolution/test_conv_transpose_depthwise.py",
    "convolution/test_conv_transpose_norm.py",
    "convolution/test_unpool_conv*.py",
    "test_autotune.py",
    "losses/test_cross_entropy*.py",
    "losses/test_dice_cross_entropy.py",
    "losses/test_linear_cross_entropy.py",
    "losses/test_upsample*.py",
    "losses/test_confusion.py",
    "nn/test_nn.py",
    "swapping/test_swap.py",
    "swapping/test_swap_sequences.py",
    "test_dispatch.py",
)

Command = list[str]


@dataclass
class Part:
    """One process: its command, its share of the budget, and the file for its standard output, if any.

    seconds_option: the command has an option `--seconds`, after which it starts nothing new.
    """

    name: str
    command: Command
    share: float
    output: str | None = None
    seconds_option: bool = False


@dataclass
class Outcome:
    """How a part ended."""

    name: str
    status: str = "not run"
    code: int | None = None
    seconds: float = 0.0
    limit: float = 0.0
    command: str = ""
    last_lines: list[str] = field(default_factory=list)


def plan(chosen: Sequence[str], quick: bool, results: Path) -> list[Part]:
    """The parts in order. quick: a little of each, to try this file on a machine without a GPU."""
    fastseg = [sys.executable, "-m", "fastseg.commands.cli"]
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=5"]
    if importlib.util.find_spec("xdist") is not None and not quick:
        pytest += ["-n", str(min(8, os.cpu_count() or 1)), "--dist", "worksteal"]
    bench = [*fastseg, "bench", "run", "--out", str(results), *["--quick"] * quick]
    tests = (
        ["tests/test_dispatch.py"]
        if quick
        else [
            str(path.relative_to(ROOT)) for pattern in OPERATOR_TESTS for path in sorted((ROOT / "tests").glob(pattern))
        ]
    )
    small = ["--quick", "--op", "max_pool2d"] if quick else []
    few = ["--op", "max_pool2d", "--layout", "nchw", "--sm", "90"] if quick else []
    share, cupy = dict(SHARES), importlib.util.find_spec("cupy") is not None
    gpu_tests = ["tests/pooling/test_unpool.py"] if quick else ["tests"]
    half_precision = [*fastseg, "verify", "--dtype", "float16", *(small or ["--quick"])]
    sanitizer = [find_sanitizer(), "--error-exitcode", "9", "--tool"]
    found = [
        Part("doctor", [*fastseg, "doctor", "--json"], share["doctor"], "doctor.json"),
        Part("tests-gpu", [*pytest, *gpu_tests, "-m", "gpu"], share["tests"] * 0.4),
        Part("tests-operators", [*pytest, *tests, "-m", "not gpu"], share["tests"] * 0.6),
        Part("verify", [*fastseg, "verify", "--json", *small], share["verify"] * (0.7 if cupy else 1), "verify.json"),
        *([Part("verify-cuda", [*fastseg, "verify", "--backend", "cuda", "--json", *small], share["verify"] * 0.3,
                "verify-cuda.json")] if cupy else []),
        Part("operators", [*bench, "--part", "operators", "--part", "overhead"], share["operators"] * 0.7, None, True),
        Part("operators-nchw", [*bench, "--part", "operators", "--layout", "nchw", "--no-compile"],
             share["operators"] * 0.3, None, True),
        Part("models", [*bench, "--part", "models"], share["models"], None, True),
        Part("codegen", [*fastseg, "inspect", "codegen", "--json", *few], share["codegen"], "codegen.json"),
        # Last, in the time that is left: it would use any amount of time.
        *(
            Part(f"sanitizer-{tool}", [*sanitizer, tool, *half_precision], share["sanitizer"] / 2)
            for tool in ("memcheck", "racecheck")
        ),
    ]  # fmt: skip
    return [part for part in found if part.name == "doctor" or part.name.partition("-")[0] in chosen]


def find_sanitizer() -> str:
    """The path of NVIDIA's compute-sanitizer: from PATH, or the CUDA toolkit's default."""
    return shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"


def environment(out: Path) -> dict[str, str]:
    """This process's environment with the checkout first on the path and without TRITON_INTERPRET.

    Measured times of fastseg's convolutions and cuDNN's are kept in `out`.
    """
    found = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    found["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), found.get("PYTHONPATH"))))
    return found | {"PYTHONUNBUFFERED": "1", "FASTSEG_CACHE": str(out.resolve())}


def interruptible() -> None:
    """Restore SIGINT in a part's process: a shell that starts this program in the background makes it ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Run:
    """Runs parts one after another, writes their results to a folder, and prints the progress."""

    def __init__(self, out: Path, budget: float) -> None:
        self.out, self.began, self.budget = out, time.monotonic(), budget
        self.outcomes: list[Outcome] = []
        out.mkdir(parents=True, exist_ok=True)
        self.log = (out / "log.txt").open("w", encoding="utf-8", errors="replace")

    def left(self) -> float:
        """The seconds of the budget that are left."""
        return self.budget - (time.monotonic() - self.began)

    def say(self, text: str) -> None:
        """Print a line, and write it to the log."""
        line = f"[{time.monotonic() - self.began:4.0f} s] {text}"
        print(line, flush=True)
        self.log.write(line + "\n")
        self.log.flush()

    def all(self, parts: Sequence[Part]) -> int:
        """Run the parts, each with its share of the time that is left. Returns the exit code."""
        self.outcomes = [Outcome(part.name, command=" ".join(part.command)) for part in parts]
        for number, (part, outcome) in enumerate(zip(parts, self.outcomes, strict=True)):
            waiting = sum(other.share for other in parts[number:])
            outcome.limit = round(max(0.0, self.left() * part.share / waiting), 1)
            if self.left() < min(LEAST, self.budget / 4):
                self.say(f"{part.name}: not run, {self.left():.0f} s are left")
                continue
            try:
                self.one(part, outcome)
            except Exception as error:  # the other parts must run
                outcome.status = f"failed to start: {error}"
            self.say(f"{part.name}: {outcome.status} after {outcome.seconds:.0f} s")
            self.summary()
        self.summary()
        self.log.close()
        return 0 if all(outcome.status == "ok" for outcome in self.outcomes) else 1

    def one(self, part: Part, outcome: Outcome) -> None:
        """Run one part, within its limit."""
        command = list(part.command)
        if part.seconds_option:
            command += ["--seconds", str(max(1, round(outcome.limit - MARGIN)))]
        self.say(f"{part.name}: at most {outcome.limit:.0f} s: {' '.join(command[1:])}")
        started, outcome.status = time.monotonic(), "interrupted"
        with contextlib.ExitStack() as stack:
            target = subprocess.PIPE
            if part.output is not None:
                target = stack.enter_context((self.out / part.output).open("wb"))
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment(self.out), stdin=subprocess.DEVNULL, stdout=target,
                stderr=subprocess.STDOUT if part.output is None else subprocess.PIPE, start_new_session=True,
                preexec_fn=interruptible,
            )  # fmt: skip
            stream = process.stdout if part.output is None else process.stderr
            reader = threading.Thread(target=self.follow, args=(stream, outcome), daemon=True)
            reader.start()
            try:
                outcome.code = process.wait(timeout=outcome.limit)
                outcome.status = "ok" if outcome.code == 0 else f"failed with code {outcome.code}"
            except subprocess.TimeoutExpired:
                outcome.status = "stopped at its time limit"
                process.send_signal(signal.SIGINT)  # pytest prints its failures, verify its finished cases
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=GRACE)
            finally:
                with contextlib.suppress(ProcessLookupError):  # its child processes too, which would occupy the GPU
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                reader.join(timeout=5)
                outcome.seconds = round(time.monotonic() - started, 1)

    def follow(self, stream: Any, outcome: Outcome) -> None:
        """Copy the output of a part to the log and the terminal, line by line."""
        written = 0
        for raw in stream:
            line = raw.decode(errors="replace").rstrip("\n")
            outcome.last_lines = [*outcome.last_lines[-14:], line[:400]]
            written += len(line)
            if written < LOG_BYTES:
                with contextlib.suppress(ValueError):  # a stopped part still prints, but the log is closed
                    self.log.write(f"  {line}\n")
                    self.log.flush()
                print(f"    {line[:200]}", flush=True)

    def summary(self) -> None:
        """Write summary.json atomically."""
        found = {
            "seconds": round(time.monotonic() - self.began, 1),
            "budget": self.budget,
            "passed": all(outcome.status == "ok" for outcome in self.outcomes),
            "parts": [asdict(outcome) for outcome in self.outcomes],
        }
        temporary = self.out / "summary.json.part"
        temporary.write_text(json.dumps(found, indent=1), encoding="utf-8")
        os.replace(temporary, self.out / "summary.json")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the files")
    parser.add_argument("--part", action="append", choices=PARTS[1:], help="only this part (may be repeated)")
    parser.add_argument(
        "--budget", type=float, default=BUDGET, metavar="S", help="seconds in all (default: %(default)g)"
    )
    parser.add_argument("--quick", action="store_true", help="a little of each part; works without a GPU")
    args = parser.parse_args(arguments)
    if not args.budget > 0:
        parser.error("--budget must be above 0 seconds")
    run = Run(args.out.resolve(), args.budget)
    return run.all(plan(args.part or PARTS, args.quick, args.out.resolve() / "results.jsonl"))


if __name__ == "__main__":
    sys.exit(main())
