"""Swapped models with the rest of torch: saving, dtypes, autocast, checkpointing, compilers, exporters, processes."""

import copy
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.swap_common import ENCODER_DECODER_OPERATORS, EncoderDecoder, assert_same, operators, results, twins
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import fastseg


@pytest.fixture
def net(device):
    return EncoderDecoder().to(device)


@pytest.fixture
def x(device):
    return torch.randn(2, 3, 8, 8, device=device)


def test_results_before_during_and_after_training(net, x, triton_backend):
    plain, model, report = twins(net)
    assert operators(model, x) == ENCODER_DECODER_OPERATORS
    optimizers = [torch.optim.SGD(each.parameters(), 0.1, momentum=0.9) for each in (plain, model)]
    for _ in range(2):
        for each, optimizer in zip((plain, model), optimizers, strict=True):
            optimizer.zero_grad()
            each(x).square().mean().backward()
            optimizer.step()
    report.undo()
    assert operators(model, x) == []
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-3, atol=1e-4, msg=name)


# --- saving, layouts and dtypes --------------------------------------------------------------------------------------


def test_a_swapped_model_can_be_copied_and_saved(net, x, triton_backend):
    plain, model, _ = twins(net)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
        assert operators(twin, x) == ENCODER_DECODER_OPERATORS
        assert list(twin.state_dict()) == list(plain.state_dict())
    assert_same(results(twin, x), results(plain, x))


def test_state_dicts_load_in_both_directions(net, x):
    plain, model, _ = twins(net)
    assert list(plain.state_dict()) == list(model.state_dict())
    for source, target in ((EncoderDecoder(), model), (model, plain)):
        target.load_state_dict(source.state_dict(), strict=True)
        assert all(
            torch.equal(a.cpu(), b.cpu())
            for a, b in zip(target.state_dict().values(), source.state_dict().values(), strict=True)
        )


def test_to_channels_last_and_other_dtypes(net, x, triton_backend):
    plain, model, _ = twins(net)
    for each in (plain, model):
        each.to(memory_format=torch.channels_last)
    nhwc = x.contiguous(memory_format=torch.channels_last)
    found = results(model, nhwc)
    assert found["output"].is_contiguous(memory_format=torch.channels_last)
    assert_same(found, results(plain, nhwc))
    model.half().float().eval(), plain.half().float().eval()
    assert operators(model, x)[3:5] == ["conv_transpose2d", "max_unpool2d"]  # the batch norm is folded
    assert_same(results(model, x), results(plain, x))
    assert_same(results(model.train(), x), results(plain.train(), x))


@pytest.mark.parametrize("training", [True, False])
def test_autocast(training, net, x, triton_backend):
    plain, model, _ = twins(net.train(training))
    exact = copy.deepcopy(plain).double()(x.double())
    with torch.autocast(x.device.type, torch.bfloat16):
        found, theirs = model(x), plain(x)
        folded = [] if training else [4]  # the batch norm after the transposed convolution
        assert operators(model, x) == [
            name for place, name in enumerate(ENCODER_DECODER_OPERATORS) if place not in folded
        ]
    assert found.dtype == theirs.dtype
    errors = [((y.double() - exact).square().mean() / exact.square().mean()).sqrt() for y in (found, theirs)]
    assert errors[0] < 2 * errors[1]
    found.float().square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32, name
        assert parameter.grad.isfinite().all(), name


# --- checkpointing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant, device, triton_backend):
    class Checkpointed(EncoderDecoder):
        def forward(self, x):
            y, indices = checkpoint(lambda x: self.pool(self.down(x)), x, use_reentrant=reentrant)
            y = y + checkpoint_sequential(nn.Sequential(self.middle, self.up), 2, y, use_reentrant=reentrant)
            return self.head(checkpoint(self.unpool, y, indices, use_reentrant=reentrant))

    plain, model, _ = twins(Checkpointed().to(device))
    x = torch.randn(2, 3, 8, 8, device=device)
    assert_same(results(model, x), results(plain, x))


# --- compilers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [True, False])
def test_torch_compile_before_and_after(before, net, x, triton_backend):
    plain, model = copy.deepcopy(net), net
    torch.compiler.reset()
    if before:
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert_same({"y": compiled(x)}, {"y": plain(x)})
        fastseg.swap(model)
    else:
        fastseg.swap(model)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    y, want = compiled(x), plain(x)
    assert_same({"y": y}, {"y": want})
    for each, output in ((model, y), (plain, want)):
        each.zero_grad()
        output.square().sum().backward()
    for got, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_torch_export(backend, net, x):
    plain, model, _ = twins(net.eval())
    with fastseg.backend(backend):
        program = torch.export.export(model, (x,))
        called = {str(node.target) for node in program.graph.nodes}
        assert any("fastseg" in target for target in called) == (backend == "triton" or x.is_cuda)
        assert_same({"y": program.module()(x)}, {"y": plain(x)})


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torch_jit_script_raises_and_works_inside_undone(net, x):
    """torch's own MaxUnpool2d cannot be scripted either (its int arguments are not lists): the model has none."""
    model = nn.Sequential(net.down, net.middle, net.up, net.head).eval()
    report = fastseg.swap(model)
    kinds = [type(m) for m in model.modules()]
    layers = (
        fastseg.nn.MaxPool2d(2),
        fastseg.nn.ConvTranspose2d(1, 1, 1),
        fastseg.nn.CrossEntropyLoss(),
        model[2],
        model,
    )
    for layer in (*layers, fastseg.nn.MaxUnpool2d(2), fastseg.nn.BatchNormReLU2d(1)):
        with pytest.raises(
            RuntimeError, match=r"torch\.jit\.script cannot compile fastseg's .* `with report.undone\(\):`"
        ):
            torch.jit.script(layer)
    with report.undone():
        scripted = torch.jit.script(model)
        want = model(x)
    assert [type(m) for m in model.modules()] == kinds
    torch.testing.assert_close(scripted(x), want)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_onnx_of_the_plain_model(x, tmp_path, capsys):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    plain, model, report = twins(EncoderDecoder().eval())
    kinds, x = [type(m) for m in model.modules()], x.cpu()
    with report.undone():
        torch.onnx.export(model, (x,), tmp_path / "net.onnx", dynamo=True, verbose=False)
    assert [type(m) for m in model.modules()] == kinds
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), plain(x), rtol=1e-3, atol=1e-4)


