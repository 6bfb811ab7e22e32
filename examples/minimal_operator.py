"""One operator from kernel to function in one file: 2x2 average pooling, written to be read and not to be fast.

Read it top to bottom. A real operator has the same five parts in the places named below; the way to add one is in
CONTRIBUTING.md. Run it with `TRITON_INTERPRET=1 python examples/minimal_operator.py`, or without the variable on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

import fastseg
from fastseg.kernels.launch import launch
from fastseg.ops.operator import Implementation, Operator, double_backward, wants_graph

# --- 1. Device code: kernels/<family>/<operator>.py ------------------------------------------------------------------


@triton.jit
def average_pool2d_kernel(x, y, N, W, OW, BLOCK: tl.constexpr):
    """One program averages BLOCK windows. Reads x once and writes y once, both dense NCHW with even H and W."""
    # 1. Which windows: (plane * OH + oh) * OW + ow, in 64 bits because tensors may have more than 2^31 elements
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_live = o < N
    o_x = (o // OW) * 2 * W + (o % OW) * 2
    # 2. Sum the four elements in float32
    total = tl.zeros((BLOCK,), tl.float32)
    for i in tl.static_range(2):
        for j in tl.static_range(2):
            total += tl.load(x + o_x + i * W + j, mask=m_live, other=0.0).to(tl.float32)
    # 3. Store
    tl.store(y + o, (total / 4).to(y.dtype.element_ty), mask=m_live)


def average_pool2d_fwd(x: Tensor, y: Tensor) -> None:
    """The launcher: pool x (N, C, H, W) into y (N, C, H / 2, W / 2), which is already allocated."""
    block = 256
    launch(average_pool2d_kernel, triton.cdiv(y.numel(), block), x, y, y.numel(), x.shape[-1], y.shape[-1], BLOCK=block)


# --- 2. Meaning: fastseg/ops/<family>/<operator>.py ------------------------------------------------------------------


def _empty_pooled(input: Tensor) -> Tensor:
    """Shape, dtype and strides of the result. The fake and the kernel's implementation share this one rule."""
    return input.new_empty((*input.shape[:-2], input.shape[-2] // 2, input.shape[-1] // 2))


def _kernel(input: Tensor) -> Tensor:
    output = _empty_pooled(input)
    average_pool2d_fwd(input.contiguous(), output)
    return output


def _reference(input: Tensor) -> Tensor:
    """The same in torch alone: what the kernel is compared with, and what runs where the kernel cannot."""
    return F.avg_pool2d(input.contiguous(), 2)


def _unsupported(input: Tensor) -> str | None:
    """What of a call the kernel does not support. `fastseg.explain` and error messages show these words."""
    return "float64, which the kernel would sum in float32" if input.dtype == torch.float64 else None


AVERAGE_POOL2D = Operator(
    "example_average_pool2d(Tensor input) -> Tensor",  # registered as torch.ops.fastseg.example_average_pool2d
    kernels={"triton": Implementation(_kernel, _unsupported)},
    reference=_reference,
    fake=_empty_pooled,
)


class AveragePool2dFunction(torch.autograd.Function):
    """(input) -> output. The gradient of each pixel is a quarter of its window's."""

    @staticmethod
    def forward(input: Tensor) -> Tensor:
        return AVERAGE_POOL2D(input)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor | None:
        (input,) = ctx.saved_tensors
        if wants_graph():  # create_graph=True: by torch's formulas, which can be differentiated again
            return double_backward(lambda x: F.avg_pool2d(x, 2), (input,), (True,), grad)[0]
        return (grad / 4).repeat_interleave(2, -1).repeat_interleave(2, -2)  # a real operator has a kernel here too


# --- 3. The public function: checks, the choice of a backend, the call -----------------------------------------------


def average_pool2d(input: Tensor) -> Tensor:
    """torch.nn.functional.avg_pool2d(input, 2) of (N, C, H, W) with even H and W, in any floating-point dtype.

    Raises:
        RuntimeError: if H or W is odd or zero.
    """
    if input.dim() != 4 or input.shape[-1] % 2 or input.shape[-2] % 2 or 0 in input.shape[-2:]:
        raise RuntimeError(f"input must be (N, C, H, W) with even H and W, but has shape {tuple(input.shape)}")
    if AVERAGE_POOL2D.choose(input).backend == "torch":
        return F.avg_pool2d(input, 2)  # fastseg adds nothing to torch's own function
    return AveragePool2dFunction.apply(input)


# --- 4. The check: error against float64 no more than torch's own, plus one rounding ---------------------------------


def main() -> None:
    x = torch.randn(2, 3, 8, 12, device="cuda" if torch.cuda.is_available() else "cpu", requires_grad=True)
    print(*fastseg.explain(average_pool2d, x))
    with fastseg.backend("triton"):
        y = average_pool2d(x)
    truth = F.avg_pool2d(x.double(), 2)
    error, torch_error = ((result - truth).abs().max().item() for result in (y, F.avg_pool2d(x, 2)))
    assert error <= torch_error + torch.finfo(x.dtype).eps, (error, torch_error)
    grad = torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(y, x, grad)[0], torch.autograd.grad(F.avg_pool2d(x, 2), x, grad)[0])
    print(f"right: largest error {error:.1e}, torch's {torch_error:.1e}")


if __name__ == "__main__":
    main()
