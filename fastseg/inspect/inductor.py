"""Bytes that the kernels of torch.compile move on a GPU, counted without one.

Inductor generates the Triton code that it would generate for an H100: a function is traced on CPU tensors, and its
forward and backward graphs are lowered as if their tensors were on a GPU with the properties H100. The generated
program then runs on the CPU tensors. Its Triton kernels run in the interpreter, where their bytes are counted by
address, like those of fastseg's kernels. Bytes of the aten operators that it leaves to PyTorch are counted as for eager
PyTorch. The results can be compared with PyTorch's, which shows that the whole program ran.
"""

from __future__ import annotations

import contextlib
import math
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from torch import Tensor

from .. import torch_internals
from ..kernels import triton_internals
from .eager import ByteCounter
from .traffic import KernelTraffic, counting

GPU = torch.device("cuda", 0)
H100 = types.SimpleNamespace(
    name="NVIDIA H100", major=9, minor=0, multi_processor_count=132, warp_size=32, total_memory=80 << 30,
    L2_cache_size=50 << 20, regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048,
    max_threads_per_block=1024, shared_memory_per_block=48 << 10, shared_memory_per_block_optin=227 << 10,
    gcnArchName="",
)  # fmt: skip
LARGEST_BLOCK = 1 << 18


@dataclass
class Graph:
    """What the last run of one compiled graph moved: by its kernels, and by the aten operators between them."""

    backward: bool
    kernels: list[KernelTraffic] = field(default_factory=list)
    operators: ByteCounter = field(default_factory=ByteCounter)

    @property
    def moved(self) -> tuple[int, int]:
        """Bytes (least, in sectors); the two differ if one of torch's operators scatters."""
        own = sum(kernel.sectors() for kernel in self.kernels)
        return own + self.operators.least.total(), own + self.operators.sectors.total()


