"""conv_transpose2d as a torch operator: opcheck, gradients, compiled graphs, autocast, explain, invalid arguments."""

import re

import pytest
import torch
import torch.nn.functional as F
from support.conv_transpose_common import LAYOUTS, affine_relu, on, tensors

import fastseg
from fastseg import functional as FS
from fastseg import kernels
from fastseg.ops.convolution import conv_transpose_operators as operators
from fastseg.ops.convolution.conv_transpose import ConvTranspose2dFunction
from fastseg.ops.convolution.conv_transpose_operators import CONV_TRANSPOSE2D, CONV_TRANSPOSE2D_BACKWARD
from fastseg.ops.convolution.options import NO_EPILOGUE, ConvTransposeGeometry, Epilogue


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_opcheck(layout, backend, device):
    x, weight, bias = tensors((2, 5, 4, 6), 3, 3, torch.float32, layout, device)
    geometry = ConvTransposeGeometry([2, 2], [1, 1], [1, 0], 1, [1, 1])
    with fastseg.backend(backend):
        call = CONV_TRANSPOSE2D.flatten((x, weight, geometry, Epilogue(bias)))
        torch.library.opcheck(CONV_TRANSPOSE2D.op, tuple(call))
        grad = torch.randn_like(CONV_TRANSPOSE2D(x, weight, geometry, NO_EPILOGUE))
        for mask in ([True, True, True], [False, True, False]):
            call = CONV_TRANSPOSE2D_BACKWARD.flatten((grad, x, weight, geometry, mask, None))
            torch.library.opcheck(CONV_TRANSPOSE2D_BACKWARD.op, tuple(call))


