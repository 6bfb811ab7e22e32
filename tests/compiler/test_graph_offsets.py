"""torch.compile(model, backend="fastseg"): where the int64 indices of a pool become uint8 offsets."""

import pytest
import torch
import torch.nn.functional as F
from support.compiled import Compiled


def to_another_size(x, y, indices):
    return F.max_unpool2d(y, indices, 2, output_size=(7, 9))


def by_other_windows(x, y, indices):
    return F.max_unpool2d(y, indices, 3, stride=(2, 2), output_size=(6, 8))


def read_as_numbers(x, y, indices):
    return F.max_unpool2d(y, indices, 2, output_size=x.shape) + indices.sum()


def unpooled_themselves(x, y, indices):
    return F.max_unpool2d(y, indices, 2) + F.max_unpool2d(indices.double(), indices, 2)


def moved(x, y, indices):
    return F.max_unpool2d(y.flip(0), indices.flip(0), 2)


@pytest.mark.parametrize("reader, options, reason", [
    (to_another_size, {}, "is not proven to have the size"),
    (by_other_windows, {}, "has another kernel_size, stride or padding"),
    (read_as_numbers, {}, "its indices are read by sum"),
    (unpooled_themselves, {}, "its indices are read by "),
    (moved, {}, "its indices are read by flip"),
    (lambda x, y, indices: (F.max_unpool2d(y, indices, 2), indices), {}, "its indices are read by output"),
    (lambda x, y, indices: F.max_unpool2d(y, indices, 2, 1), dict(stride=1, dilation=1, ceil_mode=True), None),
    (lambda x, y, indices: F.max_unpool2d(y, indices, 3, 2, 1, x.size()), dict(kernel_size=3, stride=2, padding=1),
     None),
    (lambda x, y, indices: F.max_unpool2d(y, indices, 2, 1, 0, (6, 8)), dict(stride=2, dilation=2), "it is dilated"),
    (lambda x, y, indices: F.max_unpool2d(y, indices, 17, 1), dict(kernel_size=17), "more than 256 elements"),
])  # fmt: skip
def test_indices_become_offsets_where_that_is_proven(reader, options, reason, device, triton_backend):
    shape = (1, 1, 17, 17) if options.get("kernel_size") == 17 else (2, 2, 6, 8)
    x = torch.randn(shape, device=device)
    if options.get("dilation") == 2:
        reader = lambda x, y, indices: F.max_unpool2d(y, indices, 4, 2, 0, x.shape)  # noqa: E731

    def function(x):
        y, indices = F.max_pool2d(x, **{"kernel_size": 2, **options}, return_indices=True)
        return reader(x, y, indices)

    ours = Compiled(function)
    got, want = ours(x), function(x)
    for a, b in zip(*(value if isinstance(value, tuple) else (value,) for value in (got, want)), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
    names = {"max_pool2d", "max_unpool2d"} if reason else {"max_pool2d_with_offsets", "max_unpool2d_with_offsets"}
    assert ours.rewritten.keys() == names
    assert ours.reasons == [] if reason is None else reason in ours.reasons[0]


def test_indices_that_nothing_reads_become_offsets(device, triton_backend):
    ours, x = Compiled(lambda x: F.max_pool2d(x, 2, return_indices=True)[0]), torch.randn(1, 2, 4, 4, device=device)
    assert torch.equal(ours(x), F.max_pool2d(x, 2))
    assert ours.rewritten == {"max_pool2d_with_offsets": 1}


@pytest.mark.interpreted
def test_an_unpool_whose_input_autocast_casts_is_not_rewritten(triton_backend):
    def function(x):
        y, indices = F.max_pool2d(x, 2, return_indices=True)
        return F.max_unpool2d(y, indices, 2), F.max_unpool2d(y.float(), indices, 2)

    ours, x = Compiled(function), torch.randn(1, 2, 4, 4, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        for got, want in zip(ours(x), function(x), strict=True):
            assert got.dtype == want.dtype == torch.float32 and torch.equal(got, want)
    assert ours.rewritten == {"max_pool2d": 1, "max_unpool2d": 1}
    assert "autocast casts its input" in ours.reasons
