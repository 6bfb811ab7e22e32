"""Whether the kernels would run a call that a rule would put into the graph."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import dispatch


def reason_off_kernels(name: str, tensor: Tensor, unsupported: str | None, preferred: Any = None) -> str | None:
    """Why neither Triton nor CPU kernels would run a call of the operator `name` on `tensor`, or None if they would.

    unsupported: what of the call they do not support.
    """
    backends = {"triton", "cpu"} if name in dispatch.CPU_OPERATORS else {"triton"}
    try:
        choice = dispatch.choose(
            name,
            tensor,
            lambda backend: unsupported if backend in backends else dispatch.NO_KERNELS,
            preferred,
            dry_run=True,
        )
    except (NotImplementedError, RuntimeError) as error:  # a backend is requested but unavailable
        return str(error)
    return None if choice.backend in backends else choice.reason
