"""All parts of `fastseg bench` in one run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from . import models, networks, providers, results
from .operators import Bench
from .shapes import sites

PARTS = ("operators", "overhead", "models")
QUICK_SECONDS = 0.02


@dataclass(frozen=True)
class BenchOptions:
    """What is timed.

    Args:
        parts: a subset of PARTS. None: all on a GPU, ``"operators"`` on a CPU.
        operators: prefixes of operator names, or None for all.
        networks: names of networks, or None for all.
        dtype: None: bfloat16 on a GPU, float32 on a CPU.
        layout: a key of ``fastseg.verification.cases.LAYOUTS``.
        quick: few small cases. Always so on a CPU.
        compile: time torch.compile too. None: on a GPU, unless `quick`.
        seconds: no further case is started after this time.
    """

    parts: Sequence[str] | None = None
    operators: Sequence[str] | None = None
    networks: Sequence[str] | None = None
    dtype: str | None = None
    layout: str = "channels_last"
    quick: bool = False
    compile: bool | None = None
    seconds: float = float("inf")


def measure_all(options: BenchOptions, device: str, recorder: results.Recorder) -> None:
    """Time the chosen parts on ``"cuda"`` or ``"cpu"`` into a recorder."""
    deadline = time.monotonic() + options.seconds
    on_gpu = device == "cuda"
    small = options.quick or not on_gpu
    dtype = options.dtype or ("bfloat16" if on_gpu else "float32")
    compile = options.compile if options.compile is not None else not small
    parts = options.parts or (PARTS if on_gpu else ("operators",))
    available = providers.providers(compile)
    quick = {"seconds": QUICK_SECONDS} if small else {}
    bench = Bench(recorder, device, dtype, options.layout, deadline, **quick)
    if "operators" in parts:
        bench.ceilings()
        bench.sites(sites(small), options.operators, available)
    if "overhead" in parts:
        bench.overhead(options.operators, available)
    if "models" in parts:
        whole = models.ModelBench(recorder, device, dtype, options.layout, deadline, small, **quick)
        chosen = [n for n in networks.NETWORKS if not options.networks or n.name in options.networks]
        whole.run(chosen, compile)
