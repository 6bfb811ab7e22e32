"""SegNet's decoder in evaluation: unpooling and the convolution behind it as one, where that was found to be faster."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from .. import dispatch
from ..nn import BatchNormReLU2d, BatchNormReLUMaxUnpool2d
from ..ops.batch_norm import Norm
from ..ops.unpool_conv_norm import max_unpool2d_conv2d_batch_norm_relu
from .blocks import Block, Conv2d, Kept, Stage, decode, unpool

PARTS = {nn.ModuleList, Stage, Block, Conv2d, BatchNormReLU2d, BatchNormReLUMaxUnpool2d}
CONVOLUTION = ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros")  # what the kernel computes


def unpool_and_decode(decoder: nn.ModuleList, x: Tensor, kept: list[Kept]) -> Tensor:
    """decode(decoder, unpool(x, kept.pop()), kept); without gradients in evaluation, by way of no unpooled map.

    The first convolution of a stage alone reads the unpooled map. One kernel can put the maxima in their places as it
    reads them, and apply the norm and the ReLU behind the convolution before it stores; those in front of the unpooling
    then run on the small map. It is chosen for each stage by what both ways were measured to take. Where a hook watches
    a layer, and where a graph is traced, all run as they stand.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not _on_kernels(x) or not _as_built(decoder):
        return decode(decoder, unpool(x, kept.pop()), kept)
    before = None  # the block whose convolution has made x, and whose norm has not yet been applied
    for stage in decoder:
        first, *rest = stage
        x = _entered(before, x, kept.pop(), first)
        if kept:
            *rest, before = rest
        for block in rest:
            x = block(x)
        if kept:
            x = before[0](x)
    return x


def _entered(before: Block | None, x: Tensor, kept: Kept, block: Block) -> Tensor:
    """`block` of the unpooled map."""
    offsets, size = kept
    norms = _norm(block), None if before is None else _norm(before)
    y = max_unpool2d_conv2d_batch_norm_relu(x, offsets, block[0].weight, 2, None, 0, size, *norms)
    if y is not None:
        return y
    return block(unpool(x, kept) if before is None else before[1](x, offsets, size, input_bias=before[0].bias))


def _norm(block: Block) -> Norm:
    conv, norm = block
    return norm.running_mean, conv.bias, norm.running_var, norm.weight, norm.bias, norm.eps, norm.relu


def _on_kernels(x: Tensor) -> bool:
    return dispatch.get_backend() in ("auto", "triton") and not dispatch.torch_alone(x)


def _as_built(decoder: nn.ModuleList) -> bool:
    """Whether its layers are those it is built from, in evaluation, and nobody sees that they run in other parts."""
    if torch_module._has_any_global_hook():
        return False
    for module in decoder.modules():
        own = module.__dict__
        if type(module) not in PARTS or module.training or "forward" in own or own.get("_compiled_call_impl"):
            return False
        if any(own[f"_{name}_hooks"] for name in ("forward", "forward_pre", "backward", "backward_pre")):
            return False
    for number, stage in enumerate(decoder, 1):
        conv, norm = stage[0]
        geometry = conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode
        if type(norm) is not BatchNormReLU2d or geometry != CONVOLUTION:
            return False
        if number < len(decoder) and type(stage[-1][1]) is not BatchNormReLUMaxUnpool2d:
            return False
    return True
