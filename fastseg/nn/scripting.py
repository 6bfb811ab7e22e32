"""fastseg's modules and torch.jit.script."""

from typing import NoReturn

from torch import nn


def refuse_script(module: nn.Module) -> NoReturn:
    """Raise a RuntimeError that names the alternatives: the `__prepare_scriptable__` that torch.jit.script calls."""
    raise RuntimeError(
        f"torch.jit.script cannot compile fastseg's {type(module).__name__}; script a swapped model inside "
        "`with report.undone():`, where its layers are torch's, or use torch.compile or torch.export"
    )
