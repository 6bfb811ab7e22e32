"""The kernels of cross_entropy: division of the work, bytes moved, 64-bit addresses and out-of-range labels."""

import math
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from support.addresses import addresses, recorded
from support.cross_entropy_common import INTERPRETED, LAYOUTS, NAN, QUIET, make

import fastseg
from fastseg import functional as FS
from fastseg.inspect import traffic
from fastseg.kernels.losses import common as parts
from fastseg.kernels.losses import cross_entropy as forward
from fastseg.kernels.losses import cross_entropy_bwd as backward
from fastseg.kernels.losses import cross_entropy_one_pass as one_pass
from fastseg.kernels.losses import cross_entropy_planes as planes
from fastseg.kernels.losses.options import LossInputs, LossOptions, LossResults, OnePassResults
from fastseg.ops.losses import cross_entropy as ops

pytestmark = QUIET


def losses_and_gradients(x, target, weight):
    """Of each pixel and of the mean, in two passes and in one."""
    results = []
    for reduction, passes in (("none", None), ("mean", False), ("mean", True)):
        leaf = x.clone().requires_grad_()
        options = {"ignore_index": 255, "reduction": reduction, "one_pass": passes}
        loss = FS.cross_entropy(leaf, target, weight, label_smoothing=0.1, **options)
        results += [loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]]
    return results


NCHW, LAST = torch.contiguous_format, torch.channels_last


