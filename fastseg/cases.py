"""Calls of the operators beside torch's own, for whoever verifies, times, counts or compiles them.

Each function makes the cases of one operator family at one size: `ours` and `theirs` take the same inputs and mean
the same, forward and, by autograd, backward. Inputs are random; on the meta device they have no data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import functional
from .ops.library import memory_format

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Case:
    """One call of one operator, ours and torch's, its inputs by name, and its size in words.

    eager: what torch runs for it on a GPU under autocast in a network of this memory format, where that is more than
    `theirs`: casts, and copies back to the format that the next layer takes.
    """

    operator: str
    size: str
    ours: Callable[..., Any]
    theirs: Callable[..., Any]
    inputs: dict[str, Any] = field(repr=False)
    eager: Callable[..., Any] | None = None

    def step(self, function: Callable[..., Any], backward: bool) -> Callable[[], Any]:
        """A call of `ours` or `theirs` on these inputs; with backward, its gradients for a fixed random gradient."""
        leaves = [
            x.detach().requires_grad_(backward) if isinstance(x, Tensor) and x.is_floating_point() else x
            for x in self.inputs.values()
        ]
        if not backward:
            return lambda: function(*leaves)
        wanted = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
        differentiable = _differentiable(function(*leaves))
        if not differentiable:
            return lambda: function(*leaves)
        grads = random_gradients(differentiable)
        return lambda: torch.autograd.grad(_differentiable(function(*leaves)), wanted, grads)


def random_gradients(outputs: Sequence[Tensor]) -> list[Tensor]:
    """For the backward of these outputs; of a loss 1, as loss.backward() has it."""
    return [torch.randn_like(y) if y.dim() else torch.ones_like(y) for y in outputs]


def _differentiable(result: Any) -> list[Tensor]:
    return [y for y in (result if isinstance(result, (tuple, list)) else [result]) if y.requires_grad]


@dataclass(frozen=True)
class Placement:
    """Where and how the tensors of a case lie."""

    dtype: torch.dtype
    layout: torch.memory_format
    device: str

    def tensor(self, *shape: int) -> Tensor:
        made = torch.randn(shape, device="meta" if self.device == "meta" else "cpu").to(self.device, self.dtype)
        return made.contiguous(memory_format=self.layout) if made.dim() == 4 else made

    def parameters(self, channels: int) -> Tensor:
        """A value for each channel, between 0.5 and 1.5, in float32 where the tensors are in half precision."""
        made = torch.rand(channels, device="meta" if self.device == "meta" else "cpu").add(0.5).to(self.device)
        return made.to(torch.float64) if self.dtype == torch.float64 else made

    def labels(self, classes: int, *shape: int) -> Tensor:
        return torch.randint(classes, shape, device="meta" if self.device == "meta" else "cpu").to(self.device)


def _words(shape: Sequence[int], *rest: str) -> str:
    return " ".join(["x".join(map(str, shape)), *rest])


def max_pool2d(
    at: Placement, shape: Sequence[int], kernel: Any = 2, stride: Any = 2, padding: Any = 0, ceil_mode: bool = False
) -> Iterator[Case]:
    """Pooling with torch's indices, and with offsets (compared after conversion to indices)."""
    geometry = (kernel, stride, padding)
    size = _words(shape, f"k{kernel} s{stride} p{padding}", *["ceil"] * ceil_mode)
    inputs = {"input": at.tensor(*shape)}

    def indexed(x: Tensor, function: Callable[..., Any] = functional.max_pool2d) -> Any:
        return function(x, *geometry, ceil_mode=ceil_mode, return_indices=True)

    def with_offsets(x: Tensor) -> tuple[Tensor, Tensor]:
        return functional.max_pool2d_with_offsets(x, *geometry, ceil_mode=ceil_mode)

    def offsets_of_torch(x: Tensor) -> tuple[Tensor, Tensor]:
        y, indices = theirs(x)
        return y, functional.indices_to_offsets(indices, *geometry, width=shape[-1])

    def theirs(x: Tensor) -> tuple[Tensor, Tensor]:
        return indexed(x, F.max_pool2d)

    yield Case("max_pool2d", size, indexed, theirs, inputs)
    yield Case("max_pool2d_with_offsets", size, with_offsets, offsets_of_torch, inputs, theirs)


