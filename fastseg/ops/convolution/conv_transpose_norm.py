"""A transposed convolution with the batch norm and ReLU after it, in evaluation."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.batch_norm.arguments import NormArguments
from ..batch_norm.functions import batch_norm_relu
from .conv_transpose import conv_transpose2d, conv_transpose2d_affine_relu, runs_on_kernels
from .options import ConvTransposeGeometry, Epilogue


def folded_norm(norm: NormArguments) -> Epilogue:
    """A batch norm in evaluation as the epilogue of the convolution before it.

    norm.shift: the bias of that convolution. Computed in float32 (float64 for float64).
    """
    mean, var = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (norm.mean, norm.var))
    scale = (var + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight
    bias = (-mean if norm.shift is None else norm.shift - mean) * scale
    return Epilogue(bias if norm.bias is None else bias + norm.bias, scale, norm.relu)


def conv_transpose2d_batch_norm_relu(
    input: Tensor, weight: Tensor, geometry: ConvTransposeGeometry, norm: NormArguments
) -> Tensor:
    """relu(batch_norm(conv_transpose2d(input, weight, bias))) in evaluation, where the bias is norm.shift.

    One kernel, with the batch norm folded into its epilogue, if the kernels run; else two functions.
    """
    bias, scale, relu = epilogue = folded_norm(norm)
    if relu and runs_on_kernels(input, weight, geometry, epilogue):
        return conv_transpose2d_affine_relu(input, weight, scale, bias, *geometry)
    y = conv_transpose2d(input, weight, None, *geometry)
    return batch_norm_relu(
        y, norm.mean, norm.var, norm.weight, norm.bias, eps=norm.eps, relu=relu, input_bias=norm.shift
    )
