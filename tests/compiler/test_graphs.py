"""torch.compile(model, backend="fastseg"): what is fused, what is replaced, and what is not rewritten."""

import pytest
import torch
import torch.nn.functional as F
from support.compiled import (
    POOLED,
    THERE_AND_BACK,
    Compiled,
    assert_equal_to_torch,
    deconv,
    evaluate,
    labels,
    new_state,
    normed,
    pooled,
    then,
    there_and_back,
    train,
)

import fastseg
from fastseg.verification.criterion import relative_error


@pytest.fixture
def state(device):
    return new_state(device)


# --- chains that are proven ------------------------------------------------------------------------------------------


def back(x, weight, bias, gamma, beta, mean, var):
    """An encoder that returns indices, and a decoder with a batch norm in front of the unpooling."""
    y, indices = F.max_pool2d(torch.conv2d(x, weight, None, padding=1), 2, return_indices=True)
    z, mean, var = normed(True, lambda y, w, b: y * 2)(y, weight, bias, gamma, beta, mean, var)
    return F.max_unpool2d(torch.relu_(z), indices, (2, 2), stride=2, output_size=(2, 4, 6, 8)), mean, var


def called_conv(x, weight, bias, *norm):
    return torch.conv2d(input=x, weight=weight, bias=bias, stride=(1, 1), padding="same")


def relu(y):
    return (F.relu(y),)


PROVEN = {
    "relu": (then(train, relu), {"batch_norm_relu": 1, "input_bias": 1}),
    "relu in place": (then(train, lambda y: (y.relu_(),)), {"batch_norm_relu": 1, "input_bias": 1}),
    "called by name": (then(normed(True, called_conv), relu), {"batch_norm_relu": 1, "input_bias": 1}),
    "no convolution": (then(normed(True, lambda x, w, b: x.sum(1, True) * b.view(-1, 1, 1)), relu),
                       {"batch_norm_relu": 1}),
    "transposed": (then(normed(True, deconv), relu), {"batch_norm_relu": 1, "input_bias": 1, "conv_transpose2d": 1}),
    "transposed, evaluation": (then(normed(False, deconv), relu), {"conv_transpose2d_batch_norm_relu": 1}),
    "pool": (then(train, lambda y: (F.max_pool2d(F.relu(y), (2, 3), ceil_mode=True),)),
             {"batch_norm_relu_max_pool2d": 1, "input_bias": 1}),
    "pool, indices": (then(train, pooled), POOLED),
    "pool, indices, evaluation": (then(evaluate, pooled), POOLED),
    "pool, overlapping": (then(train, lambda y: (F.max_pool2d(F.relu(y), 3, 2, 1),)),
                          {"batch_norm_relu": 1, "max_pool2d": 1, "input_bias": 1}),
    "pool and unpool": (then(train, there_and_back), THERE_AND_BACK),
    "unpool": (back, {"batch_norm_relu_max_unpool2d": 1, "max_pool2d_with_offsets": 1}),
}  # fmt: skip


@pytest.mark.parametrize("name", PROVEN)
def test_a_chain_is_fused(name, state, triton_backend):
    function, expected = PROVEN[name]
    ours = Compiled(function)
    assert_equal_to_torch(
        ours, function, state, poison="unpool" not in name
    )  # poisoning requires determinism, and Dynamo then rejects unpools
    assert ours.rewritten == expected
    assert not {"batch_norm", "relu", "relu_"} & set(ours.targets())


