"""`fastseg doctor`: installed packages, the GPU, and the backend that calls would take here and why."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform

import torch
from rich.table import Table

from .. import dispatch
from ..functional import max_pool2d
from ..version import __version__, untested
from . import terminal
from .options import add_json

PACKAGES = ("torch", "triton", "numpy", "cupy-cuda12x", "cupy-cuda13x", "scikit-learn", "matplotlib", "pillow")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `fastseg doctor`."""
    parser.description = "Versions, the GPU, and the backend that calls would take on this machine and why."
    parser.epilog = "example:\n  fastseg doctor --json"
    add_json(parser)


def main(args: argparse.Namespace) -> int:
    """Run `fastseg doctor`. Returns 0."""
    found = facts()
    if args.json:
        terminal.print_json(found)
        return 0
    table = Table(show_header=False, box=None)
    for name, value in found.items():
        if name == "packages":
            for package, version in value.items():
                table.add_row(package, version or "[dim]not installed")
        elif name != "advice":
            table.add_row(name, "none" if value is None else str(value))
    console = terminal.console()
    console.print(table)
    console.print(found["advice"])
    return 0


def facts() -> dict[str, object]:
    """Everything that the report shows, in a form that JSON can represent."""
    cuda = torch.cuda.is_available()
    packages = {name: _version(name) for name in PACKAGES}
    packages["triton"] = triton = _triton_version()
    found: dict[str, object] = {
        "fastseg": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "tested versions": untested(torch.__version__, triton) or "yes",
        "cuda": torch.version.cuda if cuda else None,
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "compute capability": "{}.{}".format(*torch.cuda.get_device_capability()) if cuda else None,
        "backend setting": dispatch.get_backend(),
        "triton interpreted": dispatch.interpreted(),
        "backend of a CPU tensor": _backend_on("cpu"),
        "backend of a CUDA tensor": _backend_on("cuda") if cuda else "no CUDA GPU",
    }
    return found | {"advice": _advice(found)}


def _version(package: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _triton_version() -> str | None:
    """The version of the module triton, or None. Its distribution has other names too, such as triton-windows."""
    if not dispatch.TRITON_INSTALLED:
        return None
    import triton  # here, since it takes long

    return triton.__version__


def _backend_on(device: str) -> str:
    """The backend that a call on this device would take, and why."""
    try:
        choice = dispatch.explain(max_pool2d, torch.zeros(1, 8, 8, 8, device=device), 2)[0]
    except RuntimeError as error:
        return f"none ({error})"
    return f"{choice.backend} ({choice.reason})"


def _advice(facts: dict[str, object]) -> str:
    """What runs on this machine, and what to install for more."""
    if not facts["cuda"]:
        calls = "supported calls take the CPU kernels, the others fall back to PyTorch"
        if not dispatch.CPU_OPERATORS:
            calls = "every call falls back to PyTorch"
        elif (reason := dispatch.without_cpu_kernels()) is not None:
            calls = f"every call falls back to PyTorch, because {reason}"
        return f"No CUDA GPU: {calls}. To check the Triton kernels in the interpreter: fastseg verify"
    reason = dispatch.without_triton(torch.device("cuda"))
    if reason is None:
        return (
            "CUDA tensors take the Triton kernels for supported calls; fastseg.explain says which backend a call takes."
        )
    if dispatch.CUPY_INSTALLED:
        return (
            f"{reason}: CUDA tensors take the CUDA C++ kernels for supported calls, and fall back to PyTorch otherwise."
        )
    advice = "pip install 'fastseg-kernels[cuda12]' (or [cuda13]) for the kernels in CUDA C++"
    if not dispatch.TRITON_INSTALLED:
        advice = f"pip install triton or, if there is none for this platform, {advice}"
    return f"{reason}: every call falls back to PyTorch. {advice}"
