"""fastseg.nn: the modules of torch.nn, except for what `forward` runs on."""

import inspect
import warnings

import pytest
import torch
from torch import nn

import fastseg

LAYERS = ["MaxPool2d", "MaxUnpool2d", "ConvTranspose2d", "CrossEntropyLoss"]
CONSTRUCTIONS = [
    ("MaxPool2d", (2,), {}),
    ("MaxPool2d", ((2, 3),), {"stride": (3, 3), "padding": (1, 0), "ceil_mode": True, "return_indices": True}),
    ("MaxUnpool2d", (2,), {}),
    ("MaxUnpool2d", ((2, 1), 3), {"padding": (1, 0)}),
    ("ConvTranspose2d", (4, 6, 3), {}),
    ("ConvTranspose2d", (4, 6, (2, 3), 2), {"padding": 1, "output_padding": (0, 1), "bias": False, "dilation": 2}),
    ("CrossEntropyLoss", (), {}),
    ("CrossEntropyLoss", (torch.rand(5),), {"ignore_index": 3, "reduction": "sum", "label_smoothing": 0.1}),
]


def twins(name, *args, **kwargs):
    """The module of torch.nn and that of fastseg.nn, with the same parameters."""
    theirs = getattr(nn, name)(*args, **kwargs)
    ours = getattr(fastseg.nn, name)(*args, **kwargs)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def operators(module, *args):
    return [choice.operator for choice in fastseg.explain(module, *args)]


# --- the shape of the classes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS)
def test_the_class_has_the_signature_of_torchs(name):
    theirs, ours = getattr(nn, name), getattr(fastseg.nn, name)
    assert ours.__bases__ == (theirs,) and ours.__name__ == theirs.__name__
    added = [
        p for p in inspect.signature(ours).parameters.values() if p.name not in inspect.signature(theirs).parameters
    ]
    assert ours.__init__ is theirs.__init__ or added
    assert all(p.kind is p.KEYWORD_ONLY and getattr(ours, p.name) == p.default for p in added)
    parameters = inspect.signature(ours.forward).parameters.values()
    expected = inspect.signature(theirs.forward).parameters.values()
    assert [(p.name, p.kind, p.default) for p in parameters] == [(p.name, p.kind, p.default) for p in expected]


@pytest.mark.parametrize(("name", "args", "kwargs"), CONSTRUCTIONS)
def test_the_constructor_adds_no_attributes_or_state(name, args, kwargs):
    theirs, ours = twins(name, *args, **kwargs)
    added = inspect.signature(type(ours)).parameters.keys() - inspect.signature(type(theirs)).parameters.keys()
    assert vars(ours).keys() == vars(theirs).keys() | added
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert repr(ours) == repr(theirs)


# --- what forward runs on and returns ---------------------------------------------------------------------------------


def test_forward_runs_on_the_kernels(device, triton_backend):
    x = torch.randn(1, 4, 6, 8, device=device)
    pooled, indices = nn.MaxPool2d(2, return_indices=True)(x)
    target = torch.zeros(1, 6, 8, dtype=torch.long, device=device)
    calls = {
        "max_pool2d": (fastseg.nn.MaxPool2d(2), x),
        "max_unpool2d": (fastseg.nn.MaxUnpool2d(2), pooled, indices),
        "conv_transpose2d": (fastseg.nn.ConvTranspose2d(4, 3, 2, 2).to(device), x),
        "cross_entropy": (fastseg.nn.CrossEntropyLoss(), x, target),
    }
    for operator, (module, *args) in calls.items():
        choices = fastseg.explain(module, *args)
        assert {choice.operator for choice in choices} == {operator}
        assert {choice.backend for choice in choices} == {"triton"}


@pytest.mark.parametrize(
    "kwargs",
    [
        {"kernel_size": 2},
        {"kernel_size": (2, 3), "stride": (3, 3), "padding": (1, 0), "ceil_mode": True},
        {"kernel_size": 2, "return_indices": True},
    ],
)
def test_max_pool2d(device, triton_backend, assert_right, kwargs):
    theirs, ours = twins("MaxPool2d", **kwargs)
    assert_right(ours, theirs, [torch.randn(2, 3, 9, 10, device=device)])


