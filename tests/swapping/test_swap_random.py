"""torch.compile(backend="fastseg") on random programs: results, gradients and running statistics are those of torch.

The rules rewrite calls on any tensor here, and the operators fall back to PyTorch in float64, so that the error of a
wrong rewrite is larger than rounding. FASTSEG_TEST_SEED=random draws other programs; PROGRAMS is their number.
"""

import os
from unittest import mock

import pytest
import torch
from support.programs import function_of, inputs, outcome, random_program

import fastseg
from fastseg.compiler import availability

PROGRAMS = int(os.environ.get("PROGRAMS", 40))


def only_rank(name, tensor, unsupported, preferred=None):
    """Stands in for reason_off_kernels: only the rules themselves keep a call from being rewritten."""
    return None if tensor.dim() == 4 else unsupported


def assert_same(got, want):
    for a, b in zip(got, want, strict=True):
        if a is None or b is None:  # None stands for a gradient of zeros
            assert not any(x.any() for x in (a, b) if x is not None)
            continue
        assert a.dtype == b.dtype and a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=0, atol=1e-8 * max(1.0, b.abs().max().item()), equal_nan=True)


@pytest.mark.interpreted
@pytest.mark.parametrize("inner, share", [("eager", 1.0), ("aot_eager", 0.1)])
def test_a_rewritten_program_computes_the_same(inner, share, seed):
    tried = rewritten = 0
    for n in range(seed, seed + int(PROGRAMS * share)):
        source = random_program(n)
        given, program = inputs(torch.Generator().manual_seed(n)), function_of(source)
        try:
            want = outcome(program, given, n)
        except RuntimeError:  # the program writes to a tensor that torch's own backward needs
            continue
        torch.compiler.reset()
        reports = []
        options = {"inner": inner, "report": reports.append}
        with mock.patch.object(availability, "reason_off_kernels", only_rank):
            got = outcome(torch.compile(program, backend=fastseg.compile_backend, options=options), given, n)
        try:
            assert_same(got, want)
        except AssertionError as error:
            raise AssertionError(f"program {n}\n{source}\n{[str(report) for report in reports]}") from error
        tried, rewritten = tried + 1, rewritten + sum(report.rewritten.total() for report in reports)
    assert tried and rewritten > tried
