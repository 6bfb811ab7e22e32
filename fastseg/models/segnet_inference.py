"""SegNet's decoder in evaluation: unpooling and the next convolution in one kernel, where measured to be faster."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import autotune, dispatch, torch_internals
from ..kernels.pooling.geometry import PoolGeometry
from ..nn import BatchNormReLU2d, BatchNormReLUMaxUnpool2d
from ..ops.batch_norm.arguments import NormArguments
from ..ops.convolution.unpool_conv_norm import max_unpool2d_conv2d_batch_norm_relu
from .blocks import Block, Conv2d, Pooled, Stage, decode, unpool

KERNEL_CONVOLUTION = ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros")  # the convolution that the kernel computes
POOL = PoolGeometry([2, 2], [2, 2], [0, 0])  # of all pools and unpools


def unpool_and_decode(decoder: nn.ModuleList, x: Tensor, pooled: list[Pooled]) -> Tensor:
    """decode(decoder, unpool(x, pooled.pop()), pooled), in evaluation without storing the unpooled maps.

    Only the first convolution of a stage reads the unpooled map. So one kernel can unpool while it reads the small map,
    convolve, and apply the batch norm and ReLU after the convolution before it stores. The batch norm and ReLU in front
    of the unpooling then run on the small map. Each stage takes this way if it was measured to be faster. The layers
    run one by one if one of them has hooks, with gradients, and while a graph is traced.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not _may_be_faster(x) or not _is_unchanged(decoder):
        return decode(decoder, unpool(x, pooled.pop()), pooled)
    pending = None  # the block whose convolution has computed x, and whose batch norm has not been applied yet
    for stage in decoder:
        first, *rest = stage
        x = _unpooled_block(first, x, pooled.pop(), pending)
        if pooled:
            *rest, pending = rest
        for block in rest:
            x = block(x)
        if pooled:
            x = pending[0](x)
    return x


def _unpooled_block(block: Block, x: Tensor, pooled: Pooled, pending: Block | None) -> Tensor:
    """The output of `block` for the unpooled x, after the batch norm of `pending` if there is one."""
    input_norm = None if pending is None else _norm_arguments(pending)
    y = max_unpool2d_conv2d_batch_norm_relu(
        x, pooled.offsets, block[0].weight, POOL, list(pooled.size), _norm_arguments(block), input_norm
    )
    if y is not None:
        return y
    if pending is None:
        return block(unpool(x, pooled))
    conv, norm = pending
    return block(norm(x, *pooled, input_bias=conv.bias))


def _norm_arguments(block: Block) -> NormArguments:
    """The batch norm of a block in evaluation, with the bias of its convolution."""
    conv, norm = torch_internals.children(block).values()
    buffers, parameters = torch_internals.buffers(norm), torch_internals.parameters(norm)
    vectors = buffers["running_mean"], torch_internals.parameters(conv)["bias"], buffers["running_var"]
    return NormArguments(*vectors, parameters["weight"], parameters["bias"], norm.eps, norm.relu)


def _may_be_faster(x: Tensor) -> bool:
    """Whether the kernel may be chosen. Without any measurement it is not, and is only looked up for `explain`."""
    backend = dispatch.get_backend()
    if backend == "auto":
        return not dispatch.torch_alone(x) and (autotune.may_know(x) or dispatch.explaining())
    return backend == "triton"


def _is_unchanged(decoder: nn.ModuleList) -> bool:
    """Whether the layers that would not be called are those of SegNet, in evaluation, without hooks."""
    if torch_internals.has_global_hooks():
        return False
    stages = list(torch_internals.children(decoder).values())
    for stage in stages:
        if not _is_plain(stage, Stage):
            return False
        first, *rest = torch_internals.children(stage).values()
        fused = [(first, BatchNormReLU2d)]
        if stage is not stages[-1]:
            fused += [(block, BatchNormReLUMaxUnpool2d) for block in rest[-1:] or [first]]
        for block, norm_class in fused:
            if not _is_plain(block, Block):
                return False
            conv, norm = torch_internals.children(block).values()
            if not _is_plain(conv, Conv2d) or not _is_plain(norm, norm_class):
                return False
        conv = torch_internals.children(first)["0"]
        geometry = conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode
        if geometry != KERNEL_CONVOLUTION:
            return False
    return True


def _is_plain(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether a module is exactly of a class, in evaluation, and a call of it runs only the forward of the class."""
    replaced = "forward" in module.__dict__ or torch_internals.is_compiled(module)
    return type(module) is cls and not (module.training or torch_internals.has_hooks(module) or replaced)
