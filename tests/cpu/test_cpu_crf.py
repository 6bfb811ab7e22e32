"""The CPU kernel of mean_field_message: tiles and blocks of every width, dtypes, threads, tiny numbers."""

import pytest
import torch
from support.crf_common import picture

import fastseg
from fastseg import functional as FS
from fastseg.kernels.cpu import build

pytestmark = pytest.mark.skipif(build.unavailable() is not None, reason=str(build.unavailable()))


def both(values, *args, **options):
    """The kernel's messages, and the reference's in float64."""
    with fastseg.backend("cpu"):
        found = FS.mean_field_message(values, *args, **options)
    with fastseg.backend("torch"):
        return found, FS.mean_field_message(values.double(), *args, **options)


def error(found, truth):
    return ((found - truth).abs().max() / truth.abs().max()).item()


@pytest.mark.parametrize("classes", range(1, 27))
def test_every_number_of_classes(classes):
    """Classes are multiplied in blocks of 12 or 6; a picture wider than a block of neighbours, 128."""
    found, truth = both(torch.randn(1, classes, 2, 170), picture(1, 3, 2, 170), 60.0, 40.0)
    assert error(found, truth) < 2e-6


@pytest.mark.parametrize("width", [1, 15, 16, 17, 31, 32, 33, 65])
def test_every_width(width):
    for radius in (3.0, None):
        found, truth = both(torch.randn(2, 3, 7, width), picture(2, 3, 7, width), 2.0, 20.0, radius)
        assert error(found, truth) < 2e-6


@pytest.mark.parametrize("dtype, allowed", [(torch.float64, 1e-14), (torch.bfloat16, 4e-3)])
def test_other_dtypes(dtype, allowed):
    for layout in (torch.contiguous_format, torch.channels_last):
        values = torch.randn(1, 5, 6, 19).to(dtype).contiguous(memory_format=layout)
        found, truth = both(values, picture(1, 3, 6, 19), 2.0, 20.0)
        assert found.dtype == dtype and found.is_contiguous(memory_format=layout)
        assert error(found.double(), truth) < allowed


def test_the_kernel_runs_under_auto_and_does_not_depend_on_threads():
    values, image = torch.randn(1, 7, 40, 50), picture(1, 3, 40, 50)
    assert fastseg.explain(FS.mean_field_message, values, image)[0].backend == "cpu"
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(FS.mean_field_message(values, image, 3.0, 20.0))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


def test_tiny_numbers_count_as_zero_and_torchs_mode_stays():
    """The kernel takes denormal numbers as zero while it runs; other code on the thread keeps them."""
    found, _ = both(torch.full((1, 2, 3, 4), 1e-41), sigma=1.0)
    assert not found.any()
    assert (torch.full((4,), 1e-41) * 1.5).all()
