"""Memory of upsample_cross_entropy: allocations, and addresses of more than 2^31 elements."""

import gc
import itertools

import pytest
import torch
from support.cross_entropy_common import INTERPRETED, LAYOUTS, QUIET
from support.upsample_cross_entropy_common import composed, make
from torch.profiler import ProfilerActivity, profile

from fastseg import functional as FS
from fastseg.kernels.losses import upsample_cross_entropy as kernels
from fastseg.kernels.losses.options import LossInputs, LossOptions, LossResults, Resizing
from fastseg.kernels.losses.upsample import upsample_argmax
from fastseg.ops.losses import chunked_reference as chunks

pytestmark = QUIET


# --- allocations -----------------------------------------------------------------------------------------------------


def peak(function):
    """The largest number of bytes allocated on the CPU at a time during a call, beyond those before it."""
    gc.collect()  # tensors of earlier calls in cycles of references must not be freed during this one
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        function()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


@INTERPRETED
def test_peak_memory_on_a_cpu_is_an_eighth_of_torchs(monkeypatch):
    monkeypatch.setattr(chunks, "ELEMENTS", 2**15)
    x, target = make((1, 40, 16, 16), {"size": (128, 128)})

    def step(function):
        leaf = x.clone().requires_grad_()
        return lambda: function(leaf).backward()

    ours = peak(step(lambda x: FS.upsample_cross_entropy(x, target, ignore_index=255)))
    theirs = peak(step(lambda x: composed(x, target, {"size": (128, 128), "mode": "bilinear"})))
    assert ours <= theirs / 8, f"{ours} bytes, torch {theirs}"


@INTERPRETED
@LAYOUTS
def test_the_kernels_allocate_no_more_than_16_bytes_a_pixel_and_the_gradient(layout, triton_backend):
    x, target = make((1, 6, 2, 3), {"size": (20, 24)}, layout=layout)
    for reduction in ("mean", "none"):
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        allocated = peak(
            lambda leaf=leaf, reduction=reduction: (
                FS.upsample_cross_entropy(leaf, target, ignore_index=255, reduction=reduction).sum().backward()
            )
        )
        summed = 2 * 4  # the sum of the losses and its gradient
        assert allocated <= 16 * target.numel() + x.nbytes + summed, allocated


# --- addresses of more than 2^31 elements ----------------------------------------------------------------------------


def wide_launches(layout):
    """(forward, backward, argmax, number of elements of logits, of gradient, of labels)."""
    from support.addresses import recorded

    if layout == "expanded":  # the logits take little memory, their gradient does not
        x = torch.empty((1, 150, 512, 512), dtype=torch.float16, device="meta").expand(200, -1, -1, -1)
        grad = torch.empty(x.shape, dtype=x.dtype, device="meta")
    else:
        x = torch.empty((1, 150, 4096, 4096), dtype=torch.float16, device="meta")
        x = x.contiguous(memory_format=torch.channels_last)
        x = x.transpose(2, 3) if layout == "transposed" else x
        grad = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
    labels = torch.empty((x.shape[0], *x.shape[2:]), dtype=torch.uint8, device="meta")
    lse, one = torch.empty((1, *labels.shape), device="meta"), torch.empty((), device="meta")
    none = torch.empty(0, device="meta")
    resizing, options = Resizing(None, "bilinear", False), LossOptions("count", 1, 255, 0.0, 0.0)
    inputs, results = LossInputs(x, labels, None), LossResults(one, lse, one, none, none)
    launches = recorded(
        lambda: (
            kernels.upsample_cross_entropy_fwd(inputs, resizing, options, results),
            kernels.upsample_cross_entropy_bwd(one, inputs, lse, one, resizing, options, grad),
            upsample_argmax(x, labels, None, resizing),
        )
    )
    forward, backward, argmax = (launch for launch in launches if launch[0].__name__.startswith("upsample"))
    elements = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    return forward, backward, argmax, elements, grad.numel(), labels.numel()


@INTERPRETED
@pytest.mark.parametrize("layout", ["channels_last", "transposed", "expanded"])
def test_addresses_past_two_to_the_31(layout):
    from support.addresses import addresses

    forward, backward, argmax, elements, gradient, pixels = wide_launches(layout)
    ends = {  # numbers of elements of the tensors, by access and dtype
        "forward": (forward, {("load", torch.float16): elements, ("load", torch.uint8): pixels}),
        "backward": (
            backward,
            {
                ("load", torch.float16): elements,
                ("load", torch.uint8): pixels,
                ("store", torch.float16): gradient,
            },
        ),
        "argmax": (argmax, {("load", torch.float16): elements, ("store", torch.uint8): pixels}),
    }
    for name, (launch, counts) in ends.items():
        first, last = (addresses(launch, program) for program in (0, launch[1] - 1))
        for key, count in counts.items():
            assert min(first[key]) == 0 and max(first[key]) < count, (name, key)
            assert min(last[key]) >= 0 and max(last[key]) == count - 1, (name, key)
