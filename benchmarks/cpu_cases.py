"""What benchmarks/cpu.py times: operators and a network, in torch and in fastseg, float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastseg import functional
from fastseg.bench import networks
from fastseg.torch_internals import tree_leaves
from fastseg.verification import cases
from fastseg.verification.cases import Case, LossSpec, Placement, PoolSpec, ResizeSpec

Call = Callable[[], Any]
CEIL = PoolSpec(ceil_mode=True)


@dataclass(frozen=True)
class Job:
    """One row: the same computation without arguments in torch, compiled by torch, and in fastseg.

    compiled: makes the compiled form, or None if another row has it. floor: the bytes of every tensor that goes in and
    out, each once; None for a network.
    """

    operator: str
    size: str
    layout: str
    eager: Call
    compiled: Callable[[], Call] | None
    fastseg: Call
    floor: int | None = None


def _floor(case: Case, backward: bool) -> int:
    """The bytes of the inputs, the results and, with backward, the gradients of both."""
    leaves = [
        x.detach().requires_grad_(backward) if isinstance(x, Tensor) and x.is_floating_point() else x
        for x in case.inputs.values()
    ]
    results = [y for y in tree_leaves(case.ours(*leaves)) if isinstance(y, Tensor)]
    passed = [y for y in results if y.requires_grad]
    moved = [*leaves, *results, *passed, *(x for x in leaves if isinstance(x, Tensor) and x.requires_grad)]
    return sum(x.numel() * x.element_size() for x in moved if isinstance(x, Tensor))


def _job(case: Case, layout: str, backward: bool = True) -> Job:
    theirs = case.eager if case.operator in ("max_pool2d_with_offsets", "upsample_argmax") else case.theirs
    name = case.operator if backward else f"{case.operator}, forward"
    return Job(
        name, case.size, layout, case.step(theirs, backward),
        lambda: case.step(torch.compile(theirs, dynamic=False), backward), case.step(case.ours, backward),
        _floor(case, backward),
    )  # fmt: skip


# --- the table -------------------------------------------------------------------------------------------------------


def monai_dice_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Dice plus cross-entropy by the formula of MONAI's DiceCELoss(to_onehot_y=True, softmax=True)."""
    softmax = logits.softmax(1)
    one_hot = torch.zeros_like(softmax).scatter_(1, labels.unsqueeze(1), 1)
    overlap, labelled, predicted = ((x.sum((2, 3))) for x in (one_hot * softmax, one_hot, softmax))
    dice = 1 - (2 * overlap + 1e-5) / (labelled + predicted + 1e-5)
    return dice.mean() + F.cross_entropy(logits, labels)


def dice_cross_entropy(at: Placement, shape: Sequence[int]) -> Case:
    inputs = {"logits": at.tensor(*shape), "labels": at.labels(shape[1], shape[0], *shape[2:])}
    size = "x".join(map(str, shape))
    return Case("dice_cross_entropy", size, functional.dice_cross_entropy, monai_dice_cross_entropy, inputs)


def batch_norm_relu_max_pool2d(at: Placement, shape: Sequence[int], training: bool = True) -> Case:
    """Batch norm, an in-place ReLU and a pooling with positions, whose pooled map is differentiated."""
    channels = shape[1]
    running = torch.zeros(channels), torch.ones(channels)
    inputs = {"x": at.tensor(*shape), "weight": at.parameters(channels), "bias": at.parameters(channels)}

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Any:
        return functional.batch_norm_relu_max_pool2d(
            x, *running, weight, bias, training, ceil_mode=True, return_offsets=True
        )

    def theirs(x: Tensor, weight: Tensor, bias: Tensor) -> Any:
        y = F.relu(F.batch_norm(x, *running, weight, bias, training), inplace=True)
        return F.max_pool2d(y, 2, ceil_mode=True, return_indices=True)

    size = "x".join(map(str, shape))
    return Case(f"batch_norm_relu_max_pool2d{'' if training else ', evaluation'}", size, ours, theirs, inputs)


def batch_norm_relu(at: Placement, shape: Sequence[int], training: bool = True) -> Case:
    """Batch norm and an in-place ReLU."""
    channels = shape[1]
    running = torch.zeros(channels), torch.ones(channels)
    inputs = {"x": at.tensor(*shape), "weight": at.parameters(channels), "bias": at.parameters(channels)}

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return functional.batch_norm_relu(x, *running, weight, bias, training)

    def theirs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.relu(F.batch_norm(x, *running, weight, bias, training), inplace=True)

    size = "x".join(map(str, shape))
    return Case(f"batch_norm_relu{'' if training else ', evaluation'}", size, ours, theirs, inputs)


