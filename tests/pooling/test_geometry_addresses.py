"""Addresses of pooling and unpooling beyond 2^31 elements, on tensors without data."""

import pytest
import torch

from fastseg import kernels
from fastseg.kernels.pooling.geometry import PoolGeometry
from fastseg.kernels.triton_internals import InterpreterError, interpreter
from fastseg.ops.pooling.geometry import pooled_size

LAYOUTS = ("nchw", "channels_last")
SHAPE = (40, 64, 2048, 2048)  # 10.7e9 elements; the pooled map has 2.7e9


def planes(layout, height, width):
    """(flat, coordinates): the element number of (image, channel, row, column) and back, in Python's integers."""
    _, channels, _, _ = SHAPE

    def flat(n, c, h, w):
        if layout == "channels_last":
            return ((n * height + h) * width + w) * channels + c
        return ((n * channels + c) * height + h) * width + w

    def coordinates(element):
        if layout == "channels_last":
            pixel, c = divmod(element, channels)
            row, w = divmod(pixel, width)
            n, h = divmod(row, height)
        else:
            row, w = divmod(element, width)
            plane, h = divmod(row, height)
            n, c = divmod(plane, channels)
        return n, c, h, w

    return flat, coordinates


def huge(layout, kernel, padding):
    """A pool of stride 2: its windows and its tensors without data, and which elements depend on which."""
    layout_ = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    height, width = (
        pooled_size(SHAPE[2:], PoolGeometry([kernel] * 2, [2, 2], [padding] * 2), False)
    )  # fmt: skip
    image, pooled = (
        torch.empty(*SHAPE[:2], *size, dtype=torch.float16, device="meta").to(memory_format=layout_)
        for size in (SHAPE[2:], (height, width))
    )
    offsets = torch.empty_like(pooled, dtype=torch.uint8)
    (flat, coordinates), (pooled_flat, pooled_coordinates) = planes(layout, *SHAPE[2:]), planes(layout, height, width)
    taps = [(i - padding, j - padding) for i in range(kernel) for j in range(kernel)]

    def pixels_of(elements, taps=taps):
        """The pixels in the windows of pooled elements, or at other taps."""
        found = set()
        for n, c, oh, ow in map(pooled_coordinates, elements):
            for i, j in taps:
                h, w = 2 * oh + i, 2 * ow + j
                if 0 <= h < SHAPE[2] and 0 <= w < SHAPE[3]:
                    found.add(flat(n, c, h, w))
        return found

    def windows_of(elements):
        """The pooled elements whose windows hold the pixels."""
        found = set()
        for n, c, h, w in map(coordinates, elements):
            for i, j in taps:
                (oh, odd), (ow, odd_) = divmod(h - i, 2), divmod(w - j, 2)
                if not odd and not odd_ and 0 <= oh < height and 0 <= ow < width:
                    found.add(pooled_flat(n, c, oh, ow))
        return found

    windows = (PoolGeometry([kernel] * 2, [2, 2], [padding] * 2), layout == "channels_last")
    return windows, image, pooled, offsets, pixels_of, windows_of


def touched(kind, layout, kernel, padding):
    """(addresses that the last program of a kernel touches, loads that it should make, stores that it should)."""
    from support.addresses import addresses, recorded

    windows, image, pooled, offsets, pixels_of, windows_of = huge(layout, kernel, padding)
    last_pooled = set(range(pooled.numel() - 1024, pooled.numel()))
    last_cells = pixels_of(last_pooled, [(0, 0), (0, 1), (1, 0), (1, 1)])  # one for each window, also if these overlap
    run, loads, stores = {
        "pool forward": (
            lambda: kernels.pooling.pool.max_pool2d_fwd(image, pooled, offsets, *windows),
            pixels_of(last_pooled),
            last_pooled,
        ),
        "pool backward": (
            lambda: kernels.pooling.pool.max_pool2d_bwd(pooled, offsets, image, *windows),
            windows_of(last_cells), last_cells,
        ),
        "unpool backward": (
            lambda: kernels.pooling.unpool.max_unpool2d_bwd(image, offsets, pooled, *windows),
            # Overlapping windows are not read whole, only the elements at the positions, which are all 0 here.
            pixels_of(last_pooled) if kernel == 2 else None, last_pooled,
        ),
    }[kind]  # fmt: skip
    (launch,) = recorded(run)
    return addresses(launch, launch[1] - 1), loads, stores


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs interpreted kernels")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kernel, padding", [(2, 0), (3, 1)])
@pytest.mark.parametrize("kind", ["pool forward", "pool backward", "unpool backward"])
def test_addresses_beyond_two_to_the_31(kind, kernel, padding, layout):
    found, loads, stores = touched(kind, layout, kernel, padding)
    assert found["store", torch.float16] == stores and max(stores) > 2**31
    if loads is not None:
        assert found["load", torch.float16] == loads and max(loads) > 2**31
    else:
        assert min(found["load", torch.float16]) > 2**33 and max(found["load", torch.float16]) < 40 * 2**28


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs interpreted kernels")
@pytest.mark.filterwarnings("ignore:overflow")
def test_addresses_of_32_bits_would_be_detected(monkeypatch):
    """By their values, and before that by the overflow check."""
    monkeypatch.setattr(kernels.pooling.tiling, "INT32_MAX", 2**62)
    with pytest.raises(InterpreterError, match="int32 overflow"):
        touched("pool forward", "nchw", 2, 0)
    monkeypatch.setattr(interpreter().TritonSemantic, "binary_op_sanitize_overflow_impl", lambda *call: None)
    found, _, stores = touched("pool forward", "nchw", 2, 0)
    assert found["store", torch.float16] != stores
