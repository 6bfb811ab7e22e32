import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastseg import dispatch
from fastseg.commands import cli
from fastseg.verification import criterion, operators


def test_a_right_function_passes(device):
    x, w = torch.randn(3, 4, device=device), torch.randn(4, 5, device=device)
    names = [c.tensor for c in criterion.compare_to_torch(torch.matmul, torch.matmul, [x, w], ["x", "w"]) if c.passed]
    assert names == ["output 0", "grad x", "grad w"]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: x * 1.0001,  # a value
        lambda x: x + 0 * x.detach().where(x > 0, torch.nan),  # NaN where the truth has none
        lambda x: x.detach() + (x - x.detach()) * 1.01,  # only the gradient
        lambda x: torch.empty_like(x).copy_(x)[:-1],  # the shape
    ],
)
def test_a_wrong_function_fails(wrong, device):
    x = torch.randn(64, device=device)
    assert not all(c.passed for c in criterion.compare_to_torch(wrong, lambda x: x * 1, [x]))


def test_an_element_that_is_not_written_is_found(device):
    def forgets(x):
        y = torch.empty_like(x)
        y[1:] = x[1:]
        return y

    x = torch.zeros(64, device=device)  # fresh memory often holds zeros
    assert not all(c.passed for c in criterion.compare_to_torch(forgets, lambda x: x * 1, [x]))


def test_integers_must_be_equal():
    theirs = lambda x: torch.max(x, 0)  # noqa: E731
    ours = lambda x: (theirs(x)[0], theirs(x)[1] + 1)  # noqa: E731
    assert [c.passed for c in criterion.compare_to_torch(ours, theirs, [torch.randn(4, 3)])] == [True, False, True]


def test_relative_error():
    inf, nan = math.inf, math.nan
    truth = torch.tensor([4.0, -2.0, inf, nan])
    assert criterion.relative_error(truth.clone(), truth) == 0
    assert criterion.relative_error(torch.tensor([4.0, -1.0, inf, nan]), truth) == 0.25
    assert criterion.relative_error(torch.tensor([4.0, -2.0, -inf, nan]), truth) == inf
    assert criterion.relative_error(torch.tensor([4.0, nan, inf, nan]), truth) == inf


def test_the_command_passes_and_says_so(capsys):
    assert cli.main(["verify", "--quick", "--op", "max_unpool2d", "--dtype", "bfloat16", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["passed"] and len(report["cases"]) == 4
    assert {case["layout"] for case in report["cases"]} == {"nchw", "channels_last"}
    assert all(result["passed"] for case in report["cases"] for result in case["results"])


def test_the_command_fails_on_a_wrong_kernel(monkeypatch, capsys):
    from fastseg import kernels

    def zeros(x, y, positions, windows):
        y.zero_()
        positions.zero_()

    monkeypatch.setattr(kernels.pooling.pool, "max_pool2d_fwd", zeros)
    assert cli.main(["verify", "--quick", "--op", "max_pool2d", "--dtype", "float32"]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_a_case_that_raises_fails_and_the_others_continue(monkeypatch, capsys):
    from fastseg import kernels

    def broken(*arguments):
        raise TypeError("no such kernel")

    monkeypatch.setattr(kernels.pooling.pool, "max_pool2d_fwd", broken)
    arguments = ["verify", "--quick", "--op", "max_pool2d", "--op", "max_unpool2d", "--dtype", "float32", "--json"]
    assert cli.main(arguments) == 1
    cases = json.loads(capsys.readouterr().out)["cases"]
    assert [all(r["passed"] for r in c["results"]) for c in cases] == [False] * 4 + [True] * 4
    assert "no such kernel" in cases[0]["results"][0]["tensor"] and cases[0]["results"][0]["error"] is None


@pytest.mark.parametrize(
    "error, backend, counted_as_failure",
    [
        (dispatch.NotSupported, "cuda", False),
        (dispatch.NotSupported, "triton", True),
        (NotImplementedError, "cuda", True),
    ],
)
def test_unsupported_cases_are_recognized_by_the_type_of_the_error(error, backend, counted_as_failure, monkeypatch):
    """CUDA C++ kernels may lack a case, which then has no comparisons."""

    def choose(*args, **kwargs):
        raise error("in any words")

    monkeypatch.setattr(dispatch, "choose", choose)
    found = [comparisons for _, comparisons in operators.verify(["max_pool2d"], ["float32"], True, "cpu", 0, backend)]
    assert len(found) == 4
    assert all(bool(comparisons) == counted_as_failure for comparisons in found)
    assert not any(c.passed for comparisons in found for c in comparisons)


def test_an_operator_without_cuda_kernels_has_no_comparisons():
    runs = operators.verify(["conv_transpose2d"], ["float32"], True, "cpu", 0, "cuda")
    assert [comparisons for _, comparisons in runs] == [[], []]


def test_without_triton_it_raises_at_once(monkeypatch, capsys):
    monkeypatch.setattr(dispatch, "TRITON_INSTALLED", False)
    assert cli.main(["verify", "--quick", "--op", "max_pool2d"]) == 2
    assert "--backend triton cannot run: triton is not installed" in capsys.readouterr().err


@pytest.mark.parametrize("json_option", [["--json"], []])
def test_an_interrupted_run_reports_the_finished_cases(json_option, monkeypatch, capsys):
    whole = operators.verify

    def interrupted(*arguments):
        yield from itertools.islice(whole(*arguments), 3)
        raise KeyboardInterrupt

    monkeypatch.setattr("fastseg.commands.verify.verify", interrupted)
    assert cli.main(["verify", "--quick", "--op", "max_unpool2d", "--dtype", "float32", *json_option]) == 130
    output = capsys.readouterr().out
    if json_option:
        report = json.loads(output)
        assert report["interrupted"] and not report["passed"] and len(report["cases"]) == 3
        assert all(result["passed"] for case in report["cases"] for result in case["results"])
    else:
        assert "3 cases, 0 failed" in output and "interrupted" in output


EVERY_KERNEL = """
import itertools
from support.kernel_names import every_kernel
from fastseg import dispatch
from fastseg.verification import cases
from fastseg.verification.operators import SIZES
from fastseg.inspect.codegen import record
from fastseg.kernels.launch import targeting
from fastseg.ops.operator import observing

wanted = every_kernel()
assert wanted
for (operator, sizes), dtype, layout in itertools.product(
    SIZES.items(), ("float32", "bfloat16"), cases.LAYOUTS.values()
):
    at = cases.Placement(cases.DTYPES[dtype], layout, "meta")
    for case in (case for make in sizes for case in make(at)):
        with dispatch.backend("triton"), targeting(90), observing(lambda operator, call: None):
            wanted -= {launch.name for launch in record(lambda: case.step(case.ours, backward=True)())}
print(*sorted(wanted))
"""


def test_every_kernel_is_run():
    """On an H100: the kernels that use TMA too."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), env.get("PYTHONPATH", "")])
    run = subprocess.run([sys.executable, "-c", EVERY_KERNEL], capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "\n"
