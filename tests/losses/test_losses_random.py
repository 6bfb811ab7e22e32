"""Random calls of the losses, of all arguments, layouts and dtypes, against float64.

Those of cross_entropy are in test_cross_entropy.py. The expected result is the composition of torch's functions, with
z_loss and the normalizations by their formulas. The criterion is that of `assert_right`: the errors of the result and
of the gradients, for a random gradient of the loss, are no larger than those of the composition in the dtype of the
call, plus a few epsilons.
"""

import pytest
import torch
import torch.nn.functional as F
from support.cross_entropy_common import QUIET

import fastseg
from fastseg import functional as FS
from fastseg.verification import criterion

pytestmark = QUIET
CALLS = pytest.mark.parametrize(
    "backend, index", [("auto", index) for index in range(60)] + [("triton", index) for index in range(6)]
)
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@pytest.fixture(autouse=True)
def larger_tolerance(monkeypatch):
    """Sums whose terms cancel lose digits, other ones in torch than here. For float64 the truth is no more exact."""
    monkeypatch.setitem(criterion.SUM, torch.float64, 2**14)  # epsilons: 3.6e-12
    monkeypatch.setitem(criterion.SUM, torch.float32, 2**8)  # 3.1e-5


def pick(*values):
    return values[int(torch.randint(len(values), ()))]


def start(index, dtypes=DTYPES):
    """The dtype and layout of the features of a call, whose seed is the printed one plus the index."""
    torch.manual_seed(torch.initial_seed() + index)
    return pick(*dtypes), pick("nchw", "channels_last", "strided")


def features(shape, dtype, layout, device):
    x = torch.randn(shape, device=device).to(dtype)
    return x.to(memory_format=torch.channels_last) if layout == "channels_last" else x


def with_layout(x, layout):
    """`x`, for the layout "strided" as a view of every second element of memory."""
    return torch.stack((x, x), -1)[..., 0] if layout == "strided" else x


def labels(classes, shape, layout, device):
    """(class indices, ignore_index). A third of the labels are ignore_index, sometimes all or none of them."""
    dtype, ignored = pick(torch.uint8, torch.int16, torch.int32, torch.int64), pick(-100, 255, 0, classes - 1)
    target = torch.randint(classes, shape, device=device)
    if ignored >= 0 or dtype != torch.uint8:
        target[torch.rand(shape, device=device) < pick(0, 0.3, 0.3, 1)] = ignored
    return with_layout(target.to(dtype), layout), ignored


def class_weight(classes, dtype, device):
    return pick(None, (torch.rand(classes, device=device) + 0.3).to(pick(torch.float32, dtype)))


def draw_options():
    reduction = pick("none", "sum", "mean", "mean", "mean")
    options = {"reduction": reduction, "label_smoothing": pick(0.0, 0.0, 0.1, 1.0), "z_loss": pick(0.0, 0.0, 0.01)}
    return options | ({"normalization": pick("weights", "valid", "pixels", "batch")} if reduction == "mean" else {})


def widened(x):
    """`x` in the dtype that losses are computed in: float32 or float64."""
    return x if x.dtype == torch.float64 else x.float()


def cross_entropy(
    logits, target, weight, ignore_index, reduction="mean", label_smoothing=0.0, z_loss=0.0, normalization="weights"
):
    target, valid = target.long(), target != ignore_index
    weight = None if weight is None else weight.to(logits.dtype)
    options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "reduction": "none"}
    losses = F.cross_entropy(logits, target, weight, **options) + z_loss * logits.logsumexp(1) ** 2
    losses = torch.where(valid, losses, 0.0)
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    weights = torch.ones_like(losses) if weight is None else weight[target.where(valid, 0)]
    divisors = {"weights": (weights * valid).sum(), "valid": valid.sum(), "pixels": valid.numel(), "batch": len(valid)}
    return losses.sum() / divisors[normalization]


def draw_resizing(height, width):
    """Arguments of interpolate that make each side larger or smaller, by sizes or by factors."""
    mode = pick(
        {"mode": "nearest"}, *({"mode": "bilinear", "align_corners": corners} for corners in (None, False, True))
    )
    by = pick("size", "side", "factors", "factor")
    if by in ("size", "side"):
        sides = [int(torch.randint(1, 18, ())) for _ in range(2)]
        return {"size": tuple(sides) if by == "size" else sides[0], **mode}
    # interpolate raises for a factor that leaves no row or column.
    factors = [pick(0.3, 0.5, 0.77, 1.0, 1.3, 2.0, 2.3, 3.1, 4.7) for _ in range(2)]
    factors = [max(factor, 1.01 / side) for factor, side in zip(factors, (height, width), strict=True)]
    factors = factors if by == "factors" else [max(factors)] * 2
    # torch's CPU code copies a side whose size does not change; its CUDA code and ours interpolate along it.
    same = any(int(side * factor) == side for side, factor in zip((height, width), factors, strict=True))
    recompute = {"recompute_scale_factor": True if same else pick(None, True, False)}
    return {"scale_factor": tuple(factors) if by == "factors" else factors[0], **recompute, **mode}


