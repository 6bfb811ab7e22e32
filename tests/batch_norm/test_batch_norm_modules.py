"""The batch-norm modules: training like torch's, compiling, copying, and synchronizing between processes."""

import copy
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support.batch_norm_common import DownAndUp, PlainDownAndUp
from torch import nn

import fastseg
from fastseg import functional as FS
from fastseg import nn as fused


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize(
    "norm",
    [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}, {"eps": 1e-3, "momentum": 0.3}],
    ids=str,
)
def test_modules_follow_torch_through_training(norm, backend, device):
    """Two steps of SGD, then evaluation: outputs, parameters and buffers."""
    plain = PlainDownAndUp(4, **norm).to(device, torch.float64)
    ours = DownAndUp(4, **norm).to(device, torch.float64)
    ours.load_state_dict(plain.state_dict())
    optimizers = [torch.optim.SGD(m.parameters(), 0.1, momentum=0.9, weight_decay=0.01) for m in (ours, plain)]
    with fastseg.backend(backend):
        for _ in range(2):
            x = torch.randn(2, 4, 7, 9, device=device, dtype=torch.float64)
            for model, optimizer in zip((ours, plain), optimizers, strict=True):
                optimizer.zero_grad()
                model(x).square().mean().backward()
                optimizer.step()
        for (name, got), want in zip(ours.state_dict().items(), plain.state_dict().values(), strict=True):
            torch.testing.assert_close(got, want, msg=name)
        torch.testing.assert_close(ours.eval()(x), plain.eval()(x))


def test_modules_print_copy_and_pickle(tmp_path):
    model = DownAndUp(4)
    assert dict(inspect.getmembers(model.norms[0]))["num_features"] == 4  # reads every attribute
    assert "BatchNormReLUMaxPool2d(4, eps=1e-05" in repr(model) and "kernel_size=2" in repr(model)
    torch.save(model, tmp_path / "model.pt")
    x = torch.randn(2, 4, 6, 8)
    for twin in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        torch.testing.assert_close(twin(x), model(x))


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("training", [True, False])
def test_modules_compile_in_one_graph(training, backend, device):
    model = DownAndUp(4).to(device).train(training)
    x = torch.randn(2, 4, 6, 8, device=device, requires_grad=True)
    state = copy.deepcopy(model.state_dict())

    def results(function):
        model.load_state_dict(state)
        y = function(x)
        return (
            y,
            *torch.autograd.grad(y.square().sum(), [x, *model.parameters()]),
            *copy.deepcopy(list(model.buffers())),
        )

    torch.compiler.reset()
    with fastseg.backend(backend):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for got, want in zip(results(compiled), results(model), strict=True):
            torch.testing.assert_close(got, want)


def test_a_training_step_between_an_evaluation_and_its_backward(device, triton_backend):
    """The backward uses the running statistics of its own forward."""
    norm = fused.BatchNormReLU2d(3, relu=False).to(device).eval()
    x = torch.randn(2, 3, 4, 4, device=device, requires_grad=True)
    y = norm(x)
    norm.train()(x.detach() * 5)
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(grad, torch.full_like(x, (1 + norm.eps) ** -0.5))


def test_autocast_does_not_change_the_dtype(device, triton_backend):
    norm = fused.BatchNormReLU2d(4).to(device)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(2, 4, 4, 4, device=device, dtype=dtype, requires_grad=True)
        with torch.autocast(device, torch.bfloat16):
            y = norm(x)
        y.float().sum().backward()
        assert y.dtype == x.grad.dtype == dtype and norm.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_windows_of_more_than_256_elements_have_no_offsets(backend, device):
    x = torch.randn(1, 2, 20, 20, device=device)
    pool = fused.BatchNormReLUMaxPool2d(2, kernel_size=17).to(device)
    with fastseg.backend(backend):
        torch.testing.assert_close(pool(x), F.max_pool2d(F.relu(F.batch_norm(x, None, None, training=True)), 17))
        with pytest.raises(RuntimeError, match="256"):
            FS.batch_norm_relu_max_pool2d(x, None, None, training=True, kernel_size=17, return_offsets=True)


