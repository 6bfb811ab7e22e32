"""Times of whole networks: in plain torch, after fastseg.swap, fastseg's own, and torch.compile of each."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from ..verification import cases
from . import timing
from .networks import Built, Form, Network
from .operators import OUT_OF_TIME
from .results import Recorder, Unable

SECONDS = 1.0
ROUNDING = 64 * torch.finfo(torch.float32).eps
SLACK = 2.0
"""How many times plain torch's error against float64 a network's logits, loss and gradients may have."""
LEAST = {"logits": ROUNDING, "loss": ROUNDING, "gradients": 0.05, "labels": 1e-3}
"""Errors that are always allowed. If two values in a window are nearly equal, rounding moves a whole gradient, in any
dtype; if two logits are, it changes a label."""
CHECKED_BATCH = 4


@dataclass(frozen=True)
class Variant:
    """One way to run a network. compile: the mode of torch.compile, or None."""

    provider: str
    build: str
    backend: str = "auto"
    compile: str | None = None


VARIANTS = [
    Variant("torch", "plain"),
    Variant("fastseg swap", "swapped"),
    Variant("fastseg", "native"),
    Variant("fastseg triton", "native", "triton"),
    Variant("torch.compile", "plain", compile="default"),
    Variant("fastseg swap, torch.compile", "swapped", compile="default"),
    Variant("fastseg, torch.compile", "native", compile="default"),
    Variant("torch.compile max-autotune", "plain", compile="max-autotune-no-cudagraphs"),
]


class ModelBench:
    """Times networks into a recorder, until a deadline of time.monotonic."""

    def __init__(
        self, recorder: Recorder, device: str, dtype: str, layout: str, deadline: float, small: bool,
        seconds: float = SECONDS,
    ) -> None:  # fmt: skip
        self.recorder, self.device, self.deadline, self.small, self.seconds = (
            recorder, device, deadline, small, seconds,
        )  # fmt: skip
        self.dtype, self.layout, self.format = cases.DTYPES[dtype], layout, cases.LAYOUTS[layout]

    def run(self, networks: Sequence[Network], compile: bool) -> None:
        """Time all networks: first the variants without torch.compile, then those with it."""
        for compiled in (False, True) if compile else (False,):
            for network in networks:
                self._network(network, [v for v in VARIANTS if (v.compile is not None) == compiled])

    def _network(self, network: Network, variants: Sequence[Variant]) -> None:
        n, h, w = network.small if self.small else network.pictures
        identity = {
            "part": "models", "where": network.name, "operator": "", "shape": f"{n}x3x{h}x{w}", "layout": self.layout,
            "dtype": str(self.dtype).removeprefix("torch.") + ("" if self.dtype == torch.float32 else " autocast"),
        }  # fmt: skip
        if time.monotonic() > self.deadline:
            for variant in variants:
                who = identity | {"provider": variant.provider}
                self.recorder.add("status", note=OUT_OF_TIME, **who, mode="", launch="")
            return
        job = None
        with self.recorder.shown(**identity, provider="inputs", mode="", launch=""):
            inputs = [torch.randn(shape, device=self.device) for shape in network.inputs(n, h, w)]
            inputs = [x.contiguous(memory_format=self.format) for x in inputs]
            job = Job(self, Built(network, self.small), inputs, network.labels(n, h, w, self.device))
        for variant in variants if job else ():
            who = identity | {"provider": variant.provider}
            if time.monotonic() > self.deadline:
                self.recorder.add("status", note=OUT_OF_TIME, **who, mode="", launch="")
                continue
            with self.recorder.shown(**who, mode="", launch=""), dispatch.backend(variant.backend):
                job.run(variant, who)
            if variant.compile is not None:
                torch.compiler.reset()


class Job:
    """One network on its inputs: the expected results, from plain torch, and the checks and times of the variants."""

    def __init__(self, bench: ModelBench, built: Built, inputs: list[Tensor], labels: Tensor) -> None:
        self.bench, self.built, self.inputs, self.labels = bench, built, inputs, labels
        few = slice(CHECKED_BATCH)
        self.few = [x[few].contiguous(memory_format=bench.format) for x in inputs], labels[few]
        plain = built.forms["plain"]
        self.truth = self._outcome(self._place(plain, torch.float64), exact=True)
        self.plain_errors = _errors(self._outcome(self._place(plain)), self.truth)
        form = self._place(plain)
        self.wanted = {mode: self._result(mode, form, make(form)) for mode, make in self._modes()}

    def run(self, variant: Variant, who: dict[str, str]) -> None:
        """Check a variant, and time it if its results are right."""
        bench = self.bench
        form = self.built.form(variant.build, variant.backend)
        if form is None:
            return
        if variant.backend == "triton" and bench.device != "cuda":
            raise Unable("the kernels need a GPU: interpreted, they have no times")
        form = self._place(form)
        if variant.compile is None:
            errors = _errors(self._outcome(form), self.truth)
            allowed = {name: SLACK * self.plain_errors[name] + LEAST[name] for name in errors}
            verdict = _verdict(errors, allowed)
            bench.recorder.add("status", (max(errors.values()),) * 3, verdict, **who, mode="", launch="")
            if verdict != "right":
                return
        for mode, make in self._modes():
            identity = who | {"mode": mode, "launch": "eager"}
            with bench.recorder.shown(**identity):
                call = make(form, variant.compile)
                # Both have rounding errors, of the size of plain torch's error against float64.
                name = "gradients" if mode != "inference" else "logits" if form.predict is None else "labels"
                errors = _errors({name: self._result(mode, form, call)}, {name: self.wanted[mode]})
                verdict = _verdict(errors, {name: 2 * SLACK * self.plain_errors[name] + LEAST[name]})
                if verdict != "right" or variant.compile is not None:
                    bench.recorder.add("status", (max(errors.values()),) * 3, verdict, **identity)
                if verdict == "right":
                    self._time(call, identity)

    def _time(self, call: Callable[[], Any], identity: dict[str, str]) -> None:
        took = timing.measure(call, self.bench.device, self.bench.seconds)
        self.bench.recorder.add("ms", (took.p20, took.p50, took.p80), **identity)
        if took.peak_bytes is not None:
            self.bench.recorder.add("MiB", (took.peak_bytes / 2**20,) * 3, **identity)

    def _modes(self) -> list[tuple[str, Callable[..., Callable[[], Any]]]]:
        return [("inference", self._inference), ("training step", self._training)]

    @staticmethod
    def _result(mode: str, form: Form, call: Callable[[], Any]) -> list[Tensor]:
        """The logits or labels of an inference, or the gradients of a training step."""
        result = call()
        return [result] if mode == "inference" else [p.grad.clone() for p in form.model.parameters()]

    def _place(self, form: Form, dtype: torch.dtype | None = None) -> Form:
        model = copy.deepcopy(form.model).to(self.bench.device, dtype).to(memory_format=self.bench.format)
        return replace(form, model=model)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.bench.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.bench.device, self.bench.dtype)

    def _outcome(self, form: Form, exact: bool = False) -> dict[str, list[Tensor]]:
        """Logits and labels in evaluation, loss and gradients in training, of a copy of the model for few images."""
        model, (inputs, labels) = copy.deepcopy(form.model), self.few
        inputs = [x.double() for x in inputs] if exact else inputs
        found = {}
        with _no_search() if exact else self._autocast():
            model.eval()
            with torch.no_grad():
                found["logits"] = [model(*inputs)]
                if form.predict is not None:
                    found["labels"] = [form.predict(*found["logits"], labels.shape[-2:])]
            model.train()
            value = form.loss(model(*inputs), labels)
            if exact:
                value.backward()
        if not exact:
            value.backward()  # outside autocast, as in a usual training loop
        return found | {"loss": [value.detach()], "gradients": [p.grad for p in model.parameters()]}

    def _inference(self, form: Form, compile: str | None = None) -> Callable[[], Any]:
        form.model.eval()
        size = self.labels.shape[-2:]

        def forward(*inputs: Tensor) -> Tensor:
            logits = form.model(*inputs)
            return logits if form.predict is None else form.predict(logits, size)

        call = forward if compile is None else torch.compile(forward, mode=compile, dynamic=False)

        def run() -> Tensor:
            with torch.no_grad(), self._autocast():
                return call(*self.inputs)

        return run

    def _training(self, form: Form, compile: str | None = None) -> Callable[[], Any]:
        form.model.train()
        optimizer = torch.optim.SGD(form.model.parameters(), lr=1e-4, momentum=0.9)

        def forward(labels: Tensor, *inputs: Tensor) -> Tensor:
            return form.loss(form.model(*inputs), labels)

        call = forward if compile is None else torch.compile(forward, mode=compile, dynamic=False)

        def run() -> None:
            optimizer.zero_grad(set_to_none=True)
            with self._autocast():
                value = call(self.labels, *self.inputs)
            value.backward()
            optimizer.step()

        return run


@contextlib.contextmanager
def _no_search() -> Iterator[None]:
    """Turn off cuDNN's search for algorithms, which in float64 takes longer than the network."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _errors(found: dict[str, list[Tensor]], truth: dict[str, list[Tensor]]) -> dict[str, float]:
    """For each kind of result the norm of the difference over that of the truth; for labels the share that differs."""
    errors = {}
    for name, wanted in truth.items():
        if name == "labels":
            errors[name] = max(float((a != b).double().mean()) for a, b in zip(found[name], wanted, strict=True))
            continue
        pairs = list(zip(found[name], wanted, strict=True))
        off = sum(float((got.double() - want).square().sum()) for got, want in pairs)
        norm = sum(float(want.double().square().sum()) for want in wanted)
        errors[name] = (off / max(norm, 1e-300)) ** 0.5
    return errors


def _verdict(errors: dict[str, float], allowed: dict[str, float]) -> str:
    for name, error in errors.items():
        if not error <= allowed[name]:  # true for NaN
            return f"wrong: {name} off by {error:.2g}, allowed {allowed[name]:.2g}"
    return "right"
