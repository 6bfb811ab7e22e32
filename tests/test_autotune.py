"""Which implementation is faster: times are measured once, kept and recorded, and decide each direction of a call."""

import itertools
import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from support.conv_transpose_common import STRIDE_2

import fastseg
from fastseg import autotune, dispatch
from fastseg.inspect.traffic import metering
from fastseg.ops.convolution import conv_transpose as functions
from fastseg.ops.convolution import conv_transpose_operators as operators
from fastseg.ops.convolution.options import Epilogue
from fastseg.torch_internals import FakeTensorMode

GPU = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0))  # the attributes of a tensor that are read
MACHINE = {"gpu": "H100", "driver": "1"}


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with a GPU where the kernels take 1 ms and torch 2 ms. Yields the list of timed calls."""
    timed = []

    def timer(ours, theirs):
        timed.append((ours(), theirs()))
        return 1.0, 2.0

    monkeypatch.setattr(autotune, "timer", timer)
    monkeypatch.setattr(autotune, "may_measure", lambda tensor: True)
    monkeypatch.setattr(autotune, "_machine", lambda index: MACHINE)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: MACHINE["gpu"])
    monkeypatch.setattr(autotune, "RECORDED", tmp_path / "recorded")
    monkeypatch.setenv("FASTSEG_CACHE", str(tmp_path / "cache"))
    for cached in (autotune._known, autotune._recorded):
        cached.cache_clear()
    yield timed
    for cached in (autotune._known, autotune._recorded):
        cached.cache_clear()


def ask(key="a", tensor=GPU):
    return autotune.times(key, tensor, lambda: (lambda: "ours", lambda: "theirs"))


def restart():
    autotune._known.cache_clear()
    autotune._recorded.cache_clear()


def test_a_call_is_timed_once_and_never_again(machine):
    assert ask() == ask() == (1.0, 2.0)
    restart()
    assert ask() == (1.0, 2.0)  # from the file
    assert machine == [("ours", "theirs")]
    ask("b")
    assert len(machine) == 2
    assert json.loads(autotune.cache_file(0).read_text()) == {
        "machine": MACHINE,
        "ms": {"a": [1.0, 2.0], "b": [1.0, 2.0]},
    }


def test_another_machine_has_another_file(machine, monkeypatch):
    before = autotune.cache_file(0)
    for change in ({"gpu": "H200"}, {"driver": "2"}):
        monkeypatch.setattr(autotune, "_machine", lambda index, change=change: MACHINE | change)
        assert autotune.cache_file(0) != before


def test_the_digest_of_the_kernels_follows_folders(tmp_path):
    """A change of any kernel makes measured times invalid."""
    (tmp_path / "package" / "family").mkdir(parents=True)
    (tmp_path / "link").symlink_to("package")
    kernel = tmp_path / "package" / "family" / "kernel.py"
    kernel.write_text("a")
    before = autotune.digest_of(tmp_path / "link")
    kernel.write_text("b")
    assert autotune.digest_of(tmp_path / "link") != before
    assert len(list(autotune.KERNELS.resolve().rglob("*.py"))) > 30


@pytest.mark.parametrize(
    "words",
    ["NVIDIA UNIX x86_64 Kernel Module  580.95.05  ", "NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release"],
)
def test_the_drivers_version(words, monkeypatch, tmp_path):
    monkeypatch.setattr(autotune, "DRIVER", tmp_path / "version")
    assert autotune._driver() is None
    autotune.DRIVER.write_text(f"NVRM version: {words} Tue Sep  9 2025\nGCC version:  gcc version 13.3.0\n")
    assert autotune._driver() == "580.95.05"


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"ms": {"a": 1}, "machine": {}}', '{"ms": {"a": [1, "x"]}}', "\x00"]
)
def test_a_damaged_file_counts_as_missing(machine, content):
    ask()
    autotune.cache_file(0).write_text(content)
    restart()
    assert ask() == (1.0, 2.0) and len(machine) == 2
    assert json.loads(autotune.cache_file(0).read_text())["ms"] == {"a": [1.0, 2.0]}


def test_a_read_only_folder_is_no_error(machine, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTSEG_CACHE", str(tmp_path / "file" / "below"))
    assert ask() == ask() == (1.0, 2.0) and len(machine) == 1


def test_results_of_other_processes_are_kept(machine):
    ask("a")
    path = autotune.cache_file(0)
    path.write_text(json.dumps({"machine": MACHINE, "ms": {"theirs": [3, 4]}}))
    ask("b")
    assert set(json.loads(path.read_text())["ms"]) == {"theirs", "b"}


def test_nothing_is_timed_unless_allowed(machine, monkeypatch):
    monkeypatch.setattr(autotune, "may_measure", lambda tensor: False)
    assert ask() is None
    assert ask(tensor=torch.empty(1)) is None  # on a CPU
    assert machine == []


def test_when_a_call_may_be_timed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    x = torch.empty(1)
    assert not autotune.may_measure(x)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    assert autotune.may_measure(x)
    with FakeTensorMode() as mode:
        assert not autotune.may_measure(mode.from_tensor(x))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not autotune.may_measure(x)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not autotune.may_measure(x)


def test_whether_any_time_may_be_known(machine, monkeypatch):
    assert autotune.may_know(GPU) and not autotune.may_know(torch.empty(1))
    monkeypatch.setattr(autotune, "may_measure", lambda tensor: False)
    assert not autotune.may_know(GPU)
    autotune.RECORDED.mkdir()
    (autotune.RECORDED / "a.json").write_text(json.dumps({"machine": MACHINE, "ms": {"a": [5, 4]}}))
    restart()
    assert autotune.may_know(GPU)
    (autotune.RECORDED / "a.json").unlink()
    restart()
    assert not autotune.may_know(GPU)
    autotune._remember(0, "a", (1.0, 2.0))
    restart()
    assert autotune.may_know(GPU)


def test_recorded_times_of_the_same_gpu_are_used_without_a_measurement(machine, monkeypatch):
    monkeypatch.setattr(autotune, "may_measure", lambda tensor: False)
    autotune.RECORDED.mkdir()
    for name in ("H100", "H200"):
        content = {"machine": {"gpu": name, "driver": "other"}, "ms": {f"of {name}": [5, 4]}}
        (autotune.RECORDED / f"{name}.json").write_text(json.dumps(content))
    assert ask("of H100") == (5.0, 4.0) and ask("of H200") is None
    monkeypatch.setattr(autotune, "may_measure", lambda tensor: True)
    assert ask("of H100") == (1.0, 2.0)


# --- what follows for conv_transpose2d -------------------------------------------------------------------------------


@pytest.fixture
def known(monkeypatch):
    """known(direction=(ours, theirs), ...): set the times of each direction, for any shape."""

    def know(**times):
        names = dict(zip(("forward", "of_input", "of_weight", "of_both"), operators.DIRECTIONS, strict=True))
        found = {names[name]: took for name, took in times.items()}
        monkeypatch.setattr(
            autotune, "times", lambda key, *rest: next((t for way, t in found.items() if repr(way) in key), None)
        )

    return know


def tensors():
    return [torch.randn(shape) for shape in ((1, 8, 4, 4), (8, 8, 2, 2), (8,))]


def wide_tensors():
    """Tensors large enough for one kernel to compute both gradients."""
    return [torch.randn(shape) for shape in ((1, 8, 4, 8), (8, 16, 2, 2), (16,))]


class OnGPU(torch.Tensor):
    """A CPU tensor that claims to be on a GPU, for code that computes nothing."""

    is_cuda, device = True, torch.device("cuda", 0)


def chosen(x, weight, bias=None):
    """(whether torch runs the whole call, {direction: (backend, reason)})."""
    with dispatch._watched.replaced([]) as choices, fastseg.backend("auto"):
        torch_alone = functions._falls_back_to_torch(x.as_subclass(OnGPU), weight, STRIDE_2, Epilogue(bias))
    return torch_alone, {choice.operator: (choice.backend, choice.reason) for choice in choices}


def test_each_direction_is_chosen_for_itself(known):
    known(forward=(2.0, 1.0), of_input=(1.0, 3.0))
    x, weight, bias = (t.requires_grad_() for t in tensors())
    assert chosen(x, weight, bias) == (
        False,
        {
            "conv_transpose2d": ("torch", "2 ms on the kernels, 1 ms on cuDNN"),
            "conv_transpose2d, gradient of input": ("triton", "1 ms on the kernels, 3 ms on cuDNN"),
            "conv_transpose2d, gradient of weight": ("torch", operators.UNMEASURED),
        },
    )


def test_without_triton_nothing_is_known_and_no_kernel_is_loaded(monkeypatch):
    """As on Windows, where torch finds a GPU but triton is not installed."""
    loaded = []
    monkeypatch.setattr(dispatch, "TRITON_INSTALLED", False)
    monkeypatch.setattr(autotune, "_machine", loaded.append)
    monkeypatch.setattr(functions, "gradient_directions", lambda *arguments: loaded.append(arguments))
    assert ask() is None and not autotune.may_know(GPU)
    assert chosen(*(t.bfloat16().requires_grad_() for t in wide_tensors()))[0]
    assert loaded == []


def test_gradients_that_are_not_needed_do_not_count(known):
    known(forward=(2.0, 1.0), of_input=(1.0, 3.0))
    x, weight, _ = tensors()
    assert chosen(x, weight.requires_grad_())[0]
    assert set(chosen(x, weight)[1]) == {"conv_transpose2d", "conv_transpose2d, gradient of weight"}
    with torch.no_grad():
        assert set(chosen(x.requires_grad_(), weight)[1]) == {"conv_transpose2d"}


def test_a_compiled_call_chooses_when_it_runs(known, monkeypatch):
    known()
    x, weight, _ = tensors()
    assert chosen(x, weight)[0]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert chosen(x, weight) == (False, {})


def test_gradients_of_one_kernel_are_chosen_together(known):
    known(forward=(2.0, 1.0), of_both=(1.0, 3.0))
    x, weight, bias = (t.bfloat16().requires_grad_() for t in wide_tensors())
    torch_alone, found = chosen(x, weight, bias)
    assert not torch_alone and set(found) == {"conv_transpose2d", "conv_transpose2d, gradients of input and weight"}
    assert found["conv_transpose2d, gradients of input and weight"][0] == "triton"
    known(forward=(2.0, 1.0), of_both=(3.0, 1.0), of_input=(1.0, 3.0), of_weight=(1.0, 3.0))
    assert chosen(x, weight, bias)[0]
    assert not chosen(x, weight.detach(), bias)[0], "one gradient alone is timed alone"


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts what is launched where it is interpreted")
@pytest.mark.parametrize("ours", [False, True])
def test_the_backward_runs_both_gradients_where_they_are_faster(ours, known):
    known(of_both=(1.0, 2.0 if ours else 0.5))
    x, weight, _ = (t.bfloat16() for t in wide_tensors())
    arguments = (x, weight, STRIDE_2, [True] * 3, None)
    grad = torch.randn(1, 16, 8, 16).bfloat16()
    with fastseg.backend("auto"), metering() as launches:
        found = operators._conv_transpose2d_backward_kernel(grad, *arguments)
    assert ("bwd_shuffle" in str([traffic.kernel for traffic in launches])) == ours
    for a, b in zip(found, operators._conv_transpose2d_backward_reference(grad, *arguments), strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.05)


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts what is launched where it is interpreted")
@pytest.mark.parametrize("ours", list(itertools.product([False, True], repeat=2)))
@pytest.mark.parametrize("relu", [False, True])
def test_the_backward_runs_each_direction_where_it_is_faster(ours, relu, known):
    known(of_input=(1.0, 2.0 if ours[0] else 0.5), of_weight=(1.0, 2.0 if ours[1] else 0.5))
    x, weight, bias = tensors()
    y = F.conv_transpose2d(x, weight, bias, 2)
    arguments = (x, weight, STRIDE_2, [True] * 3, y.relu() if relu else None)
    grad = torch.randn_like(y)
    with fastseg.backend("auto"), metering() as launches:
        found = operators._conv_transpose2d_backward_kernel(grad, *arguments)
    launched = str([traffic.kernel for traffic in launches])
    assert ("bwd_input" in launched, "bwd_weight" in launched) == ours
    for a, b in zip(found, operators._conv_transpose2d_backward_reference(grad, *arguments), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_the_key_has_everything_that_the_time_depends_on(monkeypatch):
    keys = []
    monkeypatch.setattr(autotune, "times", lambda key, *rest: keys.append(key))
    x, weight, bias = tensors()
    geometry = STRIDE_2
    operators.preferred(operators.FORWARD, x, weight, geometry)
    operators.preferred(operators.OF_INPUT, x, weight, geometry)
    operators.preferred(operators.FORWARD, x[..., :3], weight, geometry)
    operators.preferred(operators.FORWARD, x, weight[:, :4], geometry)
    operators.preferred(operators.FORWARD, x.to(memory_format=torch.channels_last), weight, geometry)
    operators.preferred(operators.FORWARD, x, weight, geometry, dtype=torch.float16)
    operators.preferred(operators.FORWARD, x, weight, geometry._replace(stride=[2, 1]))
    operators.preferred(operators.FORWARD, x, weight, geometry, Epilogue(bias))
    operators.preferred(operators.FORWARD, x, weight, geometry, Epilogue(bias, bias))
    operators.preferred(operators.FORWARD, x, weight, geometry, Epilogue(bias, bias, True))
    assert len(set(keys)) == len(keys) == 10


def test_a_gradient_has_one_key_in_the_forward_and_in_the_backward(monkeypatch):
    """The forward passes its bias, the operator of the backward does not."""
    keys = []
    monkeypatch.setattr(autotune, "times", lambda key, *rest: keys.append(key))
    x, weight, bias = tensors()
    operators.preferred(operators.OF_INPUT, x, weight, STRIDE_2, Epilogue(bias))
    operators.preferred(operators.OF_INPUT, x, weight, STRIDE_2)
    assert keys[0] == keys[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the clock of this test is a CPU's")
def test_the_timed_calls_are_the_calls_that_run(machine, monkeypatch):
    """Both calls of each direction give the same results, except for the order of summation."""
    x, weight, bias = tensors()
    geometry = STRIDE_2
    monkeypatch.setattr(
        autotune, "times", lambda key, tensor, calls: machine.append([call() for call in calls()]) or (1.0, 2.0)
    )
    for way in operators.DIRECTIONS:
        assert operators.preferred(way, x, weight, geometry, Epilogue(bias)) == (
            "triton",
            "1 ms on the kernels, 2 ms on cuDNN",
        )
    torch.testing.assert_close(machine[0][0], machine[0][1])
    for ours, theirs in machine[1:]:
        for a, b in zip(ours, theirs, strict=True):
            assert (b is None and a.numel() == 0) or torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4) is None


@pytest.mark.gpu
def test_on_a_gpu(monkeypatch, tmp_path):
    """Calls are timed once, and never while a graph is captured."""
    monkeypatch.setenv("FASTSEG_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    restart()
    try:
        x, weight, bias = (t.cuda().requires_grad_() for t in tensors())
        with fastseg.backend("auto"):
            y = fastseg.functional.conv_transpose2d(x, weight, bias, 2)
            y.backward(torch.randn_like(y))
            kept = json.loads(autotune.cache_file(0).read_text())["ms"]
            assert len(kept) == 3 and all(min(took) > 0 for took in kept.values())
            graph = torch.cuda.CUDAGraph()
            with torch.no_grad(), torch.cuda.graph(graph):
                fastseg.functional.conv_transpose2d(x[..., :3].contiguous(), weight, bias, 2)
        assert len(autotune._known(0)) == 3
        torch.testing.assert_close(y, F.conv_transpose2d(x, weight, bias, 2))
    finally:
        restart()
