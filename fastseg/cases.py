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
        grads = [torch.randn_like(y) for y in differentiable]
        if not differentiable:
            return lambda: function(*leaves)
        return lambda: torch.autograd.grad(_differentiable(function(*leaves)), wanted, grads)


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


def conv_transpose2d(
    at: Placement, shape: Sequence[int], out_channels: int, kernel: int | tuple[int, int], stride: Any = 1,
    padding: Any = 0, output_padding: Any = 0,
) -> Iterator[Case]:  # fmt: skip
    """Transposed convolution with a bias, weights in the layout of the input."""
    kh, kw = (kernel, kernel) if isinstance(kernel, int) else kernel
    inputs = {
        "input": at.tensor(*shape),
        "weight": at.tensor(shape[1], out_channels, kh, kw) / (shape[1] * kh * kw) ** 0.5,
        "bias": at.tensor(out_channels),
    }

    def call(
        x: Tensor, weight: Tensor, bias: Tensor, function: Callable[..., Any] = functional.conv_transpose2d
    ) -> Any:
        return function(x, weight, bias, stride, padding, output_padding)

    size = _words(shape, f"to {out_channels} k{kernel} s{stride} p{padding} op{output_padding}")
    yield Case("conv_transpose2d", size, call, lambda *a: call(*a, F.conv_transpose2d), inputs)


def cross_entropy(
    at: Placement, shape: Sequence[int], ignore_index: int = -100, weighted: bool = False, reduction: str = "mean"
) -> Iterator[Case]:
    """Cross-entropy of (N, C, H, W) logits with int64 labels, a tenth of them ignored."""
    labels = at.labels(shape[1], shape[0], *shape[2:])
    labels = labels.masked_fill(at.labels(10, *labels.shape) == 0, ignore_index)
    weight = torch.rand(shape[1]).add(0.5).to(at.device) if weighted else None
    inputs = {"logits": at.tensor(*shape), "labels": labels}

    def ours(logits: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(logits, labels, weight, ignore_index=ignore_index, reduction=reduction)

    def theirs(logits: Tensor, labels: Tensor) -> Tensor:
        own = None if weight is None else weight.to(logits.dtype)
        return F.cross_entropy(logits, labels, own, ignore_index=ignore_index, reduction=reduction)

    def eager(logits: Tensor, labels: Tensor) -> Tensor:
        """Autocast runs log_softmax in the logits' dtype, and the loss in float32."""
        scores = torch.log_softmax(logits, 1).float()
        return F.nll_loss(scores, labels, weight, ignore_index=ignore_index, reduction=reduction)

    size = _words(shape, f"ignore {ignore_index} {reduction}", *["weighted"] * weighted)
    yield Case("cross_entropy", size, ours, theirs, inputs, eager)


def upsample_cross_entropy(
    at: Placement, shape: Sequence[int], size: Sequence[int], mode: str = "bilinear", align_corners: bool | None = None,
    weighted: bool = False, reduction: str = "mean", label_smoothing: float = 0.0,
) -> Iterator[Case]:  # fmt: skip
    """Cross-entropy of logits resized to their labels, a tenth of which are ignored."""
    labels = at.labels(shape[1], shape[0], *size)
    labels = labels.masked_fill(at.labels(10, *labels.shape) == 0, 255)
    weight = torch.rand(shape[1]).add(0.5).to(at.device) if weighted else None
    inputs = {"logits": at.tensor(*shape), "labels": labels}
    options = {"ignore_index": 255, "reduction": reduction, "label_smoothing": label_smoothing}
    resizing = {"size": list(size), "mode": mode, "align_corners": align_corners}

    def ours(logits: Tensor, labels: Tensor) -> Tensor:
        return functional.upsample_cross_entropy(logits, labels, weight, **resizing, **options)

    def theirs(logits: Tensor, labels: Tensor) -> Tensor:
        own = None if weight is None else weight.to(logits.dtype)
        return F.cross_entropy(F.interpolate(logits, **resizing), labels, own, **options)

    def eager(logits: Tensor, labels: Tensor) -> Tensor:
        """Autocast runs interpolate and log_softmax in the logits' dtype, and the loss in float32."""
        scores = torch.log_softmax(F.interpolate(logits, **resizing), 1).float()
        return F.nll_loss(scores, labels, weight, ignore_index=255, reduction=reduction)

    corners = ["align_corners"] * bool(align_corners)
    smoothed = [f"smoothing {label_smoothing}"] * bool(label_smoothing)
    words = (f"to {size[0]}x{size[1]} {mode}", *corners, reduction, *["weighted"] * weighted, *smoothed)
    yield Case("upsample_cross_entropy", _words(shape, *words), ours, theirs, inputs, None if smoothed else eager)


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
