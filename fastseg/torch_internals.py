"""Every private part of PyTorch that fastseg uses.

PyTorch may change a private name in any release. `PRIVATE_NAMES` lists each of them and what it is for. All of them
exist in the versions `SEEN_IN`. tests/test_internals.py fails with one sentence for each name that the installed
PyTorch no longer has, and it fails if another file uses a private name directly.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, is_fake
from torch.autograd import forward_ad
from torch.nn import _reduction
from torch.nn.modules import module as nn_module
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.nn.modules.utils import _pair as as_pair
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

__all__ = ["BatchNorm", "FakeTensor", "FakeTensorMode", "TorchDispatchMode", "as_pair", "is_fake", "tree_leaves",
           "tree_map", "tree_map_only"]  # fmt: skip

SEEN_IN = ("2.11", "2.13", "2.14", "2.15")


_INDUCTOR = "counts the bytes of Inductor's kernels (fastseg.inspect.inductor)"

PRIVATE_NAMES: dict[str, str] = {
    "torch._C._are_functorch_transforms_active": "detects calls inside torch.func transforms; without it every call "
    "counts as inside one, which is correct, but slower and takes more memory",
    "torch.autograd.forward_ad._current_level": "detects forward-mode differentiation; without it no call counts as "
    "inside it, and PyTorch raises, since the kernels have no forward-mode rule",
    "torch._C._dispatch_has_computed_kernel_for_dispatch_key": "tests that every operator runs on every device",
    "torch.utils.backend_registration._setup_privateuseone_for_python_backend": "tests a device of another vendor",
    "torch._C._acc.create_empty_tensor": "tests a device of another vendor",
    "torch.utils._pytree.tree_map": "replaces the tensors in nested arguments",
    "torch.compiler._is_exporting_flag": "detects torch.export; without it torch.compiler.is_exporting() is called",
    "torch.compiler._is_compiling_flag": "says that the compile backend is tracing",
    "torch._C.__file__": "finds torch's thread pool for the CPU kernels (kernels/cpu/build.py)",
    **{
        f"torch._C.{name}_tls": "gives autograd's threads what a with block has set (kernels/shared.py)"
        for name in ("_is_key_in", "_get_obj_in", "_stash_obj_in")
    },
    "torch._C.DisableTorchFunction": "keeps swap_functions from replacing the calls that fastseg makes itself",
    "torch._subclasses.fake_tensor.FakeTensor": "recognizes tensors without data",
    "torch._subclasses.fake_tensor.FakeTensorMode": "runs fastseg.explain without data",
    "torch._subclasses.fake_tensor.is_fake": "recognizes tensors without data",
    "torch.utils._pytree.tree_leaves": "finds the tensors in nested arguments",
    "torch.utils._pytree.tree_map_only": "replaces the tensors in nested arguments",
    "torch.utils._python_dispatch.TorchDispatchMode": "counts the bytes of aten operators",
    "torch.utils._python_dispatch._disable_current_modes": _INDUCTOR,
    "torch._ops.HigherOrderOperator": "recognizes control flow in a captured graph",
    "torch.ops.aten.add.Tensor._schema": "names aten operators and recognizes views",
    "torch._TorchCompileInductorWrapper": "passes a rewritten graph to Inductor, with mode and options",
    "torch._dynamo.lookup_backend": "finds the backend that gets a rewritten graph",
    "torch._dynamo.backends.registry._BACKENDS": "tests the entry point of the compile backend",
    "torch._dynamo.backends.registry._COMPILER_FNS": "tests the entry point of the compile backend",
    "torch.cuda._sleep": "keeps a stream busy in tests on a GPU",
    "torch.nn._reduction.legacy_get_string": "reads the deprecated arguments size_average and reduce",
    "torch.nn._reduction.get_enum": "warns of deprecated names of a reduction",
    "torch.nn.modules.batchnorm._BatchNorm": "recognizes every batch norm of torch.nn",
    "torch.nn.modules.utils._pair": "reads one number as two, as the layers of torch.nn do",
    "torch.nn.modules.module._has_any_global_hook": "detects hooks that are registered for all modules",
    **{
        f"torch.nn.Module()._{name}": "reads the members of a module without a function call for each"
        for name in ("modules", "parameters", "buffers")
    },
    **{
        f"torch.nn.Module()._{name}": "detects hooks, which need tensors that a fused layer never creates"
        for name in ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")
    },
    "torch.nn.Module._compiled_call_impl": "detects module.compile()",
    "torch.nn.BatchNorm2d._check_input_dim": "raises torch's error for an input of another rank",
    "torch.nn.ConvTranspose2d._output_padding": "computes output_padding from output_size as torch does",
    "torch.nn.Conv2d._conv_forward": "runs a convolution without its bias, in any padding mode",
    "torch.Tensor._version": "notices that a weight has changed",
    "torch._functorch._aot_autograd.utils.make_boxed_func": _INDUCTOR,
    "torch._C._conv_determine_backend_memory_format": _INDUCTOR,
    "torch._C._dynamo.guards._empty_strided_cpu": _INDUCTOR,
    "torch._C._dynamo.guards._empty_strided_cuda": _INDUCTOR,
    "torch._decomp.decompositions._max_unpoolnd": _INDUCTOR,
    "torch._decomp.decompositions._upsample_linear": _INDUCTOR,
    "torch._decomp.decompositions.utils.suggest_memory_format": _INDUCTOR,
    "torch._dynamo.device_interface.CudaInterface": _INDUCTOR,
    "torch._dynamo.utils.detect_fake_mode": _INDUCTOR,
    "torch._inductor.codegen.common.device_op_overrides_dict": _INDUCTOR,
    "torch._inductor.codegen.common.get_device_op_overrides": _INDUCTOR,
    "torch._inductor.compile_fx.compile_fx": _INDUCTOR,
    "torch._inductor.compile_fx.compile_fx_inner": _INDUCTOR,
    "torch._inductor.decomposition.is_gpu": _INDUCTOR,
    "torch._inductor.runtime.hints.TRITON_MAX_BLOCK": _INDUCTOR,
    "torch._inductor.runtime.triton_helpers.libdevice": _INDUCTOR,
    "torch._inductor.runtime.triton_helpers.set_driver_to_gpu": _INDUCTOR,
    "torch._inductor.runtime.triton_heuristics.CachingAutotuner": _INDUCTOR,
    "torch._inductor.scheduler.has_triton": _INDUCTOR,
    "torch._prims_common.suggest_memory_format": _INDUCTOR,
    "torch.utils._triton.triton_hash_with_backend": _INDUCTOR,
}
"""Each private name, what it is for, and what happens where it is missing and fastseg can do without it."""


# --- what is running -------------------------------------------------------------------------------------------------

functorch_transforms_active: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)
disable_torch_function = torch._C.DisableTorchFunction
disable_current_modes = _disable_current_modes


def forward_mode_active() -> bool:
    """Whether forward-mode differentiation (torch.autograd.forward_ad) is on."""
    return getattr(forward_ad, "_current_level", -1) >= 0


def exporting() -> bool:
    """Whether torch.export is tracing.

    The flag is read because in torch 2.11 Dynamo takes `torch.compiler.is_exporting()` for true in every trace.
    """
    if hasattr(torch.compiler, "_is_exporting_flag"):
        return torch.compiler._is_exporting_flag
    return torch.compiler.is_exporting()


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Make torch.compiler.is_compiling() true, as newer versions do by themselves while a backend traces."""
    before, torch.compiler._is_compiling_flag = torch.compiler._is_compiling_flag, True
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = before


