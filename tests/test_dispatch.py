import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import fastseg
from fastseg import dispatch
from fastseg import functional as FS
from fastseg.commands import doctor

CUDA = torch.device("cuda")


def python(code, **environment):
    """Run code in a fresh process; (exit code, output)."""
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FASTSEG_BACKEND")} | environment
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    return run.returncode, run.stdout + run.stderr


def test_the_setting_is_put_back():
    assert fastseg.get_backend() == "auto"
    with pytest.raises(KeyError), fastseg.backend("torch"):
        with fastseg.backend("triton"):
            assert fastseg.get_backend() == "triton"
        assert fastseg.get_backend() == "torch"
        raise KeyError
    assert fastseg.get_backend() == "auto"


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"'cudnn'.*'auto'"):
        fastseg.set_backend("cudnn")
    code, output = python("import fastseg; fastseg.get_backend()", FASTSEG_BACKEND="fast")
    assert code != 0 and "FASTSEG_BACKEND is 'fast'" in output


def test_the_environment_sets_the_backend():
    assert python("import fastseg; print(fastseg.get_backend())", FASTSEG_BACKEND="torch") == (0, "torch\n")


def test_triton_on_a_cpu_tensor_says_what_it_needs():
    code, output = python(
        "import torch, fastseg; fastseg.set_backend('triton');fastseg.functional.max_pool2d(torch.zeros(1, 1, 4, 4), 2)"
    )
    assert code != 0 and "RuntimeError" in output and "TRITON_INTERPRET=1" in output


def test_works_without_triton_and_cupy():
    code, output = python(
        "import sys; sys.modules['triton'] = None; sys.modules['cupy'] = None\n"
        "import torch, fastseg\n"
        "print(fastseg.functional.max_pool2d(torch.ones(1, 1, 4, 4), 2).sum().item())\n"
        "fastseg.set_backend('triton')\n"
        "try: fastseg.functional.max_pool2d(torch.ones(1, 1, 4, 4), 2)\n"
        "except RuntimeError as error: print(error)\n"
        "fastseg.set_backend('cuda')\n"
        "try: fastseg.functional.max_pool2d(torch.ones(1, 1, 4, 4), 2)\n"
        "except RuntimeError as error: print(error)\n"
        "from fastseg.kernels.cuda.pooling import pool, unpool\n"
        "from fastseg.kernels.cuda.losses import cross_entropy, cross_entropy_bwd\n"
    )
    assert code == 0 and output.startswith("4.0\n") and "triton is not installed" in output
    assert "CuPy, which is not installed" in output


@pytest.mark.interpreted
def test_explain_names_each_operator_and_computes_nothing():
    x = torch.zeros(1, 4, 8, 8, requires_grad=True)

    def step(x):
        y, indices = FS.max_pool2d(x, 2, return_indices=True)
        return FS.max_unpool2d(y, indices, 2)

    assert [(c.operator, c.backend) for c in fastseg.explain(step, x)] == [
        ("max_pool2d", "torch"),
        ("max_unpool2d", "torch"),
    ]
    with fastseg.backend("triton"):
        assert {c.backend for c in fastseg.explain(step, x)} == {"triton"}


def supported(backend):
    """A call that every backend's kernels support."""
    return None


@pytest.mark.parametrize(
    "device, missing, preferred, backend, reason",
    [
        ("cuda", None, None, "triton", "supported"),
        ("cuda", "dilation 2", None, "torch", "dilation 2"),
        ("cuda", None, ("torch", "cuDNN is faster"), "torch", "cuDNN"),
        ("cuda", None, ("triton", "faster than cuDNN"), "triton", "cuDNN"),
        ("cuda", "dilation 2", ("triton", "faster than cuDNN"), "torch", "dilation 2"),
        ("cpu", None, None, "torch", "CPU"),
        ("mps", None, None, "torch", "mps"),
    ],
)
def test_auto(device, missing, preferred, backend, reason):
    choice = dispatch._decide("op", torch.device(device), dispatch.only_triton(missing), preferred)
    assert choice.backend == backend and reason in choice.reason


