"""upsample_cross_entropy against the composition of torch's functions in float64."""

import itertools
import math
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from support.cross_entropy_common import BACKENDS, INTERPRETED, LAYOUTS, NAN, QUIET
from support.upsample_cross_entropy_common import RESIZINGS, WAYS, composed, make, results

import fastseg
from fastseg import functional as FS
from fastseg.kernels.losses import upsample_cross_entropy as kernels
from fastseg.ops.losses import chunked_reference as chunks
from fastseg.ops.losses import upsample_cross_entropy_operators as ops

pytestmark = QUIET


# --- values and gradients --------------------------------------------------------------------------------------------


@WAYS
@BACKENDS
def test_errors_of_every_resizing_are_no_larger_than_torchs(small, way, backend, device, assert_right):
    """The cases take turns with layouts, dtypes, reductions, weights and label smoothing."""
    turn = [way == other and small == size for size, other in RESIZINGS].index(True)
    dtype = (torch.float32, torch.bfloat16, torch.float16)[turn % 3]
    layout = (torch.contiguous_format, torch.channels_last)[turn % 2]
    reduction, smoothing = ("mean", "none", "sum")[turn % 3], (0.0, 0.1)[turn // 2 % 2]
    x, target = make((1 + turn % 2, (5, 7, 3)[turn % 3], *small), way, device, dtype, layout)
    weight = torch.rand(x.shape[1], device=device) + 0.5 if turn % 4 < 2 else None
    options = {"reduction": reduction, "label_smoothing": smoothing}

    def ours(x, target):
        return FS.upsample_cross_entropy(x, target, weight, ignore_index=255, **way, **options)

    with fastseg.backend(backend):
        assert_right(ours, lambda x, t: composed(x, t, way, weight, **options), [x, target], ["logits", "target"])


@WAYS
def test_the_reference_is_torchs_composition_in_float64(small, way, monkeypatch, device):
    x, target = make((2, 4, *small), way, device, torch.float64)
    weight = torch.rand(4, device=device, dtype=torch.float64)
    want = results(composed, x, target, way, weight, reduction="none", label_smoothing=0.2)
    for elements, few in itertools.product((1, 100, 10**6), (1, 99)):  # rows, chunks, all; both layouts
        monkeypatch.setattr(chunks, "ELEMENTS", elements)
        monkeypatch.setattr("fastseg.ops.losses.row_chunks.FEW_CLASSES", few)
        options = {"ignore_index": 255, "reduction": "none", "label_smoothing": 0.2}
        with fastseg.backend("torch"):
            got = results(FS.upsample_cross_entropy, x, target, weight, **way, **options)
        for ours, theirs in zip(got, want, strict=True):
            # interpolate rounds its source positions to float64 in a different way
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@LAYOUTS
@BACKENDS
@pytest.mark.parametrize("normalization", ["weights", "valid", "pixels", "batch"])
def test_normalizations_and_z_loss_are_those_of_cross_entropy(normalization, backend, layout, device):
    way = {"size": (7, 9), "mode": "bilinear"}
    x, target = make((2, 6, 3, 4), way, device, layout=layout)
    options = {"ignore_index": 255, "z_loss": 1e-2, "label_smoothing": 0.1}
    weight = torch.rand(6, device=device)

    def unfused(x, target):
        large = F.interpolate(x, **way)
        return FS.cross_entropy(large, target, weight, normalization=normalization, **options)

    with fastseg.backend("torch"):
        want = results(unfused, x.double(), target)
    with fastseg.backend(backend):
        got = results(FS.upsample_cross_entropy, x, target, weight, normalization=normalization, **way, **options)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)


def test_closer_to_float64_than_autocast(device, triton_backend):
    way = {"size": (8, 12), "mode": "bilinear"}
    x, target = make((1, 7, 4, 6), way, device, torch.float16)  # the interpreter truncates to bfloat16
    truth = results(composed, x.double(), target, way)
    with torch.autocast(device, torch.float16):
        theirs = results(composed, x, target, way)
        ours = results(FS.upsample_cross_entropy, x, target, ignore_index=255)
    assert ours[0].dtype == torch.float32 and ours[1].dtype == torch.float16
    for mine, other, exact in zip(ours, theirs, truth, strict=True):
        assert (mine.double() - exact).abs().mean() < (other.double() - exact).abs().mean()


