"""ConvTranspose2d, and ConvTranspose2d followed by batch normalization and ReLU."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from .. import dispatch, torch_internals
from .. import functional as F
from ..kernels.batch_norm.arguments import NormArguments
from ..ops.arguments import IntOrPair
from ..ops.convolution.conv_transpose import runs_on_kernels
from ..ops.convolution.conv_transpose_norm import folded_norm
from ..ops.convolution.options import Epilogue, conv_transpose_geometry
from .batch_norm import BatchNormReLU2d
from .scripting import refuse_script


class ConvTranspose2d(nn.ConvTranspose2d):
    """2-D transposed convolution on :func:`fastseg.functional.conv_transpose2d`.

    The same values and errors as :class:`torch.nn.ConvTranspose2d`, to rounding.

    A weight that mixes no channels and is not being trained, such as FCN's bilinear interpolation, runs as a depthwise
    convolution (1 / C of the arithmetic) where the kernels support it. For this the weight is checked once after each
    change that torch counts: an in-place operation, load_state_dict, another tensor. The check forces a host sync on a
    GPU, and is skipped while a graph is traced or captured. In-place writes to ``weight.data`` are not counted by
    torch; write under torch.no_grad() instead.

    Args:
        in_channels, out_channels: numbers of channels C and K.
        kernel_size, stride, padding, output_padding, groups, bias, dilation: as in torch.
        padding_mode: only "zeros".
        device, dtype: of the parameters.

    Shape:
        - Input: (N, C, H, W) or (C, H, W).
        - output_size: an optional argument of the call, with as many entries as the input or two. It selects one of
          the output sizes that `stride` allows, in place of `output_padding`.
        - Output: (N, K, OH, OW) or (K, OH, OW) with
          OH = (H - 1) * stride - 2 * padding + dilation * (kernel_size - 1) + output_padding + 1.

    Example:
        >>> import torch, fastseg
        >>> up = fastseg.nn.ConvTranspose2d(8, 4, kernel_size=2, stride=2)
        >>> tuple(up(torch.randn(1, 8, 5, 6)).shape)
        (1, 4, 10, 12)

    Note:
        Deterministic, the gradients too. Sums are in float32. Under backend "auto" the kernels run only where they were
        measured to be faster than cuDNN; see :func:`fastseg.functional.conv_transpose2d`.

    Source:
        torch.nn.ConvTranspose2d
    """

    __prepare_scriptable__ = refuse_script

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        if dispatch.left_to_torch("conv_transpose2d", input):
            # Not super().forward: a bound `forward` that was saved must still work after a swap is undone.
            return nn.ConvTranspose2d.forward(self, input, output_size)
        return conv_transpose_with_bias(self, input, self.bias, output_size)


def conv_transpose_with_bias(
    conv: nn.ConvTranspose2d, input: Tensor, bias: Tensor | None, output_size: Sequence[int] | None = None
) -> Tensor:
    """ConvTranspose2d.forward, with this bias in place of the layer's."""
    weight = conv.weight  # read once: a parametrization computes it at each read, and may return another value
    if conv.padding_mode != "zeros":
        raise ValueError(f"ConvTranspose2d: padding_mode must be 'zeros', but is {conv.padding_mode!r}")
    output_padding = torch_internals.output_padding(conv, input, output_size)
    if conv.groups == 1 and 1 < conv.in_channels == conv.out_channels and _mixes_no_channels(weight):
        diagonal = weight.diagonal().permute(2, 0, 1).unsqueeze(1)
        geometry = conv_transpose_geometry(conv.stride, conv.padding, output_padding, conv.in_channels, conv.dilation)
        if runs_on_kernels(input, diagonal, geometry, Epilogue(bias)):
            return F.conv_transpose2d(input, diagonal, bias, *geometry)
    geometry = (conv.stride, conv.padding, output_padding, conv.groups, conv.dilation)
    return F.conv_transpose2d(input, weight, bias, *geometry)


class _CheckedWeight(NamedTuple):
    """The result of a check of a weight, and what identified the weight's values when it was checked."""

    data_ptr: int
    version: int
    dtype: torch.dtype
    shape: torch.Size
    mixes_no_channels: bool


_checked_weights: MutableMapping[nn.Parameter, _CheckedWeight] = WeakIdKeyDictionary()


