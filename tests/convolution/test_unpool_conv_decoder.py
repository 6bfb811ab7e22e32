"""SegNet's decoder in evaluation: each stage in one kernel where that is faster, or the layers as they stand."""

import json
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from support.unpool_conv_common import APART, JOINED, entrance, interpreted, launched, norm
from torch import nn

import fastseg
from fastseg import autotune, dispatch, models
from fastseg.models import blocks
from fastseg.models import segnet_inference as evaluation
from fastseg.ops.convolution import unpool_conv, unpool_conv_norm
from fastseg.ops.convolution.unpool_conv_norm import MAX_UNPOOL2D_CONV2D_BATCH_NORM_RELU as OPERATOR

# --- the decoder -----------------------------------------------------------------------------------------------------

SIZES = [(5, 6), (9, 11)]  # the maps that its two stages work on


def decoder(device="cpu", dtype=torch.float32):
    """Two stages as SegNet's, the first of two blocks, with a state away from where it starts."""

    def layer(i, o, norm):
        return blocks.Block(blocks.Conv2d(i, o, 3, padding=1), norm(o))

    built = blocks.stages(8, [[8, 8], [8]], layer, blocks.Norms.of(1e-5), down=False)
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
    """(map, what the two unpoolings need) as an encoder would leave them."""
    made = [
        (entrance((1, *size), 8, 8, device, dtype)[:2], torch.Size(size)) for size in reversed(SIZES)
    ]  # the last one is used first
    return made[-1][0][0], [(offsets, size) for (_, offsets), size in made]


def run(built, x, kept):
    with torch.no_grad():
        return evaluation.unpool_and_decode(built, x, list(kept))


def as_it_stands(built, x, kept):
    kept = list(kept)
    with torch.no_grad():
        return blocks.decode(built, blocks.unpool(x, kept.pop()), kept)


@pytest.fixture
def on_a_gpu(monkeypatch, tmp_path):
    """This CPU passes for a GPU: kernels run, interpreted, and `faster` keeps what the test's timer says."""
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
    with fastseg.backend("auto"):
        yield
    for cached in (autotune._known, autotune._recorded):
        cached.cache_clear()


@interpreted
@pytest.mark.parametrize("wins", [(True, True), (True, False), (False, True), (False, False)])
def test_each_stage_goes_where_it_is_faster(wins, on_a_gpu, monkeypatch):
    """Measured at the first run, in the order of the stages, and never again; explain tells it."""
    built, (x, kept), left = decoder(), pooled(), list(wins)
    monkeypatch.setattr(autotune, "timer", lambda ours, theirs: (1.0, 2.0) if left.pop(0) else (2.0, 1.0))
    want, standing = launched(lambda: as_it_stands(built, x, kept))
    run(built, x, kept)
    assert not left
    found, kernels = launched(lambda: run(built, x, kept))
    torch.testing.assert_close(found, want)
    first = JOINED[1:] if wins[0] else standing[:2]
    assert kernels == [*first, *(JOINED if wins[1] else standing[2:])] and standing[2:] == APART
    with torch.no_grad():
        choices = fastseg.explain(lambda x: evaluation.unpool_and_decode(built, x, list(kept)), x)
    chosen = [(c.backend, c.reason) for c in choices if c.operator == unpool_conv_norm.NAME]
    names = {True: ("triton", "1 ms in one kernel, 2 ms"), False: ("torch", "2 ms in one kernel, 1 ms")}
    assert chosen == [(names[w][0], f"{names[w][1]} by way of the unpooled map") for w in wins]


