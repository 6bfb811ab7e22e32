"""softmax_moments: what Monte-Carlo passes say about each pixel, accumulated without keeping the passes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...kernels import losses as triton_kernels
from ..arguments import FLOAT_DTYPES, accumulator, require_tensor
from ..operator import Implementation, Operator, dense, empty, memory_format

NAME = "softmax_moments"
MOST_CLASSES = 256  # that a program holds


class SoftmaxMoments(NamedTuple):
    """The moments of the softmax over the passes so far.

    count: the number of passes. mean: (N, K, H, W). squares: (N, K, H, W), the sums of the squared deviations from the
    mean. entropy: (N, H, W), the sum of the passes' entropies in nats.
    """

    count: int
    mean: Tensor
    squares: Tensor
    entropy: Tensor

    @property
    def variance(self) -> Tensor:
        """The population variance of each class, (N, K, H, W)."""
        return self.squares / self.count

    @property
    def predictive_entropy(self) -> Tensor:
        """The entropy of the mean, (N, H, W): the whole uncertainty."""
        return torch.special.entr(self.mean).sum(1)

    @property
    def mutual_information(self) -> Tensor:
        """The entropy of the mean less the mean entropy, (N, H, W): how much the passes disagree. At least 0."""
        return (self.predictive_entropy - self.entropy / self.count).clamp(min=0)


def _layout(logits: Tensor) -> torch.memory_format:
    """The memory format of the passes, as one batch: that of a single image may be ambiguous."""
    return memory_format(logits.flatten(0, 1))


def _empty_moments(
    logits: Tensor, count: int, mean: Tensor, squares: Tensor, entropy: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    layout, dtype, (_, n, k, h, w) = _layout(logits), accumulator(logits.dtype), logits.shape
    mean, squares = (empty(logits, (n, k, h, w), layout, dtype) for _ in range(2))
    return mean, squares, empty(logits, (n, h, w), torch.contiguous_format, dtype)


def _kernel(
    logits: Tensor, count: int, mean: Tensor, squares: Tensor, entropy: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    layout, new = _layout(logits), _empty_moments(logits, count, mean, squares, entropy)
    old = new if count == 0 else (dense(mean, layout), dense(squares, layout), entropy.contiguous())
    passes = dense(logits.flatten(0, 1), layout).unflatten(0, logits.shape[:2])
    triton_kernels.softmax_moments.softmax_moments(passes, layout == torch.channels_last, count, old, new)
    return new


def _reference(
    logits: Tensor, count: int, mean: Tensor, squares: Tensor, entropy: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One pass at a time, so that no more than one pass's softmax is held."""
    new = _empty_moments(logits, count, mean, squares, entropy)
    for total, before in zip(new, (mean, squares, entropy), strict=True):
        total.copy_(before) if count else total.zero_()
    average, deviations, disorder = new
    for number, scores in enumerate(logits, count + 1):
        p = scores.to(average.dtype).softmax(1)
        disorder += torch.special.entr(p).sum(1)
        step = p - average
        average += step / number
        deviations.addcmul_(step, p - average)
    return new


def _unsupported(logits: Tensor, *rest: object) -> str | None:
    if logits.dtype not in FLOAT_DTYPES:
        return f"logits of dtype {logits.dtype}"
    if not 0 < logits.shape[2] <= MOST_CLASSES:
        return f"{logits.shape[2]} classes"
    return None if logits.numel() else "logits without elements"


SOFTMAX_MOMENTS = Operator(
    "softmax_moments(Tensor logits, int count, Tensor mean, Tensor squares, Tensor entropy) "
    "-> (Tensor, Tensor, Tensor)",
    kernels={"triton": Implementation(_kernel, _unsupported)},
    reference=_reference,
    fake=_empty_moments,
)


def softmax_moments(logits: Tensor, state: SoftmaxMoments | None = None) -> SoftmaxMoments:
    """The mean and variance of the softmax over passes, and their entropies, updated by more passes.

    For a network with random layers, such as dropout in evaluation: passes are consumed in chunks, and none is kept.

    Args:
        logits: the scores of T passes over N images, in any floating-point dtype. Each pass may be channels_last.
        state: the moments of earlier passes; None for none.

    Shape:
        - logits: (T, N, K, H, W).

    Returns:
        SoftmaxMoments: count, mean, squares and entropy, in float32 (float64 for float64 logits), with the properties
        variance, predictive_entropy and mutual_information. They have no gradient.

    Raises:
        TypeError: if an argument has another type.
        ValueError: for another shape, and for a state of another shape, dtype or device.

    Note:
        Deterministic. Welford's and Chan's formulas keep the digits of a variance near 0, which a difference of sums
        loses. On a GPU more than 256 classes fall back to PyTorch, as do CPU tensors.

    Example:
        >>> import torch, fastseg.functional as FS
        >>> passes = torch.tensor([[0.0, 9.0], [9.0, 0.0]]).view(2, 1, 2, 1, 1)  # two passes that contradict each other
        >>> moments = FS.softmax_moments(passes)
        >>> moments.mean.flatten(), moments.mutual_information.item()  # the most there can be is log(2) = 0.6931
        (tensor([0.5000, 0.5000]), 0.691...)

    Source:
        Welford, Technometrics 1962; Chan, Golub and LeVeque, 1979; for segmentation Kendall, Badrinarayanan and
        Cipolla, "Bayesian SegNet", 2015.
    """
    require_tensor(NAME, "logits", logits)
    if logits.dim() != 5 or logits.shape[0] == 0 or logits.shape[2] == 0:
        raise ValueError(
            f"{NAME}: logits must have shape (T, N, K, H, W) with at least one pass and one class, but has shape "
            f"{tuple(logits.shape)}"
        )
    if not logits.is_floating_point():
        raise TypeError(f"{NAME}: logits must be floating-point, but is of {logits.dtype}")
    logits = logits.detach()
    if state is None:
        nothing = logits.new_empty(0, dtype=accumulator(logits.dtype))
        state = SoftmaxMoments(0, nothing, nothing, nothing)
    else:
        if not isinstance(state, SoftmaxMoments):
            raise TypeError(f"{NAME}: state must be SoftmaxMoments or None, but is of type {type(state).__name__}")
        wanted = (logits.shape[1:], accumulator(logits.dtype), logits.device)
        if (state.mean.shape, state.mean.dtype, state.mean.device) != wanted:
            raise ValueError(
                f"{NAME}: state must be of shape {tuple(wanted[0])}, {wanted[1]} and on {wanted[2]} for these logits, "
                f"but its mean is of shape {tuple(state.mean.shape)}, {state.mean.dtype} and on {state.mean.device}"
            )
    call = (logits, *state)
    SOFTMAX_MOMENTS.choose(*call)  # only for `explain`: the operator chooses again when it runs
    return SoftmaxMoments(state.count + logits.shape[0], *SOFTMAX_MOMENTS(*call))