@pytest.mark.parametrize(
    "missing, preferred, no_compiler, backend, reason",
    [
        (None, None, None, "cpu", "supported by the CPU kernels"),
        ("dilation 2", None, None, "torch", "do not support dilation 2"),
        (None, ("torch", "torch is faster"), None, "torch", "faster"),
        ("dilation 2", ("torch", "torch is faster"), None, "torch", "dilation 2"),
        (None, None, "no C++ compiler is found", "torch", "a CPU tensor, and no C++ compiler is found"),
        (dispatch.NO_KERNELS, None, "no C++ compiler is found", "torch", "a CPU tensor"),
    ],
)
def test_auto_on_a_cpu(monkeypatch, missing, preferred, no_compiler, backend, reason):
    monkeypatch.setattr(dispatch, "without_cpu_kernels", lambda: no_compiler)
    unsupported = {"cpu": missing, "triton": None, "cuda": None}.get
    choice = dispatch._decide("op", torch.device("cpu"), unsupported, preferred)
    assert choice.backend == backend and reason in choice.reason


def test_the_cpu_kernels_when_requested(monkeypatch):
    with fastseg.backend("cpu"):
        with pytest.raises(RuntimeError, match=r"op: backend 'cpu' runs on CPU tensors, not on device type 'cuda'"):
            dispatch._decide("op", CUDA, supported, None)
        with pytest.raises(NotImplementedError, match="the CPU kernels do not support dilation 2"):
            dispatch._decide("op", torch.device("cpu"), lambda backend: "dilation 2", None)
        monkeypatch.setattr(dispatch, "without_cpu_kernels", lambda: None)
        assert dispatch._decide("op", torch.device("cpu"), supported, None).backend == "cpu"
        monkeypatch.setattr(dispatch, "without_cpu_kernels", lambda: "no C++ compiler is found")
        with pytest.raises(RuntimeError, match=r"cannot run: no C\+\+ compiler is found"):
            dispatch._decide("op", torch.device("cpu"), supported, None)


def test_where_every_call_falls_back_to_torch(monkeypatch):
    on_gpu, on_cpu = (SimpleNamespace(device=torch.device(kind)) for kind in ("cuda", "cpu"))
    for reason in (None, "no C++ compiler is found"):
        monkeypatch.setattr(dispatch, "without_cpu_kernels", lambda reason=reason: reason)
        assert dispatch.torch_alone(on_cpu) is (reason is not None) and not dispatch.torch_alone(on_gpu)
        assert dispatch.left_to_torch("no kernels", torch.zeros(1))
    for setting, alone in (("triton", False), ("cuda", False), ("cpu", False), ("torch", True)):
        with fastseg.backend(setting):
            assert dispatch.torch_alone(on_cpu) is dispatch.torch_alone(on_gpu) is alone
    monkeypatch.setattr(dispatch, "TRITON_INSTALLED", False)
    monkeypatch.setattr(dispatch, "CUPY_INSTALLED", False)
    assert dispatch.torch_alone(on_gpu)
    with pytest.raises(TypeError, match="input must be a Tensor"):
        fastseg.nn.MaxPool2d(2)([1])


def test_forward_mode_falls_back_to_torch_unless_kernels_are_requested():
    with torch.autograd.forward_ad.dual_level():
        assert dispatch._decide("op", CUDA, dispatch.only_triton(None), None).reason.startswith("inside forward-mode")
        with fastseg.backend("triton"):
            assert dispatch._decide("op", CUDA, dispatch.only_triton(None), None).backend == "triton"
    assert dispatch._decide("op", CUDA, dispatch.only_triton(None), None).backend == "triton"


def test_triton_overrules_what_is_preferred_but_not_what_is_unsupported(triton_backend):
    assert dispatch._decide("op", CUDA, dispatch.only_triton(None), ("torch", "cuDNN is faster")).backend == "triton"
    with pytest.raises(NotImplementedError, match=r"op: .*dilation 2"):
        dispatch._decide("op", CUDA, dispatch.only_triton("dilation 2"), None)
    with pytest.raises(RuntimeError, match="mps"):
        dispatch._decide("op", torch.device("mps"), dispatch.only_triton(None), None)


@pytest.mark.parametrize(
    "cupy, missing, backend, reason",
    [
        (True, None, "cuda", "triton is not installed; a CUDA tensor"),
        (True, "this operator", "torch", "CUDA C\\+\\+ kernels do not support this operator"),
        (False, None, "torch", "triton is not installed"),
    ],
)
def test_auto_without_triton(cupy, missing, backend, reason, monkeypatch):
    monkeypatch.setattr(dispatch, "TRITON_INSTALLED", False)
    monkeypatch.setattr(dispatch, "CUPY_INSTALLED", cupy)
    choice = dispatch._decide(
        "op", CUDA, {"triton": "any of it", "cuda": missing}.get, ("torch", "cuDNN is faster than Triton")
    )
    assert choice.backend == backend and re.match(f".*{reason}", choice.reason)
    assert dispatch._decide("op", torch.device("cpu"), dispatch.only_triton(None), None).backend == "torch"