@interpreted
def test_without_a_measurement_all_is_as_it_stands(on_a_gpu, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    built, (x, kept) = decoder(), pooled()
    want, standing = launched(lambda: as_it_stands(built, x, kept))
    found, kernels = launched(lambda: run(built, x, kept))
    assert torch.equal(found, want) and kernels == standing
    with torch.no_grad():
        choices = fastseg.explain(lambda x: evaluation.unpool_and_decode(built, x, list(kept)), x)
    assert {c.reason for c in choices if c.operator == unpool_conv_norm.NAME} == {unpool_conv_norm.UNMEASURED}
    monkeypatch.setattr(evaluation, "_as_built", None)  # it is not even asked
    assert torch.equal(run(built, x, kept), want)


def test_a_backend_that_is_set(device, triton_backend, exact):
    """Triton: the kernels; torch and the process's own choice on a CPU: the layers, bit by bit."""
    built, (x, kept) = decoder(device), pooled(device)
    want = as_it_stands(built, x, kept)
    torch.testing.assert_close(run(built, x, kept), want)
    assert seen(built, x, kept) == 2
    for backend in ("torch", *(["auto"] * (device == "cpu"))):
        with fastseg.backend(backend):
            assert seen(built, x, kept) == 0
            assert torch.equal(run(built, x, kept), as_it_stands(built, x, kept))


def seen(built, x, kept, grad=False):
    """How many stages would run in one kernel each."""
    with torch.set_grad_enabled(grad):
        choices = fastseg.explain(lambda x: evaluation.unpool_and_decode(built, x, list(kept)), x)
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
def test_what_keeps_the_layers_as_they_stand(change, triton_backend, device, exact):
    """They give then what they give, through whatever was changed."""
    built, (x, kept) = decoder(device), pooled(device)
    change(built)
    built.to(device)
    # A stage whose norm has no running statistics stands alone; all else is seen in the decoder as a whole.
    assert seen(built, x, kept) == (built[0][0][1].running_mean is None)
    kept_state = [b.clone() for b in built.buffers()]
    found = run(built, x, kept)
    for buffer, before in zip(built.buffers(), kept_state, strict=True):
        buffer.copy_(before)
    torch.testing.assert_close(found, as_it_stands(built, x, kept))


def test_gradients_keep_the_layers_as_they_stand(triton_backend, device):
    built, (x, kept) = decoder(device), pooled(device)
    assert seen(built, x, kept, grad=True) == 0
    y = evaluation.unpool_and_decode(built, x, list(kept))
    y.sum().backward()
    assert all(p.grad is not None for p in built.parameters())


def test_a_hook_of_all_modules_keeps_the_layers_as_they_stand(triton_backend, device):
    built, (x, kept), calls = decoder(device), pooled(device), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: calls.append(type(module)))
    try:
        run(built, x, kept)
    finally:
        handle.remove()
    assert calls.count(blocks.Block) == 3 and calls.count(blocks.Stage) == 2


def test_float64_and_another_dtype_than_the_weights(triton_backend, device):
    built, (x, kept) = decoder(device, torch.float64), pooled(device, torch.float64)
    assert seen(built, x, kept) == 0
    torch.testing.assert_close(run(built, x, kept), as_it_stands(built, x, kept))
    x, offsets, weight, geometry = entrance((1, 4, 6), 8, 8, device, torch.float16)
    for dtype, there in ((torch.float16, True), (torch.float32, False)):  # which torch's convolution refuses
        y = unpool_conv_norm.max_unpool2d_conv2d_batch_norm_relu(
            x, offsets, weight.to(dtype), geometry, norm(8, device), None
        )
        assert (y is not None) == there


def test_autocast(triton_backend, device, monkeypatch):
    """In autocast's dtype, from weights in float32; a map of another dtype is left to the layers."""
    built, (x, kept) = decoder(device), pooled(device, torch.bfloat16)
    dtypes, run_one_kernel = [], unpool_conv.run_one_kernel

    def noted(input, offsets, weight, *rest):
        dtypes.append((input.dtype, weight.dtype))
        return run_one_kernel(input, offsets, weight, *rest)

    monkeypatch.setattr(unpool_conv, "run_one_kernel", noted)
    with torch.autocast(device, torch.bfloat16):
        assert seen(built, x, kept) == 2
        found, want = run(built, x, kept), as_it_stands(built, x, kept)
        assert seen(built, x.float(), kept) == 1  # the first convolution's output is bfloat16 again
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
    """Both ways of each stage are timed in the first run and never again, also not while a graph is captured."""
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
def test_other_decoders_stay(name, triton_backend, device):
    model = models.MODELS[name](width=0.01).to(device).eval()
    with torch.no_grad():
        choices = fastseg.explain(model, torch.randn(1, 3, 193, 193, device=device))
    assert unpool_conv_norm.NAME not in {choice.operator for choice in choices}


class Decoder(nn.Module):
    def __init__(self, built, sizes):
        super().__init__()
        self.stages, self.sizes = built, sizes

    def forward(self, x, *offsets):
        return evaluation.unpool_and_decode(self.stages, x, list(zip(offsets, self.sizes, strict=True)))


def test_compiled_and_exported_without_it(triton_backend, device):
    """A graph keeps the layers: what it holds was not decided by the machine that made it."""
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