# --- torch.func ------------------------------------------------------------------------------------------------------


def test_gradients_of_each_sample(device, triton_backend):
    """vmap over grad, and vmap over the parameters of an ensemble."""
    model = nn.ModuleDict(
        {"pool": nn.MaxPool2d(2), "up": nn.ConvTranspose2d(3, 4, 2, 2), "loss": nn.CrossEntropyLoss()}
    )
    plain, model, _ = twins(model.to(device))
    x, labels = torch.randn(3, 1, 3, 4, 4, device=device), torch.randint(0, 4, (3, 1, 4, 4), device=device)

    def per_sample(model, parameter_dims=None):
        def loss(parameters, x, labels):
            return model["loss"](functional_call(model["up"], parameters, (model["pool"](x),)), labels)

        parameters = dict(model["up"].named_parameters())
        if parameter_dims == 0:
            parameters = {name: torch.stack([value, 2 * value, -value]) for name, value in parameters.items()}
        return torch.func.vmap(torch.func.grad(loss), (parameter_dims, 0, 0))(parameters, x, labels)

    for dims in (None, 0):
        found, want = per_sample(model, dims), per_sample(plain, dims)
        for name in want:
            torch.testing.assert_close(found[name], want[name], rtol=1e-4, atol=1e-5)


# --- processes -------------------------------------------------------------------------------------------------------

PROCESS = """
import sys, torch, torch.distributed as dist, fastseg
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
sys.path.insert(0, {tests!r})
from support.swap_common import EncoderDecoder
rank, path = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{{path}}/rendezvous", rank=rank, world_size=2)
given = torch.load(f"{{path}}/given.pt")
x = given["x"][rank : rank + 1]

def gradients(swapped, wrap):
    model = EncoderDecoder()
    model.load_state_dict(given["state"])
    report = fastseg.swap(model) if swapped else None
    model = wrap(model)
    model(x).square().sum().backward()
    found = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in model.parameters()]
    return model, report, found

def sharded(model):
    mesh = init_device_mesh("cpu", (2,))
    for part in (model.down, model.up[0], model):
        fully_shard(part, mesh=mesh)
    return model

saved = {{}}
for name, wrap in (("ddp", DistributedDataParallel), ("fsdp", sharded)):
    with fastseg.backend("triton"):
        model, report, ours = gradients(True, wrap)
        asked = [choice.operator for choice in fastseg.explain(model.module, x)] if name == "ddp" else []
    _, _, theirs = gradients(False, wrap)
    saved[name] = (asked, ours, theirs)
try:
    fastseg.swap(model)
except RuntimeError as error:
    saved["error"] = str(error)
report.undo()  # the sharded model's: the classes that fully_shard made stay, around torch's
saved["undone"] = [cls.__module__ for m in model.modules() for cls in type(m).__mro__]
saved["sharded"] = [type(m).__name__ for m in model.modules()]
saved["output"] = model(x).detach()
torch.save(saved, f"{{path}}/{{rank}}.pt")
dist.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_two_processes_ddp_and_fsdp2(tmp_path):
    """Each process has its own image; all gradients are those of torch's model, and none is missing."""
    torch.save({"state": EncoderDecoder().state_dict(), "x": torch.randn(2, 3, 8, 8)}, tmp_path / "given.pt")
    code = PROCESS.format(tests=str(Path(__file__).parents[1]))
    env = os.environ | {"TRITON_INTERPRET": "1"}  # the processes use CPUs everywhere
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), str(tmp_path)], stderr=subprocess.PIPE, text=True, env=env
        )
        for rank in range(2)
    ]
    for run in runs:
        _, errors = run.communicate(timeout=300)
        assert run.returncode == 0, errors
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert parts[0]["ddp"][0] == ENCODER_DECODER_OPERATORS
    for part in parts:
        for name in ("ddp", "fsdp"):
            _, ours, theirs = part[name]
            for got, want in zip(ours, theirs, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-3, atol=2e-4 * max(1.0, want.abs().max().item()))
        for got, want in zip(part["ddp"][1], parts[0]["ddp"][1], strict=True):
            assert torch.equal(got, want)
        assert part["error"].startswith(
            "swap: (the model) is already sharded by fully_shard; call swap before fully_shard"
        )
        assert not any(module.startswith("fastseg") for module in part["undone"])
        assert {"FSDPEncoderDecoder", "FSDPSequential", "FSDPConvTranspose2d"} <= set(part["sharded"])
        assert part["output"].isfinite().all()
