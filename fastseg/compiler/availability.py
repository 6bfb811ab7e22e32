"""Whether the kernels would run a call that a rule would put into the graph."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import dispatch


def reason_off_kernels(name: str, tensor: Tensor, unsupported: str | None, preferred: Any = None) -> str | None:
    """Why the Triton kernels would not run a call of the operator `name` on `tensor`, or None if they would."""
    try:
        choice = dispatch.choose(name, tensor, dispatch.only_triton(unsupported), preferred, dry_run=True)
    except (NotImplementedError, RuntimeError) as error:  # backend "triton" is requested but unavailable
        return str(error)
    return None if choice.backend == "triton" else choice.reason