def max_unpool2d(
    at: Placement, shape: Sequence[int], kernel: Any = 2, stride: Any = 2, padding: Any = 0, ceil_mode: bool = False
) -> Iterator[Case]:
    """Unpooling to `shape`, from torch's indices and from the offsets that say the same."""
    geometry = (kernel, stride, padding)
    size = _words(shape, f"k{kernel} s{stride} p{padding}", *["ceil"] * ceil_mode)
    plane = torch.randn(shape, device="meta" if at.device == "meta" else "cpu")
    pooled, indices = F.max_pool2d(plane, *geometry, ceil_mode=ceil_mode, return_indices=True)
    indices = indices.to(at.device).contiguous(memory_format=at.layout)
    offsets = functional.indices_to_offsets(indices, *geometry, width=shape[-1])
    inputs = {"input": at.tensor(*pooled.shape), "indices": indices, "offsets": offsets}
    kept = {"output_size": list(shape[-2:])}

    def theirs(x: Tensor, indices: Tensor, offsets: Tensor) -> Tensor:
        return F.max_unpool2d(x, indices, *geometry, **kept)

    def ours(x: Tensor, indices: Tensor, offsets: Tensor) -> Tensor:
        return functional.max_unpool2d(x, indices, *geometry, **kept)

    def with_offsets(x: Tensor, indices: Tensor, offsets: Tensor) -> Tensor:
        return functional.max_unpool2d_with_offsets(x, offsets, *geometry, **kept)

    def eager(*inputs: Tensor) -> Tensor:
        return theirs(*inputs).contiguous(memory_format=at.layout)

    yield Case("max_unpool2d", size, ours, theirs, inputs, eager)
    yield Case("max_unpool2d_with_offsets", size, with_offsets, theirs, inputs, eager)


def max_unpool2d_anywhere(at: Placement, shape: Sequence[int]) -> Iterator[Case]:
    """Unpooling by 2 from indices that no pool made: anywhere in the plane, none twice."""
    n, c, h, w = shape
    draws = torch.stack([torch.randperm(4 * h * w)[: h * w] for _ in range(n * c)]).view(n, c, h, w)
    inputs = {"input": at.tensor(*shape), "indices": draws.to(at.device).contiguous(memory_format=at.layout)}
    yield Case(
        "max_unpool2d",
        _words(shape, "any indices"),
        lambda x, indices: functional.max_unpool2d(x, indices, 2),
        lambda x, indices: F.max_unpool2d(x, indices, 2),
        inputs,
    )


def _apart(x: Tensor, kernel: int) -> Tensor:
    """Values no two of which are near each other in any window: half precision must not choose another maximum."""
    levels = (2 * x.float()).round() / 2
    rows, columns = (torch.arange(size, device=x.device) % kernel for size in x.shape[-2:])
    steps = (rows[:, None] * kernel + columns) * (0.5 / kernel**2)
    return (
        (levels + steps + x.float().sin() * (0.05 / kernel**2)).to(x.dtype).contiguous(memory_format=memory_format(x))
    )


def batch_norm_relu(
    at: Placement, shape: Sequence[int], kernel: int = 2, ceil_mode: bool = True, conv_bias: bool = True
) -> Iterator[Case]:
    """Batch norm in training with the ReLU behind it; with pooling behind; with the unpooling that undoes it.

    conv_bias: behind a convolution whose bias torch adds and ours absorbs.
    """
    channels = shape[1]
    running = [torch.zeros(channels, device=at.device), torch.ones(channels, device=at.device)]

    def inputs(image: Sequence[int]) -> dict[str, Any]:
        vectors = {name: at.parameters(channels) for name in ("weight", "bias", "conv bias")}
        return {"input": _apart(at.tensor(*image), kernel), **(vectors if conv_bias else vectors | {"conv bias": None})}

    def ours(function: Callable[..., Any], **rest: Any) -> Callable[..., Any]:
        def call(x: Tensor, weight: Tensor, bias: Tensor, added: Tensor | None, *offsets: Tensor) -> Any:
            moved = [t.clone().to(weight.dtype) for t in running]
            return function(x, *offsets[1:], *moved, weight, bias, training=True, **rest, input_bias=added)

        return call

    def theirs(x: Tensor, weight: Tensor, bias: Tensor, added: Tensor | None, *_: Tensor) -> Tensor:
        moved = [t.clone().to(weight.dtype) for t in running]
        y = x if added is None else x + added.to(x.dtype).view(1, -1, 1, 1)
        return F.relu(F.batch_norm(y, *moved, weight, bias, training=True))

    def pooled(*inputs: Tensor) -> Tensor:
        return F.max_pool2d(theirs(*inputs), kernel, ceil_mode=ceil_mode, return_indices=True)[0]

    yield Case("batch_norm_relu", _words(shape), ours(functional.batch_norm_relu), theirs, inputs(shape))
    size = _words(shape, f"k{kernel}", *["ceil"] * ceil_mode)
    fused = ours(functional.batch_norm_relu_max_pool2d, kernel_size=kernel, ceil_mode=ceil_mode)
    yield Case("batch_norm_relu_max_pool2d", size, fused, pooled, inputs(shape))
    plane = torch.randn(shape, device="meta" if at.device == "meta" else "cpu")
    small, indices = F.max_pool2d(plane, kernel, ceil_mode=ceil_mode, return_indices=True)
    indices = indices.to(at.device).contiguous(memory_format=at.layout)
    offsets = functional.indices_to_offsets(indices, kernel, kernel, 0, width=shape[-1])

    def unpooled(*inputs: Tensor) -> Tensor:
        return F.max_unpool2d(theirs(*inputs), inputs[-2], kernel, output_size=shape[-2:])

    def eager(*inputs: Tensor) -> Tensor:
        return unpooled(*inputs).contiguous(memory_format=at.layout)

    fused = ours(functional.batch_norm_relu_max_unpool2d, kernel_size=kernel, output_size=shape[-2:])
    places = {"indices": indices, "offsets": offsets}
    yield Case("batch_norm_relu_max_unpool2d", size, fused, unpooled, inputs(small.shape) | places, eager)