def _mixes_no_channels(weight: Tensor) -> bool:
    """Whether all values off the channel diagonal are known to be zero. False if they may not be checked now."""
    if torch.compiler.is_compiling() or (weight.requires_grad and torch.is_grad_enabled()):
        return False
    if type(weight) is not nn.Parameter or weight.is_meta or weight.is_inference():
        return False  # a weight computed by a parametrization is a new tensor at each call
    identity = (weight.data_ptr(), torch_internals.version(weight), weight.dtype, weight.shape)
    known = _checked_weights.get(weight)
    if known is None or known[:-1] != identity:
        if weight.is_cuda and torch.cuda.is_current_stream_capturing():
            return False
        with torch.no_grad():
            on_diagonal = weight.diagonal().count_nonzero()
            known = _CheckedWeight(*identity, bool(weight.count_nonzero() == on_diagonal))
        _checked_weights[weight] = known
    return known.mixes_no_channels


class ConvTranspose2dBeforeNorm(ConvTranspose2d):
    """ConvTranspose2d that does not add its bias, for a batch norm that takes it as `input_bias`. No output_size."""

    omits_bias = True

    def forward(self, input: Tensor) -> Tensor:
        return conv_transpose_with_bias(self, input, None)


class ConvTransposeBatchNormReLU2d(nn.Sequential):
    """2-D transposed convolution, batch normalization and ReLU.

        y = relu((conv_transpose2d(x) - mean) / sqrt(var + eps) * weight + bias)

    In training the batch norm reads the output of the convolution, and the convolution's bias only moves the running
    mean. In evaluation the batch norm is folded into the epilogue of the convolution, in float32, where the kernels run
    it (:func:`fastseg.functional.conv_transpose2d_affine_relu`) and neither layer has hooks; all parameters still get
    their gradients. The state_dict keys are ``0.`` and ``1.``, as of the three layers in an nn.Sequential.

    Args:
        in_channels, out_channels: numbers of channels C and K.
        kernel_size, stride, padding, output_padding, groups, dilation: as in :class:`ConvTranspose2d`. There is a bias.
        eps, momentum: as in :class:`BatchNormReLU2d`.
        device, dtype: of parameters and buffers.

    Shape:
        - Input: (N, C, H, W).
        - Output: (N, K, OH, OW), of the size that :class:`ConvTranspose2d` returns.

    Example:
        >>> import torch, fastseg
        >>> block = fastseg.nn.ConvTransposeBatchNormReLU2d(8, 4, 2, stride=2)
        >>> tuple(block(torch.randn(2, 8, 5, 6)).shape), list(block.state_dict())[:3]
        ((2, 4, 10, 12), ['0.weight', '0.bias', '1.weight'])

    Note:
        Deterministic.

    Source:
        torch.nn.ConvTranspose2d, torch.nn.BatchNorm2d
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntOrPair,
        stride: IntOrPair = 1,
        padding: IntOrPair = 0,
        output_padding: IntOrPair = 0,
        groups: int = 1,
        dilation: IntOrPair = 1,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        conv = ConvTranspose2dBeforeNorm(
            in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, True, dilation,
            device=device, dtype=dtype,
        )  # fmt: skip
        super().__init__(conv, BatchNormReLU2d(out_channels, eps, momentum, device=device, dtype=dtype))

    def forward(self, input: Tensor) -> Tensor:
        conv, norm = self
        if norm.relu and not any(map(torch_internals.has_hooks, (conv, norm))):
            output = folded_conv_transpose(conv, norm, input)
            if output is not None:
                return output
        return norm(conv(input), input_bias=conv.bias)


def folded_conv_transpose(conv: nn.ConvTranspose2d, norm: nn.BatchNorm2d, input: Tensor) -> Tensor | None:
    """relu(norm(conv(input))) in evaluation as one kernel; None in training and where the kernels would not run it."""
    if norm.training or norm.running_mean is None:
        return None
    weight = conv.weight  # read once: a parametrization computes it at each read
    geometry = conv_transpose_geometry(conv.stride, conv.padding, conv.output_padding, conv.groups, conv.dilation)
    # The running statistics stand in for shift and scale, which have the same shape: nothing is computed to ask.
    epilogue = Epilogue(bias=norm.running_mean, scale=norm.running_var, relu=True)
    if not runs_on_kernels(input, weight, geometry, epilogue):
        return None
    statistics = (norm.running_mean, conv.bias, norm.running_var)
    epilogue = folded_norm(NormArguments(*statistics, norm.weight, norm.bias, norm.eps, relu=True))
    return F.conv_transpose2d_affine_relu(input, weight, epilogue.scale, epilogue.bias, *geometry)