@pytest.mark.parametrize(
    "geometry",
    [
        ConvTransposeGeometry([2, 2], [1, 1], [1, 0], 1, [1, 1]),
        ConvTransposeGeometry([1, 2], [0, 1], [0, 0], 2, [2, 1]),
    ],
)
@pytest.mark.parametrize("fused", [False, True])
def test_gradients_of_the_reference(geometry, fused, device):
    """Through the operators, which nothing else runs in float64."""
    groups = geometry.groups
    x, weight, bias = tensors((2, 4, 2, 3), 2, 3, torch.float64, torch.contiguous_format, device)
    scale = [torch.randn_like(bias.repeat(groups))] if fused else []
    leaves = [t.requires_grad_() for t in (x, weight, bias.repeat(groups), *scale)]

    def function(x, weight, bias, scale=None):
        return ConvTranspose2dFunction.apply(x, weight, bias, scale, geometry, fused)

    with fastseg.backend("torch"):
        assert torch.autograd.gradcheck(function, leaves)
        assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize(
    "ours, theirs", [(FS.conv_transpose2d, F.conv_transpose2d), (FS.conv_transpose2d_affine_relu, affine_relu)]
)
def test_second_derivatives_through_the_kernels(ours, theirs, device, triton_backend):
    x, weight, bias = tensors((2, 3, 3, 4), 2, 3, torch.float32, torch.channels_last, device)
    more = (bias,) if ours is FS.conv_transpose2d else (bias, torch.randn_like(bias))
    leaves = [t.requires_grad_() for t in (x, weight, *more)]

    def second(function):
        first = torch.autograd.grad((function(*leaves, 2) ** 3).sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum((g**2).sum() for g in first), leaves)

    for a, b in zip(second(ours), second(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_in_one_graph(backend, dynamic, device):
    leaves = [t.requires_grad_() for t in tensors((2, 6, 4, 5), 4, 3, torch.float32, torch.channels_last, device)]

    def function(x, weight, bias):
        return FS.conv_transpose2d(x * 2, weight, bias, 2, 1, output_padding=1).relu()

    with fastseg.backend(backend):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)(*leaves)
        eager = function(*leaves)
        torch.testing.assert_close(compiled, eager)
        assert compiled.stride() == eager.stride()
        grad = torch.randn_like(eager)
        for a, b in zip(*(torch.autograd.grad(y, leaves, grad) for y in (compiled, eager)), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast(compiled, device):
    leaves = [t.requires_grad_() for t in tensors((1, 4, 3, 4), 3, 2, torch.float32, torch.channels_last, device)]
    function = torch.compile(on("triton"), fullgraph=True, backend="aot_eager") if compiled else on("triton")
    with torch.autocast(device, torch.bfloat16):
        ours, theirs = function(*leaves, 2), F.conv_transpose2d(*leaves, 2)
        mixed = on("triton")(leaves[0].bfloat16(), *leaves[1:], 2)
        with pytest.raises(
            RuntimeError, match=r"weight must be of input's dtype torch.float64, but is of torch.bfloat16"
        ):
            FS.conv_transpose2d(leaves[0].double(), *leaves[1:])  # autocast leaves float64 alone
    assert ours.dtype == mixed.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)
    grads = [torch.autograd.grad(y, leaves, torch.ones_like(y)) for y in (ours, theirs)]
    for a, b in zip(*grads, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)


def test_tf32_is_torchs_choice():
    x = torch.empty(1)
    for switch, want in (("ieee", "ieee"), ("tf32", "tf32"), ("none", "ieee")):
        torch.backends.cudnn.conv.fp32_precision = switch
        assert kernels.convolution.gemm.input_precision(x) == want
        assert kernels.convolution.gemm.input_precision(x.half()) == "ieee"


def test_what_runs_and_why(device):
    x, weight, bias = tensors((1, 4, 3, 4), 2, 3, torch.float32, torch.contiguous_format, device)
    cases = {
        "dtype torch.float64": (x.double(), weight.double()),
        "dilation (2, 1) with stride (2, 2)": (x, weight, None, 2, 0, 0, 1, (2, 1)),
    }
    for reason, arguments in cases.items():
        with fastseg.backend("triton"), pytest.raises(NotImplementedError, match=re.escape(reason)):
            FS.conv_transpose2d(*arguments)
        assert torch.equal(FS.conv_transpose2d(*arguments), F.conv_transpose2d(*arguments))
    (choice,) = on("triton", fastseg.explain)(FS.conv_transpose2d, x, weight, bias)
    assert choice.backend == "triton"
    with fastseg.backend("auto"):
        geometry = ConvTransposeGeometry([1, 1], [0, 0], [0, 0], 1, [1, 1])
        preferred = CONV_TRANSPOSE2D.preferred(x, weight, geometry, Epilogue(bias))
        assert preferred == ("torch", operators.UNMEASURED)
    assert [c.backend for c in fastseg.explain(FS.conv_transpose2d, x, weight, bias)] == ["torch"]


def bad_calls():
    x, weight, bias = torch.zeros(1, 4, 3, 3), torch.zeros(4, 2, 3, 3), torch.zeros(2)
    yield "input", (x[0, 0], weight), {}
    yield "input", (x[None], weight), {}
    yield "weight", (x, weight[0]), {}
    yield "weight", (x, weight[:, :0]), {}
    yield "input", (x[:, :3], weight), {}
    yield "input", (x[:, :, :0], weight), {}
    yield "weight", (x.half(), weight), {}
    yield "bias", (torch.zeros(2, 4, 5, 6), weight, bias.double()), {}
    yield "bias", (x, weight, bias[:1]), {}
    yield "bias", (x, weight, bias[None]), {}
    yield "padding", (x, weight), {"padding": -1}
    yield "padding", (x, weight), {"padding": 4}
    yield "padding", (x, weight), {"padding": (0, 1, 0)}
    yield "stride", (x, weight), {"stride": 0}
    yield "stride", (x, weight), {"stride": (1, -1)}
    yield "dilation", (x, weight), {"dilation": 0}
    yield "groups", (x, weight), {"groups": 0}
    yield "groups", (x, weight), {"groups": 3}
    yield "output_padding", (x, weight), {"output_padding": -1}
    yield "output_padding", (x, weight), {"output_padding": 1}
    yield "output_padding", (x, weight), {"output_padding": (0, 2), "stride": (3, 2)}


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("name, arguments, keywords", list(bad_calls()))
def test_bad_arguments_raise_what_torch_raises(name, arguments, keywords, backend):
    with pytest.raises(Exception) as theirs:
        F.conv_transpose2d(*arguments, **keywords)
    with fastseg.backend(backend), pytest.raises(theirs.type, match=f"conv_transpose2d.*{name}"):
        FS.conv_transpose2d(*arguments, **keywords)


def test_devices_may_not_be_mixed():
    x, weight = torch.zeros(1, 4, 3, 3), torch.zeros(4, 2, 3, 3)
    with pytest.raises(RuntimeError, match="weight must be on input's device cpu, but is on meta"):
        FS.conv_transpose2d(x, weight.to("meta"))
    with pytest.raises(RuntimeError, match="bias must be on input's device cpu, but is on meta"):
        FS.conv_transpose2d(x, weight, torch.zeros(2, device="meta"))