def sleep_on_gpu(cycles: int) -> None:
    """Keep the current CUDA stream busy for this many clock cycles."""
    torch.cuda._sleep(cycles)


# --- graphs and operators --------------------------------------------------------------------------------------------


def inductor_backend(mode: str | None, options: Mapping[str, Any] | None) -> Callable[..., Any]:
    """Inductor as a backend, with torch.compile's mode and options."""
    return torch._TorchCompileInductorWrapper(mode, options, None)


def lookup_backend(backend: Any) -> Callable[..., Any]:
    """The backend of torch.compile with this name; a callable is returned unchanged."""
    return torch._dynamo.lookup_backend(backend)


def backend_registry() -> tuple[dict[str, Any], dict[str, Any]]:
    """Dynamo's entry points of backends, and the backends already loaded, by name."""
    from torch._dynamo.backends import registry

    return registry._BACKENDS, registry._COMPILER_FNS


def is_higher_order(target: Any) -> bool:
    """Whether a node calls a higher-order operator, such as torch.cond."""
    return isinstance(target, torch._ops.HigherOrderOperator)


def operator_name(operator: Any) -> str:
    """The name of an aten operator without its overload, such as "aten::add"."""
    return operator._schema.name


def schema_arguments(operator: Any) -> list[Any]:
    """The arguments of an operator's schema, with names and types."""
    return list(operator._schema.arguments)


def returns_view(operator: Any) -> bool:
    """Whether one of an aten operator's results is a view of an argument."""
    return any(r.alias_info is not None and not r.alias_info.is_write for r in operator._schema.returns)