@BACKENDS
def test_the_default_size_is_that_of_the_target(backend, device):
    x, target = make((1, 5, 3, 4), {"size": (7, 10)}, device)
    with fastseg.backend(backend):
        implicit = FS.upsample_cross_entropy(x, target, ignore_index=255)
        assert torch.equal(implicit, FS.upsample_cross_entropy(x, target, size=(7, 10), ignore_index=255))


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32], ids=str)
def test_labels_of_every_width(dtype, backend, device):
    x, target = make((1, 4, 3, 2), {"size": (6, 5)}, device)
    with fastseg.backend(backend):
        narrow = FS.upsample_cross_entropy(x, target.to(dtype), ignore_index=255)
        assert torch.equal(narrow, FS.upsample_cross_entropy(x, target, ignore_index=255))


def test_strided_views(device, triton_backend):
    base = torch.randn(2, 9, 8, 20, device=device)
    target = torch.randint(3, (2, 7, 9), device=device)
    for x in (base[:, ::3, 1:5, 2:8], base[:1, :3, :4, ::4].transpose(2, 3).expand(2, -1, -1, -1)):
        want = results(composed, x.double(), target, {"size": (7, 9), "mode": "bilinear"})
        leaf = x.detach().requires_grad_()
        loss = FS.upsample_cross_entropy(leaf, target)
        loss.backward(torch.full_like(loss, 0.5))
        torch.testing.assert_close(loss.double(), want[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(leaf.grad.double(), want[1], rtol=1e-5, atol=1e-6)


def test_the_gradient_keeps_dtype_and_layout(device, triton_backend):
    for dtype, layout in itertools.product(
        (torch.float32, torch.float16), (torch.contiguous_format, torch.channels_last)
    ):
        x, target = make((1, 3, 2, 3), {"size": (3, 4)}, device, dtype, layout)
        _, grad = results(FS.upsample_cross_entropy, x, target, ignore_index=255)
        assert grad.dtype == dtype and grad.stride() == x.stride()


@BACKENDS
def test_large_logits_keep_their_digits(backend, device):
    way = {"size": (6, 8), "mode": "bilinear"}
    x, target = make((1, 7, 3, 4), way, device)
    x += 300
    want = results(composed, x.double(), target, way, reduction="sum", label_smoothing=0.1)
    with fastseg.backend(backend):
        options = {"ignore_index": 255, "reduction": "sum", "label_smoothing": 0.1}
        got = results(FS.upsample_cross_entropy, x, target, **options)
    # the mean of two logits near 300 is rounded to float32, by up to 300 * 2^-24 = 2e-5
    torch.testing.assert_close(got[0].double(), want[0], rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(got[1].double(), want[1], rtol=1e-4, atol=2e-4)


@BACKENDS
def test_a_class_with_logits_of_minus_infinity_in_nearest_mode(backend, device):
    way = {"size": (5, 7), "mode": "nearest"}
    x, target = make((1, 6, 3, 4), way, device)
    x[:, 5] = -math.inf
    target[target == 5] = 0
    want = results(composed, x.double(), target, way)
    with fastseg.backend(backend):
        got = results(FS.upsample_cross_entropy, x, target, ignore_index=255, **way)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)


@INTERPRETED
def test_a_cpu_resizes_the_whole_map_only_for_few_classes(no_cpu_kernels):
    for classes, mode in ((1, "bilinear"), (8, "bilinear"), (9, "bilinear"), (32, "nearest"), (33, "nearest")):
        way = {"size": (6, 8), "mode": mode}
        x, target = make((2, classes, 3, 4), way, dtype=torch.float64)
        target, options = target.to(torch.uint8), {"ignore_index": 255, "label_smoothing": 0.1, "mode": mode}
        loss = FS.upsample_cross_entropy(x.requires_grad_(), target, **options)
        in_chunks = "UpsampleCrossEntropyOnePassFunction" in type(loss.grad_fn).__name__
        assert in_chunks == (classes in (9, 33))
        with fastseg.backend("torch"):
            chunked = FS.upsample_cross_entropy(x, target, **options)
            assert "UpsampleCrossEntropyOnePassFunction" in type(chunked.grad_fn).__name__
        torch.testing.assert_close(loss, chunked)
        torch.testing.assert_close(torch.autograd.grad(loss, x), torch.autograd.grad(chunked, x))
        target[0, 2, 3] = classes
        with pytest.raises(IndexError, match=f"Target {classes}"):
            FS.upsample_cross_entropy(x, target, **options)


@pytest.mark.parametrize("backend", ["auto", "torch", "triton"])
def test_an_ignored_pixel_adds_nothing_whatever_its_logits(backend, device):
    x = torch.randn(1, 4, 4, 4, device=device)
    target = torch.randint(4, (1, 8, 8), device=device)
    x[0, :, 0, 0], target[0, :3, :3] = NAN, 255
    with fastseg.backend(backend):
        loss, grad = results(FS.upsample_cross_entropy, x, target, ignore_index=255)
    clean = x.clone()
    clean[0, :, 0, 0] = 0
    want = results(composed, clean.double(), target, {"size": (8, 8), "mode": "bilinear"})
    torch.testing.assert_close(loss.double(), want[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad.double(), want[1], rtol=1e-5, atol=1e-6)


@BACKENDS
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_all_pixels_ignored(reduction, backend, device):
    x, target = torch.randn(1, 3, 2, 3, device=device), torch.full((1, 4, 5), 255, device=device)
    with fastseg.backend(backend):
        loss, grad = results(FS.upsample_cross_entropy, x, target, ignore_index=255, reduction=reduction)
    want = composed(x, target, {"size": (4, 5), "mode": "bilinear"}, reduction=reduction)
    torch.testing.assert_close(loss, want, equal_nan=True)
    assert not grad.any() and not grad.isnan().any()


@BACKENDS
def test_an_empty_batch(backend, device):
    x, target = torch.randn(0, 3, 2, 3, device=device), torch.empty(0, 4, 5, dtype=torch.long, device=device)
    with fastseg.backend(backend):
        assert FS.upsample_cross_entropy(x, target).isnan()
        loss, grad = results(FS.upsample_cross_entropy, x, target, reduction="sum")
    assert loss == 0 and grad.shape == x.shape


def test_class_probabilities_fall_back_with_a_reason(device):
    x, target = torch.randn(2, 3, 4, 5, device=device), torch.rand(2, 3, 8, 10, device=device).softmax(1)
    want = F.cross_entropy(F.interpolate(x, (8, 10), mode="bilinear"), target, label_smoothing=0.1)
    torch.testing.assert_close(FS.upsample_cross_entropy(x, target, label_smoothing=0.1), want)
    with fastseg.backend("triton"), pytest.raises(NotImplementedError, match="class probabilities"):
        FS.upsample_cross_entropy(x, target)
    with fastseg.backend("triton"), pytest.raises(NotImplementedError, match="float64"):
        FS.upsample_cross_entropy(x.double(), target.argmax(1))


# --- division of the work --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "patch",
    [
        {"kernels.PATCH_ROWS": 2, "kernels.BACKWARD_COLUMNS": 16},
        {"kernels.is_wide": lambda *call: True},
        {"kernels.LARGEST_PATCH": 5, "kernels.LEAST_PATCH": 4},
    ],
    ids=["patches", "wide", "narrow"],
)
def test_results_do_not_depend_on_the_tile_sizes(patch, monkeypatch, device, triton_backend):
    x, target = make((1, 5, 5, 6), {"size": (9, 23)}, device)
    before = results(FS.upsample_cross_entropy, x, target, ignore_index=255)
    for name, value in patch.items():
        monkeypatch.setattr(kernels, name.partition(".")[2], value)
    for got, want in zip(results(FS.upsample_cross_entropy, x, target, ignore_index=255), before, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-6, atol=1e-7)


@BACKENDS
def test_results_are_bitwise_deterministic(backend, device):
    x, target = make((1, 5, 4, 6), {"size": (9, 11)}, device)
    with fastseg.backend(backend):
        first, second = (results(FS.upsample_cross_entropy, x, target, ignore_index=255) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# --- bad input -------------------------------------------------------------------------------------------------------


@INTERPRETED
@BACKENDS
@pytest.mark.parametrize("label", [5, -1, 2**32 + 1])
def test_an_out_of_range_label_is_an_index_error_on_a_cpu(label, backend):
    x, target = torch.randn(1, 5, 2, 3), torch.zeros(1, 4, 6, dtype=torch.long)
    target[0, 2, 3] = label
    with fastseg.backend(backend), pytest.raises(IndexError, match=rf"upsample_cross_entropy: Target {label}.*0, 2, 3"):
        FS.upsample_cross_entropy(x, target)


@INTERPRETED
def test_an_out_of_range_label_is_never_an_address(monkeypatch, triton_backend):
    from fastseg.inspect.traffic import metering

    monkeypatch.setattr(ops, "require_labels_in_range", lambda *call: None)
    monkeypatch.setattr("triton.language.device_assert", lambda *call, **named: None)
    x, target = make((1, 5, 3, 4), {"size": (6, 8)})
    clean = target.clone()
    target[0, 0, :4], clean[0, 0, :4] = torch.tensor([5, -1, 2**31, -(2**40)]), 255
    weight = torch.rand(5)
    with metering() as launches:
        got = results(FS.upsample_cross_entropy, x, target, weight, ignore_index=255)
    assert len(launches) == 3 and all(launch.outside == 0 for launch in launches)
    want = results(composed, x.double(), clean, {"size": (6, 8), "mode": "bilinear"}, weight)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
def test_an_out_of_range_label_is_a_device_assertion():
    code = """
        import torch, fastseg
        x, target = torch.randn(1, 5, 4, 4, device="cuda"), torch.zeros(1, 8, 8, dtype=torch.long, device="cuda")
        target[0, 3, 3] = 7
        fastseg.functional.upsample_cross_entropy(x, target).item()
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert run.returncode != 0 and "neither a class nor ignore_index" in run.stderr + run.stdout


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"size": (8, 8), "scale_factor": 2}, ValueError, "only one of size and scale_factor"),
        ({"size": (8, 8, 8)}, ValueError, "size must be"),
        ({"size": 8.0}, TypeError, "size must be"),
        ({"scale_factor": -1.0}, ValueError, "scale_factor must be above 0"),
        ({"scale_factor": 0.1}, RuntimeError, "rows and columns"),
        ({"size": 8, "recompute_scale_factor": True}, ValueError, "recompute_scale_factor"),
        ({"mode": "bicubic"}, NotImplementedError, "'bicubic'"),
        ({"mode": "nearest", "align_corners": False}, ValueError, "align_corners"),
        ({"size": (8, 9)}, RuntimeError, r"shape \(2, 8, 9\) for input of shape \(2, 3, 4, 4\) resized to \(8, 9\)"),
        ({"target": torch.zeros(3, 8, 8, dtype=torch.long)}, ValueError, "another batch size"),
        ({"target": torch.zeros(3, 3, 8, 8)}, ValueError, "another batch size"),
        ({"target": torch.zeros(2, 4, 8, 8)}, RuntimeError, r"shape \(2, 3, 8, 8\) .* has \(2, 4, 8, 8\)"),
        ({"target": torch.zeros(2, dtype=torch.long)}, RuntimeError, r"class indices \(N, H, W\) .* shape \(2,\)"),
        ({"target": torch.zeros(8, dtype=torch.long)}, ValueError, "class indices .* another batch size"),
        ({"target": torch.zeros(2, 0, 0, dtype=torch.long)}, RuntimeError, "target must have rows and columns"),
        (
            {"target": torch.zeros(2, 3, 8, 8, dtype=torch.long)},
            RuntimeError,
            r"input of shape \(2, 3, 4, 4\), but is of torch.int64 and shape \(2, 3, 8, 8\)",
        ),
        ({"target": torch.zeros(2, 8, 8, dtype=torch.bool)}, RuntimeError, r"torch.bool and shape \(2, 8, 8\)"),
        ({"target": torch.zeros(2, 8, 8)}, RuntimeError, "class indices"),
        ({"input": torch.zeros(2, 3, 4)}, NotImplementedError, r"\(N, C, h, w\)"),
        ({"input": torch.zeros(2, 3, 4, 4, dtype=torch.long)}, NotImplementedError, "floating-point"),
        ({"input": torch.zeros(2, 0, 4, 4)}, RuntimeError, "classes"),
        ({"weight": torch.ones(4)}, RuntimeError, "one entry for each of the 3 classes"),
        ({"label_smoothing": 1.5}, RuntimeError, "label_smoothing"),
        ({"reduction": "median"}, ValueError, "reduction must be one of"),
        ({"normalization": "valid", "reduction": "sum"}, ValueError, "normalization"),
        ({"z_loss": "1"}, TypeError, "z_loss"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else None,
)
def test_bad_arguments(change, error, words):
    good = {"input": torch.zeros(2, 3, 4, 4), "target": torch.zeros(2, 8, 8, dtype=torch.long)}
    with pytest.raises(error, match=words):
        FS.upsample_cross_entropy(**good | change)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint16, torch.uint32], ids=str)
def test_labels_that_torch_does_not_take(dtype, device):
    x, target = torch.randn(2, 4, 3, 5, device=device), torch.randint(4, (2, 6, 10), device=device)
    features, classifier = torch.randn(2, 3, 6, 10, device=device), torch.randn(4, 3, device=device)
    for backend in ("torch", "triton"):
        with fastseg.backend(backend):
            assert torch.equal(FS.upsample_cross_entropy(x, target.to(dtype)), FS.upsample_cross_entropy(x, target))
            got = FS.linear_cross_entropy(features, classifier, target.to(dtype))
            assert torch.equal(got, FS.linear_cross_entropy(features, classifier, target))
