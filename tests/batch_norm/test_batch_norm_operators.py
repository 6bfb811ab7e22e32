"""The rules that torch has for operators: derivatives, opcheck, transforms."""

import pytest
import torch
from support.batch_norm_common import LAYOUTS, TAILS, Problem, layouts

import fastseg
from fastseg import functional as FS


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("tail", TAILS)
def test_first_and_second_derivatives(tail, training, backend, device):
    """The first come from the operators, the second from torch's own formulas."""
    problem = Problem(tail, (2, 1, 2, 4), torch.float64, LAYOUTS[0], device)
    leaves = [t.requires_grad_() for t in problem.inputs("weight", "bias")]
    call = lambda *a: problem.ours(*a, training=training)  # noqa: E731
    with fastseg.backend(backend):
        assert torch.autograd.gradcheck(call, leaves, fast_mode=backend == "triton")
        assert torch.autograd.gradgradcheck(call, leaves, fast_mode=backend == "triton")


def test_inputs_computed_from_one_another(device, triton_backend):
    """Each path counts once, with and without create_graph."""
    problem = Problem("plain", (2, 3, 4, 4), torch.float64, LAYOUTS[0], device)

    def gradients(function, **options):
        x = problem.x.clone().requires_grad_()
        weight = x.mean((0, 2, 3)) + 2
        return torch.autograd.grad(function(x, weight, weight).pow(3).sum(), (x, weight), **options)

    want = gradients(problem.theirs)
    for got in (gradients(problem.ours), gradients(problem.ours, create_graph=True)):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@layouts
def test_opcheck(layout, backend, device):
    problem = Problem("pool", (2, 4, 6, 8), torch.float32, layout, device)
    x, ops = problem.x, torch.ops.fastseg
    vector = lambda: torch.rand(4, device=device) + 0.5  # noqa: E731
    norm = (vector(), vector(), vector(), vector(), vector(), 1e-5, True)
    geometry = ([2, 2], [2, 2], [0, 0], [1, 1])
    grad = torch.randn_like(x)
    pooled, offsets = FS.max_pool2d_with_offsets(x, 2)
    small = torch.randn_like(pooled)
    with fastseg.backend(backend):
        for op, arguments in [
            (ops.batch_norm_stats, (x, vector(), vector(), vector(), 0.1)),
            (ops.batch_norm_stats, (x, None, None, None, None)),
            (ops.batch_norm_relu, (x, *norm)),
            (ops.batch_norm_relu_sums, (grad, x, *norm)),
            (ops.batch_norm_relu_backward, (grad, x, torch.rand(2, 4, device=device), *norm)),
            (ops.batch_norm_relu_backward, (grad, x, None, *norm)),
            (ops.batch_norm_relu_max_pool2d, (x, *geometry, False, True, *norm)),
            (ops.batch_norm_relu_max_pool2d, (x, *geometry, True, False, *norm)),
            (ops.batch_norm_relu_max_pool2d_sums, (small, offsets, x, *geometry, *norm)),
            (ops.batch_norm_relu_max_pool2d_backward, (small, offsets, x, None, *geometry, *norm)),
            (ops.batch_norm_relu_max_unpool2d, (small, offsets, *geometry, [6, 8], *norm)),
            (ops.batch_norm_relu_max_unpool2d_sums, (grad, offsets, small, *geometry, *norm)),
        ]:
            torch.library.opcheck(op.default, arguments)


def test_func_grad_works_and_vmap_raises(device):
    """The kernels have no batching rule."""
    problem = Problem("plain", (2, 3, 4, 4), torch.float32, LAYOUTS[0], device)
    with fastseg.backend("triton"):
        for training in (True, False):

            def loss(x, function, training=training):
                return function(x, problem.weight, problem.bias, training=training).square().sum()

            ours, theirs = (torch.func.grad(loss)(problem.x, f) for f in (problem.ours, problem.theirs))
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
        with pytest.raises(RuntimeError, match="vmap"):
            torch.func.vmap(lambda x: problem.ours(x, training=False))(problem.x[None])
