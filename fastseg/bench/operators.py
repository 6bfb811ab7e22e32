"""Times of single operators: every provider on every case, after a check of its results, and the host overhead."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from ..ops.operator import Operator, observing
from ..verification import cases
from ..verification.cases import LAYOUTS, Case, Placement
from . import providers, timing
from .providers import Function, Provider, check, check_full_size
from .results import Recorder
from .shapes import TINY, DrawnInPlace, Site

CHECKED_ELEMENTS = 2**24  # larger cases are checked against float64 for one image only
SECONDS = 0.12
OUT_OF_TIME = "not run: the time is up"


def step(case: Case, function: Function, mode: str) -> Callable[[], Any]:
    """A function without arguments that runs the forward without a graph, the backward alone, or both."""
    if mode != "backward":
        return case.step(function, mode == "forward+backward")
    inputs = list(case.inputs.values())
    leaves = [x.detach().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]
    result = function(*leaves)
    outputs = [y for y in (result if isinstance(result, (tuple, list)) else [result]) if y.requires_grad]
    grads = cases.random_gradients(outputs)
    wanted = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
    return lambda: torch.autograd.grad(outputs, wanted, grads, retain_graph=True)


def floors(bare: Case) -> dict[str, int]:
    """The floor of each mode in bytes, from a case on the meta device: the sum over the operators that run."""
    from ..kernels import launch  # late: importing kernels decides whether they are interpreted

    found = {}
    for mode, backward in (("forward", False), ("forward+backward", True)):
        moved: list[int] = []

        def note(operator: Operator, args: tuple[Any, ...], moved: list[int] = moved) -> None:
            moved.append(operator.floor(*args))

        with dispatch.backend("triton"), launch.recording(lambda *launched: None):
            call = bare.step(bare.ours, backward)
            with observing(note):
                call()
        found[mode] = sum(moved)
    return found | {"backward": found["forward+backward"] - found["forward"]}


def flops(case: Case) -> dict[str, int]:
    """FLOPs of a transposed convolution by mode; empty for other operators."""
    if not case.operator.startswith("conv_transpose2d"):
        return {}
    x, weight = case.inputs["input"], case.inputs["weight"]
    forward = 2 * x.numel() * weight.shape[1:].numel()
    return {"forward": forward, "backward": 2 * forward, "forward+backward": 3 * forward}


class Bench:
    """Times operators into a recorder, until a deadline of time.monotonic."""

    def __init__(
        self, recorder: Recorder, device: str, dtype: str, layout: str, deadline: float, seconds: float = SECONDS
    ) -> None:
        self.recorder, self.device, self.layout, self.deadline, self.seconds = (
            recorder, device, layout, deadline, seconds,
        )  # fmt: skip
        self.at = DrawnInPlace(cases.DTYPES[dtype], LAYOUTS[layout], device)
        self.meta = Placement(cases.DTYPES[dtype], LAYOUTS[layout], "meta")

    def ceilings(self) -> None:
        """Measure and record the device's peak rates, which the operators' rates are divided by.

        On a GPU the matmul is in half precision, even if the operators are in float32.
        """
        half = self.at.dtype if self.device == "cpu" or self.at.dtype != torch.float32 else torch.bfloat16
        copy, matmul = timing.copy_rates(self.device), timing.matmul_rates(self.device, half)
        self.best = {"copy": copy[1], "matmul": matmul[1]}
        same = {"part": "ceilings", "where": "", "provider": "torch", "mode": "", "launch": "eager", "layout": ""}
        self.recorder.add("GB/s", copy, operator="copy", shape="2^30" if self.device == "cuda" else "2^24",
                          dtype="uint8", **same)  # fmt: skip
        self.recorder.add("TFLOP/s", matmul, operator="matmul", shape="8192^3" if self.device == "cuda" else "512^3",
                          dtype=str(half).removeprefix("torch."), **same)  # fmt: skip

    def sites(self, found: Sequence[Site], operators: Sequence[str] | None, who: Sequence[Provider]) -> None:
        """Time every provider on every case; compilers only on the headlines, since they are slow.

        In order: the headlines, the headlines with torch.compile, the other sites, and max-autotune.
        """
        eager = [provider for provider in who if not provider.compiles]
        compiled = [provider for provider in who if provider.compiles]
        main, rest = ([site for site in found if site.headline == headline] for headline in (True, False))
        for some, sites in ((eager, main), (compiled[:1], main), (eager, rest), (compiled[1:], main)):
            for site in sites if some else ():
                bare = site.cases(self.meta)
                chosen = [n for n, case in enumerate(bare) if _asked(case, operators)]
                if chosen and time.monotonic() < self.deadline:
                    self._site(site, chosen, bare, some)
                else:
                    for number, provider in itertools.product(chosen, some):
                        self._record("status", site, bare[number], provider, note=OUT_OF_TIME)

    def _site(self, site: Site, chosen: Sequence[int], bare: Sequence[Case], who: Sequence[Provider]) -> None:
        full = None
        with self.recorder.shown(**self._identity(site, bare[chosen[0]]), provider="inputs", mode="", launch=""):
            full = site.cases(self.at)
        if full is None:
            return
        small = full
        if max(x.numel() for x in full[0].inputs.values() if isinstance(x, Tensor)) > CHECKED_ELEMENTS:
            small = site.one().cases(self.at)
        for number in chosen:
            floor: dict[str, int] = {}
            inputs = self._identity(site, full[number]) | {"provider": "inputs", "mode": "", "launch": ""}
            with self.recorder.shown(**inputs):  # if this fails there are times but no rates
                floor = floors(bare[number])
            for provider in who:
                identity = self._identity(site, full[number]) | {"provider": provider.name}
                with self.recorder.shown(**identity, mode="", launch=""), provider.context():
                    self._provider(site, full[number], small[number], provider, floor)

    def _provider(self, site: Site, case: Case, small: Case, provider: Provider, floor: dict[str, int]) -> None:
        function = provider.function(case)
        if function is None:
            return
        error, verdict = None, "right"
        if not provider.compiles:  # a compiler would compile again for the small shape
            error, verdict = check(provider, small, provider.function(small) if case is not small else function)
        if verdict == "right" and (case is not small or provider.compiles):
            verdict = check_full_size(provider, case, function)
        self._record("status", site, case, provider, (error,) * 3, note=verdict)
        if verdict != "right":
            return
        work = flops(case)
        for mode in provider.modes:
            for how in ("eager", "graph"):
                if how == "graph" and (self.device != "cuda" or mode == "backward"):
                    continue  # a backward alone cannot be captured: its forward ran on another stream
                identity = self._identity(site, case) | {"provider": provider.name, "mode": mode, "launch": how}
                with self.recorder.shown(**identity):
                    call = step(case, function, mode)
                    with provider.library():
                        if how == "graph":
                            call = timing.captured(call)
                        took = timing.measure(call, self.device, self.seconds)
                    self._times(identity, took, floor.get(mode), work.get(mode), how)

    def _times(
        self, identity: dict[str, str], took: timing.Timing, floor: int | None, work: int | None, how: str
    ) -> None:
        slow_first = (took.p80, took.p50, took.p20)
        self.recorder.add("ms", (took.p20, took.p50, took.p80), **identity)
        if took.peak_bytes is not None and how == "eager":
            self.recorder.add("MiB", (took.peak_bytes / 2**20,) * 3, **identity)
        for metric, share, amount, unit, best in (
            ("GB/s", "of copy", floor, 1e6, self.best["copy"]),
            ("TFLOP/s", "of matmul", work, 1e9, self.best["matmul"]),
        ):
            if amount is not None:
                rates = tuple(amount / unit / ms for ms in slow_first)
                self.recorder.add(metric, rates, **identity)
                self.recorder.add(share, tuple(rate / best for rate in rates), **identity)

    def overhead(self, operators: Sequence[str] | None, who: Sequence[Provider]) -> None:
        """Time the host overhead: microseconds of host time per call on a tiny input."""
        for site in TINY:
            for case in site.cases(self.at):
                for provider in who:
                    if provider.compiles or not _asked(case, operators):
                        continue
                    identity = self._identity(site, case, "overhead") | {"provider": provider.name, "launch": "eager"}
                    with self.recorder.shown(**identity, mode=""), provider.context():
                        self._overhead(case, provider, identity)

    def _overhead(self, case: Case, provider: Provider, identity: dict[str, str]) -> None:
        function = provider.function(case)
        if function is None:
            return
        error, verdict = check(provider, case, function)
        self.recorder.add("status", (error,) * 3, verdict, **identity, mode="")
        if verdict != "right":
            return
        for mode in [mode for mode in provider.modes if mode != "backward"]:
            with self.recorder.shown(**identity, mode=mode), provider.library():
                took = timing.host_overhead(step(case, function, mode), self.device)
                self.recorder.add("us", took, **identity, mode=mode)

    def _identity(self, site: Site, case: Case, part: str = "operators") -> dict[str, str]:
        return {"part": part, "where": site.where} | providers.labels(case, self.at, self.layout)

    def _record(
        self, metric: str, site: Site, case: Case, provider: Provider, values: tuple[Any, ...] = (None,) * 3,
        note: str = "",
    ) -> None:  # fmt: skip
        self.recorder.add(
            metric, values, note, **self._identity(site, case), provider=provider.name, mode="", launch=""
        )


def _asked(case: Case, operators: Sequence[str] | None) -> bool:
    return not operators or case.operator.startswith(tuple(operators))
