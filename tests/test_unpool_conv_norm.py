"""SegNet's decoder in evaluation: unpooling, convolution and norms in one kernel, or the layers as they stand."""

import json
import os
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastseg
from fastseg import dispatch, faster, models
from fastseg import functional as FS
from fastseg.inspect.traffic import metering
from fastseg.models import blocks, evaluation
from fastseg.ops import unpool_conv, unpool_conv_norm
from fastseg.ops.unpool_conv_norm import MAX_UNPOOL2D_CONV2D_BATCH_NORM_RELU as OPERATOR
from fastseg.ops.unpool_conv_norm import NO_NORM

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="counts what is launched where it is interpreted")
GEOMETRY = ([2, 2], [2, 2], [0, 0])
JOINED = ["batch_norm_relu_fwd_kernel", "max_unpool2d_conv2d_fwd_kernel"]
APART = ["bn_relu_max_unpool2d_fwd_kernel", "batch_norm_relu_fwd_kernel"]


@pytest.fixture
def exact():
    """Products of float32 as they are, for cuDNN too."""
    before, torch.backends.cudnn.conv.fp32_precision = torch.backends.cudnn.conv.fp32_precision, "ieee"
    yield
    torch.backends.cudnn.conv.fp32_precision = before


def norm(channels, device, shifted=True, affine=True, relu=True, dtype=torch.float32):
    """mean, shift, var, weight, bias, eps, relu: away from where they start."""
    vectors = [torch.randn(channels, device=device) * 0.3 for _ in range(5)]
    mean, shift, var, weight, bias = (v.to(dtype) for v in vectors)
    var, weight = var.abs() + 0.5, weight + 1
    pair = (weight, bias) if affine else (None, None)
    return mean, shift if shifted else None, var, *pair, 1e-3, relu


def entrance(size, channels, outputs, device, dtype=torch.float32, layout=torch.channels_last):
    """(pooled map, offsets, weight, geometry) of an unpooling to `size` and a convolution."""
    image = torch.randn(size[0], channels, *size[1:]).to(device, dtype).contiguous(memory_format=layout)
    x, offsets = FS.max_pool2d_with_offsets(image, 2, ceil_mode=True)
    weight = (torch.randn(outputs, channels, 3, 3, device=device) / (3 * channels**0.5)).to(dtype)
    return x, offsets, weight.contiguous(memory_format=layout), (*GEOMETRY, list(size[1:]))


def launched(call):
    with metering() as launches:
        result = call()
    return result, [traffic.kernel for traffic in launches]


# --- the operator ----------------------------------------------------------------------------------------------------


def layers(x, offsets, weight, geometry, behind, before):
    """torch's own functions, one behind the other, a bias added where a layer would add it."""

    def normalised(y, mean, shift, var, weight, bias, eps, relu):
        y = F.batch_norm(y if shift is None else y + shift[:, None, None], mean, var, weight, bias, eps=eps)
        return y.relu() if relu else y

    x = x if before is None else normalised(x, *before)
    indices = FS.offsets_to_indices(offsets, *geometry[:3], width=geometry[3][1])
    return normalised(F.conv2d(F.max_unpool2d(x, indices, *geometry), weight, padding=1), *behind)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "size, channels, outputs, dtype, behind, before",
    [
        ((2, 4, 6), 16, 24, torch.float32, {}, {}),
        ((1, 7, 5), 5, 3, torch.float32, {"relu": False}, None),
        ((1, 3, 4), 72, 8, torch.float16, {"shifted": False}, {"relu": False}),
        ((1, 5, 6), 8, 40, torch.bfloat16, {"affine": False}, {"shifted": False, "affine": False}),
        ((1, 4, 4), 8, 8, torch.float16, {"dtype": torch.float16}, {"dtype": torch.float16}),
    ],
)
def test_output(size, channels, outputs, dtype, behind, before, layout, device, triton_backend, exact):
    x, offsets, weight, geometry = entrance(size, channels, outputs, device, dtype, layout)
    behind = norm(outputs, device, **behind)
    before = None if before is None else norm(channels, device, **before)
    with fastseg.verify.poisoned():
        ours = OPERATOR(x, offsets, weight, *geometry, *behind, *(before or NO_NORM))

    def in_double(values):
        return tuple(t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in values)

    truth = layers(*in_double((x, offsets, weight)), geometry, in_double(behind), before and in_double(before))
    with fastseg.backend("torch"):
        theirs = OPERATOR(x, offsets, weight, *geometry, *behind, *(before or NO_NORM))
    allowed = fastseg.verify.relative_error(theirs, truth) + 8 * torch.finfo(dtype).eps
    assert fastseg.verify.relative_error(ours, truth) <= allowed
    assert (ours.shape, ours.dtype, ours.stride()) == (theirs.shape, dtype, theirs.stride())


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("before", [False, True])
def test_opcheck(backend, before, device):
    x, offsets, weight, geometry = entrance((2, 5, 6), 4, 3, device)
    with fastseg.backend(backend):
        norms = (*norm(3, device), *(norm(4, device) if before else NO_NORM))
        torch.library.opcheck(OPERATOR.op, (x, offsets, weight, *geometry, *norms))


