"""Inputs that the batch-norm kernels do not support, and invalid arguments."""

import pytest
import torch
import torch.nn.functional as F

import fastseg
from fastseg import functional as FS
from fastseg import nn as fused


@pytest.mark.parametrize("shape", [(6, 4), (3, 4, 5), (2, 4, 3, 2, 5), (0, 4, 3, 3)])
@pytest.mark.parametrize("training", [True, False])
def test_unsupported_inputs_fall_back_to_pytorch(shape, training, device):
    x, vectors = torch.randn(shape, device=device), torch.rand(4, 4, device=device).unbind()
    got, want = ([t.clone() for t in vectors] for _ in range(2))
    ours = FS.batch_norm_relu(x, *got, training)
    assert torch.equal(ours, F.relu(F.batch_norm(x, *want, training)))
    assert torch.equal(torch.stack(got), torch.stack(want))
    with fastseg.backend("triton"), pytest.raises(NotImplementedError, match=r"D input|an empty batch"):
        FS.batch_norm_relu(x, *got, training)


def bad_calls():
    x, v, w = torch.zeros(2, 4, 3, 3), torch.ones(4), torch.ones(5)
    yield "weight", (x, v, v, w, None)
    yield "bias", (x, v, v, v, w)
    yield "running_mean", (x, w, v)
    yield "running_mean", (x, None, None)
    yield "running_", (x, v, None, None, None, True)
    yield "more than 1 value", (x[:1, :, :1, :1], v, v, None, None, True)
    yield "eps", (x, v, v, None, None, True, 0.1, 0.0)
    yield "eps", (x, v, v, None, None, False, 0.1, -1.0)


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("name, arguments", list(bad_calls()))
def test_invalid_arguments_raise_what_torch_raises(name, arguments, backend):
    with pytest.raises(Exception) as theirs:
        F.batch_norm(*arguments)
    offsets = torch.zeros(arguments[0].shape, dtype=torch.uint8)
    x, *rest = arguments
    with fastseg.backend(backend):
        for call in (
            lambda: FS.batch_norm_relu(*arguments),
            lambda: FS.batch_norm_relu_max_pool2d(*arguments, kernel_size=1),
            lambda: FS.batch_norm_relu_max_unpool2d(x, offsets, *rest),
        ):
            with pytest.raises(theirs.type, match=name):
                call()


def test_invalid_arguments_that_torch_does_not_have():
    x, v = torch.zeros(2, 4, 3, 3), torch.ones(4)
    with pytest.raises(TypeError, match="input must be a Tensor"):
        FS.batch_norm_relu([1.0], v, v)
    with pytest.raises(RuntimeError, match="input_bias must have shape"):
        FS.batch_norm_relu(x, v, v, input_bias=torch.ones(3))
    with pytest.raises(RuntimeError, match=r"must be \(N, C, H, W\)"):
        FS.batch_norm_relu_max_pool2d(x[0], torch.ones(3), torch.ones(3))
    with pytest.raises(RuntimeError, match="offsets must be of dtype"):
        FS.batch_norm_relu_max_unpool2d(x, torch.zeros_like(x), v, v)
    with pytest.raises(RuntimeError, match="kernel_size must be at least 1"):
        FS.batch_norm_relu_max_pool2d(x, v, v, kernel_size=0)
    with pytest.raises(ValueError, match="expected 4D"):
        fused.BatchNormReLU2d(4)(x[0])


@pytest.mark.parametrize("backend", ["auto", pytest.param("triton", marks=pytest.mark.interpreted)])
def test_an_offset_outside_its_window_raises(backend):
    x, v = torch.zeros(1, 2, 2, 2), torch.ones(2)
    with fastseg.backend(backend), pytest.raises(RuntimeError, match="invalid max offset: 4"):
        FS.batch_norm_relu_max_unpool2d(x, torch.full(x.shape, 4, dtype=torch.uint8), v, v)
