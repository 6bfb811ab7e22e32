"""The arguments of batch norm + ReLU as objects that pass whole through the layers, and their checks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ...kernels.batch_norm.arguments import NormArguments, RunningStatistics
from ...kernels.pooling.geometry import PoolGeometry
from ..arguments import require_tensor
from ..operator import register_options

register_options(
    NormArguments, "Tensor mean, Tensor? shift, Tensor var, Tensor? weight, Tensor? bias, float eps, bool relu"
)
register_options(RunningStatistics, "Tensor(a!) running_mean, Tensor(b!) running_var, float momentum")


class BatchNormOptions(NamedTuple):
    """How a call normalizes: the arguments that are not tensors."""

    training: bool
    momentum: float
    eps: float
    relu: bool
    process_group: Any


class BatchNormCall(NamedTuple):
    """The arguments that every function of the batch_norm_relu family takes."""

    input: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    input_bias: Tensor | None
    options: BatchNormOptions

    def check(self, function: str) -> None:
        """Raise TypeError, ValueError or RuntimeError for arguments that torch's batch_norm refuses."""
        input, training, eps = self.input, self.options.training, self.options.eps
        require_tensor(function, "input", input)
        if input.dim() < 2:
            raise RuntimeError(f"{function}: input must be (N, C, ...), but has shape {tuple(input.shape)}")
        for name in ("running_mean", "running_var", "weight", "bias", "input_bias"):
            self._check_vector(function, name, getattr(self, name))
        if (self.running_mean is None) != (self.running_var is None):
            raise ValueError(f"{function}: running_mean and running_var must be given both or neither")
        if not training and self.running_mean is None:
            raise RuntimeError(f"{function}: running_mean must be a Tensor if training is False, but is None")
        if training and self.options.process_group is None and input.numel() == input.shape[1]:
            raise ValueError(
                f"{function}: expected more than 1 value per channel when training, got {tuple(input.shape)}"
            )
        if eps < 0 or (training and eps == 0):
            raise ValueError(f"{function}: eps must be {'positive' if training else 'at least 0'}, but is {eps}")

    def check_images(self, function: str) -> None:
        """`check`, and raise RuntimeError unless the input is (N, C, H, W)."""
        require_tensor(function, "input", self.input)
        if self.input.dim() != 4:
            raise RuntimeError(f"{function}: input must be (N, C, H, W), but has shape {tuple(self.input.shape)}")
        self.check(function)

    def _check_vector(self, function: str, name: str, values: Tensor | None) -> None:
        if values is None:
            return
        require_tensor(function, name, values)
        if values.shape != self.input.shape[1:2]:
            raise RuntimeError(
                f"{function}: {name} must have shape ({self.input.shape[1]},), one value per channel of the input, "
                f"but has shape {tuple(values.shape)}"
            )
        if values.device != self.input.device:
            raise RuntimeError(
                f"{function}: {name} must be on input's device {self.input.device}, but is on {values.device}"
            )


class Tail(NamedTuple):
    """What follows the ReLU in the same pass: max-unpooling if there are offsets, else max-pooling.

    ceil_mode and keep_offsets belong to pooling, offsets and output_size to unpooling.
    """

    geometry: PoolGeometry
    ceil_mode: bool = False
    keep_offsets: bool = False
    offsets: Tensor | None = None
    output_size: Sequence[int] | None = None
