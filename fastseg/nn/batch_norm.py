"""BatchNormReLU2d and what follows it: BatchNormReLUMaxPool2d, BatchNormReLUMaxUnpool2d; their synchronisation."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import functional as F
from .. import torch_internals
from ..ops.pooling.positions import IntOrPair
from .scripting import refuse_script


def normalise(norm: nn.BatchNorm2d, function: Callable[..., Any], *tensors: Tensor, **rest: Any) -> Any:
    """function(*tensors, the module's state, **rest): what nn.BatchNorm2d.forward does, momentum and counter included.

    function: one of fastseg.functional's batch_norm_relu family. norm: torch's, or one of these.
    """
    torch_internals.check_input_dim(norm, tensors[0])
    factor = 0.0 if norm.momentum is None else norm.momentum
    if norm.training and norm.track_running_stats and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:  # the mean of all batches
            factor = 1.0 / float(norm.num_batches_tracked)
    use_batch = norm.training or (norm.running_mean is None and norm.running_var is None)
    tracked = not norm.training or norm.track_running_stats
    group = None
    if getattr(norm, "sync", False) and norm.training and dist.is_available() and dist.is_initialized():
        group = dist.group.WORLD if norm.process_group is None else norm.process_group
        group = group if dist.get_world_size(group) > 1 else None
    return function(
        *tensors,
        norm.running_mean if tracked else None,
        norm.running_var if tracked else None,
        norm.weight,
        norm.bias,
        use_batch,
        factor,
        norm.eps,
        process_group=group,
        **rest,
    )


class BatchNormReLU2d(nn.BatchNorm2d):
    """torch.nn.BatchNorm2d and the ReLU behind it: same arguments, parameters, buffers and state_dict.

    relu: False leaves the ReLU out. newer: arguments that nn.BatchNorm2d has in this torch and not in all, as `bias`.
    forward(input (N, C, H, W), input_bias=None): input_bias is the bias of the convolution before, where that has not
    added it. See fastseg.functional.batch_norm_relu.

    sync: under an initialised process group, normalise with the statistics of all its processes' batches in training.
    convert_sync_batchnorm sets it.
    """

    __prepare_scriptable__ = refuse_script
    sync: bool = False
    process_group: Any = None  # of sync; None: all processes

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
        return normalise(self, F.batch_norm_relu, input, relu=self.relu, input_bias=input_bias)

    @property
    def qconfig(self) -> Any:
        """Refuses torch's converter, which asks for it and would rebuild the module as plain batch norm."""
        if sys._getframe(1).f_code.co_name == "convert_sync_batchnorm":
            raise RuntimeError(
                f"{type(self).__name__} cannot be rebuilt as another batch norm, which would drop its ReLU; "
                "fastseg.nn.convert_sync_batchnorm synchronises it"
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute 'qconfig'")

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.relu else ", relu=False") + (", sync=True" if self.sync else "")


class BatchNormReLUMaxPool2d(BatchNormReLU2d):
    """BatchNormReLU2d and the max-pooling behind it; the map between is never stored.

    Arguments of nn.BatchNorm2d, then kernel_size, stride, padding and ceil_mode of nn.MaxPool2d.
    forward(input (N, C, H, W), input_bias=None) gives the pooled map, and with return_offsets the uint8 offsets of the
    maxima too. See fastseg.functional.batch_norm_relu_max_pool2d.
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
        return normalise(
            self, F.batch_norm_relu_max_pool2d, input, relu=self.relu, input_bias=input_bias,
            kernel_size=self.kernel_size, stride=self.stride, padding=self.padding, ceil_mode=self.ceil_mode,
            return_offsets=self.return_offsets,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}"


class BatchNormReLUMaxUnpool2d(BatchNormReLU2d):
    """BatchNormReLU2d and the max-unpooling behind it; the map between is never stored.

    Arguments of nn.BatchNorm2d, then those of max_unpool2d. forward(input (N, C, H, W), offsets, output_size=None,
    input_bias=None): offsets uint8, of input's shape, from max_pool2d_with_offsets or BatchNormReLUMaxPool2d. See
    fastseg.functional.batch_norm_relu_max_unpool2d.
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
        return normalise(
            self, F.batch_norm_relu_max_unpool2d, input, offsets, relu=self.relu, input_bias=input_bias,
            kernel_size=self.kernel_size, stride=self.stride, padding=self.padding, output_size=output_size,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}"


def convert_sync_batchnorm(model: nn.Module, process_group: Any = None) -> nn.Module:
    """torch.nn.SyncBatchNorm.convert_sync_batchnorm for models that hold fused batch norms.

    fastseg's are set to `sync`, in place; torch's own become torch.nn.SyncBatchNorm, for which the model, or `model`
    itself where it is one, is changed as torch does. process_group: the processes that share statistics, default all.
    """
    if isinstance(model, BatchNormReLU2d):
        model.sync, model.process_group = True, process_group
    elif isinstance(model, torch_internals.BatchNorm):
        return nn.SyncBatchNorm.convert_sync_batchnorm(model, process_group)
    else:
        for name, child in model.named_children():
            model.add_module(name, convert_sync_batchnorm(child, process_group))
    return model
