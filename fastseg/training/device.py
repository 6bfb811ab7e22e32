"""The device that a run takes."""

from __future__ import annotations

import torch


def pick_device(name: str | None) -> torch.device:
    """The device of that name, by default "cuda" where there is one; ValueError where it cannot be had."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu, cuda or cuda:N, not {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"there is no device {device}; torch sees {torch.cuda.device_count()} CUDA devices")
    return device
