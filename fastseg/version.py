"""The version of the distribution `fastseg-kernels`, and the versions of PyTorch and Triton that it needs.

Importing this module raises ImportError if PyTorch is too old, before a missing name inside of PyTorch does.
"""

from __future__ import annotations

import re

import torch

__version__ = "0.1.0"

OLDEST_TORCH = (2, 11)
# Pairs of PyTorch and Triton with which `make versions` passed (docs/versions.md). `fastseg doctor` names others.
TESTED = (((2, 11), (3, 6)), ((2, 13), (3, 7)), ((2, 14), (3, 8)), ((2, 15), (3, 9)))


def release(version: str) -> tuple[int, int]:
    """The first two numbers of a version such as "2.13.0+cpu"."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def require_torch(version: str) -> None:
    """Raise ImportError for a PyTorch that lacks what fastseg uses."""
    if release(version) < OLDEST_TORCH:
        raise ImportError(f"fastseg needs torch {spelled(OLDEST_TORCH)} or later, but torch {version} is installed")


def untested(torch_version: str, triton_version: str | None) -> str | None:
    """Which of the installed versions is not among the tested ones, in words; None if both are.

    Args:
        torch_version: the installed version of torch.
        triton_version: the installed version of triton, or None without triton.
    """
    tested = dict(TESTED)
    of_torch = release(torch_version)
    if of_torch not in tested:
        return f"torch {torch_version} is not tested; torch {_list(tested)} are"
    if triton_version is None or release(triton_version) == tested[of_torch]:
        return None
    return f"torch {torch_version} is tested with triton {spelled(tested[of_torch])}, not with {triton_version}"


def spelled(numbers: tuple[int, ...]) -> str:
    """The version with these numbers: "2.13" of (2, 13)."""
    return ".".join(map(str, numbers))


def _list(versions: dict[tuple[int, int], tuple[int, int]]) -> str:
    """Versions in words, such as "2.11 and 2.13"."""
    *others, last = map(spelled, versions)
    return f"{', '.join(others)} and {last}" if others else last


require_torch(torch.__version__)
