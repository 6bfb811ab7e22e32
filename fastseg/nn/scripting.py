"""What torch.jit.script is told."""

from typing import NoReturn

from torch import nn


def refuse_script(module: nn.Module) -> NoReturn:
    """The `__prepare_scriptable__` of a module, which torch.jit.script calls: RuntimeError that says what to do."""
    raise RuntimeError(
        f"torch.jit.script cannot compile fastseg's {type(module).__name__}; script a swapped model inside "
        "`with report.undone():`, where it is torch's, or take torch.compile or torch.export"
    )
