"""Without a GPU, compiled kernels with faults are stopped. `make witness` runs this; elsewhere it is skipped."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from support import witness

from fastseg import functional, kernels
from fastseg.verification import cases, criterion

pytestmark = pytest.mark.skipif(not witness.opened(), reason="needs ttsem and its own environment: run `make witness`")

STORE = "tl.store(y + o_y, best.to(y.dtype.element_ty), mask=m_live)"
LOAD = 'value = tl.load(x + o_x, mask=m_inside, other=float("-inf")).to(best.dtype)'
FAULTS = {  # what is replaced in a copy of the pooling kernel, and what the witness says
    "a store without a mask": (
        STORE,
        STORE.replace(", mask=m_live", ""),
        "writes 40 element(s) past the end of the tensor passed as `y`",
    ),
    "a load without a mask": (
        LOAD,
        LOAD.replace("mask=m_inside, other", "mask=m_live, other"),
        "before the start of the tensor passed as `x`",
    ),
    "a store that overlaps another program's": (
        STORE,
        STORE.replace("y + o_y,", "y + o_y - (program > 0) * VEC,"),
        "program instances (0, 0, 0) and (1, 0, 0) both touch element 127 of `y`",
    ),
}
SKIPPED = STORE.replace("mask=m_live", "mask=m_live & (o[:, None] % 7 != 3)")


def changed(tmp_path, before, after):
    """The pooling kernel from a copy of its file in which one statement is another."""
    source = Path(kernels.pooling.pool.__file__).read_text()
    assert source.count(before) == 1
    path = tmp_path / "changed_pool.py"
    path.write_text(source.replace(before, after))
    spec = importlib.util.spec_from_file_location("fastseg.kernels.pooling.changed_pool", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.max_pool2d_fwd_kernel


@pytest.fixture
def pooled(monkeypatch, triton_backend):
    """pooled(kernel): compare padded pooling with torch, in blocks of 128 windows, of which the last is not full."""
    at = cases.Placement(torch.float32, torch.contiguous_format, "cuda")
    case = next(cases.max_pool2d(at, (2, 3, 7, 17), cases.PoolSpec(kernel=3, stride=2, padding=1)))

    def compare(kernel):
        for module in (kernels.pooling.pool, kernels.pooling.tiling):
            monkeypatch.setattr(module, "BLOCK", 128)
        monkeypatch.setattr(kernels.pooling.pool, "max_pool2d_fwd_kernel", kernel)
        return criterion.compare_to_torch(case.ours, case.theirs, list(case.inputs.values()))

    return compare


def test_the_kernel_as_it_is_passes(pooled):
    assert all(c.passed for c in pooled(kernels.pooling.pool.max_pool2d_fwd_kernel))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_stops_the_launch(fault, tmp_path, pooled):
    from ttsem.sanitize import KernelFault

    before, after, said = FAULTS[fault]
    with pytest.raises(KernelFault) as stopped:
        pooled(changed(tmp_path, before, after))
    assert said in str(stopped.value) and "max_pool2d_fwd_kernel" in str(stopped.value)


def test_a_store_that_skips_elements_fails(tmp_path, pooled):
    output, *_ = pooled(changed(tmp_path, STORE, SKIPPED))
    assert not output.passed and output.error == float("inf")  # an element that was not written is NaN


def out_of_range_label(loss, *logits):
    target = torch.zeros(1, 8, 8, dtype=torch.long, device="cuda")
    target[0, 3, 3] = 7
    loss(torch.randn(1, 5, *logits, device="cuda"), target)


def invalid_index(index):
    x = torch.ones(1, 1, 4, 4, device="cuda")
    functional.max_unpool2d(x, torch.full((1, 1, 4, 4), index, device="cuda"), 2)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: out_of_range_label(functional.cross_entropy, 8, 8), "neither a class nor ignore_index"),
        (lambda: out_of_range_label(functional.upsample_cross_entropy, 4, 4), "neither a class nor ignore_index"),
        *((lambda i=i: invalid_index(i), "found an invalid max index") for i in (-1, 64, 2**32 + 3)),
    ],
)
def test_a_device_assertion_stops_the_launch(call, said):
    """As on a GPU, where the tests marked `gpu` see it end the process."""
    from ttsem.sanitize import Unjudged

    with pytest.raises(Unjudged, match=said):
        call()
