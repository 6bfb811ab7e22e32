"""BatchNormReLU2d, the same followed by max-pooling or max-unpooling, and their conversion to synchronized norms."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import functional as F
from .. import torch_internals
from ..ops.arguments import IntOrPair
from .scripting import refuse_script


def call_with_state(norm: nn.BatchNorm2d, function: Callable[..., Any], *tensors: Tensor, **rest: Any) -> Any:
    """Call a function of the batch_norm_relu family with a batch norm's state, as nn.BatchNorm2d.forward does.

    Updates `num_batches_tracked` and computes the momentum from it where `norm.momentum` is None.

    Args:
        norm: a batch norm of torch.nn or of fastseg.nn.
        function: one of fastseg.functional.batch_norm_relu, batch_norm_relu_max_pool2d, batch_norm_relu_max_unpool2d.
        tensors: the function's arguments in front of running_mean.
        rest: its keyword arguments.
    """
    torch_internals.check_input_dim(norm, tensors[0])
    momentum = 0.0 if norm.momentum is None else norm.momentum
    if norm.training and norm.track_running_stats and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:  # the running statistics are the mean over all batches
            momentum = 1.0 / float(norm.num_batches_tracked)
    uses_batch_statistics = norm.training or (norm.running_mean is None and norm.running_var is None)
    uses_running_statistics = not norm.training or norm.track_running_stats
    return function(
        *tensors,
        norm.running_mean if uses_running_statistics else None,
        norm.running_var if uses_running_statistics else None,
        norm.weight,
        norm.bias,
        uses_batch_statistics,
        momentum,
        norm.eps,
        process_group=_process_group(norm),
        **rest,
    )


def _process_group(norm: nn.BatchNorm2d) -> Any:
    """The process group that a batch norm shares its statistics with, or None if it uses its own batch alone."""
    if not (getattr(norm, "sync", False) and norm.training and dist.is_available() and dist.is_initialized()):
        return None
    group = dist.group.WORLD if norm.process_group is None else norm.process_group
    return group if dist.get_world_size(group) > 1 else None


class BatchNormReLU2d(nn.BatchNorm2d):
    """2-D batch normalization and ReLU in one, on :func:`fastseg.functional.batch_norm_relu`.

        y = relu((x - mean) / sqrt(var + eps) * weight + bias)

    mean and var are those of the batch in training, and the running ones in evaluation. Constructor arguments,
    parameters, buffers and state_dict keys are those of :class:`torch.nn.BatchNorm2d`. No tensor of full size is saved
    for the backward except the input.

    Args:
        num_features: number of channels C.
        eps: added to the variance.
        momentum: weight of the batch in the running statistics; None for the mean over all batches.
        affine: whether there are `weight` and `bias`, of shape (C,).
        track_running_stats: whether there are running statistics. Without them evaluation uses those of the batch.
        device, dtype: of parameters and buffers.
        relu: False leaves out the ReLU.
        newer: arguments of nn.BatchNorm2d that only some versions of torch have, such as `bias`.

    Shape:
        - Input: (N, C, H, W), any floating-point dtype.
        - input_bias: an optional second argument of the call, (C,): the bias of the convolution that made the input,
          if the convolution has not added it. It moves the running mean in training, where it cancels out of the
          output, and is added in evaluation.
        - Output: the shape, dtype and memory format of the input.

    Example:
        >>> import torch, fastseg
        >>> norm = fastseg.nn.BatchNormReLU2d(1)
        >>> norm(torch.tensor([1.0, 3.0]).view(2, 1, 1, 1)).round(decimals=3).flatten().tolist()
        [0.0, 1.0]

    Note:
        Deterministic. With `sync` set (by :func:`convert_sync_batchnorm`), training under an initialized process group
        uses the statistics of the batches of all processes in `process_group` (None: the default group).

    Source:
        torch.nn.BatchNorm2d; Ioffe and Szegedy, "Batch Normalization", ICML 2015
    """

    __prepare_scriptable__ = refuse_script
    sync: bool = False
    process_group: Any = None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        relu: bool = True,
        **newer: Any,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, **newer)
        self.relu = relu

    def forward(self, input: Tensor, input_bias: Tensor | None = None) -> Tensor:
        return call_with_state(self, F.batch_norm_relu, input, relu=self.relu, input_bias=input_bias)

    @property
    def qconfig(self) -> NoReturn:
        """Raises RuntimeError for torch's converters, which would rebuild the module as a plain batch norm.

        torch.nn.SyncBatchNorm.convert_sync_batchnorm reads this attribute while it builds the replacement, and
        torch.ao.quantization reads it before it quantizes a module.
        """
        raise RuntimeError(
            f"{type(self).__name__} cannot be rebuilt as another batch norm, which would drop its ReLU; use "
            "fastseg.nn.convert_sync_batchnorm to synchronize it"
        )

    def __dir__(self) -> Iterable[str]:
        """All attributes but `qconfig`: torch.jit.trace and inspect.getmembers read every attribute in this list."""
        return [name for name in super().__dir__() if name != "qconfig"]

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.relu else ", relu=False") + (", sync=True" if self.sync else "")


class BatchNormReLUMaxPool2d(BatchNormReLU2d):
    """2-D batch normalization, ReLU and max-pooling in one, on :func:`fastseg.functional.batch_norm_relu_max_pool2d`.

        y = max_pool2d(relu((x - mean) / sqrt(var + eps) * weight + bias))

    The normalized tensor is never stored. Parameters, buffers and state_dict keys are those of
    :class:`torch.nn.BatchNorm2d`.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype, relu, newer: as in
            :class:`BatchNormReLU2d`.
        kernel_size, stride, padding, ceil_mode: as in :class:`MaxPool2d`.
        return_offsets: also return the uint8 offsets of the maxima, as :class:`MaxPool2dWithOffsets` does.

    Shape:
        - Input: (N, C, H, W), any floating-point dtype; input_bias (C,) as in :class:`BatchNormReLU2d`.
        - Output: (N, C, OH, OW), of the size that :class:`MaxPool2d` returns.
        - Offsets: uint8, the shape of the output.

    Example:
        >>> import torch, fastseg
        >>> block = fastseg.nn.BatchNormReLUMaxPool2d(8, kernel_size=2, return_offsets=True)
        >>> output, offsets = block(torch.randn(2, 8, 6, 4))
        >>> tuple(output.shape), tuple(offsets.shape), offsets.dtype
        ((2, 8, 3, 2), (2, 8, 3, 2), torch.uint8)

    Note:
        Deterministic. Overlapping windows, and windows with a stride of more than 64 elements, run as two operators.

    Source:
        torch.nn.BatchNorm2d, torch.nn.MaxPool2d
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        kernel_size: IntOrPair = 2,
        stride: IntOrPair | None = None,
        padding: IntOrPair = 0,
        ceil_mode: bool = False,
        return_offsets: bool = False,
        relu: bool = True,
        **newer: Any,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, relu=relu, **newer)
        self.kernel_size, self.stride, self.padding = kernel_size, stride, padding
        self.ceil_mode, self.return_offsets = ceil_mode, return_offsets

    def forward(self, input: Tensor, input_bias: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        return call_with_state(
            self, F.batch_norm_relu_max_pool2d, input, relu=self.relu, input_bias=input_bias,
            kernel_size=self.kernel_size, stride=self.stride, padding=self.padding, ceil_mode=self.ceil_mode,
            return_offsets=self.return_offsets,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}"


class BatchNormReLUMaxUnpool2d(BatchNormReLU2d):
    """2-D batch normalization, ReLU, max-unpooling in one: :func:`fastseg.functional.batch_norm_relu_max_unpool2d`.

        y = max_unpool2d(relu((x - mean) / sqrt(var + eps) * weight + bias), offsets)

    The normalized tensor is never stored. Parameters, buffers and state_dict keys are those of
    :class:`torch.nn.BatchNorm2d`.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype, relu, newer: as in
            :class:`BatchNormReLU2d`.
        kernel_size, stride, padding: those of the pool that returned the offsets.

    Shape:
        - Input: (N, C, H, W), any floating-point dtype.
        - Offsets: uint8, the shape of the input, from :class:`BatchNormReLUMaxPool2d` or
          :class:`MaxPool2dWithOffsets`.
        - output_size and input_bias: optional arguments of the call, as in :class:`MaxUnpool2d` and
          :class:`BatchNormReLU2d`.
        - Output: (N, C, OH, OW), of the size that :class:`MaxUnpool2d` returns.

    Example:
        >>> import torch, fastseg
        >>> pool = fastseg.nn.BatchNormReLUMaxPool2d(8, ceil_mode=True, return_offsets=True)
        >>> unpool = fastseg.nn.BatchNormReLUMaxUnpool2d(8)
        >>> output, offsets = pool(torch.randn(2, 8, 6, 5))
        >>> tuple(unpool(output, offsets, output_size=(6, 5)).shape)
        (2, 8, 6, 5)

    Note:
        Deterministic. Overlapping windows, and windows with a stride of more than 64 elements, run as two operators.

    Source:
        torch.nn.BatchNorm2d, torch.nn.MaxUnpool2d
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        kernel_size: IntOrPair = 2,
        stride: IntOrPair | None = None,
        padding: IntOrPair = 0,
        relu: bool = True,
        **newer: Any,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, relu=relu, **newer)
        self.kernel_size, self.stride, self.padding = kernel_size, stride, padding

    def forward(
        self,
        input: Tensor,
        offsets: Tensor,
        output_size: Sequence[int] | None = None,
        input_bias: Tensor | None = None,
    ) -> Tensor:
        return call_with_state(
            self, F.batch_norm_relu_max_unpool2d, input, offsets, relu=self.relu, input_bias=input_bias,
            kernel_size=self.kernel_size, stride=self.stride, padding=self.padding, output_size=output_size,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}"


def convert_sync_batchnorm(model: nn.Module, process_group: Any = None) -> nn.Module:
    """Synchronize all batch norms of a model, those of fastseg.nn and those of torch.nn.

    fastseg's batch norms are changed in place (`sync` is set). torch's batch norms become torch.nn.SyncBatchNorm.

    Args:
        model: a model, or a batch norm.
        process_group: the processes that share statistics. Default: the default group.

    Returns:
        `model`, or its replacement if it is itself a batch norm of torch.nn.

    Example:
        >>> import fastseg
        >>> fastseg.nn.convert_sync_batchnorm(fastseg.nn.BatchNormReLU2d(4)).sync
        True

    Source:
        torch.nn.SyncBatchNorm.convert_sync_batchnorm
    """
    if isinstance(model, BatchNormReLU2d):
        model.sync, model.process_group = True, process_group
    elif isinstance(model, torch_internals.BatchNorm):
        return nn.SyncBatchNorm.convert_sync_batchnorm(model, process_group)
    else:
        for name, child in model.named_children():
            model.add_module(name, convert_sync_batchnorm(child, process_group))
    return model
