"""Batch norm and its neighbours in an nn.Sequential, run as one where nobody can see what is between them.

The layers inside stay what they are. The sequence looks at them at each call, so that whatever happens to them later,
another layer in a place, a hook, a conversion to SyncBatchNorm, is followed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import dispatch, torch_internals
from .. import functional as F
from .. import nn as fused
from ..nn.batch_norm import call_with_state
from ..nn.conv import conv_transpose_with_bias, folded_conv_transpose
from ..nn.scripting import refuse_script
from ..ops.batch_norm.operators import BATCH_NORM_RELU
from ..ops.batch_norm.pooling_operators import fusible

Kind = Callable[[nn.Module], type]


class Group(NamedTuple):
    """Layers that run as one: [convolution whose bias the norm takes,] norm [, ReLU] [, pool]."""

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
    """nn.Sequential whose batch norms run with the convolution's bias before them and the ReLU and pool behind them.

    Where the kernels do not run, or something watches a layer (a hook, a forward of its own), the layers run one by
    one, as in nn.Sequential.
    """

    __prepare_scriptable__ = refuse_script

    def forward(self, input: Any) -> Any:
        if not isinstance(input, Tensor) or dispatch.torch_alone(input) or _watched_from_outside():
            return nn.Sequential.forward(self, input)  # not super(): a bound forward works after undo
        layers, at = list(self), 0
        while at < len(layers):
            group = group_at(layers, at)
            if group is not None and _covered(input, group.norm):
                input, at = group(input), at + group.length
            else:
                input, at = layers[at](input), at + 1
        return input


def groups(sequence: nn.Sequential, kind: Kind, watched: bool) -> list[tuple[str, ...]]:
    """Names of the children that run as one, group by group.

    kind: the class that a layer has, or will have. watched: also where a hook prevents it now.
    """
    names, layers, at, found = list(torch_internals.children(sequence)), list(sequence), 0, []
    while at < len(layers):
        group = group_at(layers, at, kind, watched)
        if group is not None:
            found.append(tuple(names[at : at + group.length]))
        at += 1 if group is None else group.length
    return found


def group_at(layers: Sequence[nn.Module], at: int, kind: Kind = type, watched: bool = False) -> Group | None:
    """The group that begins with layer `at`, of two layers at least. kind, watched: as in `groups`."""
    if not isinstance(layers[at], (nn.Conv2d, nn.BatchNorm2d, nn.ConvTranspose2d)):
        return None

    def layer_is(place: int, base: type) -> bool:
        return (
            place < len(layers)
            and _stock(layers[place], base, kind)
            and (watched or not torch_internals.has_hooks(layers[place]))
        )

    conv, end = None, at
    # A bias with a parametrization is none of the layer's own parameters.
    biased = torch_internals.parameters(layers[at]).get("bias") is not None
    if layer_is(at, fused.ConvTranspose2d) or (biased and layer_is(at, nn.Conv2d) and _convolves(layers[at])):
        conv, end = layers[at], at + 1
    if not layer_is(end, nn.BatchNorm2d) or "parametrizations" in torch_internals.children(layers[end]):
        return None
    norm, end = layers[end], end + 1
    relu = layer_is(end, nn.ReLU)
    end += relu
    pool = layers[end] if layer_is(end, fused.MaxPool2d) and _joins(layers[end]) else None
    end += pool is not None
    # Without a bias, a transposed convolution gains by its epilogue alone, which has a ReLU.
    if conv is not None and not biased and (not relu or pool is not None):
        return None
    return Group(conv, norm, relu, pool, end - at) if end - at > 1 else None


def _stock(layer: nn.Module, base: type, kind: Kind) -> bool:
    """Whether a layer is a `base`, or of a subclass, that is called and computes as one."""
    cls = kind(layer)
    return (
        issubclass(cls, base)
        and cls.forward is base.forward
        and cls.__call__ is base.__call__
        and "forward" not in layer.__dict__
    )


def _convolves(conv: nn.Conv2d) -> bool:
    """Whether a bias that torch's convolution would add can be kept from it: nobody else has a say in that."""
    return torch_internals.convolves_as_torch(conv)


def _joins(pool: nn.MaxPool2d) -> bool:
    """Whether a pool's windows are those that run in one pass with the norm, and nobody asks for their indices."""
    kernel, stride, dilation = map(torch_internals.as_pair, (pool.kernel_size, pool.stride, pool.dilation))
    known = len(kernel) == len(stride) == 2
    return known and not pool.return_indices and dilation == (1, 1) and fusible(kernel, stride)


def _watched_from_outside() -> bool:
    """Whether a hook of all modules, or a transform that the operators have no rule for, would miss the layers."""
    return (
        torch_internals.has_global_hooks()
        or torch_internals.functorch_transforms_active()
        or torch_internals.forward_mode_active()
    )


def _covered(input: Any, norm: nn.BatchNorm2d) -> bool:
    """Whether the group's operators take these tensors. What torch refuses is left to torch."""
    vectors = [t for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var) if t is not None]
    if not all(
        type(t) in (Tensor, nn.Parameter) or isinstance(t, torch_internals.FakeTensor) for t in (input, *vectors)
    ):
        return False  # a DTensor, a tuple
    if BATCH_NORM_RELU.unsupported("triton", input) is not None:
        return False
    halves = (torch.float16, torch.bfloat16)
    return all(t.dtype == input.dtype or (t.dtype == torch.float32 and input.dtype in halves) for t in vectors)