@interpreted
@pytest.mark.parametrize("before", [False, True])
def test_what_is_timed_is_what_would_run(before, triton_backend, monkeypatch):
    """All of it both ways, the norm in front of the unpooling too, and both give the same."""
    x, offsets, weight, geometry = entrance((2, 6, 8), 8, 8, "cpu", torch.float16)
    norms = (*norm(8, "cpu"), *(norm(8, "cpu") if before else NO_NORM))
    timed = []
    monkeypatch.setattr(faster, "times", lambda key, tensor, calls: timed.extend(map(launched, calls())) or (1.0, 2.0))
    said = "1 ms in one kernel, 2 ms by way of the unpooled map"
    assert OPERATOR.preferred(x, offsets, weight.float(), *geometry, *norms) == ("triton", said)
    (ours, joined), (theirs, apart) = timed
    torch.testing.assert_close(ours, theirs, rtol=5e-3, atol=5e-3)
    assert joined == (JOINED if before else JOINED[1:])
    assert apart == (APART if before else ["max_unpool2d_fwd_kernel", APART[1]])


def test_a_call_is_known_by_all_that_its_time_depends_on(monkeypatch):
    keys = []
    monkeypatch.setattr(faster, "times", lambda key, *rest: keys.append(key))
    x, offsets, weight, _ = entrance((2, 6, 8), 8, 8, "cpu")

    def ask(x=x, weight=weight, size=(6, 8), before=NO_NORM):
        OPERATOR.preferred(x, offsets, weight, *GEOMETRY, list(size), *norm(8, "cpu"), *before)

    ask()
    ask(x[:1])
    ask(x.half())
    ask(x.contiguous(), weight.contiguous())
    ask(x, weight[:4])
    ask(x, weight, (5, 8))
    ask(x, weight, (6, 8), norm(8, "cpu"))
    ask(x, weight, (6, 8), norm(8, "cpu", relu=False))
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    ask()
    assert len(set(keys)) == len(keys) == 9


@interpreted
@pytest.mark.parametrize("before", [False, True])
def test_gate_bytes(before, triton_backend):
    """Sectors both ways, the convolution that the layers take being at its floor: the share that docs state."""
    x, offsets, weight, geometry = entrance((1, 24, 32), 16, 16, "cpu", torch.float16)
    norms = (*norm(16, "cpu"), *(norm(16, "cpu") if before else NO_NORM))
    arguments, moved = (x, offsets, weight, *geometry, *norms), []
    for way in (unpool_conv_norm._joined, unpool_conv_norm._apart):
        with metering() as launches:
            way(*arguments)
        assert all(traffic.outside == 0 for traffic in launches)
        moved.append(sum(traffic.sectors() for traffic in launches))
    pooled, weights = x.numel(), 2 * weight.numel()
    assert moved[0] <= 1.05 * (pooled * (15 if before else 11) + weights)
    apart = moved[1] + pooled * (8 + 8) + weights  # the convolution's own
    assert apart == pytest.approx(pooled * 43 + weights, rel=0.05)