# --- synchronized ----------------------------------------------------------------------------------------------------

SYNCHRONIZED = """
import sys, torch, torch.distributed as dist, fastseg
from fastseg import nn as fused
sys.path[:0] = {tests!r}
from support.batch_norm_common import DownAndUp
rank, path, *backends = int(sys.argv[1]), *sys.argv[2:]
dist.init_process_group("gloo", init_method=f"file://{{path}}/rendezvous", rank=rank, world_size=2)
inputs = torch.load(f"{{path}}/inputs.pt")
lone = fused.convert_sync_batchnorm(fused.BatchNormReLU2d(2, relu=False))
pixel = lone(torch.full((1, 2, 1, 1), float(rank)))  # one value per channel here, two in both processes
assert abs(pixel.abs().max().item() - 1) < 1e-3, pixel
for backend in backends:
    model = DownAndUp(4).double()
    model.load_state_dict(inputs["state"])
    fused.convert_sync_batchnorm(model)
    part = slice(0, 1) if rank == 0 else slice(1, 4)
    x = inputs["x"][part].detach().requires_grad_()
    with fastseg.backend(backend):
        y = model(x)
        y.backward(inputs["upstream"][part])
    for p in model.parameters():
        dist.all_reduce(p.grad)
    if rank == 0:
        torch.save([p.grad for p in model.parameters()], f"{{path}}/{{backend}} grads.pt")
    torch.save([y.detach(), x.grad, model.state_dict()], f"{{path}}/{{backend}} {{rank}}.pt")
dist.destroy_process_group()
"""


def test_two_processes_equal_one_with_the_whole_batch(tmp_path):
    """One has one image and the other three. The parameters' gradients are summed over both, as DDP does."""
    backends = ("auto",) if torch.cuda.is_available() else ("auto", "triton")  # interpreted
    model = DownAndUp(4).double()
    x, upstream = (torch.randn(4, 4, 6, 8, dtype=torch.float64) for _ in range(2))
    torch.save({"state": model.state_dict(), "x": x, "upstream": upstream}, tmp_path / "inputs.pt")
    code = SYNCHRONIZED.format(tests=[str(Path(__file__).parents[1])])
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), str(tmp_path), *backends], stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    for run in runs:
        _, errors = run.communicate(timeout=300)
        assert run.returncode == 0, errors
    y = model(x.requires_grad_())
    y.backward(upstream)
    for backend in backends:
        parts = [torch.load(tmp_path / f"{backend} {rank}.pt") for rank in range(2)]
        torch.testing.assert_close(torch.cat([part[0] for part in parts]), y.detach())
        torch.testing.assert_close(torch.cat([part[1] for part in parts]), x.grad)
        grads = torch.load(tmp_path / f"{backend} grads.pt")
        for got, want in zip(grads, [p.grad for p in model.parameters()], strict=True):
            torch.testing.assert_close(got, want)
        for part in parts:
            for name, value in model.state_dict().items():
                torch.testing.assert_close(part[2][name], value, msg=name)


def test_convert_sync_batchnorm():
    model = nn.Sequential(DownAndUp(4), nn.BatchNorm2d(4), nn.Sequential(fused.BatchNormReLU2d(4)))
    with pytest.raises(RuntimeError, match=r"fastseg\.nn\.convert_sync_batchnorm"):
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    keys = model.state_dict().keys()
    assert fused.convert_sync_batchnorm(model) is model
    assert model.state_dict().keys() == keys
    assert isinstance(model[1], nn.SyncBatchNorm)
    assert all(m.sync for m in model.modules() if isinstance(m, fused.BatchNormReLU2d)) and "sync=True" in repr(model)
    assert isinstance(fused.convert_sync_batchnorm(nn.BatchNorm2d(4)), nn.SyncBatchNorm)
    model[0](torch.randn(2, 4, 6, 8))  # without a process group the statistics are those of its own batch
