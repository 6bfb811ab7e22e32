"""An nn.Sequential that runs a batch norm fused with its neighbors, as long as nothing needs the tensors between them.

The layers inside keep their classes. The sequence looks at them at each call, so that later changes count: a replaced
layer, a new hook, a conversion to SyncBatchNorm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import dispatch, torch_internals
from .. import functional as F
from .. import nn as fused
from ..kernels.pooling.geometry import PoolGeometry
from ..nn.batch_norm import call_with_state
from ..nn.conv import conv_transpose_with_bias, folded_conv_transpose
from ..nn.scripting import refuse_script
from ..ops.batch_norm.batch_norm import BATCH_NORM_RELU
from ..ops.batch_norm.functions import FEW_ELEMENTS, FEW_POOLED
from ..ops.operator import MOST_THREADS, memory_format

LayerClass = Callable[[nn.Module], type]  # the class that a layer has, or will have after the swap


class Group(NamedTuple):
    """Consecutive layers of a sequence that run fused: [convolution,] norm [, ReLU] [, pool].

    conv: the convolution, if the norm takes over its bias or is folded into it. length: the number of layers.
    """

    conv: nn.Module | None
    norm: nn.BatchNorm2d
    relu: bool
    pool: nn.Module | None
    length: int

    def __call__(self, input: Tensor) -> Tensor:
        conv, norm, relu, pool, _ = self
        bias = None
        if isinstance(conv, nn.ConvTranspose2d):
            output = folded_conv_transpose(conv, norm, input) if relu and pool is None else None
            if output is not None:
                return output
            input, bias = conv_transpose_with_bias(conv, input, None), conv.bias
        elif conv is not None:
            input, bias = torch_internals.convolve_without_bias(conv, input), conv.bias
        if pool is None:
            return call_with_state(norm, F.batch_norm_relu, input, relu=relu, input_bias=bias)
        return call_with_state(
            norm, F.batch_norm_relu_max_pool2d, input, relu=relu, input_bias=bias, kernel_size=pool.kernel_size,
            stride=pool.stride, padding=pool.padding, ceil_mode=pool.ceil_mode,
        )  # fmt: skip


class Sequential(nn.Sequential):
    """nn.Sequential that runs each batch norm fused with the convolution bias in front and the ReLU and pool after it.

    Where the kernels would not run, or a layer has a hook or its own forward, the layers run one by one, as in
    nn.Sequential.
    """

    __prepare_scriptable__ = refuse_script

    def forward(self, input: Any) -> Any:
        if not isinstance(input, Tensor) or dispatch.torch_alone(input) or _layers_must_be_called():
            # Not super().forward: a bound `forward` that was saved must still work after a swap is undone.
            return nn.Sequential.forward(self, input)
        layers, at = list(self), 0
        while at < len(layers):
            group = find_group(layers, at)
            if group is not None and _supported(input, group.norm) and not _is_small(input, group):
                input, at = group(input), at + group.length
            else:
                input, at = layers[at](input), at + 1
        return input


def group_names(sequence: nn.Sequential, class_of: LayerClass, ignore_hooks: bool) -> list[tuple[str, ...]]:
    """The names of the children in each group that would run fused.

    class_of: the class that a layer has, or will have. ignore_hooks: include groups that a hook now prevents.
    """
    names, layers, at, found = list(torch_internals.children(sequence)), list(sequence), 0, []
    while at < len(layers):
        group = find_group(layers, at, class_of, ignore_hooks)
        if group is not None:
            found.append(tuple(names[at : at + group.length]))
        at += 1 if group is None else group.length
    return found


def find_group(
    layers: Sequence[nn.Module], at: int, class_of: LayerClass = type, ignore_hooks: bool = False
) -> Group | None:
    """The group that begins with layer number `at` and has at least two layers, or None."""
    if not isinstance(layers[at], (nn.Conv2d, nn.BatchNorm2d, nn.ConvTranspose2d)):
        return None

    def layer_is(place: int, base: type) -> bool:
        if place >= len(layers) or not _computes_as(base, layers[place], class_of):
            return False
        return ignore_hooks or not torch_internals.has_hooks(layers[place])

    conv, end = None, at
    # A bias with a parametrization is not among the layer's own parameters, and stays in the convolution.
    biased = torch_internals.parameters(layers[at]).get("bias") is not None
    convolves = biased and layer_is(at, nn.Conv2d) and torch_internals.convolves_as_torch(layers[at])
    if layer_is(at, fused.ConvTranspose2d) or convolves:
        conv, end = layers[at], at + 1
    if not layer_is(end, nn.BatchNorm2d) or "parametrizations" in torch_internals.children(layers[end]):
        return None
    norm, end = layers[end], end + 1
    relu = layer_is(end, nn.ReLU)
    end += relu
    pool = layers[end] if layer_is(end, fused.MaxPool2d) and _can_be_fused(layers[end]) else None
    end += pool is not None
    # Without a bias, a transposed convolution only gains from its fused epilogue, which has a ReLU and no pool.
    if conv is not None and not biased and (not relu or pool is not None):
        return None
    return Group(conv, norm, relu, pool, end - at) if end - at > 1 else None


def _computes_as(base: type, layer: nn.Module, class_of: LayerClass) -> bool:
    """Whether a layer is a `base` or of a subclass, and neither class nor instance replaces how it is called."""
    cls = class_of(layer)
    return (
        issubclass(cls, base)
        and cls.forward is base.forward
        and cls.__call__ is base.__call__
        and "forward" not in layer.__dict__
    )


def _can_be_fused(pool: nn.MaxPool2d) -> bool:
    """Whether the fused kernel supports a pool: its windows do not overlap and no indices are returned."""
    kernel, stride, dilation = map(torch_internals.as_pair, (pool.kernel_size, pool.stride, pool.dilation))
    if pool.return_indices or not len(kernel) == len(stride) == len(dilation) == 2:
        return False
    return PoolGeometry(kernel, stride, (0, 0), dilation).has_cells


def _layers_must_be_called() -> bool:
    """Whether a hook for all modules needs to see the layers, or a transform is active that the operators lack."""
    return (
        torch_internals.has_global_hooks()
        or torch_internals.functorch_transforms_active()
        or torch_internals.forward_mode_active()
    )


def _is_small(input: Tensor, group: Group) -> bool:
    """Whether "auto" leaves the group's batch norm to torch on a CPU, where its layers are faster one by one."""
    if not input.is_cpu or dispatch.get_backend() != "auto" or dispatch.explaining() or torch.compiler.is_compiling():
        return False
    elements, conv = input.numel(), group.conv
    if isinstance(conv, nn.Conv2d):  # of its output, but for the edges
        elements = elements * conv.out_channels // (conv.in_channels * conv.stride[0] * conv.stride[1])
    elif conv is not None:
        return False
    least = (FEW_ELEMENTS if group.pool is None else FEW_POOLED)[group.norm.training]
    return elements < least[memory_format(input)] * min(torch.get_num_threads(), MOST_THREADS)


def _supported(input: Any, norm: nn.BatchNorm2d) -> bool:
    """Whether the fused operators support the input and the norm's tensors. What torch rejects is left to torch."""
    vectors = [t for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var) if t is not None]
    if not all(
        type(t) in (Tensor, nn.Parameter) or isinstance(t, torch_internals.FakeTensor) for t in (input, *vectors)
    ):
        return False  # a DTensor, or a tuple
    if BATCH_NORM_RELU.unsupported("triton", input) is not None:
        return False
    half = input.dtype in (torch.float16, torch.bfloat16)
    return all(t.dtype == input.dtype or (t.dtype == torch.float32 and half) for t in vectors)
