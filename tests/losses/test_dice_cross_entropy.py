"""dice_cross_entropy against the composition of torch's functions in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from support.addresses import addresses, recorded
from support.cross_entropy_common import DTYPES, INTERPRETED, LAYOUTS, NAN, QUIET, make

import fastseg
from fastseg import functional as FS
from fastseg.inspect import traffic
from fastseg.kernels.losses import dice_cross_entropy as kernels
from fastseg.kernels.losses.options import LossInputs
from fastseg.ops.losses import dice_cross_entropy as ops

pytestmark = QUIET


def composed(x, target, weight=None, ignore_index=-100, batch=False, background=True, smooth=1e-5, dice=1.0, ce=1.0):
    """The loss sample by sample and class by class, in float64 if x is."""
    x = x if x.dtype == torch.float64 else x.float()
    weight = None if weight is None else weight.to(x.dtype)
    loss = F.cross_entropy(x, target.long(), weight, ignore_index=ignore_index)
    p, samples = x.softmax(1), [list(range(len(x)))] if batch else [[n] for n in range(len(x))]
    scores = []
    for sample in samples:
        valid = target[sample] != ignore_index
        for c in range(0 if background else 1, x.shape[1]):
            hit, mine = target[sample][valid] == c, p[sample, c][valid]
            scores.append((2 * mine[hit].sum() + smooth) / (mine.sum() + hit.sum() + smooth))
    return ce * loss + dice * (1 - torch.stack(scores).mean())


@LAYOUTS
@DTYPES
@pytest.mark.parametrize("backend", ["triton", "auto"])
@pytest.mark.parametrize("shape, ignore, weighted, kwargs", [
    ((2, 4, 6, 8), 255, False, {}),
    ((3, 11, 3, 5), 0, True, {"batch": True, "include_background": False, "smooth": 1.0}),
    ((1, 150, 1, 5), 255, True, {"dice_weight": 0.5, "ce_weight": 2.0}),
    ((2, 2, 5, 7), -100, False, {"include_background": False}),
    ((1, 1, 2, 3), -100, False, {"batch": True}),
])  # fmt: skip
def test_errors_are_no_larger_than_torchs(
    shape, ignore, weighted, kwargs, backend, dtype, layout, device, assert_right
):
    x, target = make(shape, device, dtype, layout, ignore)
    weight = torch.rand(shape[1], device=device) + 0.5 if weighted else None
    names = {"include_background": "background", "dice_weight": "dice", "ce_weight": "ce"}
    renamed = {names.get(name, name): value for name, value in kwargs.items()}

    def ours(x):
        loss = FS.dice_cross_entropy(x, target, weight, ignore_index=ignore, **kwargs)
        assert loss.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32) and loss.dim() == 0
        return loss

    with fastseg.backend(backend):
        assert_right(ours, lambda x: composed(x, target, weight, ignore, **renamed), [x], ["logits"])
        leaf = x.clone().requires_grad_()
        ours(leaf).backward()
        assert leaf.grad.dtype == dtype and leaf.grad.stride() == x.stride()
        if backend == "triton" and shape[1] > 1:
            assert torch.equal((leaf.grad != 0).any(1), target != ignore)


@pytest.mark.parametrize("backend", ["triton", "auto"])
def test_any_rank_and_label_dtype(backend, device):
    with fastseg.backend(backend):
        for shape in ((3, 4, 5), (2, 4, 2, 3, 2), (6, 4)):
            x, target = make(shape, device)
            want = composed(x, target)
            for dtype in (torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.float32):
                torch.testing.assert_close(FS.dice_cross_entropy(x, target.to(dtype)), want)
        row = torch.randn(4, device=device)
        got = FS.dice_cross_entropy(row, torch.tensor(2, device=device))
        torch.testing.assert_close(got, composed(row[None], torch.tensor([2], device=device)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_floating_point_labels_are_whole_numbers(dtype, device):
    x, target = make((2, 4, 3, 5), device)
    target[0, 0] = 255
    want = FS.dice_cross_entropy(x, target, ignore_index=255)
    assert torch.equal(FS.dice_cross_entropy(x, target.to(dtype), ignore_index=255), want)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a device-side assertion on a GPU")
def test_other_floating_point_targets_raise():
    x, target = make((2, 4, 3, 5), "cpu")
    for value in (0.5, float("nan"), float("inf")):
        wrong = target.float()
        wrong[1, 2, 3] = value
        with pytest.raises(
            (RuntimeError, IndexError), match=r"holds (0.5|nan) at \(1, 2, 3\)|out of bounds at \(1, 2, 3\)"
        ):
            FS.dice_cross_entropy(x, wrong)
    with pytest.raises(RuntimeError, match=r"whole numbers of float32 or float64, but is of torch.bfloat16"):
        FS.dice_cross_entropy(x, target.bfloat16())
    with pytest.raises(RuntimeError, match=r"target must be class indices, but is of torch.float32"):
        FS.dice_cross_entropy(x, x.softmax(1))


@LAYOUTS
@pytest.mark.parametrize("backend", ["triton", "auto"])
def test_all_pixels_ignored(backend, layout, device):
    x, target = make((2, 3, 3, 5), device, layout=layout)
    with fastseg.backend(backend):
        loss = FS.dice_cross_entropy(x.requires_grad_(), torch.full_like(target, 9), ignore_index=9)
        assert loss.isnan()
        only_dice = FS.dice_cross_entropy(x, torch.full_like(target, 9), ignore_index=9, ce_weight=0.0)
        assert only_dice.isnan()  # 0 * NaN, as in the composition
        loss.backward()
        assert FS.dice_cross_entropy(x[:0], target[:0]).isnan()
    assert not x.grad.nan_to_num().any()


@LAYOUTS
def test_ignored_pixels_may_have_infinite_and_nan_logits(layout, device, triton_backend):
    x, target = make((1, 5, 4, 6), device, layout=layout)
    target[0, 0, :2] = 255
    x[0, :, 0, 0], x[0, 2, 0, 1] = NAN, float("inf")
    loss = FS.dice_cross_entropy(x.requires_grad_(), target, ignore_index=255)
    loss.backward()
    assert loss.isfinite() and x.grad.isfinite().all() and not x.grad[0, :, 0, :2].any()


@LAYOUTS
@pytest.mark.parametrize("patch", [{"INT32_MAX": 0}, {"TILE": 128, "FEW_PROGRAMS": 0}, {"STEPS": 1}], ids=str)
def test_results_do_not_depend_on_the_tile_sizes_and_are_deterministic(
    patch, layout, device, monkeypatch, triton_backend
):
    x, target = make((2, 5, 9, 17), device, layout=layout, ignore=255)
    results = []
    for _ in range(3):
        leaf = x.clone().requires_grad_()
        loss = FS.dice_cross_entropy(leaf, target, ignore_index=255)
        results.append((loss.detach(), torch.autograd.grad(loss, leaf)[0]))
        if len(results) == 2:
            for name, value in patch.items():
                monkeypatch.setattr(kernels, name, value)
    assert all(map(torch.equal, *results[:2]))
    torch.testing.assert_close(*results[1:], rtol=2e-6, atol=1e-7)


@INTERPRETED
@LAYOUTS
@pytest.mark.parametrize("classes, size", [(4, (64, 64)), (19, (64, 64)), (150, (16, 64))])
def test_bytes_moved_are_the_floor(classes, size, layout, triton_backend):
    """2 C + 8 bytes per pixel forward and 4 C + 8 backward, for bf16 logits and int64 labels."""
    x, target = make((1, classes, *size), dtype=torch.bfloat16, layout=layout, ignore=255)
    with traffic.metering() as launches:
        FS.dice_cross_entropy(x.requires_grad_(), target, ignore_index=255).backward()
    pixels = math.prod(size)
    forward, backward = (launch.sectors() for launch in launches)
    assert backward <= 1.05 * (4 * classes + 8) * pixels
    # Each program writes its sums once. A small image has more programs per pixel than a large one.
    sums = launches[0].programs * (3 * classes + 2) * 4
    assert forward <= 1.05 * (2 * classes + 8) * pixels + 2 * sums + 64 * launches[0].programs
    assert [launch.outside for launch in launches] == [0, 0]


@LAYOUTS
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_opcheck(backend, layout, device):
    x, target = make((2, 3, 2, 5), device, torch.float32, layout, ignore=255)
    weight = torch.rand(3, device=device)
    with fastseg.backend(backend):
        torch.library.opcheck(torch.ops.fastseg.dice_cross_entropy.default, (x, target, weight, 255))
        loss, sums = ops.DICE_CROSS_ENTROPY(x, target, weight, 255)
        inputs = (torch.ones_like(loss), torch.randn_like(sums), x, target, weight, 255)
        torch.library.opcheck(torch.ops.fastseg.dice_cross_entropy_backward.default, inputs)


@pytest.mark.parametrize("kwargs", [{}, {"batch": True, "include_background": False}], ids=str)
def test_gradients_pass_gradcheck(kwargs, device, triton_backend):
    x, target = make((2, 3, 1, 2), device, torch.float64, torch.channels_last)
    weight = torch.rand(3, device=device)
    loss = lambda x: FS.dice_cross_entropy(x, target, weight, smooth=0.1, **kwargs)  # noqa: E731
    assert torch.autograd.gradcheck(loss, x.requires_grad_(), fast_mode=True)
    assert torch.autograd.gradgradcheck(loss, x, fast_mode=True)


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_compiles_in_one_graph_and_as_a_module(backend, device):
    x, target = make((2, 4, 3, 6), device, torch.bfloat16, ignore=255)
    module = fastseg.nn.DiceCrossEntropyLoss(torch.rand(4), ignore_index=255, batch=True).to(device)
    assert list(module.state_dict()) == ["weight"] and "batch=True" in repr(module)
    with fastseg.backend(backend):
        leaf = x.clone().requires_grad_()
        eager = module(leaf, target)
        traced = torch.compile(module, fullgraph=True, backend="aot_eager")(leaf, target)
        torch.testing.assert_close(eager, composed(x, target, module.weight, 255, batch=True))
        torch.testing.assert_close(eager, traced)
        torch.testing.assert_close(torch.autograd.grad(eager, leaf), torch.autograd.grad(traced, leaf))


@pytest.mark.parametrize("kwargs, error, message", [
    ({"smooth": -1.0}, ValueError, "smooth must not be negative, but is -1.0"),
    ({"smooth": "a"}, TypeError, "smooth must be a float"),
    ({"dice_weight": None}, TypeError, "dice_weight must be a float"),
    ({"target": torch.rand(1, 3, 2, 2)}, RuntimeError, "target must be class indices"),
    ({"target": torch.zeros(2, 2, 2, dtype=torch.int64)}, ValueError, "target must have shape"),
    ({"target": torch.full((1, 2, 2), 3)}, IndexError, r"Target 3 is out of bounds at \(0, 0, 0\)"),
    ({"input": torch.rand(1, 1, 2, 2), "include_background": False}, ValueError, "input must have a class besides"),
    ({"input": torch.rand(1, 0, 2, 2)}, ValueError, "input must have a class, but has shape"),
    ({"weight": torch.ones(4)}, RuntimeError, "weight must have one entry"),
])  # fmt: skip
@pytest.mark.parametrize("backend", ["auto", pytest.param("triton", marks=pytest.mark.interpreted)])
def test_bad_arguments(kwargs, error, message, backend):
    arguments = {"input": torch.rand(1, 3, 2, 2), "target": torch.zeros(1, 2, 2, dtype=torch.int64)} | kwargs
    with fastseg.backend(backend), pytest.raises(error, match=f"dice_cross_entropy: {message}"):
        FS.dice_cross_entropy(**arguments)


def test_unsupported_calls_fall_back_with_a_reason(device, triton_backend):
    x, target = make((1, 257, 1, 3), device)
    with pytest.raises(NotImplementedError, match="257 classes"):
        FS.dice_cross_entropy(x, target)
    with fastseg.backend("auto"):
        torch.testing.assert_close(FS.dice_cross_entropy(x, target), composed(x, target))


@INTERPRETED
@LAYOUTS
def test_addresses_of_the_last_program_of_a_huge_image(layout):
    """More than 2^31 logits: exactly its own pixels are read and written."""
    last, classes, size = layout == torch.channels_last, 117, 300**3
    x = torch.empty((1, classes, 1, size), dtype=torch.float16, device="meta").to(memory_format=layout)
    labels = torch.empty((1, 1, size), dtype=torch.uint8, device="meta")
    grad, sums, loss = torch.empty_like(x), torch.empty((1, 3, classes), device="meta"), torch.empty(2, device="meta")

    def run():
        inputs = LossInputs(x, labels, None)
        kernels.dice_cross_entropy_fwd(inputs, 255, last, loss, sums)
        kernels.dice_cross_entropy_bwd(loss, sums, inputs, 255, last, grad)

    for launch, access in zip(recorded(run), ("load", "store"), strict=True):
        step = launch[3]["BLOCK"] * launch[3].get("STEPS", 1)
        pixels = range((size - 1) // step * step, size)
        found = addresses(launch, launch[1] - 1)
        assert found["load", torch.uint8] == set(pixels)
        logits = {p * classes + c if last else c * size + p for c in range(classes) for p in pixels}
        assert found["load", torch.float16] == found[access, torch.float16] == logits
