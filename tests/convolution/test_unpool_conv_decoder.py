"""SegNet's decoder in evaluation: each stage in one kernel if that is faster, else layer by layer."""

import json
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from support.unpool_conv_common import LAYER_BY_LAYER, ONE_KERNEL, interpreted, launched, norm, stage_inputs
from torch import nn

import fastseg
from fastseg import autotune, dispatch, models
from fastseg.models import blocks, segnet_inference
from fastseg.ops.batch_norm import functions
from fastseg.ops.batch_norm.batch_norm import BATCH_NORM_RELU
from fastseg.ops.batch_norm.batch_norm_unpool import BATCH_NORM_RELU_MAX_UNPOOL2D
from fastseg.ops.convolution import unpool_conv, unpool_conv_norm
from fastseg.ops.convolution.unpool_conv_norm import MAX_UNPOOL2D_CONV2D_BATCH_NORM_RELU as OPERATOR
from fastseg.ops.operator import Operator

# --- the decoder -----------------------------------------------------------------------------------------------------

SIZES = [(5, 6), (9, 11)]  # of the maps of its two stages


def decoder(device="cpu", dtype=torch.float32):
    """Two stages as in SegNet, the first with two blocks, whose state is not that of new layers."""

    def layer(i, o, norm):
        return blocks.Block(blocks.Conv2d(i, o, 3, padding=1), norm(o))

    built = blocks.build_decoder(8, [[8, 8], [8]], layer, blocks.NormFactories.of(1e-5))
    for module in built.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_var, module.weight):
                nn.init.uniform_(tensor, 0.5, 1.5)
            for tensor in (module.running_mean, module.bias):
                nn.init.normal_(tensor, std=0.3)
        elif isinstance(module, nn.Conv2d):
            nn.init.normal_(module.bias, std=0.3)
    return built.to(device, dtype, memory_format=torch.channels_last).eval()


def pooled(device="cpu", dtype=torch.float32):
    """(map, offsets and sizes for the two unpoolings) as an encoder would leave them."""
    made = [
        (stage_inputs((1, *size), 8, 8, device, dtype)[:2], torch.Size(size)) for size in reversed(SIZES)
    ]  # the last one is used first
    return made[-1][0][0], [blocks.Pooled(offsets, size) for (_, offsets), size in made]


def run(built, x, kept):
    with torch.no_grad():
        return segnet_inference.unpool_and_decode(built, x, list(kept))


def layer_by_layer(built, x, kept):
    kept = list(kept)
    with torch.no_grad():
        return blocks.decode(built, blocks.unpool(x, kept.pop()), kept)