@pytest.mark.parametrize(
    "layout, shape, patch",
    [
        (NCHW, (2, 5, 9, 17), {parts: {"INT32_MAX": 0}, one_pass: {"INT32_MAX": 0}}),
        (
            NCHW,
            (2, 5, 3, 17),
            {forward: {"FEW_PROGRAMS": 0, "TOTAL_BLOCK": 2}, one_pass: {"LABELS": 16}, planes: {"HELD": 2, "WARPS": 1}},
        ),
        (NCHW, (1, 6, 4, 20), {forward: {"CLASSES": 8}, backward: {"CLASSES": 4}, planes: {"HELD": 4}}),
        (LAST, (1, 5, 7, 9), {parts: {"INT32_MAX": 0}, one_pass: {"INT32_MAX": 0}}),
        (LAST, (1, 66, 1, 5), {parts: {"INT32_MAX": 0}}),
        (LAST, (1, 5, 7, 9), {forward: {"ROWS": 16, "TOTAL_BLOCK": 2}, backward: {"GROUPS": 16}}),
        (LAST, (1, 5, 7, 9), {one_pass: {"ROWS": 16, "GROUPS": 4, "LABELS": 16}}),
        (LAST, (1, 66, 2, 5), {forward: {"LONG_ROWS": 4}, backward: {"GROUPS": 16}, one_pass: {"LONG_ROWS": 8}}),
    ],
    ids=lambda value: str(value) if isinstance(value, tuple) else "",
)
def test_results_do_not_depend_on_the_tile_sizes(layout, shape, patch, monkeypatch, device, triton_backend):
    """64-bit offsets on a small tensor, large and small programs, many partial sums."""
    x, target = make(shape, device, layout=layout, ignore=255)
    weight = torch.rand(shape[1], device=device)
    before = losses_and_gradients(x, target, weight)
    for module, values in patch.items():
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)
    for got, want in zip(losses_and_gradients(x, target, weight), before, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("classes", [2, 150])
def test_offsets_have_64_bits_before_they_overflow(classes):
    for pixels, wide in ((2**31 - 2**22 - 2048 * classes, False), (2**31 - 2, True), (2**31 + 2**12, True)):
        x = torch.empty(1, classes, pixels // classes // 2, 2, device="meta")
        options = LossOptions("sum", 0, -100, 0.0, 0.0)
        assert parts.constants(LossInputs(x, x, None), options)["WIDE"] == wide


@LAYOUTS
def test_results_are_bitwise_deterministic(layout, device, triton_backend):
    x, target = make((2, 4, 15, 19), device, layout=layout, ignore=255)
    weight = torch.rand(4, device=device)
    for first, second in zip(
        losses_and_gradients(x, target, weight), losses_and_gradients(x, target, weight), strict=True
    ):
        assert torch.equal(first, second)


@INTERPRETED
@LAYOUTS
@pytest.mark.parametrize("passes", [False, True])
@pytest.mark.parametrize(
    "classes, size", [(11, (16, 32)), (19, (16, 32)), (21, (16, 32)), (150, (4, 16)), (11, (15, 21))]
)
def test_bytes_moved_are_the_floor(classes, size, passes, layout, triton_backend):
    """6 C + 24 bytes per pixel in two passes, 4 C + 8 in one, for bf16 logits and int64 labels."""
    x, target = make((1, classes, *size), dtype=torch.bfloat16, layout=layout, ignore=255)
    with traffic.metering() as launches:
        FS.cross_entropy(x.requires_grad_(), target, ignore_index=255, one_pass=passes).backward()
    floor = (4 * classes + 8 if passes else 6 * classes + 24) * math.prod(size)
    aligned = math.prod(size) % 16 == 0
    assert floor <= sum(launch.sectors() for launch in launches) <= (1.05 if aligned else 1.15) * floor
    assert [launch.outside for launch in launches] == [0] * len(launches)


# --- addresses past 2^31 elements ------------------------------------------------------------------------------------


def on_meta(shape, dtype, terms=1):
    """Logits, labels, lse and loss on the meta device."""
    x = torch.empty(shape, dtype=dtype, device="meta")
    labels = torch.empty((shape[0], *shape[2:]), dtype=torch.uint8, device="meta")
    lse, loss = torch.empty((terms, *labels.shape), device="meta"), torch.empty((), device="meta")
    return x, labels, lse, loss


@INTERPRETED
@pytest.mark.parametrize("size", [2**31 + 16, 300**3])
def test_addresses_of_the_last_program_of_a_huge_image(size):
    """More than 2^31 pixels in one image, or more than 2^31 logits: exactly its own pixels are read and written."""
    classes = 2 if size > 2**31 else 117
    x, labels, lse, loss = on_meta((1, classes, 1, size), torch.float16)
    grad, nothing = torch.empty_like(x), loss.new_empty((0,))
    inputs, options = LossInputs(x, labels, None), LossOptions("count", 1, -100, 0.0, 0.0)

    def run():
        forward.cross_entropy_fwd(inputs, options, False, LossResults(loss, lse, loss, nothing, nothing))
        backward.cross_entropy_bwd(loss, inputs, lse, loss, options, False, grad)
        results = OnePassResults(loss, grad, nothing, loss, nothing, nothing)
        one_pass.cross_entropy_one_pass(inputs, options, False, results)

    launches = [launch for launch in recorded(run) if launch[1] > 1]
    assert len(launches) == 3
    for launch in launches:
        block = launch[3]["BLOCK"]
        pixels = range((size - 1) // block * block, size)
        logits = {c * size + p for c in range(classes) for p in pixels}
        found = addresses(launch, launch[1] - 1)
        assert found["load", torch.uint8] == set(pixels)
        assert found["load", torch.float16] == logits
        assert found.get(("store", torch.float16), logits) == logits
        assert addresses(launch, 5)["load", torch.uint8] == set(range(5 * block, 6 * block))


@INTERPRETED
def test_addresses_of_the_third_term_of_a_huge_lse():
    """For class probabilities and float32 logits lse has three terms, and the third begins at element 2^31."""
    size = 2**30
    x, _, lse, _ = on_meta((1, 2, 1, size), torch.float32, terms=3)
    inputs, grad = LossInputs(x, torch.empty_like(x), None), torch.empty_like(x)
    options, nothing = LossOptions("none", 0, -100, 0.0, 0.0), lse.new_empty((0,))
    results = LossResults(lse[0], lse, nothing, nothing, nothing)
    (launch,) = recorded(lambda: forward.cross_entropy_fwd(inputs, options, False, results))
    planes = {term * size + p for term in range(3) for p in range(size - launch[3]["BLOCK"], size)}
    assert planes <= addresses(launch, launch[1] - 1)["store", torch.float32]
    # Addresses are relative to the first tensor of a dtype, so lse is also passed as the gradient of the loss.
    (launch,) = recorded(lambda: backward.cross_entropy_bwd(lse, inputs, lse, nothing, options, False, grad))
    assert planes <= addresses(launch, launch[1] - 1)["load", torch.float32]


# --- out-of-range labels ---------------------------------------------------------------------------------------------


@INTERPRETED
@pytest.mark.parametrize("label", [5, -1, 255, 2**31, 2**32 + 1, -(2**40)])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_an_out_of_range_label_is_an_index_error_on_a_cpu(label, backend):
    x, target = make((2, 5, 3, 4))
    target[1, 2, 3] = label
    with fastseg.backend(backend), pytest.raises(IndexError, match=f"Target {label} is out of bounds"):
        FS.cross_entropy(x, target)
    with fastseg.backend(backend), pytest.raises(IndexError, match=r"\(1, 2, 3\)"):
        ops.CROSS_ENTROPY(x, target, None, LossOptions("weights", 0, -100, 0.0, 0.0), None)
    FS.cross_entropy(x, target, ignore_index=label)


@INTERPRETED
@LAYOUTS
@pytest.mark.parametrize("classes", [5, 70])
def test_an_out_of_range_label_is_never_an_address(classes, layout):
    """The kernels, without the check: out-of-range labels do not count, and nothing outside the tensors is accessed."""
    x, target = make((1, classes, 3, 7), layout=layout)
    outside = torch.tensor([-1, classes, -classes, classes + 1, 255, 2**31, 2**32 + 1, -(2**40)])
    target.view(-1)[:4], target.view(-1)[-4:] = outside[:4], outside[4:]
    valid = (target >= 0) & (target < classes)
    weight, grad_loss, last = torch.rand(classes) + 0.1, torch.rand(1, 3, 7), layout == torch.channels_last
    loss, lse, grad = torch.full((1, 3, 7), NAN), torch.full((2, 1, 3, 7), NAN), torch.full_like(x, NAN)
    mean, divisor, made, packed = torch.tensor(NAN), torch.tensor(NAN), torch.full_like(x, NAN), target.byte()
    nothing, inputs = loss.new_empty((0,)), LossInputs(x, target, weight)
    each, weighted = (LossOptions(reduction, 0, -100, 0.1, 0.01) for reduction in ("none", "weights"))
    with traffic.metering() as launches:
        forward.cross_entropy_fwd(inputs, each, last, LossResults(loss, lse, nothing, nothing, nothing))
        backward.cross_entropy_bwd(grad_loss, inputs, lse, nothing, each, last, grad)
        results = OnePassResults(mean, made, packed, divisor, nothing, nothing)
        one_pass.cross_entropy_one_pass(inputs, weighted, last, results)
    assert len(launches) == 6 and not any(launch.outside for launch in launches)
    kept = target.where(valid, -100)
    leaf = x.double().requires_grad_()
    squared = 0.01 * leaf.logsumexp(1).square() * valid
    want = F.cross_entropy(leaf, kept, weight.double(), reduction="none", label_smoothing=0.1) + squared
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(divisor, weight[target[valid]].sum())
    torch.testing.assert_close(mean.double(), want.sum() / divisor, rtol=1e-5, atol=1e-5)
    for got, given in ((grad, grad_loss), (made, torch.ones_like(loss) / divisor)):
        exact = torch.autograd.grad(want, leaf, given.double(), retain_graph=True)[0]
        torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)
        assert not got.permute(0, 2, 3, 1)[~valid].any()
    assert not loss[~valid].any() and (packed[~valid] == 255).all()


@pytest.mark.gpu
def test_an_out_of_range_label_is_a_device_assertion():
    code = """
        import torch, fastseg
        x, target = torch.randn(1, 5, 8, 8, device="cuda"), torch.zeros(1, 8, 8, dtype=torch.long, device="cuda")
        target[0, 3, 3] = 7
        fastseg.functional.cross_entropy(x, target).item()
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert run.returncode != 0 and "neither a class nor ignore_index" in run.stderr + run.stdout
