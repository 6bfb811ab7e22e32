"""SegNet's decoder in evaluation: unpooling and the convolution behind it as one, where that was found to be faster."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import autotune, dispatch, torch_internals
from ..kernels.pooling.geometry import PoolGeometry
from ..nn import BatchNormReLU2d, BatchNormReLUMaxUnpool2d
from ..ops.batch_norm.arguments import NormArguments
from ..ops.convolution.unpool_conv_norm import max_unpool2d_conv2d_batch_norm_relu
from .blocks import Block, Conv2d, Kept, Stage, decode, unpool

CONVOLUTION = ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros")  # what the kernel computes
WINDOWS = PoolGeometry([2, 2], [2, 2], [0, 0])  # of every pooling


def unpool_and_decode(decoder: nn.ModuleList, x: Tensor, kept: list[Kept]) -> Tensor:
    """decode(decoder, unpool(x, kept.pop()), kept); without gradients in evaluation, by way of no unpooled map.

    The first convolution of a stage alone reads the unpooled map. One kernel can put the maxima in their places as it
    reads them, and apply the norm and the ReLU behind the convolution before it stores; those in front of the unpooling
    then run on the small map. It is chosen for each stage by what both ways were measured to take. Where a hook watches
    a layer, and where a graph is traced, all run as they stand.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not _worth_asking(x) or not _as_built(decoder):
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
    input_norm = None if before is None else _norm(before)
    y = max_unpool2d_conv2d_batch_norm_relu(x, offsets, block[0].weight, WINDOWS, list(size), _norm(block), input_norm)
    if y is not None:
        return y
    return block(unpool(x, kept) if before is None else before[1](x, offsets, size, input_bias=before[0].bias))


def _norm(block: Block) -> NormArguments:
    conv, norm = torch_internals.children(block).values()
    buffers, parameters = torch_internals.buffers(norm), torch_internals.parameters(norm)
    vectors = buffers["running_mean"], torch_internals.parameters(conv)["bias"], buffers["running_var"]
    return NormArguments(*vectors, parameters["weight"], parameters["bias"], norm.eps, norm.relu)


def _worth_asking(x: Tensor) -> bool:
    """Whether a kernel may be chosen; where nobody knows of one that is faster, only to tell."""
    backend = dispatch.get_backend()
    if backend == "auto":
        return not dispatch.torch_alone(x) and (autotune.may_know(x) or dispatch.explaining())
    return backend == "triton"


def _as_built(decoder: nn.ModuleList) -> bool:
    """Whether the layers that would run in other parts are those it is built from, in evaluation, watched by nobody."""
    if torch_internals.has_global_hooks():
        return False
    stages = list(torch_internals.children(decoder).values())
    for stage in stages:
        if not _plain(stage, Stage):
            return False
        first, *rest = torch_internals.children(stage).values()
        ends = [(first, BatchNormReLU2d)]
        if stage is not stages[-1]:
            ends += [(block, BatchNormReLUMaxUnpool2d) for block in rest[-1:] or [first]]
        for block, kind in ends:
            if not _plain(block, Block):
                return False
            conv, norm = torch_internals.children(block).values()
            if not _plain(conv, Conv2d) or not _plain(norm, kind):
                return False
        conv = torch_internals.children(first)["0"]
        geometry = conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode
        if geometry != CONVOLUTION:
            return False
    return True


def _plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    replaced = "forward" in module.__dict__ or torch_internals.is_compiled(module)
    return type(module) is kind and not (module.training or torch_internals.has_hooks(module) or replaced)