def compiled(function: Callable[..., Any]) -> tuple[Callable[..., Any], list[Graph]]:
    """(the function, run on CPU tensors by Inductor's interpreted GPU kernels; its graphs, added when compiled).

    Needs TRITON_INTERPRET=1. Exceptions of Inductor's internals are passed on.
    """
    from torch.fx.node import map_aggregate
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    inductor = torch_internals.inductor()
    graphs: list[Graph] = []

    def lower(module: torch.fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Callable[[list[Any]], Any]:
        """Lower a graph of aten operators to GPU kernels, as a program that runs on CPU tensors."""
        mode = inductor.detect_fake_mode(inputs)
        for node in module.graph.nodes:
            node.args, node.kwargs = (map_aggregate(x, _on_gpu) for x in (node.args, node.kwargs))
        module.recompile()
        with mode:
            moved = [_on_gpu(x) for x in inputs]
        with _a_gpu(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            FakeTensorProp(module, mode).propagate_dont_convert_inputs(*moved)
            program = inductor.compile_fx_inner(module, moved, **options)
        graph = Graph(bool(options.get("is_backward")))
        graphs.append(graph)

        def run(args: list[Any]) -> Any:
            graph.kernels, graph.operators = [], ByteCounter()
            with _interpreted(graph.kernels), graph.operators:
                return program(args)

        return torch_internals.boxed(run)

    def backend(module: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        patches = {"force_disable_caches": True, "compile_threads": 1}
        with _decomposed_for_a_gpu():
            return inductor.compile_fx(module, inputs, inner_compile=lower, config_patches=patches)

    return torch.compile(function, backend=backend, dynamic=False, fullgraph=True), graphs


def _on_gpu(x: Any) -> Any:
    if isinstance(x, Tensor):
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=GPU)
    return GPU if isinstance(x, torch.device) else x


@contextlib.contextmanager
def _decomposed_for_a_gpu() -> Iterator[None]:
    """Decompose gradients of biases, resizing of few channels and unpooling as on a GPU instead of as on a CPU.

    Since torch 2.14 unpooling keeps channels_last on a CPU, with a copy, and returns NCHW on a GPU.
    """
    inductor = torch_internals.inductor()
    resize, unpool, utils = inductor.upsample_linear, inductor.max_unpool, inductor.decompositions.utils
    contiguous = mock.patch.object(utils, "suggest_memory_format", lambda x: torch.contiguous_format)

    def unpooled(*args: Any) -> Tensor:
        with contiguous:
            return unpool(*args)

    def resized(x: Tensor, *rest: Any) -> Tensor:
        with contiguous if x.shape[1] < 16 else contextlib.nullcontext():
            return resize(x, *rest)

    with (
        mock.patch.object(inductor.decomposition, "is_gpu", lambda device: True),
        mock.patch.object(inductor.decompositions, "_upsample_linear", resized),
        mock.patch.object(inductor.decompositions, "_max_unpoolnd", unpooled),
    ):
        yield


@contextlib.contextmanager
def _a_gpu() -> Iterator[None]:
    """Make Inductor find an H100, and write programs that take CPU tensors and use no streams."""
    inductor = torch_internals.inductor()
    interface, helpers = inductor.CudaInterface, inductor.triton_helpers
    on_cpu = inductor.common.get_device_op_overrides("cpu")
    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (torch.cuda, "current_device", lambda: 0),
            (torch.cuda, "device", lambda index: contextlib.nullcontext()),
            (torch.cuda, "get_device_properties", lambda *device: H100),
            (torch.cuda, "get_device_capability", lambda *device: (9, 0)),
            (interface, "get_device_properties", staticmethod(lambda *device: H100)),
            (interface, "get_compute_capability", staticmethod(lambda *device: 90)),
            (interface, "is_bf16_supported", staticmethod(lambda *a, **k: True)),
            (interface.Worker, "get_device_properties", staticmethod(lambda *device: H100)),
            (interface.Worker, "current_device", staticmethod(lambda: 0)),
            (inductor.scheduler, "has_triton", lambda *device: True),
            (inductor.triton_utilities, "triton_hash_with_backend", lambda: "interpreted"),
            (helpers, "set_driver_to_gpu", lambda: None),
            (helpers, "libdevice", Libdevice()),
            (type(on_cpu), "device_guard", lambda self, index: "torch.no_grad()"),  # the code of any context manager
            (inductor.C, "_conv_determine_backend_memory_format", _cudnn_format),
            (inductor.guards, "_empty_strided_cuda", inductor.empty_strided_cpu),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(mock.patch.dict(inductor.common.device_op_overrides_dict, {"cuda": on_cpu}))
        yield


def _cudnn_format(input: Tensor, weight: Tensor, backend: Any) -> torch.memory_format:
    """The memory format of a convolution's result in cuDNN, which a build without CUDA cannot ask."""
    formats = list(map(torch_internals.inductor().suggest_memory_format, (input, weight)))
    return torch.channels_last if torch.channels_last in formats else torch.contiguous_format


@contextlib.contextmanager
def _interpreted(launches: list[KernelTraffic]) -> Iterator[None]:
    """Launch Inductor's kernels in the interpreter, and add the traffic of each to the list."""
    inductor = torch_internals.inductor()
    run = inductor.CachingAutotuner.run

    def counted(self: Any, *args: Any, **named: Any) -> None:
        _grow(self.configs[0].kwargs, self.size_hints)
        lanes_outside = np.errstate(all="ignore")  # masked lanes compute with meaningless values
        with torch_internals.disable_current_modes(), lanes_outside, counting(self.fn.__name__, args) as traffic:
            run(self, *args, **named)
        if traffic.outside:
            raise RuntimeError(f"{traffic.kernel} accessed memory outside its tensors: it did not run as generated")
        launches.append(traffic)

    with (
        mock.patch.object(inductor.CachingAutotuner, "run", counted),
        mock.patch.object(triton_internals.interpreter().ReduceOps, "generic_reduce", _by_halves),
        mock.patch.object(inductor.triton_helpers, "libdevice", Libdevice()),
    ):
        yield


def _grow(blocks: dict[str, Any], sizes: dict[str, int]) -> None:
    """Use the largest blocks that the code allows. Fewer programs access the same sectors and run faster here."""
    largest = torch_internals.inductor().largest_blocks
    for axis, size in sizes.items():
        name, most = f"{axis.upper()}BLOCK", min(size, largest[axis.upper()])
        while name in blocks and blocks[name] < most and math.prod(blocks.values()) < LARGEST_BLOCK:
            blocks[name] *= 2


class Libdevice:
    """CUDA's mathematical functions, which the interpreter does not have, replaced by Triton's."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return getattr(tl.math, name)

    @staticmethod
    def isnan(x: Any) -> Any:
        return x != x


def _by_halves(self: Any, values: Sequence[Any]) -> list[Any]:
    """Reduce a block by combining its halves. The interpreter reduces lane by lane, which takes minutes."""
    dtypes = [x.dtype for x in values]
    blocks = [x.handle.data for x in values]
    blocks = [x.ravel() if self.axis is None else np.moveaxis(x, self.axis, 0) for x in blocks]
    while half := len(blocks[0]) // 2:
        sides = [x[:half] for x in blocks], [x[half:] for x in blocks]
        left, right = ([self.to_tensor(x, dtype) for x, dtype in zip(side, dtypes, strict=True)] for side in sides)
        combined = self.combine_fn.fn(*left, *right)
        blocks = [x.handle.data for x in (combined if isinstance(combined, tuple) else (combined,))]
    if self.keep_dims:
        raise NotImplementedError("a reduction with keep_dims, which Inductor does not generate")
    return [self.to_tensor(x[0], dtype) for x, dtype in zip(blocks, dtypes, strict=True)]