@pytest.mark.parametrize("resize, options", [
    (dict(scale_factor=2), {}),
    (dict(size=(7, 11), mode="bilinear", align_corners=True), dict(ignore_index=2, reduction="sum")),
    (dict(size=(12, 8), mode="bilinear"), dict(label_smoothing=0.1, reduction="none")),
    (dict(size=9, mode="nearest"), dict(weight=True)),
])  # fmt: skip
def test_resizing_and_loss_are_fused(resize, options, device, assert_right, triton_backend):
    options = dict(options)
    x = torch.randn(2, 5, 6, 4, device=device)
    target = torch.randint(0, 5, F.interpolate(x, **resize)[:, 0].shape, device=device)
    weight = torch.rand(5, device=device) if options.pop("weight", False) else None

    def function(x):
        logits = F.interpolate(x, **resize)
        labels = target + 0  # computed after the resizing, as targets often are
        return F.cross_entropy(logits, labels, None if weight is None else weight.to(x.dtype), **options)

    ours = Compiled(function)
    assert_right(ours, function, [x])
    assert ours.rewritten == {"upsample_cross_entropy": 1}


def test_single_calls_are_replaced(state, triton_backend):
    target = labels((2, 14, 18), state[0].device)

    def function(x, weight, bias, *norm):
        y, indices = F.max_pool2d(x, 3, 2, 1, return_indices=True)
        z = F.max_unpool2d(y * y, indices, 3, 2, 1, output_size=x.shape[-2:])
        y = torch.max_pool2d(z, 1) + F.max_pool2d_with_indices(x, 1)[0]
        return F.cross_entropy(deconv(y, weight, bias), target), indices

    ours = Compiled(function)
    assert_equal_to_torch(ours, function, state)
    pools = {"max_pool2d": 2, "max_pool2d_with_offsets": 1, "max_unpool2d": 1}
    assert ours.rewritten == {**pools, "conv_transpose2d": 1, "cross_entropy": 1}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("resized", [False, True])
def test_a_loss_keeps_the_dtype_of_torchs(dtype, resized, device, triton_backend):
    logits, target = torch.randn(1, 3, 4, 4, device=device).to(dtype), labels((1, 4, 4), device) % 3

    def function(x):
        return F.cross_entropy(F.interpolate(x, size=(4, 4)) if resized else x, target) * x[0, 0, 0, 0]

    ours = Compiled(function)
    got, want = ours(logits), function(logits)
    assert got.dtype == want.dtype == dtype and relative_error(got, want) < 4 * torch.finfo(dtype).eps
    assert sum(ours.rewritten.values()) == 1


# --- chains that are not proven --------------------------------------------------------------------------------------


def reader_between(y):
    return F.relu(y), y.mean()


def reader_of_relu(y):
    y = F.relu(y)
    return F.max_pool2d(y, 2), y.mean()


def written_between(y):
    z = y[:, :2]
    z.mul_(2)
    return (F.relu(y),)


def hooked(y):
    y.register_hook(lambda grad: grad * 2)
    return (F.relu(y),)


def autocast_between(y):
    with torch.autocast(y.device.type, torch.bfloat16):
        y = F.relu(y)
    return (y,)


def no_grad_between(y):
    with torch.no_grad():
        z = F.relu(y)
    return (z,)


def another_activation(y):
    return (F.leaky_relu(y),)


def biased_twice(x, weight, bias, gamma, beta, mean, var):
    y = torch.conv2d(x, weight, bias, padding=1)
    z, mean, var = normed(True, lambda *_: y)(x, weight, bias, gamma, beta, mean, var)
    return F.relu(z), y.square().mean(), mean, var


def written_bias(x, weight, bias, gamma, beta, mean, var):
    original, bias = bias, bias * 1
    y = torch.conv2d(x, weight, bias, padding=1)
    bias.mul_(0)
    z, mean, var = normed(True, lambda *_: y)(x, weight, bias, gamma, beta, mean, var)
    return F.relu(z), original.square(), mean, var


def deconv_read_twice(x, weight, bias, gamma, beta, mean, var):
    y = deconv(x, weight, bias)
    z, mean, var = normed(False, lambda *_: y)(x, weight, bias, gamma, beta, mean, var)
    return F.relu(z), y.mean(), mean, var