def conv_transpose2d(
    at: Placement, shape: Sequence[int], out_channels: int, kernel: int | tuple[int, int], stride: Any = 1,
    padding: Any = 0, output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
) -> Iterator[Case]:  # fmt: skip
    """Transposed convolution with a bias, weights in the layout of the input."""
    geometry = (stride, padding, output_padding, groups, dilation)
    inputs = _conv_inputs(at, shape, out_channels, kernel, groups) | {"bias": at.tensor(out_channels)}
    size = _words(shape, _conv_words(out_channels, kernel, *geometry))
    yield Case(
        "conv_transpose2d", size, lambda *t: functional.conv_transpose2d(*t, *geometry),
        lambda *t: F.conv_transpose2d(*t, *geometry), inputs,
    )  # fmt: skip


def conv_transpose2d_affine_relu(
    at: Placement, shape: Sequence[int], out_channels: int, kernel: int | tuple[int, int], stride: Any = 1,
    padding: Any = 0, output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
) -> Iterator[Case]:  # fmt: skip
    """Transposed convolution with a folded batch norm and ReLU in its epilogue."""
    geometry = (stride, padding, output_padding, groups, dilation)
    inputs = _conv_inputs(at, shape, out_channels, kernel, groups)
    inputs |= {"scale": at.tensor(out_channels).float(), "shift": at.tensor(out_channels).float()}
    size = _words(shape, _conv_words(out_channels, kernel, *geometry))

    def theirs(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        y = F.conv_transpose2d(x, weight, None, *geometry)
        return (y * scale.to(y.dtype)[:, None, None] + shift.to(y.dtype)[:, None, None]).relu()

    yield Case(
        "conv_transpose2d_affine_relu", size, lambda *t: functional.conv_transpose2d_affine_relu(*t, *geometry),
        theirs, inputs,
    )  # fmt: skip


def _conv_inputs(
    at: Placement, shape: Sequence[int], out_channels: int, kernel: int | tuple[int, int], groups: int
) -> dict[str, Any]:
    kh, kw = (kernel, kernel) if isinstance(kernel, int) else kernel
    weight = at.tensor(shape[1], out_channels // groups, kh, kw) / (shape[1] // groups * kh * kw) ** 0.5
    return {"input": at.tensor(*shape), "weight": weight}


def _conv_words(
    out_channels: int, kernel: Any, stride: Any, padding: Any, output_padding: Any, groups: int, dilation: Any
) -> str:
    rest = [f"g{groups}"] * (groups != 1) + [f"d{dilation}"] * (dilation != 1)
    return " ".join([f"to {out_channels} k{kernel} s{stride} p{padding} op{output_padding}", *rest])


def cross_entropy(
    at: Placement, shape: Sequence[int], ignore_index: int = -100, weighted: bool = False, reduction: str = "mean",
    label_smoothing: float = 0.0, probabilities: bool = False, one_pass: bool | None = None, predicted: bool = False,
) -> Iterator[Case]:  # fmt: skip
    """Cross-entropy of (N, C, H, W) logits with int64 labels, a tenth of them ignored, or with class probabilities.

    predicted: and each pixel's class with the largest logit.
    """
    labels = at.labels(shape[1], shape[0], *shape[2:])
    labels = labels.masked_fill(at.labels(10, *labels.shape) == 0, ignore_index)
    weight = torch.rand(shape[1]).add(0.5).to(at.device) if weighted else None
    shares = at.tensor(*shape).softmax(1) if probabilities else None
    inputs = {"logits": at.tensor(*shape), "labels": labels}
    options = {"ignore_index": ignore_index, "reduction": reduction, "label_smoothing": label_smoothing}

    def ours(logits: Tensor, labels: Tensor) -> Any:
        target = labels if shares is None else shares
        if predicted:
            return functional.cross_entropy_with_predictions(logits, target, weight, **options, one_pass=one_pass)[:2]
        return functional.cross_entropy(logits, target, weight, **options, one_pass=one_pass)

    def theirs(logits: Tensor, labels: Tensor) -> Any:
        own = None if weight is None else weight.to(logits.dtype)
        target = labels if shares is None else shares.to(logits.dtype)
        loss = F.cross_entropy(logits, target, own, **options)
        return (loss, logits.argmax(1)) if predicted else loss

    def eager(logits: Tensor, labels: Tensor) -> Tensor:
        """Autocast runs log_softmax in the logits' dtype, and the loss in float32."""
        scores = torch.log_softmax(logits, 1).float()
        return F.nll_loss(scores, labels, weight, ignore_index=ignore_index, reduction=reduction)

    words = [f"ignore {ignore_index} {reduction}", *["weighted"] * weighted, *["probabilities"] * probabilities]
    words += [f"smoothing {label_smoothing}"] * bool(label_smoothing) + ["two passes"] * (one_pass is False)
    name = "cross_entropy" + "_with_predictions" * predicted
    plain = not (label_smoothing or probabilities or predicted)
    yield Case(name, _words(shape, *words), ours, theirs, inputs, eager if plain else None)


def dice_cross_entropy(
    at: Placement, shape: Sequence[int], ignore_index: int = -100, batch: bool = False
) -> Iterator[Case]:
    """Soft Dice and cross-entropy of (N, C, H, W) logits with int64 labels, a tenth of them ignored."""
    labels = at.labels(shape[1], shape[0], *shape[2:])
    inputs = {
        "logits": at.tensor(*shape),
        "labels": labels.masked_fill(at.labels(10, *labels.shape) == 0, ignore_index),
    }

    def ours(logits: Tensor, labels: Tensor) -> Tensor:
        return functional.dice_cross_entropy(logits, labels, ignore_index=ignore_index, batch=batch)

    def theirs(logits: Tensor, labels: Tensor) -> Tensor:
        """As it is commonly written: softmax, one-hot labels, and sums of their products."""
        logits = logits if logits.dtype == torch.float64 else logits.float()
        valid = (labels != ignore_index).unsqueeze(1)
        softmax = logits.softmax(1) * valid
        hit = F.one_hot(labels.where(valid[:, 0], 0), shape[1]).movedim(-1, 1) * valid
        over = (0, 2, 3) if batch else (2, 3)
        dice = (2 * (softmax * hit).sum(over) + 1e-5) / (softmax.sum(over) + hit.sum(over) + 1e-5)
        return F.cross_entropy(logits, labels, ignore_index=ignore_index) + 1 - dice.mean()

    size = _words(shape, f"ignore {ignore_index}", *["batch"] * batch)
    yield Case("dice_cross_entropy", size, ours, theirs, inputs)


def upsample_cross_entropy(
    at: Placement, shape: Sequence[int], size: Sequence[int], mode: str = "bilinear", align_corners: bool | None = None,
    weighted: bool = False, reduction: str = "mean", label_smoothing: float = 0.0, predicted: bool = False,
) -> Iterator[Case]:  # fmt: skip
    """Cross-entropy of logits resized to their labels, a tenth of which are ignored; predicted: and their classes."""
    labels = at.labels(shape[1], shape[0], *size)
    labels = labels.masked_fill(at.labels(10, *labels.shape) == 0, 255)
    weight = torch.rand(shape[1]).add(0.5).to(at.device) if weighted else None
    inputs = {"logits": at.tensor(*shape), "labels": labels}
    options = {"ignore_index": 255, "reduction": reduction, "label_smoothing": label_smoothing}
    resizing = {"size": list(size), "mode": mode, "align_corners": align_corners}

    def ours(logits: Tensor, labels: Tensor) -> Any:
        if predicted:
            return functional.upsample_cross_entropy_with_predictions(logits, labels, weight, **resizing, **options)[:2]
        return functional.upsample_cross_entropy(logits, labels, weight, **resizing, **options)

    def theirs(logits: Tensor, labels: Tensor) -> Any:
        own, large = None if weight is None else weight.to(logits.dtype), F.interpolate(logits, **resizing)
        loss = F.cross_entropy(large, labels, own, **options)
        return (loss, large.argmax(1)) if predicted else loss

    def eager(logits: Tensor, labels: Tensor) -> Tensor:
        """Autocast runs interpolate and log_softmax in the logits' dtype, and the loss in float32."""
        scores = torch.log_softmax(F.interpolate(logits, **resizing), 1).float()
        return F.nll_loss(scores, labels, weight, ignore_index=255, reduction=reduction)

    corners = ["align_corners"] * bool(align_corners)
    smoothed = [f"smoothing {label_smoothing}"] * bool(label_smoothing)
    words = (f"to {size[0]}x{size[1]} {mode}", *corners, reduction, *["weighted"] * weighted, *smoothed)
    name, plain = "upsample_cross_entropy" + "_with_predictions" * predicted, not smoothed and not predicted
    yield Case(name, _words(shape, *words), ours, theirs, inputs, eager if plain else None)


def upsample_argmax(at: Placement, shape: Sequence[int], size: Sequence[int], mode: str = "bilinear") -> Iterator[Case]:
    """The class of each pixel of logits that are resized, and its probability."""

    def ours(logits: Tensor) -> tuple[Tensor, Tensor]:
        return functional.upsample_argmax(logits, size, mode=mode, return_probability=True)

    def theirs(logits: Tensor) -> tuple[Tensor, Tensor]:
        large = F.interpolate(logits.detach().double(), size, mode=mode)  # halves would tie where float32 does not
        return large.argmax(1).to(torch.uint8), large.softmax(1).amax(1)

    def eager(logits: Tensor) -> tuple[Tensor, Tensor]:
        share, best = F.interpolate(logits, size, mode=mode).float().softmax(1).max(1)
        return best, share

    inputs = {"logits": at.tensor(*shape)}
    yield Case("upsample_argmax", _words(shape, f"to {size[0]}x{size[1]} {mode}"), ours, theirs, inputs, eager)


def confusion_matrix(at: Placement, shape: Sequence[int], classes: int) -> Iterator[Case]:
    """Counts of a map of predictions and one of labels, a tenth of which are ignored."""
    labels = at.labels(classes, *shape)
    labels = labels.masked_fill(at.labels(10, *shape) == 0, 255)
    inputs = {"pred": at.labels(classes, *shape).to(torch.uint8), "labels": labels}

    def ours(pred: Tensor, labels: Tensor) -> Tensor:
        return functional.confusion_matrix(pred, labels, classes, 255)

    def theirs(pred: Tensor, labels: Tensor) -> Tensor:
        cell = (labels * classes + pred).masked_fill(labels == 255, classes**2)
        return torch.bincount(cell.flatten(), minlength=classes**2 + 1)[:-1].view(classes, classes)

    yield Case("confusion_matrix", _words(shape, f"{classes} classes"), ours, theirs, inputs)


def linear_cross_entropy(
    at: Placement, shape: Sequence[int], classes: int, chunk: int | None = None, reduction: str = "mean"
) -> Iterator[Case]:
    """A 1x1 classifier with a bias and its cross-entropy, a tenth of the labels ignored."""
    labels = at.labels(classes, shape[0], *shape[2:])
    labels = labels.masked_fill(at.labels(10, *labels.shape) == 0, 255)
    inputs = {
        "features": at.tensor(*shape),
        "linear_weight": at.tensor(classes, shape[1]) / shape[1] ** 0.5,
        "linear_bias": at.tensor(classes),
        "labels": labels,
    }

    def ours(features: Tensor, linear_weight: Tensor, linear_bias: Tensor, labels: Tensor) -> Tensor:
        options = {"ignore_index": 255, "reduction": reduction, "chunk": chunk}
        return functional.linear_cross_entropy(features, linear_weight, labels, linear_bias=linear_bias, **options)

    def theirs(features: Tensor, linear_weight: Tensor, linear_bias: Tensor, labels: Tensor) -> Tensor:
        logits = F.conv2d(features, linear_weight[:, :, None, None], linear_bias)
        return F.cross_entropy(logits, labels, ignore_index=255, reduction=reduction)

    size = _words(shape, f"{classes} classes {reduction}", *[f"chunk {chunk}"] * bool(chunk))
    yield Case("linear_cross_entropy", size, ours, theirs, inputs)