def table(layout: str, quick: bool) -> Iterator[Job]:
    """The rows of docs/cpu.md for one memory format. quick: at small sizes."""
    at = Placement(torch.float32, cases.LAYOUTS[layout], "cpu")
    n, h, w = (1, 64, 96) if quick else (4, 256, 512)
    logits, maps = (n, 19, h, w), (n, 16, 48, 64) if quick else (n, 64, 180, 240)
    yield _job(next(cases.cross_entropy(at, logits)), layout)
    yield _job(next(cases.upsample_cross_entropy(at, (n, 19, h // 8, w // 8), ResizeSpec((h, w)))), layout)
    yield _job(dice_cross_entropy(at, logits), layout)
    yield _job(batch_norm_relu_max_pool2d(at, maps), layout)
    yield _job(batch_norm_relu(at, maps), layout)
    _, with_offsets = cases.max_pool2d(at, maps, CEIL)
    yield _job(with_offsets, layout)
    _, with_offsets = cases.max_unpool2d(at, maps, CEIL)
    yield _job(with_offsets, layout)
    yield from network(layout, (2, 3, 45, 61) if quick else (2, 3, 180, 240))


def network(layout: str, shape: Sequence[int]) -> Iterator[Job]:
    """SegNet of width 0.25 in torch's layers: a training step (forward, loss, backward), and inference.

    With fastseg swapped in, and as fastseg.models has it, which also joins batch norms with the pools and unpools.
    """
    forms = networks.of_models("segnet")(11, 0.25)
    plain, native, swapped = forms["plain"], forms["native"], networks.swapped(forms["plain"])
    memory_format = cases.LAYOUTS[layout]
    x = torch.randn(shape).contiguous(memory_format=memory_format)
    labels = torch.randint(11, (shape[0], *shape[2:]))
    for form in (plain, native, swapped):
        form.model.to(memory_format=memory_format)
    size = "x".join(map(str, shape))

    def training(form: networks.Form) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda x, labels: form.loss(form.model(x), labels)

    def step(model: nn.Module, forward: Callable[[Tensor, Tensor], Tensor]) -> Call:
        def run() -> None:
            model.train().zero_grad(set_to_none=True)
            forward(x, labels).backward()

        return run

    def inference(model: nn.Module, forward: Callable[[Tensor], Tensor]) -> Call:
        def run() -> Tensor:
            model.eval()
            with torch.no_grad():
                return forward(x)

        return run

    yield Job(
        "SegNet, training step", size, layout, step(plain.model, training(plain)),
        lambda: step(plain.model, torch.compile(training(plain), dynamic=False)),
        step(swapped.model, training(swapped)),
    )  # fmt: skip
    yield Job(
        "SegNet, inference", size, layout, inference(plain.model, plain.model),
        lambda: inference(plain.model, torch.compile(plain.model, dynamic=False)),
        inference(swapped.model, swapped.model),
    )  # fmt: skip
    yield Job(
        "fastseg.models.SegNet, training step", size, layout, step(plain.model, training(plain)), None,
        step(native.model, training(native)),
    )  # fmt: skip
    yield Job(
        "fastseg.models.SegNet, inference", size, layout, inference(plain.model, plain.model), None,
        inference(native.model, native.model),
    )  # fmt: skip


# --- sizes -----------------------------------------------------------------------------------------------------------

LOGITS = [
    (n, c, h, w) for n, h, w in ((1, 32, 32), (1, 64, 64), (1, 128, 128), (2, 180, 240), (2, 360, 480)) for c in (2, 19)
]
MAPS = [(1, 8, 16, 16), (1, 16, 32, 32), (2, 32, 32, 32), (2, 32, 64, 64), (2, 64, 64, 64), (2, 64, 90, 120)]


def sizes(layout: str, quick: bool) -> Iterator[Job]:
    """Every function from small maps to large ones: where `auto` takes the kernels, and what it costs.

    quick: the smallest and a middle size alone.
    """
    at = Placement(torch.float32, cases.LAYOUTS[layout], "cpu")
    for shape in LOGITS[1:6:4] if quick else LOGITS:
        n, c, h, w = shape
        yield _job(next(cases.cross_entropy(at, shape)), layout)
        yield _job(next(cases.cross_entropy(at, shape, LossSpec(one_pass=False))), layout)
        yield _job(next(cases.cross_entropy(at, shape)), layout, backward=False)
        yield _job(dice_cross_entropy(at, shape), layout)
        small, resize = (n, c, h // 8, w // 8), ResizeSpec((h, w))
        yield _job(next(cases.upsample_cross_entropy(at, small, resize)), layout)
        yield _job(next(cases.upsample_argmax(at, small, (h, w))), layout, backward=False)
        if layout == "nchw":
            yield _job(next(cases.confusion_matrix(at, (n, h, w), c)), layout, backward=False)
    for shape in MAPS[::3] if quick else MAPS:
        for backward in (True, False):
            for case in (*cases.max_pool2d(at, shape, CEIL), *cases.max_unpool2d(at, shape, CEIL)):
                yield _job(case, layout, backward)
        for training in (True, False):
            for make in (batch_norm_relu, batch_norm_relu_max_pool2d):
                yield _job(make(at, shape, training), layout, backward=training)
        yield _job(batch_norm_relu_max_unpool2d(at, shape), layout)


def batch_norm_relu_max_unpool2d(at: Placement, shape: Sequence[int]) -> Case:
    """Batch norm in training, an in-place ReLU and an unpooling to `shape`."""
    _, unpool = cases.max_unpool2d(at, shape, CEIL)
    channels, size = shape[1], list(shape[-2:])
    running = torch.zeros(channels), torch.ones(channels)
    inputs = dict(unpool.inputs) | {"weight": at.parameters(channels), "bias": at.parameters(channels)}

    def ours(x: Tensor, indices: Tensor, offsets: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return functional.batch_norm_relu_max_unpool2d(x, offsets, *running, weight, bias, True, output_size=size)

    def theirs(x: Tensor, indices: Tensor, offsets: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = F.relu(F.batch_norm(x, *running, weight, bias, True), inplace=True)
        return F.max_unpool2d(y, indices, 2, output_size=size)

    return Case("batch_norm_relu_max_unpool2d", unpool.size, ours, theirs, inputs)
