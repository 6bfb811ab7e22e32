"""Times of whole networks: plain torch, fused layers swapped in, fastseg's own, and torch.compile of each."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import cases, dispatch, models, swap
from .. import nn as fused
from . import timing
from .operators import OUT_OF_TIME
from .results import Recorder, Unable

SECONDS = 1.0
SLACK = 2.0
"""A network's logits, loss and gradients may be so many times as far from float64 as plain torch's."""
FLIPS = 0.05
"""What gradients may differ at least: a maximum of two nearly equal values moves a whole gradient, in any dtype."""
CHECKED_BATCH = 4
BN_EPS = 1e-5  # torch's own: with the authors' 1e-9 a check of few pictures sees little but rounding


class PlainTwin(nn.Module):
    """SegNet, SegNetBasic or DeconvNet as one writes it in torch alone: nn.MaxPool2d with indices, nn.MaxUnpool2d.

    Takes the layers of one of fastseg.models' networks and makes torch's own of them.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.norm = getattr(model, "norm", nn.Identity())
        self.encoder = nn.ModuleList(self.stage(*blocks) for blocks in model.encoder)
        middle = (getattr(model, name, None) for name in ("fc6", "fc7", "fc6_deconv"))
        self.middle = self.stage(*(layer for layer in middle if layer is not None))
        self.decoder = nn.ModuleList(self.stage(*blocks) for blocks in model.decoder)
        self.classifier = model.classifier  # all in the order of the network's own parameters
        self.pools = nn.ModuleList(nn.MaxPool2d(2, return_indices=True, ceil_mode=True) for _ in self.encoder)
        self.unpools = nn.ModuleList(nn.MaxUnpool2d(2) for _ in self.decoder)

    @staticmethod
    def stage(*blocks: nn.Module) -> nn.Sequential:
        """Convolution, nn.BatchNorm2d and ReLU for each pair of a convolution and what is fused behind it."""
        made = []
        for conv, norm in blocks:
            conv.__class__ = nn.ConvTranspose2d if isinstance(conv, nn.ConvTranspose2d) else nn.Conv2d
            relus = [nn.ReLU(inplace=True)] * norm.relu
            norm.__class__ = nn.BatchNorm2d
            made.append(nn.Sequential(conv, norm, *relus))
        return nn.Sequential(*made)

    def forward(self, x: Tensor) -> Tensor:
        x, places = self.norm(x), []
        for stage, pool in zip(self.encoder, self.pools, strict=True):
            x = stage(x)
            size = x.shape
            x, indices = pool(x)
            places.append((indices, size))
        x = self.middle(x)
        for stage, unpool in zip(self.decoder, self.unpools, strict=True):
            indices, size = places.pop()
            x = stage(unpool(x, indices, output_size=size))
        return self.classifier(x)


