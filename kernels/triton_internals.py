"""Every private part of Triton that the kernels, the instruments and the tests use.

Triton documents its language and `triton.jit`; its compiler, launcher and interpreter may change in any release.
`PRIVATE_NAMES` lists each name that is used and what it is for. All of them exist in the versions `SEEN_IN`.
tests/test_internals.py fails with one sentence for each name that the installed Triton no longer has.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import triton
from triton.runtime.errors import InterpreterError

__all__ = ["InterpreterError"]

SEEN_IN = ((3, 6), (3, 7), (3, 8), (3, 9))
VERSION: tuple[int, ...] = tuple(map(int, triton.__version__.split(".")[:2]))
INTERPRETED: bool = triton.knobs.runtime.interpret  # TRITON_INTERPRET, as read when triton was imported


_SPEED = "speeds up the interpreter; a Triton outside SEEN_IN runs its own interpreter unchanged"
_WATCHED = "counts accesses and finds races in the interpreter"

PRIVATE_NAMES: dict[str, str] = {
    "triton.knobs.runtime.interpret": "tells whether kernels are interpreted",
    "triton.runtime.interpreter._get_np_dtype": _SPEED,
    "triton.runtime.interpreter._patch_attr": _SPEED,
    "triton.runtime.interpreter._patch_builtin": _SPEED,
    "triton.runtime.interpreter._patch_lang": _SPEED,
    "triton.runtime.interpreter._patch_lang_tensor": _SPEED,
    "triton.language.core.block_type.__init__": _SPEED,
    "triton.language.core.tensor.__init__": _SPEED,
    "triton.runtime.interpreter.TritonSemantic.binary_op_sanitize_overflow_impl": _SPEED,
    "triton.runtime.interpreter.TritonSemantic.broadcast_impl_value": _SPEED,
    **{
        f"triton.runtime.interpreter.InterpreterBuilder.create_{name}": _WATCHED
        for name in ("masked_load", "masked_store", "atomic_rmw", "atomic_cas", "dot", "barrier", "get_program_id")
    },
    "triton.runtime.interpreter.interpreter_builder.set_grid_idx": "sets grid_idx, the number of the running program",
    "triton.runtime.interpreter.TensorHandle.set_attr": "tests the hints that kernels give the compiler",
    "triton.runtime.interpreter.ReduceOps.generic_reduce": "speeds up the reductions of Inductor's kernels",
    "triton.runtime.errors.InterpreterError": "tests what the interpreter raises",
    "triton.language.core.is_builtin": "finds the functions that the interpreter replaces",
    "triton.backends.compiler.GPUTarget": "compiles for a GPU that the machine does not have",
    "triton.compiler.ASTSource": "compiles a recorded launch",
    "triton.runtime.jit.JITFunction._do_compile": "tests the launcher without a compiler",
    "triton.runtime.driver.set_active": "tests the launcher without a GPU",
}
"""Each private name and what it is for."""


# --- the interpreter -------------------------------------------------------------------------------------------------


def interpreter() -> ModuleType:
    """Triton's interpreter, imported late: compiled kernels do not need it."""
    from triton.runtime import interpreter

    return interpreter


def current_program() -> int:
    """The number of the program that the interpreter is running."""
    return interpreter().interpreter_builder.grid_idx[0]


def is_builtin(member: Any) -> bool:
    """Whether this is a builtin of Triton's language, which the interpreter replaces during a launch."""
    from triton.language import core

    return core.is_builtin(member)


def patch_builtin(package: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
    """Replace one builtin of a package by the interpreter's, until the scope ends."""
    interpreter()._patch_attr(package, name, member, builder, scope)


def replace_patch_builtins(patch: Callable[[Any, Any, Any], None]) -> None:
    """Replace how the interpreter finds and patches all builtins of a package."""
    interpreter()._patch_builtin = patch


def replace_numpy_dtype(wrap: Callable[[Callable[[Any], Any]], Callable[[Any], Any]]) -> None:
    """Wrap the interpreter's function from a Triton type to a NumPy type."""
    interpreter()._get_np_dtype = wrap(interpreter()._get_np_dtype)


def replace_overflow_check(wrap: Callable[[Callable[..., None]], Callable[..., None]]) -> None:
    """Wrap the interpreter's check of integer sums, differences and products for overflow."""
    semantic = interpreter().TritonSemantic
    semantic.binary_op_sanitize_overflow_impl = wrap(semantic.binary_op_sanitize_overflow_impl)


def replace_patch_tensor(wrap: Callable[[Callable[..., None]], Callable[..., None]]) -> None:
    """Wrap how the interpreter gives `tl.tensor` its Python operators."""
    interpreter()._patch_lang_tensor = wrap(interpreter()._patch_lang_tensor)


def replace_constructors(wrap_block: Callable[..., Any], wrap_tensor: Callable[..., Any]) -> None:
    """Wrap the constructors of `tl.block_type` and `tl.tensor`."""
    from triton.language import core

    core.block_type.__init__ = wrap_block(core.block_type.__init__)
    core.tensor.__init__ = wrap_tensor(core.tensor.__init__)


def replace_broadcast(wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Wrap how the interpreter brings two operands to one shape."""
    semantic = interpreter().TritonSemantic
    semantic.broadcast_impl_value = wrap(semantic.broadcast_impl_value)


def replace_patch_language(wrap: Callable[[Callable[[Any], Any]], Callable[[Any], Any]]) -> None:
    """Wrap how the interpreter patches triton.language in the globals of a kernel."""
    interpreter()._patch_lang = wrap(interpreter()._patch_lang)


# --- the compiler ----------------------------------------------------------------------------------------------------


def gpu_target(backend: str, architecture: int | str, warp_size: int) -> Any:
    """A GPU to compile for: ("cuda", 90, 32) or ("hip", "gfx942", 64)."""
    from triton.backends.compiler import GPUTarget

    return GPUTarget(backend, architecture, warp_size)


def source(kernel: Any, signature: dict[str, str], constants: dict[str, Any], attributes: dict[Any, Any]) -> Any:
    """What triton.compile takes: a kernel with the types, constants and attributes of its arguments."""
    from triton.compiler import ASTSource

    return ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)


def nvidia_tool(name: str) -> Path:
    """The path of one of NVIDIA's tools that Triton's wheel contains: cuobjdump, nvdisasm or ptxas."""
    return Path(triton.__path__[0]) / "backends" / "nvidia" / "bin" / name