COMPILED = """
import json, sys
sys.path.insert(0, "tests")
import torch
import test_unpool_conv_norm as tests
from fastseg import dispatch
from fastseg.inspect.codegen import compile_for, disassemble, record
def launches(channels, h, w):
    x, offsets = torch.empty(8, channels, h, w, dtype=torch.bfloat16), torch.empty(8, channels, h, w, dtype=torch.uint8)
    weight = torch.empty(channels, channels, 3, 3, dtype=torch.bfloat16)
    images = (t.to(memory_format=torch.channels_last) for t in (x, offsets, weight))
    norms = [*(torch.empty(channels) for _ in range(5)), 1e-5, True, *tests.NO_NORM]
    arguments = (*images, *tests.GEOMETRY, [2 * h, 2 * w], *norms)
    return record(lambda: tests.unpool_conv_norm._joined(*arguments))

with torch.device("meta"), dispatch.backend("triton"):
    found = launches(128, 90, 120) + launches(64, 180, 240)
kernels = [compile_for(launch, 90) for launch in found]
disassemble(kernels)
print(json.dumps([[k.name, k.spills, k.count("HGMMA"), list(k.widths("STG"))] for k in kernels]))
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled in a process of their own")
def test_gate_machine_code():
    """At SegNet's widths, with the norm in the epilogue: no spills, tensor cores, stores of 16 bytes."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    found = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, env=env)
    assert found.returncode == 0, found.stderr
    rows = json.loads(found.stdout)
    assert [row[0] for row in rows] == JOINED[1:] * 2
    for _, spills, products, stores in rows:
        assert spills == 0 and products > 0 and stores == [16]


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
    decide, times, may_know = dispatch._decide, faster.times, faster.may_know
    gpu = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0))
    monkeypatch.setattr(dispatch, "torch_alone", lambda tensor: dispatch.get_backend() == "torch")
    monkeypatch.setattr(dispatch, "_decide", lambda operator, device, *rest: decide(operator, "cuda", *rest))
    monkeypatch.setattr(faster, "times", lambda key, tensor, calls: times(key, gpu, calls))
    monkeypatch.setattr(faster, "may_know", lambda tensor: may_know(gpu))
    monkeypatch.setattr(faster, "may_measure", lambda tensor: torch.backends.cudnn.benchmark)
    monkeypatch.setattr(faster, "_machine", lambda index: {"gpu": "H100"})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "H100")
    monkeypatch.setattr(faster, "RECORDED", tmp_path / "recorded")
    monkeypatch.setenv("FASTSEG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    for cached in (faster._known, faster._recorded):
        cached.cache_clear()
    with fastseg.backend("auto"):
        yield
    for cached in (faster._known, faster._recorded):
        cached.cache_clear()


@interpreted
@pytest.mark.parametrize("wins", [(True, True), (True, False), (False, True), (False, False)])
def test_each_stage_goes_where_it_is_faster(wins, on_a_gpu, monkeypatch):
    """Measured at the first run, in the order of the stages, and never again; explain tells it."""
    built, (x, kept), left = decoder(), pooled(), list(wins)
    monkeypatch.setattr(faster, "timer", lambda ours, theirs: (1.0, 2.0) if left.pop(0) else (2.0, 1.0))
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
    dtypes, in_one_kernel = [], unpool_conv.in_one_kernel

    def noted(input, offsets, weight, *rest):
        dtypes.append((input.dtype, weight.dtype))
        return in_one_kernel(input, offsets, weight, *rest)

    monkeypatch.setattr(unpool_conv, "in_one_kernel", noted)
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
    faster._known.cache_clear()
    try:
        model = models.SegNet(width=0.25).cuda().bfloat16().to(memory_format=torch.channels_last).eval()
        x = torch.randn(2, 3, 96, 128, device="cuda").bfloat16().contiguous(memory_format=torch.channels_last)
        with fastseg.backend("auto"), torch.no_grad():
            y = model(x)
            kept = json.loads(faster.cache_file(0).read_text())["ms"]
            assert len(kept) == 5 and all(key.startswith(unpool_conv_norm.NAME) for key in kept)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = model(x)
            graph.replay()
        assert len(faster._known(0)) == 5
        torch.testing.assert_close(captured, y)
        with torch.no_grad(), fastseg.backend("torch"):
            torch.testing.assert_close(y, model(x), rtol=0.05, atol=0.05 * float(y.abs().max()))
    finally:
        faster._known.cache_clear()


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
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for run in (program.module(), compiled):
            torch.testing.assert_close(run(x, *offsets), want, rtol=1e-2, atol=1e-2)  # TF32 on a GPU
