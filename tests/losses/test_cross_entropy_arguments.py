"""Arguments of cross_entropy: errors, and calls that fall back to PyTorch."""

import pytest
import torch
import torch.nn.functional as F
from support.cross_entropy_common import NAN, make

import fastseg
from fastseg import functional as FS

X, TARGET = make((2, 4, 3, 5))


BAD = {
    "input": [[1.0], X.long(), X > 0],
    "target": [
        1, TARGET[:1], TARGET[0], TARGET[:, :2], TARGET[..., None], torch.tensor(1), X.long(), X[..., 1:],
        TARGET.float(), TARGET.bool(), TARGET.to(torch.uint64), TARGET.to("meta"),
    ],
    "weight": [
        [1.0] * 4, torch.ones(5), torch.ones(()), torch.ones(4).double(), torch.ones(4).half(),
        torch.ones(4, device="meta"), torch.ones(4, requires_grad=True),
    ],
    "reduction": ["max", None],
    "ignore_index": [1.0, None, True, 2**70],
    "label_smoothing": [1.1, "a"],
}  # fmt: skip


@pytest.mark.parametrize("name, value", [(name, value) for name, values in BAD.items() for value in values])
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_bad_arguments_raise_what_torch_raises(name, value, backend):
    arguments = {"input": X, "target": TARGET, name: value}
    with pytest.raises(Exception) as theirs:
        F.cross_entropy(**arguments)
    with fastseg.backend(backend), pytest.raises(theirs.type, match=f"cross_entropy: {name} must") as ours:
        FS.cross_entropy(**arguments)
    assert type(ours.value) is theirs.type


@pytest.mark.parametrize("smoothing", [-0.1, NAN])
def test_label_smoothing_outside_its_range_raises(smoothing):
    with pytest.raises(RuntimeError, match="label_smoothing must be between"):
        FS.cross_entropy(X, TARGET, label_smoothing=smoothing)


def test_class_probabilities_take_no_ignore_index():
    for function in (F.cross_entropy, FS.cross_entropy):
        with pytest.raises(RuntimeError, match="ignore_index"):
            function(X, X.softmax(1), ignore_index=3)


@pytest.mark.parametrize("shape", [(0,), (2,), (1, 1), (3,)], ids=str)
def test_wrong_targets_of_one_pixel_raise_what_torch_raises(shape):
    target = torch.zeros(shape, dtype=torch.int64)
    with pytest.raises(Exception) as theirs:
        F.cross_entropy(torch.randn(3), target)
    with pytest.raises(theirs.type, match="cross_entropy: target must"):
        FS.cross_entropy(torch.randn(3), target)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (
            {"normalization": "mean"},
            "normalization must be one of 'weights', 'valid', 'pixels', 'batch', but is 'mean'",
        ),
        ({"normalization": "valid", "reduction": "sum"}, "normalization must be left out for reduction 'sum'"),
        ({"one_pass": True, "reduction": "none"}, "one_pass must be left out for reduction 'none'"),
    ],
)
def test_bad_values_of_arguments_that_torch_does_not_have(kwargs, message):
    with pytest.raises(ValueError, match=message):
        FS.cross_entropy(X, TARGET, **kwargs)
    with pytest.raises(TypeError, match="z_loss must be a float"):
        FS.cross_entropy(X, TARGET, z_loss="a")
    with pytest.raises(TypeError):
        FS.cross_entropy(X, TARGET, None, None, -100, None, "mean", 0.0, "valid")  # it is keyword-only


@pytest.mark.parametrize(
    "reason, x, target, kwargs",
    [
        ("class probabilities of dtype torch.float64 for logits of torch.float32", X, X.double().softmax(1), {}),
        ("class probabilities of dtype torch.float32 for logits of torch.float64", X.double(), X.softmax(1), {}),
        ("a gradient of class probabilities", X, X.softmax(1).requires_grad_(), {}),
        ("a gradient of .* weight", X, X.softmax(1), {"weight": torch.ones(4, requires_grad=True)}),
        ("without classes", X[:0, :0], TARGET[:0], {}),
    ],
)
def test_unsupported_calls_fall_back_with_a_reason(reason, x, target, kwargs, triton_backend):
    with pytest.raises(NotImplementedError, match=reason):
        FS.cross_entropy(x, target, **kwargs)
    fastseg.set_backend("auto")
    got, want = FS.cross_entropy(x, target, **kwargs), F.cross_entropy(x, target, **kwargs)
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", [(5,), (2, 5), (1, 5, 2), (1, 5, 2, 2), (1, 5, 2, 1, 2)], ids=str)
@pytest.mark.parametrize("backend", ["auto", pytest.param("triton", marks=pytest.mark.interpreted)])
def test_an_out_of_range_label_is_reported_with_its_position(shape, backend):
    target = torch.zeros((*shape[:1], *shape[2:]) if len(shape) > 1 else (), dtype=torch.int64)
    target.view(-1)[-1] = 7
    where = tuple(size - 1 for size in target.shape)
    with fastseg.backend(backend), pytest.raises(IndexError) as error:
        FS.cross_entropy(torch.randn(shape), target)
    assert f"Target 7 is out of bounds at {where}" in str(error.value)


@pytest.mark.parametrize(
    "classes, dtype, backend",
    [
        (255, torch.uint8, "triton"),
        (256, torch.uint8, "triton"),
        (300, torch.uint8, "triton"),
        (2**15, torch.int16, "torch"),
    ],
)
def test_label_dtypes_that_cannot_hold_the_number_of_classes(classes, dtype, backend, device):
    largest = min(classes - 1, torch.iinfo(dtype).max)
    target = torch.tensor([[[0, 7], [200, largest]]], dtype=dtype, device=device)
    features, linear_weight = torch.randn(1, 3, 2, 2, device=device), torch.randn(classes, 3, device=device)
    x = torch.einsum("ck,nkhw->nchw", linear_weight, features)
    want = F.cross_entropy(x, target.long())
    with fastseg.backend(backend):
        torch.testing.assert_close(FS.cross_entropy(x, target), want)
        torch.testing.assert_close(FS.upsample_cross_entropy(x, target), want)
        torch.testing.assert_close(FS.linear_cross_entropy(features, linear_weight, target), want)


def test_explain(device):
    x, target = X.to(device), TARGET.to(device)
    with fastseg.backend("triton"):
        (choice,) = fastseg.explain(FS.cross_entropy, x, target)
        assert (choice.operator, choice.backend) == ("cross_entropy", "triton")
    with fastseg.backend("torch"):
        (choice,) = fastseg.explain(FS.cross_entropy, x, target)
        assert choice.backend == "torch"
