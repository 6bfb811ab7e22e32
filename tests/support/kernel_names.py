"""The names of all Triton kernels."""

import importlib
from pathlib import Path

from fastseg import kernels


def every_kernel() -> set[str]:
    """The names of the kernels in all modules of fastseg.kernels, interpreted or compiled."""
    root = Path(kernels.__file__).parent
    names = [".".join(path.relative_to(root).with_suffix("").parts) for path in root.rglob("*.py")]
    modules = [importlib.import_module(f"fastseg.kernels.{name}") for name in names if "__init__" not in name]
    return {
        name
        for module in modules
        for name, found in vars(module).items()
        if name.endswith("_kernel") and hasattr(found, "run")
    }