# --- modules ---------------------------------------------------------------------------------------------------------


def has_hooks(module: nn.Module) -> bool:
    """Whether a forward, forward pre-, backward or backward pre-hook is registered on the module itself."""
    own = module.__dict__
    return bool(
        own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    )


def has_global_hooks() -> bool:
    """Whether a hook is registered for all modules."""
    return bool(nn_module._has_any_global_hook())


def is_compiled(module: nn.Module) -> bool:
    """Whether module.compile() was called."""
    return module.__dict__.get("_compiled_call_impl") is not None


def children(module: nn.Module) -> dict[str, nn.Module]:
    """A module's children by name, shared ones under each of their names."""
    return module._modules


def parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """A module's own parameters by name, without those that a parametrization computes."""
    return module._parameters


def buffers(module: nn.Module) -> dict[str, Tensor | None]:
    """A module's own buffers by name."""
    return module._buffers


def check_input_dim(norm: nn.BatchNorm2d, input: Tensor) -> None:
    """Raise torch's ValueError where the input has a rank that the batch norm does not take."""
    norm._check_input_dim(input)


def output_padding(conv: nn.ConvTranspose2d, input: Tensor, output_size: Sequence[int] | None) -> list[int]:
    """The output_padding that gives `output_size`; torch's ValueError where none does."""
    return conv._output_padding(input, output_size, conv.stride, conv.padding, conv.kernel_size, 2, conv.dilation)


def convolve_without_bias(conv: nn.Conv2d, input: Tensor) -> Tensor:
    """nn.Conv2d.forward without the bias."""
    return conv._conv_forward(input, conv.weight, None)


def convolves_as_torch(conv: nn.Conv2d) -> bool:
    """Whether neither the class nor the instance replaces how nn.Conv2d convolves."""
    return type(conv)._conv_forward is nn.Conv2d._conv_forward and "_conv_forward" not in conv.__dict__


def version(tensor: Tensor) -> int:
    """How many in-place changes torch has counted in a tensor."""
    return tensor._version


def legacy_reduction(size_average: bool | None, reduce: bool | None) -> str:
    """The reduction that the deprecated arguments of a loss ask for."""
    return _reduction.legacy_get_string(size_average, reduce)


def warn_of_reduction(reduction: str) -> None:
    """Give torch's warning where the name of a reduction is deprecated."""
    _reduction.get_enum(reduction)


# --- Inductor --------------------------------------------------------------------------------------------------------


def python_device(name: str) -> None:
    """Register a device of this name whose operators are written in Python."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(name)


def empty_on_python_device(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor on the device that python_device registered. It has no data."""
    return torch._C._acc.create_empty_tensor(shape, dtype)


def has_kernel(operator: str, key: str) -> bool:
    """Whether a registered operator ("namespace::name") has an implementation for a dispatch key."""
    return torch._C._dispatch_has_computed_kernel_for_dispatch_key(operator, key)


def constant_when_compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compiler.assume_constant_result without its import of torch._dynamo, which imports triton."""
    function._dynamo_marked_constant = True  # the mark that assume_constant_result sets
    return function


def boxed(function: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
    """Mark a compiled function that takes its arguments in one list, as torch's make_boxed_func does."""
    function._boxed_call = True
    return function


def inductor() -> SimpleNamespace:
    """The parts of Inductor that fastseg.inspect.inductor runs or replaces; importing them takes seconds."""
    from torch._decomp import decompositions
    from torch._dynamo.device_interface import CudaInterface
    from torch._dynamo.utils import detect_fake_mode
    from torch._inductor import decomposition, scheduler
    from torch._inductor.codegen import common
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner
    from torch._inductor.runtime import triton_helpers
    from torch._inductor.runtime.hints import TRITON_MAX_BLOCK
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    return SimpleNamespace(
        decompositions=decompositions, CudaInterface=CudaInterface, detect_fake_mode=detect_fake_mode,
        decomposition=decomposition, scheduler=scheduler, common=common, compile_fx=compile_fx,
        compile_fx_inner=compile_fx_inner, triton_helpers=triton_helpers, largest_blocks=TRITON_MAX_BLOCK,
        CachingAutotuner=CachingAutotuner, triton_utilities=torch.utils._triton, C=torch._C,
        guards=torch._C._dynamo.guards, empty_strided_cpu=torch._C._dynamo.guards._empty_strided_cpu,
        suggest_memory_format=torch._prims_common.suggest_memory_format,
        upsample_linear=decompositions._upsample_linear, max_unpool=decompositions._max_unpoolnd,
    )  # fmt: skip
