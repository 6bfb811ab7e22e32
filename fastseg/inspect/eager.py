"""Bytes that PyTorch's operators move on a GPU, counted without one.

A dispatch mode sees every aten operator of a call. The tensors are on the meta device: they have shapes, dtypes and
strides but no data. By default an operator reads each input once and writes each output once. RULES lists the operators
whose CUDA kernels move more, for instance because they zero-fill before a scatter or copy to NCHW. A scattered element
costs at least its own bytes and at most its 32-byte sector, so each count is a pair: (least, sectors).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..torch_internals import TorchDispatchMode, operator_name, returns_view, tree_leaves
from .traffic import SECTOR

aten = torch.ops.aten
Count = tuple[int, int]


def nbytes(*values: Any) -> int:
    """The bytes of all tensors in nested values."""
    return sum(x.numel() * x.element_size() for x in tree_leaves(values) if isinstance(x, Tensor))


def _packed(x: Tensor) -> int:
    """Bytes of the copy to NCHW that a CUDA kernel first makes of a tensor in another memory format."""
    return 0 if x.is_contiguous() else 2 * nbytes(x)


def _count(dense: int, scattered: int = 0, region: Tensor | None = None, passes: int = 1) -> Count:
    """`dense` bytes, plus `scattered` elements of `region` that are each accessed `passes` times."""
    if region is None:
        return dense, dense
    least = scattered * region.element_size()
    return dense + passes * least, dense + passes * min(SECTOR * scattered, nbytes(region))


def _unpool(args: tuple[Any, ...], out: Tensor) -> Count:
    """(values, indices) -> out: both are copied to NCHW; out is zero-filled, then the values are scattered."""
    values, indices = args[:2]
    dense = _packed(values) + _packed(indices) + nbytes(out, values, indices)
    return _count(dense, values.numel(), out)


def _pool_backward(args: tuple[Any, ...], out: Tensor) -> Count:
    """(grad, ..., indices) -> out: zero-filled, then an atomic addition (read and write) for each pooled element."""
    grad, indices = args[0], args[-1]
    return _count(nbytes(out, grad, indices), grad.numel(), out, passes=2)


def _nll_forward(args: tuple[Any, ...], out: Any) -> Count:
    """(log-probabilities, labels) -> loss: one log-probability per label."""
    scores, labels = args[:2]
    return _count(_packed(scores) + nbytes(labels, out), labels.numel(), scores)


def _nll_backward(args: tuple[Any, ...], out: Tensor) -> Count:
    """(grad, log-probabilities, labels) -> gradient: zero-filled, then one element per label."""
    labels = args[2]
    return _count(nbytes(out, labels), labels.numel(), out)


def _batch_norm(args: tuple[Any, ...], out: Any) -> Count:
    """(input, ..., training at 5) -> output: in training, the statistics read the input once more."""
    return _count(nbytes(args, out) + (nbytes(args[0]) if args[5] else 0))


def _batch_norm_backward(args: tuple[Any, ...], out: Any) -> Count:
    """(grad, input, ..., training at 7) -> gradients: in training, the sums read both once more."""
    return _count(nbytes(args, out) + (nbytes(args[:2]) if args[7] else 0))


RULES: dict[Any, Callable[[tuple[Any, ...], Any], Count]] = {
    aten.max_unpool2d.default: _unpool,
    aten.max_pool2d_with_indices_backward.default: _pool_backward,
    aten.nll_loss2d_forward.default: _nll_forward,
    aten.nll_loss2d_backward.default: _nll_backward,
    aten._log_softmax.default: lambda args, out: _count(_packed(args[0]) + nbytes(args[0], out)),
    aten.native_batch_norm.default: _batch_norm,
    aten.cudnn_batch_norm.default: _batch_norm,
    aten.native_batch_norm_backward.default: _batch_norm_backward,
    aten.gather.default: lambda args, out: _count(nbytes(args[2], out), out.numel(), args[0]),
    aten.copy_.default: lambda args, out: _count(nbytes(args[1], out)),
    aten.zero_.default: lambda args, out: _count(nbytes(out)),
}


def _bias_bytes(func: Any, args: tuple[Any, ...], out: Any) -> int:
    """Bytes for a convolution's bias on a GPU: cuDNN's output is read and written again, or its gradient is summed."""
    if func is aten.convolution.default and args[2] is not None:
        return 2 * nbytes(out)
    return nbytes(args[0]) if func is aten.convolution_backward.default and args[-1][2] else 0


class ByteCounter(TorchDispatchMode):
    """Counts bytes by aten operator in `least` and `sectors` while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.least: Counter[str] = Counter()
        self.sectors: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        out = func(*args, **kwargs)
        kwargs.pop("out", None)  # is only written
        if not returns_view(func) and "empty" not in func.__name__:
            rule = RULES.get(func, lambda args, out: _count(nbytes(args, kwargs, out)))
            least, sectors = rule(args, out)
            self.least[operator_name(func)] += least
            self.sectors[operator_name(func)] += sectors
            if bias := _bias_bytes(func, args, out):
                self.least["bias of a convolution"] += bias
                self.sectors["bias of a convolution"] += bias
        return out
