"""Backends and recorders that ``with`` blocks set belong to the thread of the block, and to its backward."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import fastseg
import fastseg.functional as FS
from fastseg import dispatch
from fastseg.kernels import launch
from fastseg.kernels.shared import Setting
from fastseg.ops.operator import observing

WAIT = 60  # seconds; a thread that fails breaks the barrier before


def at_once(*functions):
    """The results of the functions, each run in its own thread."""
    with ThreadPoolExecutor(len(functions)) as threads:
        return [task.result() for task in [threads.submit(function) for function in functions]]


def overlapping(name, barrier, *, leave_first):
    """Enter a block with this backend while the other thread is in its own; what is read inside and afterwards."""
    with fastseg.backend(name):
        barrier.wait(WAIT)
        inside = fastseg.get_backend()
        barrier.wait(WAIT)
        if not leave_first:
            barrier.wait(WAIT)
    after = fastseg.get_backend()
    if leave_first:
        barrier.wait(WAIT)
    return inside, after


def test_blocks_that_overlap_in_two_threads_leave_the_backend_as_it_was():
    barrier = threading.Barrier(2, timeout=WAIT)
    found = at_once(
        lambda: overlapping("torch", barrier, leave_first=True),
        lambda: overlapping("triton", barrier, leave_first=False),
    )
    assert found == [("torch", "auto"), ("triton", "auto")] and fastseg.get_backend() == "auto"


def test_the_backend_of_the_process_is_read_by_every_thread_outside_of_blocks():
    fastseg.set_backend("torch")
    try:
        assert at_once(fastseg.get_backend, fastseg.get_backend) == ["torch", "torch"]
        with fastseg.backend("auto"):
            assert fastseg.get_backend() == "auto" and at_once(fastseg.get_backend) == ["torch"]
            fastseg.set_backend("cuda")  # of the block
            assert fastseg.get_backend() == "cuda" and at_once(fastseg.get_backend) == ["torch"]
        assert fastseg.get_backend() == "torch"
    finally:
        fastseg.set_backend("auto")


class Nested(torch.autograd.Function):
    """Its backward runs another backward, `depth` times. From the 60th on, torch runs them in a thread of its own."""

    @staticmethod
    def forward(ctx, x, depth, seen):
        ctx.depth, ctx.seen = depth, seen
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        with fastseg.backend("cpu"):  # the block of a backward ends with it
            pass
        ctx.seen.append((threading.get_ident(), fastseg.get_backend()))
        if ctx.depth:
            with torch.enable_grad():
                Nested.apply(torch.ones(1, requires_grad=True), ctx.depth - 1, ctx.seen).backward()
        return grad, None, None


def nested_backward():
    seen = []
    Nested.apply(torch.ones(1, requires_grad=True), 70, seen).backward()
    threads, backends = zip(*seen, strict=True)
    assert len(set(threads)) == 2, "every backward ran in the thread that called it"
    return set(backends)


def test_values_of_blocks_are_not_released_too_often():
    """torch 2.11 does so with what it carries to autograd's threads; the process crashed."""
    value = object()
    setting, before = Setting(None), sys.getrefcount(value)
    for _ in range(5):
        with setting.replaced(value):
            assert setting.value is value
    assert sys.getrefcount(value) == before


def nested_backward_in_a_block(name, barrier):
    with fastseg.backend(name):
        barrier.wait(WAIT)
        return nested_backward()


def test_autograds_threads_see_the_backend_of_the_thread_that_called_the_backward():
    barrier = threading.Barrier(2, timeout=WAIT)
    found = at_once(*(lambda name=name: nested_backward_in_a_block(name, barrier) for name in ("torch", "triton")))
    assert found == [{"torch"}, {"triton"}]
    assert nested_backward() == {"auto"}


def test_compiled_code_follows_the_block_of_its_thread():
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    @torch.compile(backend=count, fullgraph=True)
    def function(x):
        outside = 1 if fastseg.get_backend() == "torch" else 2
        with fastseg.backend("torch"):
            inside = 10 if fastseg.get_backend() == "torch" else 20
        return x + outside + inside

    def in_block(name):
        with fastseg.backend(name):
            return function(torch.zeros(1)).item()

    assert function(torch.zeros(1)).item() == 12 and in_block("torch") == 11
    assert at_once(lambda: in_block("torch"), lambda: function(torch.zeros(1)).item()) == [11, 12]
    assert len(graphs) == 2


def explained(barrier):
    def call(x):
        barrier.wait(WAIT)  # both threads are explaining
        return FS.max_pool2d(x, 2)

    return len(fastseg.explain(call, torch.zeros(1, 1, 4, 4)))


def observed(barrier):
    seen = []
    with observing(lambda operator, args: seen.append(operator)):
        barrier.wait(WAIT)
        with fastseg.backend("torch"):
            FS.confusion_matrix(*torch.zeros(2, 1, 4, 4, dtype=torch.int64), 2)
        barrier.wait(WAIT)
    return len(seen)


def recorded(barrier):
    seen = []
    with launch.recording(lambda kernel, programs, args, meta: seen.append(kernel)):
        barrier.wait(WAIT)
        launch.launch("kernel", 1, torch.zeros(1))
        barrier.wait(WAIT)
    return len(seen)


@pytest.mark.parametrize("instrument", [explained, observed, recorded])
def test_an_instrument_sees_the_calls_of_its_own_thread(instrument):
    barrier = threading.Barrier(2, timeout=WAIT)
    assert at_once(lambda: instrument(barrier), lambda: instrument(barrier)) == [1, 1]
    assert dispatch.explaining() is False
