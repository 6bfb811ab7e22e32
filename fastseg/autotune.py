"""Which of two implementations of a call is faster: measured on this machine, or recorded on one like it.

If torch.backends.cudnn.benchmark is on, the first call of each shape on a GPU times both implementations. The times are
kept in the process and in a file for later processes. There is one file for each combination of GPU, driver, versions
and kernels, in the folder that the environment variable FASTSEG_CACHE names, by default ~/.cache/fastseg. Nothing is
timed while a CUDA graph is captured or a call is traced.

Without a measurement of this machine, times recorded on a GPU of the same name are used: files of the same format in
fastseg/recorded. To record a measurement, copy its file there.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import dispatch
from .atomic_write import atomic_write

Times = tuple[float, float]  # milliseconds of the kernels and of torch
RECORDED = Path(__file__).with_name("recorded")
KERNELS = Path(__file__).with_name("kernels")
DRIVER = Path("/proc/driver/nvidia/version")
WARM_UP, ROUNDS, CALLS = 3, 7, 5

Timer = Callable[[Callable[[], Any], Callable[[], Any]], Times]


def times(key: str, tensor: Tensor, calls: Callable[[], tuple[Callable[[], Any], Callable[[], Any]]]) -> Times | None:
    """The times of both implementations on the tensor's GPU for the call that `key` describes; None if unknown.

    calls: gives the two calls, fastseg's and torch's; used only if they are timed now.
    """
    if not tensor.is_cuda or dispatch.without_triton(tensor.device) is not None:
        return None
    known = _known(tensor.device.index or 0)
    if key not in known and may_measure(tensor):
        known[key] = timer(*calls())
        _remember(tensor.device.index or 0, key, known[key])
    return known.get(key) or _recorded(torch.cuda.get_device_name(tensor.device)).get(key)


def may_know(tensor: Tensor) -> bool:
    """Whether `times` can know any call on the tensor's GPU. If not, callers need not compute a key."""
    if not tensor.is_cuda or dispatch.without_triton(tensor.device) is not None:
        return False
    known = may_measure(tensor) or _known(tensor.device.index or 0)
    return bool(known or _recorded(torch.cuda.get_device_name(tensor.device)))


def may_measure(tensor: Tensor) -> bool:
    """Whether a call on this tensor may be timed: benchmarking is on, and the call is neither traced nor captured."""
    return (
        torch.backends.cudnn.benchmark
        and type(tensor) in (Tensor, torch.nn.Parameter)
        and not torch.compiler.is_compiling()
        and not torch.cuda.is_current_stream_capturing()
    )


def gpu_times(ours: Callable[[], Any], theirs: Callable[[], Any]) -> Times:
    """Median times by CUDA events. The calls alternate, so that clocks and caches are the same for both."""
    found: tuple[list[float], list[float]] = ([], [])
    with torch.no_grad():
        for call in (ours, theirs) * WARM_UP:
            call()
        for _ in range(ROUNDS):
            for call, took in zip((ours, theirs), found, strict=True):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                for _ in range(CALLS):
                    call()
                end.record()
                end.synchronize()
                took.append(start.elapsed_time(end) / CALLS)
    return statistics.median(found[0]), statistics.median(found[1])


timer: Timer = gpu_times


def _driver() -> str | None:
    """The version of NVIDIA's driver; None if the operating system does not tell.

    It is in a line such as "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05 ..."; some drivers leave
    out "for x86_64".
    """
    with contextlib.suppress(OSError):
        if found := re.search(r"Module.*?(\d+\.[\d.]+)", DRIVER.read_text()):
            return found[1]
    return None


def digest_of(folder: Path) -> str:
    """A digest of all Python files in a folder and in the folders below it."""
    digest = hashlib.sha1()
    for path in sorted(folder.resolve().rglob("*.py")):  # resolve: fastseg/kernels may be a link
        digest.update(path.read_bytes())
    return digest.hexdigest()


@functools.cache
def _machine(index: int) -> dict[str, Any]:
    """Everything that a time depends on besides the call."""
    import triton

    from .version import __version__

    return {
        "gpu": torch.cuda.get_device_name(index), "driver": _driver(),
        "torch": torch.__version__, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),
        "triton": triton.__version__, "fastseg": __version__, "kernels": digest_of(KERNELS),
    }  # fmt: skip


def cache_file(index: int) -> Path:
    """The file with this machine's times."""
    folder = Path(os.environ.get("FASTSEG_CACHE") or Path.home() / ".cache" / "fastseg")
    name = hashlib.sha1(json.dumps(_machine(index), sort_keys=True).encode()).hexdigest()[:16]
    return folder / f"times-{name}.json"


def _read(path: Path) -> dict[str, Any]:
    """{"machine": ..., "ms": {key: times}} of a file; empty if it is missing, truncated or of another format."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads(path.read_text())
        ms = {str(key): (float(ours), float(theirs)) for key, (ours, theirs) in found["ms"].items()}
        return {"machine": dict(found["machine"]), "ms": ms}
    return {"machine": {}, "ms": {}}


@functools.cache
def _known(index: int) -> dict[str, Times]:
    """This process's times of one GPU, initially those of the file."""
    return _read(cache_file(index))["ms"]


@functools.cache
def _recorded(gpu: str) -> dict[str, Times]:
    """The times recorded in fastseg/recorded for GPUs of this name."""
    found: dict[str, Times] = {}
    for path in sorted(RECORDED.glob("*.json")):
        content = _read(path)
        if content["machine"].get("gpu") == gpu:
            found |= content["ms"]
    return found


def _remember(index: int, key: str, measured: Times) -> None:
    """Add one result to the file atomically; other processes may write it too. Errors are ignored."""
    path = cache_file(index)
    content = {"machine": _machine(index), "ms": _read(path)["ms"] | {key: measured}}
    with contextlib.suppress(OSError), atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=0))
