"""A transposed convolution with the batch norm of evaluation and the ReLU behind it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import IntOrPair
from ..batch_norm.functions import batch_norm_relu
from .conv_transpose import conv_transpose2d, conv_transpose2d_affine_relu, runs_on_kernels


def folded_norm(
    running_mean: Tensor, running_var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float,
    input_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(scale, shift) that a batch norm in evaluation and the bias before it come to, in float32 at least."""
    mean, var = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (running_mean, running_var))
    scale = (var + eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    shift = -mean if input_bias is None else input_bias - mean
    shift = shift * scale
    return scale, shift if bias is None else shift + bias


def conv_transpose2d_batch_norm_relu(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: IntOrPair, padding: IntOrPair,
    output_padding: IntOrPair, groups: int, dilation: IntOrPair, running_mean: Tensor, running_var: Tensor,
    norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float,
) -> Tensor:  # fmt: skip
    """relu(batch_norm(conv_transpose2d(...))) in evaluation: folded into the epilogue where the kernels run."""
    geometry = (stride, padding, output_padding, groups, dilation)
    scale, shift = folded_norm(running_mean, running_var, norm_weight, norm_bias, eps, bias)
    if runs_on_kernels(input, weight, shift, *geometry, scale, True):
        return conv_transpose2d_affine_relu(input, weight, scale, shift, *geometry)
    y = conv_transpose2d(input, weight, None, *geometry)
    return batch_norm_relu(y, running_mean, running_var, norm_weight, norm_bias, eps=eps, input_bias=bias)
