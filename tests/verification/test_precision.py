"""Float32 products are compared exactly and as TF32, each with its own allowance; sums are judged by their terms."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from fastseg.verification import cases, criterion, operators, precision

conv, rnn = torch.backends.cudnn.conv, torch.backends.cudnn.rnn
SHAPE = (2, 16, 6, 8)


@pytest.fixture(autouse=True)
def torchs_default(exact):
    """TF32 for convolutions and recurrent networks, before each test and after it."""
    torch.backends.cudnn.allow_tf32 = True
    assert precision.in_force() == "tf32"
    yield
    torch.backends.cudnn.allow_tf32 = True


def as_tf32(x):
    """x with the 10 bits of TF32's fraction, rounded to nearest; gradients pass as they are."""
    bits = (x.detach().view(torch.int32) + 0x1000) & ~0x1FFF
    return x + (bits.view(torch.float32) - x.detach())


class TF32Convolution(torch.autograd.Function):
    """A transposed convolution whose three products all round both factors to TF32, as tensor cores do."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return F.conv_transpose2d(as_tf32(x), as_tf32(weight), stride=2)

    @staticmethod
    def backward(ctx, grad):
        x, weight = (as_tf32(t).detach().requires_grad_() for t in ctx.saved_tensors)
        with torch.enable_grad():
            y = F.conv_transpose2d(x, weight, stride=2)
        return torch.autograd.grad(y, (x, weight), as_tf32(grad))


def exact(x, weight):
    return F.conv_transpose2d(x, weight, stride=2)


def passed(ours, how):
    inputs = [torch.randn(SHAPE), torch.randn(16, 8, 2, 2)]
    return [c.passed for c in criterion.compare_to_torch(ours, exact, inputs, precision=how)]


def test_rounding_to_tf32_passes_as_tf32_alone():
    assert passed(TF32Convolution.apply, "tf32") == [True] * 3
    assert passed(TF32Convolution.apply, "ieee") == [False] * 3
    assert passed(exact, "ieee") == passed(exact, "tf32") == [True] * 3


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x, w: exact(x, w) * 1.003,  # more than TF32 may change
        lambda x, w: exact(x.bfloat16().float(), w.bfloat16().float()),  # 7 bits instead of 10
        lambda x, w: exact(F.pad(x[..., :-1], (0, 1)), w),  # one column is not read
        lambda x, w: exact(x * (torch.arange(16) != 15).view(-1, 1, 1), w),  # nor one channel of 16
    ],
)
@pytest.mark.parametrize("how", precision.PRECISIONS)
def test_a_wrong_convolution_fails_in_both_precisions(wrong, how):
    assert not all(passed(wrong, how))


def test_only_float32_has_the_allowance_of_tf32():
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        assert criterion.allowance(dtype, "tf32") == criterion.allowance(dtype)
    assert criterion.allowance(torch.float32) == 8 * 2**-23
    assert criterion.allowance(torch.float32, "tf32") == 2 * 2**-10 + 8 * 2**-23


@pytest.mark.parametrize("older", [True, False])
@pytest.mark.parametrize("settings", list(itertools.product(("ieee", "tf32", "none"), repeat=2)))
def test_the_precision_is_set_and_restored_from_every_state(settings, older):
    """Also where torch's older switch cannot be read, because the settings disagree with it."""

    def switch():
        try:
            return torch.backends.cudnn.allow_tf32
        except RuntimeError:
            return None

    torch.backends.cudnn.allow_tf32 = older
    conv.fp32_precision, rnn.fp32_precision = settings
    before = switch()
    for how in precision.PRECISIONS:
        with pytest.raises(KeyError), precision.convolving(how):
            assert (conv.fp32_precision, rnn.fp32_precision, precision.in_force()) == (how, how, how)
            assert torch.backends.cudnn.allow_tf32 is (how == "tf32")
            raise KeyError
        assert (conv.fp32_precision, rnn.fp32_precision, switch()) == (*settings, before)
    conv.fp32_precision = rnn.fp32_precision = "tf32" if older else "ieee"
    assert switch() is older


def test_another_precision_is_refused():
    message = "precision must be one of 'ieee', 'tf32', but is 'bf16'"
    with pytest.raises(ValueError, match=message), precision.convolving("bf16"):
        pass


def test_both_functions_run_in_the_precision_that_is_compared():
    ran = []

    def noting(x):
        ran.append(precision.in_force())
        return x * 2

    for how in precision.PRECISIONS:
        criterion.compare_to_torch(noting, noting, [torch.ones(3)], precision=how)
        assert set(ran) == {how}
        ran.clear()


def test_verify_compares_convolutions_in_float32_twice():
    at = cases.Placement(torch.float32, torch.contiguous_format, "cpu")
    twice = {name for name, sizes in operators.SIZES.items() if len(next(sizes[0](at)).precisions) == 2}
    assert twice == set(cases.case.CONVOLUTIONS)
    runs = operators.verify(["conv_transpose2d"], ["float32", "float16"], True, "cpu", 0, "torch")
    assert [(what["dtype"], what["precision"]) for what, _ in runs] == [
        ("float32", "ieee"), ("float32", "tf32"), ("float32", "ieee"), ("float32", "tf32"), ("float16", "ieee"),
        ("float16", "ieee"),
    ]  # fmt: skip


# --- terms that cancel -----------------------------------------------------------------------------------------------


def shifted(sum_of):
    """x + shift, with the gradient of the shift from another function."""

    class Shifted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, shift):
            return x + shift

        @staticmethod
        def backward(ctx, grad):
            return grad, sum_of(grad).to(grad.dtype).view(1)

    return Shifted.apply


def bias_gradient(sum_of, dtype=torch.float32):
    """The comparison of the gradient of one number that is added to 4096 elements: their gradients nearly cancel."""
    inputs = [torch.zeros(4096, dtype=dtype), torch.zeros(1, dtype=dtype)]
    return criterion.compare_to_torch(shifted(sum_of), torch.add, inputs)[-1]


@pytest.mark.parametrize(("units", "right"), [(4, True), (-4, True), (12, False), (-12, False)])
def test_a_gradient_is_judged_by_the_sum_of_magnitudes_of_its_terms(units, right):
    """It may be off by 8 units of that sum, which is more than torch's own error and 8 units of the gradient."""
    off = units * torch.finfo(torch.float32).eps
    found = bias_gradient(lambda grad: grad.double().sum() + off * grad.double().abs().sum())
    assert found.error > found.torch_error + criterion.allowance(torch.float32)
    assert found.passed is right


@pytest.mark.parametrize("wrong", [lambda g: g[1:].double().sum(), lambda g: g.double().sum() + 0.01 * g.abs().max()])
def test_a_sum_without_one_of_its_terms_fails_all_the_same(wrong):
    assert not bias_gradient(wrong).passed


@pytest.mark.parametrize(("units", "right"), [(0, True), (3, False), (-3, False)])
def test_cancelling_terms_do_not_excuse_the_rounding_of_half_precision(units, right):
    """The result may be off by one unit of itself, although its terms are many times larger."""
    off = 1 + units * torch.finfo(torch.bfloat16).eps
    assert bias_gradient(lambda grad: grad.double().sum() * off, torch.bfloat16).passed is right