UNPROVEN = {  # function, what is rewritten nevertheless, the reason or ""
    "a reader between": (then(train, reader_between), {}, "its ReLU is not the only reader"),
    "a reader of the ReLU": (then(train, reader_of_relu), {"batch_norm_relu": 1, "input_bias": 1, "max_pool2d": 1}, ""),
    "written between": (then(train, written_between), {}, "its ReLU is not the only reader"),
    "a hook": (then(train, hooked), {}, ""),
    "autocast between": (then(train, autocast_between), {}, "separates it from its ReLU"),
    "no_grad between": (then(train, no_grad_between), {}, "separates it from its ReLU"),
    "another activation": (then(train, another_activation), {}, ""),
    "evaluation": (then(evaluate, relu), {}, "runs it in one pass too"),
    "a bias with another reader": (biased_twice, {"batch_norm_relu": 1}, ""),
    "a bias that is written": (written_bias, {"batch_norm_relu": 1}, ""),
    "a transposed convolution with another reader": (deconv_read_twice, {"conv_transpose2d": 1}, "in one pass too"),
    "not an image": (then(normed(True, lambda x, w, b: x.mean((2, 3)) @ w[:, :, 0, 0].T), relu), {}, "2-D input"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNPROVEN)
def test_what_is_not_proven_is_not_rewritten(name, state, triton_backend):
    function, expected, reason = UNPROVEN[name]
    ours = Compiled(function)
    assert_equal_to_torch(ours, function, state)
    assert ours.rewritten == expected
    assert not reason or any(reason in found for found in ours.reasons), ours.reasons


@pytest.mark.parametrize("between, fused", [
    (lambda x, mean, var: x * 1, True),
    (lambda x, mean, var: F.batch_norm(x, None, None, training=True), True),
    (lambda x, mean, var: x + mean.sum(), False),
    (lambda x, mean, var: x * var.view(2, 2)[0, 0], False),
    (lambda x, mean, var: F.batch_norm(x, mean, var, training=True), False),
])  # fmt: skip
def test_a_batch_norm_moves_to_its_unpool_unless_its_statistics_are_read_in_between(
    between, fused, state, triton_backend
):
    """Where the indices are computed after the batch norm, the fused call must come after them."""

    def function(x, y, mean, var):
        mean, var = mean.detach().clone(), var.detach().clone()
        y = F.batch_norm(y, mean, var, training=True)
        z, indices = F.max_pool2d(between(x, mean, var), 2, return_indices=True)
        return F.max_unpool2d(F.relu(y), indices, 2), z, mean, var

    ours = Compiled(function)
    x, y = (torch.randn(2, 4, *size, device=state[0].device) for size in ((6, 8), (3, 4)))
    assert_equal_to_torch(ours, function, [x, y, *state[-2:]])
    assert ours.rewritten == {"max_pool2d_with_offsets": 1} | (
        {"batch_norm_relu_max_unpool2d": 1} if fused else {"batch_norm_relu": 1, "max_unpool2d_with_offsets": 1}
    )


@pytest.mark.parametrize("loss, reason", [
    (lambda logits, target: F.cross_entropy(logits, target) + logits.mean(), "the loss is not the only reader"),
    (lambda logits, target: F.cross_entropy(logits, F.one_hot(target, 4).movedim(-1, 1).to(logits.dtype)),
     "class probabilities"),
    (lambda logits, target: F.cross_entropy(logits, target, size_average=False), "size_average"),
    (lambda logits, target: F.cross_entropy(logits * 2, target), None),
    (lambda logits, target: F.cross_entropy(torch.ones_like(logits), logits), "the loss is not the only reader"),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore:size_average and reduce")
def test_resizing_and_loss_that_are_not_fused(loss, reason, device, triton_backend):
    x, target = torch.randn(1, 4, 3, 5, device=device), labels((1, 6, 10), device)

    def function(x):
        return loss(F.interpolate(x, scale_factor=2, mode="bilinear"), target)

    ours = Compiled(function)
    assert_equal_to_torch(ours, function, [x])
    assert "upsample_cross_entropy" not in ours.rewritten
    assert reason is None or any(reason in found for found in ours.reasons)


def test_resizing_in_an_unsupported_mode_or_written_logits_are_not_fused(device, triton_backend):
    x, target = torch.randn(1, 4, 3, 5, device=device), labels((1, 6, 10), device)

    def bicubic(x):
        return F.cross_entropy(F.interpolate(x, scale_factor=2, mode="bicubic"), target)

    def antialias(x):
        return F.cross_entropy(F.interpolate(x, (6, 10), mode="bilinear", antialias=True), target)

    def written(x):
        x = x * 1
        logits = F.interpolate(x, (6, 10))
        x[0] = 0  # does not change the logits
        return F.cross_entropy(logits, target) + x.sum()

    for function, reason in ((bicubic, "mode 'bicubic'"), (antialias, "antialias"), (written, "in-place write")):
        ours = Compiled(function)
        assert relative_error(ours(x), function(x)) < 1e-6
        assert any(reason in found for found in ours.reasons) and ours.rewritten == {"cross_entropy": 1}


def test_a_pool_that_saves_nothing_is_left_to_the_inner_compiler(device, triton_backend):
    ours = Compiled(lambda x: F.max_pool2d(x, 2))
    x = torch.randn(1, 2, 4, 4, device=device)
    ours(x)
    assert ours.rewritten == {} and "without indices or a gradient" in ours.reasons[0]
    ours(x.requires_grad_()).sum().backward()
    assert ours.rewritten == {"max_pool2d": 1}


def test_a_transposed_convolution_whose_stride_is_not_constant_stays_torchs(device, triton_backend):
    """With dynamic=True the stride is a node of the graph."""

    def function(x, weight, stride):
        return F.conv_transpose2d(x, weight, None, stride)

    ours = Compiled(function, dynamic=True)
    x, weight = torch.randn(1, 2, 4, 5, device=device), torch.randn(2, 3, 2, 2, device=device)
    for stride in (2, 3):
        assert torch.equal(ours(x, weight, stride), function(x, weight, stride))
    assert ours.rewritten == {} and "is not constant" in ours.reasons[0]


@pytest.mark.parametrize("resized", [False, True])
@pytest.mark.parametrize("write, written", [
    (lambda logits: logits.mul_(2), True),
    (lambda logits: F.relu(logits.flatten(2), inplace=True), True),
    (lambda logits: (logits * 1).mul_(2), False),
])  # fmt: skip
def test_a_loss_whose_logits_are_written_later_is_not_replaced(write, written, resized, device, triton_backend):
    """fastseg's losses save the logits for the backward, and torch's do not."""
    target = labels((1, 6, 10), device)

    def function(x):
        logits = x * 1
        loss = F.cross_entropy(F.interpolate(logits, target.shape[1:]) if resized else logits, target)
        return loss + write(logits).sum()

    ours = Compiled(function, "aot_eager")
    x = torch.randn(1, 4, *((3, 5) if resized else (6, 10)), device=device, requires_grad=True)
    got, want = (torch.autograd.grad(run(x), x)[0] for run in (ours, function))
    assert relative_error(got, want) < 1e-5
    if not written:
        assert list(ours.rewritten) == ["upsample_cross_entropy" if resized else "cross_entropy"]
    else:
        assert list(ours.rewritten) == (["cross_entropy"] if resized else [])  # the resized logits are not written
        assert "its logits are written in place later, and the backward needs them" in ours.reasons


@pytest.mark.parametrize("setting", ["auto", "torch"])
def test_a_graph_is_not_rewritten_where_no_kernels_run(setting, state, no_cpu_kernels):
    state = [t.cpu() for t in state]
    function = then(train, there_and_back)
    with fastseg.backend(setting):
        ours = Compiled(function)
        for a, b in zip(ours(*state), function(*state), strict=True):
            assert torch.equal(a, b)
    assert ours.rewritten == {}
    assert set(ours.reasons) == ({"a CPU tensor, and no C++ compiler was found"} if setting == "auto" else set())