@pytest.fixture
def turing(monkeypatch):
    """torch's facts of a GPU of compute capability 7.5."""
    monkeypatch.setattr(dispatch, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(major=7, minor=5))
    dispatch._capability_once.cache_clear()
    yield
    dispatch._capability_once.cache_clear()


@pytest.mark.parametrize("cupy, backend", [(True, "cuda"), (False, "torch")])
def test_a_gpu_too_old_for_triton(cupy, backend, turing, monkeypatch):
    monkeypatch.setattr(dispatch, "CUPY_INSTALLED", cupy)
    said = "triton needs a GPU of compute capability 8.0 or later, and this one has 7.5"
    choice = dispatch._decide("op", CUDA, supported, None)
    assert choice.backend == backend and choice.reason.startswith(said)
    assert dispatch.torch_alone(SimpleNamespace(device=CUDA)) is (not cupy)
    advice = doctor._advice({"cuda": "13.0"})
    assert advice.startswith(said) and ("take the CUDA C++ kernels" in advice) is cupy
    with fastseg.backend("triton"), pytest.raises(RuntimeError, match=f"op: backend 'triton' cannot run: {said}"):
        dispatch._decide("op", CUDA, dispatch.only_triton(None), None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(major=8, minor=0))
    dispatch._capability_once.cache_clear()
    assert dispatch._decide("op", CUDA, dispatch.only_triton(None), None).backend == "triton"


@pytest.mark.gpu
def test_the_gpu_is_asked_for_within_a_graph():
    """torch.compile takes the answer for a constant: no break."""

    @torch.compile(fullgraph=True, backend="eager")
    def lacking(x):
        return x + (1 if dispatch.without_triton(CUDA) is None else 2)

    assert lacking(torch.zeros(1)).item() == 1


def test_cuda_says_what_it_needs(monkeypatch):
    with fastseg.backend("cuda"):
        with pytest.raises(NotImplementedError, match=r"op: the CUDA C\+\+ kernels do not support this operator"):
            dispatch._decide("op", CUDA, dispatch.only_triton(None), None)
        monkeypatch.setattr(dispatch, "CUPY_INSTALLED", False)
        with pytest.raises(RuntimeError, match=r"fastseg-kernels\[cuda12\]"):
            FS.max_pool2d(torch.zeros(1, 1, 4, 4), 2)
        monkeypatch.setattr(dispatch, "CUPY_INSTALLED", True)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(RuntimeError, match="needs a CUDA GPU"):
            FS.max_pool2d(torch.zeros(1, 1, 4, 4), 2)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        for device in ("cpu", "mps"):
            with pytest.raises(RuntimeError, match="runs on CUDA tensors"):
                dispatch._decide("op", torch.device(device), supported, None)
        assert dispatch._decide("op", CUDA, {"triton": "any of it", "cuda": None}.get, None).backend == "cuda"


def test_explain_leaves_a_model_as_it_was():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), fastseg.nn.MaxPool2d(2))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert [c.operator for c in fastseg.explain(model, torch.randn(2, 3, 8, 8))] == ["max_pool2d"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_explain_leaves_shared_modules_and_tied_parameters_as_they_were():
    norm = torch.nn.BatchNorm2d(3)
    convs = [torch.nn.Conv2d(3, 3, 1) for _ in range(2)]
    convs[1].weight = convs[0].weight
    model = torch.nn.Sequential(convs[0], norm, convs[1], norm, fastseg.nn.MaxPool2d(2))
    before = [model.state_dict(keep_vars=True)[name] for name in model.state_dict()]
    assert [c.operator for c in fastseg.explain(model, torch.randn(2, 3, 8, 8))] == ["max_pool2d"]
    assert all(a is b for a, b in zip(model.state_dict(keep_vars=True).values(), before, strict=True))


def test_interpreting_after_triton_is_loaded_is_refused():
    code, output = python("import triton, fastseg.dispatch as d; d.interpret_kernels()")
    assert code != 0 and "triton is imported already" in output


def test_the_checkout_lends_the_package_its_kernels_alone():
    code, output = python("import fastseg.kernels, fastseg.tests")
    assert code != 0 and "No module named 'fastseg.tests'" in output
