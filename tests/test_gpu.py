"""Tests of every operator that need a GPU: repeated runs, streams, CUDA graphs, large tensors and autocast."""

import pytest
import torch
from support import witness

import fastseg
from fastseg.torch_internals import sleep_on_gpu
from fastseg.verification import cases, operators

gpu = pytest.mark.gpu
CASES = [(operator, number) for operator, sizes in operators.SIZES.items() for number in range(len(sizes))]
REPEATS = 2 if witness.opened() else 100  # without a GPU each run takes a second


def made(operator, number, dtype, layout, device="cuda"):
    return list(operators.SIZES[operator][number](cases.Placement(dtype, layout, device)))


def tensors(result):
    return [t for t in (result if isinstance(result, (tuple, list)) else [result]) if isinstance(t, torch.Tensor)]


def identical(first, second):
    """Whether all tensors are equal, with NaN equal to NaN. It stays on the device, so that runs are not delayed."""
    pairs = zip(first, second, strict=True)
    return torch.stack([((a == b) | ((a != a) & (b != b))).all() for a, b in pairs]).all()


def steps(case):
    """The forward and, if there is one, the backward, as functions without arguments."""
    backward = case.step(case.ours, True)
    return [case.step(case.ours, False), backward]


@gpu
@pytest.mark.parametrize("layout", cases.LAYOUTS.values(), ids=cases.LAYOUTS)
@pytest.mark.parametrize(("operator", "number"), CASES)
def test_a_hundred_runs_are_bitwise_equal(operator, number, layout, triton_backend):
    torch.use_deterministic_algorithms(True)
    try:
        for case in made(operator, number, torch.float16, layout):
            for step in steps(case):
                first = [t.clone() for t in tensors(step())]
                same = torch.stack([identical(first, tensors(step())) for _ in range(REPEATS)])
                assert same.all(), f"{case.operator} {case.size}: {int((~same).sum())} of {REPEATS} runs differ"
    finally:
        torch.use_deterministic_algorithms(False)


@gpu
@pytest.mark.parametrize(("operator", "number"), CASES)
def test_on_another_stream(operator, number, triton_backend):
    """The inputs are written late on another stream. Kernels on the default stream would read the old values."""
    stream = torch.cuda.Stream()
    for case in made(operator, number, torch.bfloat16, torch.channels_last):
        want = tensors(case.step(case.ours, False)())
        with torch.cuda.stream(stream):
            late = {
                name: torch.zeros_like(t) if isinstance(t, torch.Tensor) and t.is_floating_point() else t
                for name, t in case.inputs.items()
            }
            sleep_on_gpu(20_000_000)
            for name, t in late.items():
                if isinstance(t, torch.Tensor) and t.is_floating_point():
                    t.copy_(case.inputs[name])
            got = tensors(case.ours(*late.values()))
        stream.synchronize()
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@gpu
@pytest.mark.parametrize(("operator", "number"), CASES)
def test_replayed_from_a_cuda_graph(operator, number, triton_backend):
    for case in made(operator, number, torch.bfloat16, torch.channels_last):
        if case.inputs and any(isinstance(t, torch.Tensor) and not t.numel() for t in case.inputs.values()):
            continue  # torch cannot capture an empty call
        for step in steps(case):
            want = [t.clone() for t in tensors(step())]  # compiles the kernels
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                got = tensors(step())
            for t in got:
                t.zero_()
            graph.replay()
            torch.cuda.synchronize()
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@gpu
def test_more_than_two_to_the_31_elements():
    """Pooling, unpooling, batch norm and loss: the end of a batch past 2^31 elements gives the same as by itself."""
    FS = fastseg.functional
    shape = (33, 64, 1024, 1024)  # 2.2 G elements of two bytes
    x = torch.empty(shape, dtype=torch.float16, device="cuda", memory_format=torch.channels_last)
    for image in x:
        image.copy_(torch.randn(shape[1:], device="cuda"))
    last = x[-1:].clone(memory_format=torch.channels_last)
    with torch.no_grad(), fastseg.backend("triton"):
        pooled, offsets = FS.max_pool2d_with_offsets(x, 2)
        want, where = FS.max_pool2d_with_offsets(last, 2)
        assert torch.equal(pooled[-1:], want) and torch.equal(offsets[-1:], where)
        assert torch.equal(FS.max_unpool2d_with_offsets(pooled, offsets, 2)[-1:],
                           FS.max_unpool2d_with_offsets(want, where, 2))  # fmt: skip
        del pooled, offsets
        labels = torch.randint(64, (shape[0], *shape[2:]), dtype=torch.uint8, device="cuda")
        loss = FS.cross_entropy(x, labels, reduction="none")
        assert torch.equal(loss[-1:], FS.cross_entropy(last, labels[-1:], reduction="none"))
        del loss, labels
        mean, var = torch.zeros(64, device="cuda"), torch.ones(64, device="cuda")
        assert torch.equal(FS.batch_norm_relu(x, mean, var)[-1:], FS.batch_norm_relu(last, mean, var))


@gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_step_under_autocast_and_a_grad_scaler(dtype):
    """SegNet under fastseg and under torch: the same loss, finite gradients, no skipped step."""
    torch.manual_seed(0)
    model = fastseg.models.SegNet(5, width=0.125).cuda().to(memory_format=torch.channels_last)
    images, masks = torch.randn(2, 3, 64, 96, device="cuda"), torch.randint(5, (2, 64, 96), device="cuda")
    losses, state = [], {name: t.clone() for name, t in model.state_dict().items()}
    for backend in ("auto", "torch"):
        model.load_state_dict(state)
        scaler, optimizer = torch.amp.GradScaler("cuda"), torch.optim.SGD(model.parameters(), 0.01)
        with fastseg.backend(backend):
            with torch.autocast("cuda", dtype):
                loss = fastseg.functional.cross_entropy(model(images), masks)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scale = scaler.get_scale()
            scaler.update()
        assert scaler.get_scale() == scale, "a gradient was not finite"
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)