@pytest.mark.parametrize("output_size", [None, (9, 10), (2, 3, 9, 10)])
@pytest.mark.parametrize("keyword", [True, False])
def test_max_unpool2d(device, triton_backend, assert_right, output_size, keyword):
    pool = nn.MaxPool2d(2, return_indices=True, ceil_mode=output_size is not None)
    x, indices = pool(torch.randn(2, 3, 9, 10, device=device))
    theirs, ours = twins("MaxUnpool2d", 2)
    sizes = () if keyword else (output_size,)
    named = {"output_size": output_size} if keyword else {}
    assert_right(lambda x: ours(x, indices, *sizes, **named), lambda x: theirs(x, indices, *sizes, **named), [x])


def test_max_unpool2d_rejects_an_impossible_size(device):
    x, indices = nn.MaxPool2d(2, return_indices=True)(torch.randn(1, 2, 8, 8, device=device))
    for unpool in twins("MaxUnpool2d", 2):
        with pytest.raises(ValueError, match="output_size"):
            unpool(x, indices, output_size=(12, 8))


@pytest.mark.parametrize(
    ("kwargs", "output_size"),
    [
        ({"kernel_size": 2, "stride": 2}, None),
        ({"kernel_size": 3, "stride": 2, "padding": 1}, (10, 11)),
        ({"kernel_size": 3, "stride": 2, "padding": 1}, (2, 5, 10, 11)),
        ({"kernel_size": 3, "padding": 1, "bias": False}, None),
    ],
)
@pytest.mark.parametrize("keyword", [True, False])
def test_conv_transpose2d(device, triton_backend, assert_right, kwargs, output_size, keyword):
    theirs, ours = (module.to(device) for module in twins("ConvTranspose2d", 4, 5, **kwargs))
    sizes = () if keyword else (output_size,)
    named = {"output_size": output_size} if keyword else {}

    def run(module):
        def call(x, *parameters):
            state = dict(zip(dict(module.named_parameters()), parameters, strict=True))
            return torch.func.functional_call(module, state, (x, *sizes), named)

        return call

    parameters = [p.detach() for p in theirs.parameters()]
    assert_right(run(ours), run(theirs), [torch.randn(2, 4, 5, 6, device=device), *parameters])


def test_conv_transpose2d_passes_on_every_argument(device):
    kwargs = {"stride": 3, "padding": 2, "output_padding": (1, 2), "groups": 2, "dilation": (2, 3)}
    theirs, ours = (module.to(device) for module in twins("ConvTranspose2d", 4, 6, (3, 2), **kwargs))
    x = torch.randn(2, 4, 5, 6, device=device)
    torch.testing.assert_close(ours(x), theirs(x))


def test_conv_transpose2d_rejects_what_torch_rejects(device):
    x = torch.randn(1, 4, 5, 6, device=device)
    for module in twins("ConvTranspose2d", 4, 5, 3, stride=2):
        with pytest.raises(ValueError, match="output size"):
            module.to(device)(x, output_size=(20, 13))
        module.padding_mode = "reflect"
        with pytest.raises(ValueError, match="zeros"):
            module(x)


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"ignore_index": 2}, {"reduction": "sum"}, {"reduction": "none"}, {"weight": torch.rand(5) + 0.5}],
)
def test_cross_entropy_loss(device, triton_backend, assert_right, kwargs):
    theirs, ours = (module.to(device) for module in twins("CrossEntropyLoss", **kwargs))
    target = torch.randint(0, 5, (2, 4, 6), device=device)

    def reference(x):
        return nn.functional.cross_entropy(
            x, target, None if theirs.weight is None else theirs.weight.to(x.dtype), None, theirs.ignore_index,
            None, theirs.reduction,
        )  # fmt: skip

    assert_right(lambda x: ours(x, target), reference, [torch.randn(2, 5, 4, 6, device=device)])


def test_cross_entropy_loss_smooths_labels(device):
    theirs, ours = twins("CrossEntropyLoss", label_smoothing=0.3)
    x, target = torch.randn(2, 5, 4, 6, device=device), torch.randint(0, 5, (2, 4, 6), device=device)
    torch.testing.assert_close(ours(x, target), theirs(x, target))


