"""Compiles every CPU kernel ahead, so that no later process compiles one at its first call."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch

from .build import Parameter, compile_ahead

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BY_LAYOUT = (
    "pooling/pool", "pooling/unpool",
    "batch_norm/batch_norm", "batch_norm/batch_norm_pool", "batch_norm/batch_norm_unpool",
)  # fmt: skip
BY_DTYPE = ("losses/cross_entropy", "losses/dice_cross_entropy", "losses/upsample", "losses/upsample_cross_entropy")
ALONE = ("losses/confusion",)


class Compiled(NamedTuple):
    """A library, and the seconds that compiling it took, or None if it was on the disk."""

    name: str
    parameters: dict[str, Parameter]
    seconds: float | None


def libraries() -> Iterator[tuple[str, dict[str, Parameter]]]:
    """All libraries that calls use: the names of their source files, and their parameters.

    Class probabilities of another dtype than the logits have a library of their own, which is left to the first call.
    """
    for name in ALONE:
        yield name, {}
    for dtype in DTYPES:
        for name in BY_DTYPE:
            yield name, {"LOGITS": dtype}
        yield "losses/cross_entropy", {"LOGITS": dtype, "TARGET": dtype}
        yield "crf/message", {"VALUES": dtype}
        for name in BY_LAYOUT:
            for channels_last in (False, True):
                yield name, {"DTYPE": dtype, "CHANNELS_LAST": channels_last}


def warm() -> Iterator[Compiled]:
    """Compile all libraries, one on each core, and yield each as soon as it and those before it are there.

    Raises BuildError where they cannot be built.
    """
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        started = [(name, parameters, pool.submit(compile_ahead, name, parameters)) for name, parameters in libraries()]
        for name, parameters, future in started:
            yield Compiled(name, parameters, future.result())
