"""ConvTranspose2d, and with the batch norm and the ReLU behind it."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from .. import dispatch, torch_internals
from .. import functional as F
from ..ops.convolution.conv_transpose import runs_on_kernels
from ..ops.convolution.conv_transpose_norm import folded_norm
from ..ops.pooling.positions import IntOrPair
from .batch_norm import BatchNormReLU2d
from .scripting import refuse_script


class ConvTranspose2d(nn.ConvTranspose2d):
    """torch.nn.ConvTranspose2d on fastseg.functional.conv_transpose2d: same arguments, parameters, errors.

    forward(input (N, C, H, W) or (C, H, W), output_size=None): output_size, of as many entries as input or of 2, picks
    one of the sizes that `stride` leaves open, in place of `output_padding`.

    A weight that mixes no channels and is not being trained, such as FCN's bilinear interpolation, runs depthwise, 1/C
    of the work, where the kernels take that. It is looked at once for each change that torch counts (an operation in
    place, load_state_dict, another tensor), which makes the host wait, and never while a graph is traced or captured.
    Values written off the diagonal through `weight.data` in place are no change to torch: write under torch.no_grad().
    """

    __prepare_scriptable__ = refuse_script

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        # By name and by function: a bound `forward` that somebody keeps must work after a swap is undone.
        if dispatch.left_to_torch("conv_transpose2d", input):
            return nn.ConvTranspose2d.forward(self, input, output_size)
        return convolved(self, input, self.bias, output_size)


def convolved(
    conv: nn.ConvTranspose2d, input: Tensor, bias: Tensor | None, output_size: Sequence[int] | None = None
) -> Tensor:
    """What ConvTranspose2d computes, with another bias."""
    weight = conv.weight  # once: a parametrization computes it, and may change with each time
    if conv.padding_mode != "zeros":
        raise ValueError(f"ConvTranspose2d: padding_mode must be 'zeros', but is {conv.padding_mode!r}")
    geometry = (conv.stride, conv.padding, torch_internals.output_padding(conv, input, output_size))
    if conv.groups == 1 and 1 < conv.in_channels == conv.out_channels and _mixes_no_channels(weight):
        diagonal = weight.diagonal().permute(2, 0, 1).unsqueeze(1)
        depthwise = (input, diagonal, bias, *geometry, conv.in_channels, conv.dilation)
        if runs_on_kernels(*depthwise):
            return F.conv_transpose2d(*depthwise)
    return F.conv_transpose2d(input, weight, bias, *geometry, conv.groups, conv.dilation)


_looked: MutableMapping[nn.Parameter, tuple[tuple[object, ...], bool]] = WeakIdKeyDictionary()


def _mixes_no_channels(weight: Tensor) -> bool:
    """Whether all weights off the channels' diagonal are zero, as far as that is known or can be asked."""
    if torch.compiler.is_compiling() or (weight.requires_grad and torch.is_grad_enabled()):
        return False
    if type(weight) is not nn.Parameter or weight.is_meta or weight.is_inference():
        return False  # what a parametrization has just computed would be looked at in each call
    state = (weight.data_ptr(), torch_internals.version(weight), weight.dtype, weight.shape)
    known = _looked.get(weight)
    if known is None or known[0] != state:
        if weight.is_cuda and torch.cuda.is_current_stream_capturing():
            return False
        with torch.no_grad():
            on_diagonal = weight.diagonal().count_nonzero()
            known = _looked[weight] = state, bool(weight.count_nonzero() == on_diagonal)
    return known[1]


class ConvTranspose2dBeforeNorm(ConvTranspose2d):
    """ConvTranspose2d that leaves its bias to the batch norm behind it, and has no output_size."""

    leaves_bias = True

    def forward(self, input: Tensor) -> Tensor:
        return convolved(self, input, None)


class ConvTransposeBatchNormReLU2d(nn.Sequential):
    """ConvTranspose2d, batch norm and ReLU: state_dict keys `0.` and `1.`, as of those three in an nn.Sequential.

    Arguments of nn.ConvTranspose2d up to dilation (with a bias), then eps, momentum, device and dtype. In training the
    batch norm's kernels take the convolution's output, and its bias moves the running mean alone. In evaluation the
    batch norm is folded into the convolution's epilogue, in float32, where the kernels run that
    (fastseg.functional.conv_transpose2d_affine_relu) and no hook watches either layer; the gradients reach every
    parameter all the same.
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
            output = evaluated(conv, norm, input)
            if output is not None:
                return output
        return norm(conv(input), input_bias=conv.bias)


def evaluated(conv: nn.ConvTranspose2d, norm: nn.BatchNorm2d, input: Tensor) -> Tensor | None:
    """relu(norm(conv(input))) in evaluation as one kernel; None in training and where the kernels do not run it."""
    if norm.training or norm.running_mean is None:
        return None
    weight = conv.weight  # once: a parametrization computes it
    geometry = (conv.stride, conv.padding, conv.output_padding, conv.groups, conv.dilation)
    stand_ins = norm.running_mean, norm.running_var  # as long as shift and scale, which need not be made to ask
    if not runs_on_kernels(input, weight, stand_ins[0], *geometry, stand_ins[1], True):
        return None
    scale, shift = folded_norm(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps, conv.bias)
    return F.conv_transpose2d_affine_relu(input, weight, scale, shift, *geometry)