# --- torch's instances with fastseg's class -----------------------------------------------------------------------


def test_an_instance_of_torch_can_get_the_class_and_be_changed_later(device, triton_backend):
    pool = nn.MaxPool2d(2)
    pool.__class__ = fastseg.nn.MaxPool2d
    x = torch.randn(1, 2, 5, 7, device=device)
    assert operators(pool, x) == ["max_pool2d"]
    assert torch.equal(pool(x), nn.functional.max_pool2d(x, 2))
    pool.return_indices, pool.ceil_mode, pool.stride = True, True, 3
    for got, want in zip(pool(x), nn.functional.max_pool2d(x, 2, 3, 0, 1, True, True), strict=True):
        assert torch.equal(got, want)

    unpool = nn.MaxUnpool2d(2)
    unpool.__class__ = fastseg.nn.MaxUnpool2d
    values, indices = nn.functional.max_pool2d(x, 2, return_indices=True)
    assert operators(unpool, values, indices) == ["max_unpool2d"]
    assert torch.equal(unpool(values, indices, (5, 7)), nn.functional.max_unpool2d(values, indices, 2, None, 0, (5, 7)))

    conv = nn.ConvTranspose2d(2, 3, 2, 2).to(device)
    conv.__class__ = fastseg.nn.ConvTranspose2d
    assert operators(conv, x) == ["conv_transpose2d"]
    conv.output_padding = (1, 0)
    conv.weight = nn.Parameter(torch.randn_like(conv.weight))
    want = nn.functional.conv_transpose2d(x, conv.weight, conv.bias, 2, 0, (1, 0))
    torch.testing.assert_close(conv(x), want, rtol=1e-4, atol=1e-5)

    loss = nn.CrossEntropyLoss()
    loss.__class__ = fastseg.nn.CrossEntropyLoss
    target = torch.randint(0, 2, (1, 5, 7), device=device)
    assert operators(loss, x, target) == ["cross_entropy"]
    loss.ignore_index, loss.reduction = 1, "sum"
    want = nn.functional.cross_entropy(x, target, ignore_index=1, reduction="sum")
    torch.testing.assert_close(loss(x, target), want)


def test_cross_entropy_loss_takes_what_the_function_takes(device):
    x, target = torch.randn(2, 5, 3, 4, device=device), torch.randint(5, (2, 3, 4), device=device)
    target[0, 0] = 3
    options = {"ignore_index": 3, "normalization": "pixels", "z_loss": 0.1, "one_pass": False}
    module = fastseg.nn.CrossEntropyLoss(torch.rand(5), **options).to(device)
    want = fastseg.functional.cross_entropy(x, target, module.weight, **options)
    assert torch.equal(module(x, target), want)
    assert not torch.equal(want, fastseg.nn.CrossEntropyLoss(module.weight, ignore_index=3)(x, target))
    dice = fastseg.nn.DiceCrossEntropyLoss(module.weight, ignore_index=3, include_background=False, smooth=1.0)
    options = {"ignore_index": 3, "include_background": False, "smooth": 1.0}
    assert torch.equal(dice(x, target), fastseg.functional.dice_cross_entropy(x, target, module.weight, **options))


# --- batch norms and converters of torch that would rebuild them ----------------------------------------------------


NORMS = [fastseg.nn.BatchNormReLU2d, fastseg.nn.BatchNormReLUMaxPool2d]


@pytest.mark.parametrize("norm", NORMS)
def test_a_converter_that_would_drop_the_relu_raises(norm):
    with pytest.raises(RuntimeError, match=r"would drop its ReLU; use fastseg\.nn\.convert_sync_batchnorm"):
        nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(norm(4)))


@pytest.mark.parametrize("norm", NORMS)
def test_tools_that_read_all_attributes_of_a_batch_norm_still_work(norm):
    module, x = norm(4).eval(), torch.randn(1, 4, 6, 6)
    assert "qconfig" not in dict(inspect.getmembers(module)) and "running_mean" in dir(module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing warns that checks of shapes become constants
        traced = torch.jit.trace(module, x)
    assert torch.equal(traced(x), module(x))