def draw_shape(*channels):
    return (pick(1, 2, 3), pick(*channels), pick(1, 2, 3, 5, 7), pick(1, 2, 4, 5, 9))


@CALLS
def test_upsample_cross_entropy(backend, index, device, assert_right):
    dtype, layout = start(index, DTYPES if backend == "auto" else DTYPES[:3])  # the kernels do not support float64
    shape = n, classes, *small = draw_shape(2, 3, 5, 8, 19, 33)
    x, way, options = features(shape, dtype, layout, device), draw_resizing(*small), draw_options()
    large = F.interpolate(x, **way).shape[2:]
    # Without a size, the target's counts.
    given = {name: value for name, value in way.items() if name != "size" or pick(True, False)}
    target, ignored = labels(classes, (n, *large), layout, device)
    weight = class_weight(classes, dtype, device)
    print(shape, dtype, layout, given, target.dtype, ignored, weight, options)

    def ours(x):
        logits = with_layout(x, layout)
        return FS.upsample_cross_entropy(logits, target, weight, **given, ignore_index=ignored, **options)

    def theirs(x):
        return cross_entropy(F.interpolate(widened(x), **way), target, weight, ignored, **options)

    with fastseg.backend(backend):
        assert_right(ours, theirs, [x], ["logits"])


@CALLS
def test_linear_cross_entropy(backend, index, device, assert_right):
    dtype, layout = start(index)
    shape = n, channels, *size = draw_shape(1, 2, 3, 8, 11)
    # Not one class: its gradient is 0, and relative errors have no meaning.
    classes, options, chunk = pick(2, 3, 5, 19, 33), draw_options(), pick(None, 1, 7, 50)
    x = features(shape, dtype, layout, device)
    linear_weight = torch.randn(classes, channels, *pick((), (1, 1)), device=device).to(dtype)
    linear_bias = pick(None, torch.randn(classes, device=device).to(dtype))
    target, ignored = labels(classes, (n, *size), layout, device)
    weight = class_weight(classes, dtype, device)
    print(shape, dtype, layout, linear_weight.shape, linear_bias, chunk, target.dtype, ignored, weight, options)

    def ours(x, linear_weight, linear_bias):
        call = {"linear_bias": linear_bias, "weight": weight, "ignore_index": ignored, "chunk": chunk}
        return FS.linear_cross_entropy(with_layout(x, layout), linear_weight, target, **call, **options)

    def theirs(x, linear_weight, linear_bias):
        logits = F.conv2d(x, linear_weight.view(classes, channels, 1, 1), linear_bias)
        return cross_entropy(widened(logits), target, weight, ignored, **options)

    with fastseg.backend(backend):
        names = ["features", "linear_weight", "linear_bias"]
        assert_right(ours, theirs, [x, linear_weight, linear_bias], names)


@CALLS
def test_dice_cross_entropy(backend, index, device, assert_right):
    dtype, layout = start(index)
    shape = n, classes, *size = draw_shape(2, 3, 5, 8, 19, 33)
    x, smooth = features(shape, dtype, layout, device), pick(0.0, 1e-5, 1.0)
    batch, background, dice_weight, ce_weight = (
        pick(True, False),
        pick(True, False),
        pick(1.0, 0.3),
        pick(1.0, 2.0, 0.0),
    )
    target, ignored = labels(classes, (n, *size), layout, device)
    weight = class_weight(classes, dtype, device)
    options = {"batch": batch, "include_background": background, "smooth": smooth}
    options |= {"dice_weight": dice_weight, "ce_weight": ce_weight}
    print(shape, dtype, layout, target.dtype, ignored, weight, options)

    def ours(x):
        return FS.dice_cross_entropy(with_layout(x, layout), target, weight, ignore_index=ignored, **options)

    def theirs(x):
        x, valid = widened(x), (target != ignored).unsqueeze(1)
        hit = (target.unsqueeze(1) == torch.arange(classes, device=device).view(-1, 1, 1)) & valid
        probabilities, pixels = x.softmax(1).where(valid, 0.0), (0, 2, 3) if batch else (2, 3)
        overlap, total = probabilities.where(hit, 0.0).sum(pixels), (probabilities + hit).sum(pixels)
        dice = ((2 * overlap + smooth) / (total + smooth))[..., 0 if background else 1 :].mean()
        return ce_weight * cross_entropy(x, target, weight, ignored) + dice_weight * (1 - dice)

    with fastseg.backend(backend):
        assert_right(ours, theirs, [x], ["logits"])