class UNet(nn.Module):
    """A small U-Net in plain torch: max-pooling down, 2x2 transposed convolutions with stride 2 up, skips between."""

    def __init__(self, num_classes: int, width: float = 1.0) -> None:
        super().__init__()
        channels = [max(8, int(c * width)) for c in (32, 64, 128, 256, 512)]
        self.down = nn.ModuleList(self.stage(i, o) for i, o in zip([3, *channels], channels, strict=False))
        self.pool = nn.MaxPool2d(2)
        pairs = list(zip(channels[:0:-1], channels[-2::-1], strict=True))
        self.up = nn.ModuleList(nn.ConvTranspose2d(i, o, 2, 2) for i, o in pairs)
        self.merge = nn.ModuleList(self.stage(2 * o, o) for _, o in pairs)
        self.classifier = nn.Conv2d(channels[0], num_classes, 1)

    @staticmethod
    def stage(inputs: int, outputs: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for channels in (inputs, outputs):
            layers += [nn.Conv2d(channels, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for stage in self.down:
            x = stage(x)
            kept.append(x)
            x = self.pool(x)
        x = kept.pop()  # the last map is not pooled
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(torch.cat([kept.pop(), up(x)], 1))
        return self.classifier(x)


@dataclass(frozen=True)
class Network:
    """A network, its classes, and the pictures it is timed on: at full size, and small for a CPU."""

    name: str
    classes: int
    pictures: tuple[int, int, int]
    small: tuple[int, int, int]


NETWORKS = [
    Network("segnet", 11, (8, 360, 480), (4, 48, 64)),
    Network("deconvnet", 21, (16, 224, 224), (4, 224, 224)),
    Network("unet", 19, (8, 512, 512), (4, 64, 64)),
    Network("segnet-basic", 11, (8, 360, 480), (4, 48, 64)),
]
SMALL_WIDTH = 0.125


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


class Built:
    """The forms of one network, all with the same weights: plain, swapped, native."""

    def __init__(self, network: Network, small: bool) -> None:
        width = SMALL_WIDTH if small else 1.0
        torch.manual_seed(0)
        if network.name == "unet":
            self.native, self.plain = None, UNet(network.classes, width)
        else:
            self.native = models.MODELS[network.name](network.classes, width=width, bn_eps=BN_EPS)
            self.plain = PlainTwin(copy.deepcopy(self.native))

    def model(self, build: str, backend: str) -> nn.Module | None:
        """None where this network has no such form, or it would run what another one does."""
        if backend == "triton" and not any(isinstance(m, nn.ConvTranspose2d) for m in self.plain.modules()):
            return None  # the same kernels as under "auto"
        if build == "native" and self.native is not None:
            return copy.deepcopy(self.native)
        if build == "native" and backend != "triton":
            return None
        made = copy.deepcopy(self.plain)
        if build != "plain":
            swap(made)
        return made


class ModelBench:
    """Times networks into a recorder, until a deadline (of time.monotonic)."""

    def __init__(
        self, recorder: Recorder, device: str, dtype: str, layout: str, deadline: float, small: bool,
        seconds: float = SECONDS,
    ) -> None:  # fmt: skip
        self.recorder, self.device, self.deadline, self.small, self.seconds = (
            recorder, device, deadline, small, seconds,
        )  # fmt: skip
        self.dtype, self.layout, self.format = cases.DTYPES[dtype], layout, cases.LAYOUTS[layout]

    def run(self, networks: Sequence[Network], compile: bool) -> None:
        """All networks: first what is not compiled, then what is."""
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
            images = torch.randn(n, 3, h, w, device=self.device).contiguous(memory_format=self.format)
            labels = torch.randint(network.classes, (n, h, w), device=self.device)
            job = Job(self, Built(network, self.small), images, labels)
        for variant in variants if job else ():
            who = identity | {"provider": variant.provider}
            if time.monotonic() > self.deadline:
                self.recorder.add("status", note=OUT_OF_TIME, **who, mode="", launch="")
                continue
            with self.recorder.shown(**who, mode="", launch=""), dispatch.backend(variant.backend):
                job.run(variant, who)
            if variant.compile is not None:
                torch._dynamo.reset()


class Job:
    """One network on its pictures: what is right, from plain torch, and the variants checked and timed."""

    def __init__(self, bench: ModelBench, built: Built, images: Tensor, labels: Tensor) -> None:
        self.bench, self.built, self.images, self.labels = bench, built, images, labels
        few = slice(CHECKED_BATCH)
        self.few = images[few].contiguous(memory_format=bench.format), labels[few]
        self.truth = self._outcome(self._place(built.plain).double(), nn.CrossEntropyLoss(), exact=True)
        plain = self._outcome(self._place(built.plain), nn.CrossEntropyLoss())
        self.plain_errors = _errors(plain, self.truth)
        model, loss = self._place(built.plain), nn.CrossEntropyLoss()
        self.wanted = {mode: self._result(mode, model, make(model, loss)) for mode, make in self._modes()}

    def run(self, variant: Variant, who: dict[str, str]) -> None:
        """Check a variant, and time it if it is right."""
        bench = self.bench
        built = self.built.model(variant.build, variant.backend)
        if built is None:
            return
        if variant.backend == "triton" and bench.device != "cuda":
            raise Unable("the kernels need a GPU: interpreted, they have no times")
        model = self._place(built)
        loss = nn.CrossEntropyLoss() if variant.build == "plain" else fused.CrossEntropyLoss()
        if variant.compile is None:
            errors = _errors(self._outcome(model, loss), self.truth)
            allowed = {name: SLACK * self.plain_errors[name] + self._least(name) for name in errors}
            verdict = _verdict(errors, allowed)
            bench.recorder.add("status", (max(errors.values()),) * 3, verdict, **who, mode="", launch="")
            if verdict != "right":
                return
        for mode, make in self._modes():
            identity = who | {"mode": mode, "launch": "eager"}
            with bench.recorder.shown(**identity):
                call = make(model, loss, variant.compile)
                # Both have errors of their own, of the size that plain torch has against float64.
                name = "logits" if mode == "inference" else "gradients"
                errors = _errors({name: self._result(mode, model, call)}, {name: self.wanted[mode]})
                verdict = _verdict(errors, {name: 2 * SLACK * self.plain_errors[name] + self._least(name)})
                if verdict != "right" or variant.compile is not None:
                    bench.recorder.add("status", (max(errors.values()),) * 3, verdict, **identity)
                if verdict == "right":
                    self._time(call, identity)

    def _time(self, call: Callable[[], Any], identity: dict[str, str]) -> None:
        took = timing.measure(call, self.bench.device, self.bench.seconds)
        self.bench.recorder.add("ms", (took.p20, took.p50, took.p80), **identity)
        if took.peak_bytes is not None:
            self.bench.recorder.add("MiB", (took.peak_bytes / 2**20,) * 3, **identity)

    def _least(self, name: str) -> float:
        return FLIPS if name == "gradients" else 64 * torch.finfo(torch.float32).eps

    def _modes(self) -> list[tuple[str, Callable[..., Callable[[], Any]]]]:
        return [("inference", self._inference), ("training step", self._training)]

    @staticmethod
    def _result(mode: str, model: nn.Module, call: Callable[[], Any]) -> list[Tensor]:
        """Logits of an inference, gradients of a training step."""
        result = call()
        return [result] if mode == "inference" else [p.grad.clone() for p in model.parameters()]

    def _place(self, model: nn.Module) -> nn.Module:
        return copy.deepcopy(model).to(self.bench.device).to(memory_format=self.bench.format)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.bench.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.bench.device, self.bench.dtype)

    def _outcome(self, model: nn.Module, loss: nn.Module, exact: bool = False) -> dict[str, list[Tensor]]:
        """Logits in eval mode, loss and gradients in training mode, for few pictures and a copy of the model."""
        model = copy.deepcopy(model)
        images, labels = (self.few[0].double(), self.few[1]) if exact else self.few
        with _no_search() if exact else self._autocast():
            model.eval()
            with torch.no_grad():
                logits = model(images)
            model.train()
            value = loss(model(images), labels)
            if exact:
                value.backward()
        if not exact:
            value.backward()  # outside autocast, as one writes it
        return {"logits": [logits], "loss": [value.detach()], "gradients": [p.grad for p in model.parameters()]}

    def _inference(self, model: nn.Module, loss: nn.Module, compile: str | None = None) -> Callable[[], Any]:
        model.eval()
        call = model if compile is None else torch.compile(model, mode=compile, dynamic=False)

        def run() -> Tensor:
            with torch.no_grad(), self._autocast():
                return call(self.images)

        return run

    def _training(self, model: nn.Module, loss: nn.Module, compile: str | None = None) -> Callable[[], Any]:
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

        def forward(images: Tensor, labels: Tensor) -> Tensor:
            return loss(model(images), labels)

        call = forward if compile is None else torch.compile(forward, mode=compile, dynamic=False)

        def run() -> None:
            optimizer.zero_grad(set_to_none=True)
            with self._autocast():
                value = call(self.images, self.labels)
            value.backward()
            optimizer.step()

        return run


@contextlib.contextmanager
def _no_search() -> Iterator[None]:
    """cuDNN tries no algorithms: in float64 that takes longer than the network."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _errors(found: dict[str, list[Tensor]], truth: dict[str, list[Tensor]]) -> dict[str, float]:
    """The norm of the difference over the norm of the truth, for each kind of result."""
    errors = {}
    for name, wanted in truth.items():
        pairs = list(zip(found[name], wanted, strict=True))
        off = sum(float((got.double() - want).square().sum()) for got, want in pairs)
        norm = sum(float(want.double().square().sum()) for want in wanted)
        errors[name] = (off / max(norm, 1e-300)) ** 0.5
    return errors


def _verdict(errors: dict[str, float], allowed: dict[str, float]) -> str:
    for name, error in errors.items():
        if not error <= allowed[name]:  # NaN is wrong
            return f"wrong: {name} off by {error:.2g}, allowed {allowed[name]:.2g}"
    return "right"
