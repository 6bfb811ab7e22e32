"""The device that a run uses."""

from __future__ import annotations

import torch


def pick_device(name: str | None) -> torch.device:
    """Return a CPU or CUDA device that exists.

    Args:
        name: ``"cpu"``, ``"cuda"`` or ``"cuda:N"``. None selects CUDA if available, else the CPU.

    Raises:
        ValueError: the name is not one of these, or PyTorch does not see that device.

    Example::

        >>> from fastseg.training.device import pick_device
        >>> pick_device("cpu")
        device(type='cpu')
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu, cuda or cuda:N, but is {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {device} does not exist; torch sees {torch.cuda.device_count()} CUDA devices")
    return device
