"""The arguments of batch norm, for every backend. No triton here: the other kernels run where it is missing."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class NormArguments(NamedTuple):
    """The statistics and parameters of a batch norm and its ReLU. Every tensor is a vector of C.

        y = relu(((x - mean) + shift) * weight / sqrt(var + eps) + bias)

    The mean is stored as two terms, so that a mean far from zero loses no digits. In training `shift` is the rounding
    error of `mean`. In evaluation it is the bias of the preceding convolution, if that bias has not been added to x.
    relu: whether there is a ReLU.
    """

    mean: Tensor
    shift: Tensor | None
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    relu: bool

    def contiguous(self) -> NormArguments:
        """The same with contiguous vectors, which the kernels require."""
        return self._replace(
            mean=self.mean.contiguous(),
            shift=None if self.shift is None else self.shift.contiguous(),
            var=self.var.contiguous(),
            weight=None if self.weight is None else self.weight.contiguous(),
            bias=None if self.bias is None else self.bias.contiguous(),
        )


class RunningStatistics(NamedTuple):
    """The running statistics that a training call updates in place, vectors of C, and the weight of the new batch."""

    running_mean: Tensor
    running_var: Tensor
    momentum: float
