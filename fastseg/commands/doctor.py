"""`fastseg doctor`: what is installed, what the GPU is, and which backend would run here and why."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform

import torch

from .. import dispatch
from ..version import __version__
from . import terminal

PACKAGES = ("torch", "triton", "numpy", "cupy-cuda12x", "cupy-cuda13x", "scikit-learn", "matplotlib", "pillow")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _advice(facts: dict[str, object]) -> str:
    if not facts["cuda"]:
        return (
            "No CUDA GPU: every call takes torch. The kernels can be checked here all the same, interpreted: "
            "fastseg verify"
        )
    lacking = dispatch.without_triton(torch.device("cuda"))
    if lacking is not None:
        if dispatch.CUPY_INSTALLED:
            return f"{lacking}: CUDA tensors take the CUDA C++ kernels where they cover a call, else torch."
        way = "pip install 'fastseg-kernels[cuda12]' (or [cuda13]) for the kernels in CUDA C++"
        if not dispatch.TRITON_INSTALLED:
            way = f"pip install triton or, where there is none, {way}"
        return f"{lacking}: every call takes torch. {way}"
    return "CUDA tensors take the Triton kernels where they cover a call; fastseg.explain tells for one call."


def facts() -> dict[str, object]:
    """Everything the report shows, JSON-able."""
    cuda = torch.cuda.is_available()
    found: dict[str, object] = {
        "fastseg": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cuda": torch.version.cuda if cuda else None,
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "compute capability": "{}.{}".format(*torch.cuda.get_device_capability()) if cuda else None,
        "backend setting": dispatch.get_backend(),
        "triton interpreted": dispatch.interpreted(),
        "backend of a CPU tensor": str(_would_run("cpu")),
        "backend of a CUDA tensor": str(_would_run("cuda")) if cuda else "no CUDA GPU",
    }
    return found | {"advice": _advice(found)}


def _would_run(device: str) -> str:
    from ..functional import max_pool2d

    try:
        choice = dispatch.explain(max_pool2d, torch.zeros(1, 8, 8, 8, device=device), 2)[0]
    except RuntimeError as error:
        return f"none ({error})"
    return f"{choice.backend} ({choice.reason})"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description = "Versions, the GPU, and which backend would run on this machine and why."
    parser.epilog = "example:\n  fastseg doctor --json"
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")


def main(args: argparse.Namespace) -> int:
    found = facts()
    if args.json:
        print(json.dumps(found))
        return 0
    from rich.table import Table

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