@pytest.fixture
def on_a_gpu(monkeypatch, tmp_path):
    """This CPU poses as a GPU: kernels run interpreted, and autotune keeps what the test's timer says."""
    decide, times, may_know = dispatch._decide, autotune.times, autotune.may_know
    gpu = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0))
    monkeypatch.setattr(dispatch, "torch_alone", lambda tensor: dispatch.get_backend() == "torch")
    monkeypatch.setattr(
        dispatch, "_decide", lambda operator, device, *rest: decide(operator, torch.device("cuda"), *rest)
    )
    monkeypatch.setattr(autotune, "times", lambda key, tensor, calls: times(key, gpu, calls))
    monkeypatch.setattr(autotune, "may_know", lambda tensor: may_know(gpu))
    monkeypatch.setattr(autotune, "may_measure", lambda tensor: torch.backends.cudnn.benchmark)
    monkeypatch.setattr(autotune, "_machine", lambda index: {"gpu": "H100"})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "H100")
    monkeypatch.setattr(autotune, "RECORDED", tmp_path / "recorded")
    monkeypatch.setenv("FASTSEG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    for cached in (autotune._known, autotune._recorded):
        cached.cache_clear()
    # A CPU tensor would take the short way to the CPU kernels or torch.
    monkeypatch.setattr(functions, "few_elements", lambda x, least: None)
    monkeypatch.setattr(Operator, "_runs_on_cpu", lambda self, args: False)
    # An operator asks the implementation of the tensor's device for its preference, and here that is "cpu".
    for operator in (OPERATOR, BATCH_NORM_RELU, BATCH_NORM_RELU_MAX_UNPOOL2D):
        as_triton = operator.kernels["triton"]._replace(preferred=operator.preferred)
        monkeypatch.setitem(operator.kernels, "cpu", as_triton)
    with fastseg.backend("auto"):
        yield
    for cached in (autotune._known, autotune._recorded):
        cached.cache_clear()


@interpreted
@pytest.mark.parametrize("wins", [(True, True), (True, False), (False, True), (False, False)])
def test_each_stage_runs_the_faster_way(wins, on_a_gpu, monkeypatch):
    """Measured at the first run, in the order of the stages, and never again; explain shows the choices."""
    built, (x, kept), results = decoder(), pooled(), list(wins)
    monkeypatch.setattr(autotune, "timer", lambda ours, theirs: (1.0, 2.0) if results.pop(0) else (2.0, 1.0))
    want, layers = launched(lambda: layer_by_layer(built, x, kept))
    run(built, x, kept)
    assert not results
    found, kernels = launched(lambda: run(built, x, kept))
    torch.testing.assert_close(found, want)
    first = ONE_KERNEL[1:] if wins[0] else layers[:2]
    assert kernels == [*first, *(ONE_KERNEL if wins[1] else layers[2:])] and layers[2:] == LAYER_BY_LAYER
    with torch.no_grad():
        choices = fastseg.explain(lambda x: segnet_inference.unpool_and_decode(built, x, list(kept)), x)
    chosen = [(c.backend, c.reason) for c in choices if c.operator == unpool_conv_norm.NAME]
    names = {True: ("triton", "1 ms in one kernel, 2 ms"), False: ("torch", "2 ms in one kernel, 1 ms")}
    assert chosen == [(names[w][0], f"{names[w][1]} by way of the unpooled map") for w in wins]


@interpreted
def test_without_a_measurement_it_runs_each_layer(on_a_gpu, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    built, (x, kept) = decoder(), pooled()
    want, layers = launched(lambda: layer_by_layer(built, x, kept))
    found, kernels = launched(lambda: run(built, x, kept))
    assert torch.equal(found, want) and kernels == layers
    with torch.no_grad():
        choices = fastseg.explain(lambda x: segnet_inference.unpool_and_decode(built, x, list(kept)), x)
    assert {c.reason for c in choices if c.operator == unpool_conv_norm.NAME} == {unpool_conv_norm.UNMEASURED}
    monkeypatch.setattr(segnet_inference, "_is_unchanged", None)  # it is not even called
    assert torch.equal(run(built, x, kept), want)


def test_a_backend_that_is_set(device, triton_backend):
    """ "triton" runs the kernels; "torch", and "auto" on a CPU, run the layers with bit-identical results."""
    built, (x, kept) = decoder(device), pooled(device)
    want = layer_by_layer(built, x, kept)
    torch.testing.assert_close(run(built, x, kept), want)
    assert stages_in_one_kernel(built, x, kept) == 2
    for backend in ("torch", *(["auto"] * (device == "cpu"))):
        with fastseg.backend(backend):
            assert stages_in_one_kernel(built, x, kept) == 0
            assert torch.equal(run(built, x, kept), layer_by_layer(built, x, kept))


def stages_in_one_kernel(built, x, kept, grad=False):
    """How many stages would run in one kernel."""
    with torch.set_grad_enabled(grad):
        choices = fastseg.explain(lambda x: segnet_inference.unpool_and_decode(built, x, list(kept)), x)
    torch.clear_autocast_cache()  # of fakes
    return Counter((c.operator, c.backend) for c in choices)[unpool_conv_norm.NAME, "triton"]


def changed(change, value):
    return lambda module: setattr(module, change, value)


@pytest.mark.parametrize(
    "change",
    [
        lambda built: built[1].train(),
        lambda built: built[0][0][1].train(),
        lambda built: built[0].register_forward_hook(lambda *_: None),
        lambda built: built[0][1][1].register_forward_pre_hook(lambda *_: None),
        lambda built: changed("dilation", (2, 2))(built[1][0][0]) or changed("padding", (2, 2))(built[1][0][0]),
        lambda built: changed("forward", built[0][0].forward)(built[0][0]),
        lambda built: nn.utils.parametrizations.weight_norm(built[1][0][0]),
        lambda built: built[0][0].__setitem__(0, nn.Conv2d(8, 8, 3, padding=1, bias=False)),
        lambda built: changed("running_mean", None)(built[0][0][1]) or changed("running_var", None)(built[0][0][1]),
    ],
)
def test_what_makes_it_run_layer_by_layer(change, triton_backend, device):
    """The results are those of the changed layers."""
    built, (x, kept) = decoder(device), pooled(device)
    change(built)
    built.to(device)
    # A norm without running statistics affects only its own stage; everything else, the whole decoder.
    assert stages_in_one_kernel(built, x, kept) == (built[0][0][1].running_mean is None)
    kept_state = [b.clone() for b in built.buffers()]
    found = run(built, x, kept)
    for buffer, before in zip(built.buffers(), kept_state, strict=True):
        buffer.copy_(before)
    torch.testing.assert_close(found, layer_by_layer(built, x, kept))


def test_with_gradients_it_runs_layer_by_layer(triton_backend, device):
    built, (x, kept) = decoder(device), pooled(device)
    assert stages_in_one_kernel(built, x, kept, grad=True) == 0
    y = segnet_inference.unpool_and_decode(built, x, list(kept))
    y.sum().backward()
    assert all(p.grad is not None for p in built.parameters())


def test_with_a_global_module_hook_it_runs_layer_by_layer(triton_backend, device):
    built, (x, kept), calls = decoder(device), pooled(device), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: calls.append(type(module)))
    try:
        run(built, x, kept)
    finally:
        handle.remove()
    assert calls.count(blocks.Block) == 3 and calls.count(blocks.Stage) == 2


def test_float64_and_another_dtype_than_the_weights(triton_backend, device):
    built, (x, kept) = decoder(device, torch.float64), pooled(device, torch.float64)
    assert stages_in_one_kernel(built, x, kept) == 0
    torch.testing.assert_close(run(built, x, kept), layer_by_layer(built, x, kept))
    x, offsets, weight, *windows = stage_inputs((1, 4, 6), 8, 8, device, torch.float16)
    for dtype, fused in ((torch.float16, True), (torch.float32, False)):  # torch's convolution refuses float32
        y = unpool_conv_norm.max_unpool2d_conv2d_batch_norm_relu(
            x, offsets, weight.to(dtype), *windows, norm(8, device), None
        )
        assert (y is not None) == fused


def test_autocast(triton_backend, device, monkeypatch):
    """In autocast's dtype, from weights in float32; for a map of another dtype the layers run."""
    built, (x, kept) = decoder(device), pooled(device, torch.bfloat16)
    dtypes, run_one_kernel = [], unpool_conv.run_one_kernel

    def noted(input, offsets, weight, *rest):
        dtypes.append((input.dtype, weight.dtype))
        return run_one_kernel(input, offsets, weight, *rest)

    monkeypatch.setattr(unpool_conv, "run_one_kernel", noted)
    with torch.autocast(device, torch.bfloat16):
        assert stages_in_one_kernel(built, x, kept) == 2
        found, want = run(built, x, kept), layer_by_layer(built, x, kept)
        assert stages_in_one_kernel(built, x.float(), kept) == 1  # the first convolution's output is bfloat16 again
    assert dtypes == [(torch.bfloat16, torch.bfloat16)] * 2
    assert found.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(found, want, rtol=0.05, atol=0.05)


# --- the networks ----------------------------------------------------------------------------------------------------


def test_segnet(triton_backend, device):
    model = models.SegNet(width=0.03).to(device).eval()
    with torch.no_grad():
        choices = Counter(choice.operator for choice in fastseg.explain(model, torch.randn(1, 3, 9, 6, device=device)))
    norm = "batch_norm_relu"
    assert choices == {norm: 8 + 3, f"{norm}_max_pool2d": 5, unpool_conv_norm.NAME: 5}


@pytest.mark.gpu
def test_segnet_on_a_gpu(monkeypatch, tmp_path):
    """Both ways of each stage are timed in the first run and never again, nor while a graph is captured."""
    monkeypatch.setenv("FASTSEG_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    autotune._known.cache_clear()
    try:
        model = models.SegNet(width=0.25).cuda().bfloat16().to(memory_format=torch.channels_last).eval()
        x = torch.randn(2, 3, 96, 128, device="cuda").bfloat16().contiguous(memory_format=torch.channels_last)
        with fastseg.backend("auto"), torch.no_grad():
            y = model(x)
            kept = json.loads(autotune.cache_file(0).read_text())["ms"]
            assert len(kept) == 5 and all(key.startswith(unpool_conv_norm.NAME) for key in kept)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = model(x)
            graph.replay()
        assert len(autotune._known(0)) == 5
        torch.testing.assert_close(captured, y)
        with torch.no_grad(), fastseg.backend("torch"):
            torch.testing.assert_close(y, model(x), rtol=0.05, atol=0.05 * float(y.abs().max()))
    finally:
        autotune._known.cache_clear()


@pytest.mark.parametrize("name", ["segnet-basic", "deconvnet"])
def test_other_decoders_are_not_fused(name, triton_backend, device):
    model = models.MODELS[name](width=0.01).to(device).eval()
    with torch.no_grad():
        choices = fastseg.explain(model, torch.randn(1, 3, 193, 193, device=device))
    assert unpool_conv_norm.NAME not in {choice.operator for choice in choices}


class Decoder(nn.Module):
    def __init__(self, built, sizes):
        super().__init__()
        self.stages, self.sizes = built, sizes

    def forward(self, x, *offsets):
        return segnet_inference.unpool_and_decode(self.stages, x, list(map(blocks.Pooled, offsets, self.sizes)))


def test_compiled_and_exported_models_run_layer_by_layer(triton_backend, device):
    """A graph keeps the layers, because it may run on another machine than the one that traced it."""
    built, (x, kept) = decoder(device), pooled(device)
    offsets, sizes = zip(*kept, strict=True)
    model = Decoder(built, sizes)
    with torch.no_grad():
        want = model(x, *offsets)
        program = torch.export.export(model, (x, *offsets))
        assert OPERATOR.op not in [node.target for node in program.graph.nodes]
        torch.compiler.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for run in (program.module(), compiled):
            torch.testing.assert_close(run(x, *offsets), want, rtol=1e-2, atol=1e-2)  # TF32 on a GPU
