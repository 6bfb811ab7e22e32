"""How certain a network is of each pixel: Monte-Carlo dropout for any model with dropout layers.

A network with dropout on gives another answer in every pass. The mean of the passes' softmax is the prediction; how far
the passes differ is the uncertainty. Batch norms and all other layers stay in evaluation.

Source: Gal and Ghahramani, "Dropout as a Bayesian Approximation", 2016; Kendall, Badrinarayanan and Cipolla, "Bayesian
SegNet", 2015.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .functional import softmax_moments
from .ops.losses.softmax_moments import SoftmaxMoments
from .torch_internals import tree_map_only

MEASURES = ("variance", "entropy", "information")
_DROPOUTS = (
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout,
)  # fmt: skip


@dataclass(frozen=True)
class Sampling:
    """How the uncertainty of a prediction is sampled and measured.

    Args:
        passes, chunk, seed: as for :func:`sample`.
        measure: as `name` for :func:`measure`.

    Raises:
        ValueError: for another measure, and for numbers below 1.
    """

    passes: int = 40
    measure: str = "variance"
    chunk: int = 8
    seed: int | None = 0

    def __post_init__(self) -> None:
        if self.measure not in MEASURES:
            raise ValueError(f"measure must be one of {', '.join(MEASURES)}, but is {self.measure!r}")
        _require_positive(passes=self.passes, chunk=self.chunk)


def _require_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, but is {value}")


def dropout_layers(model: nn.Module) -> list[nn.Module]:
    """The dropout layers of a model. Raises ValueError if there are none."""
    found = [module for module in model.modules() if isinstance(module, _DROPOUTS)]
    if not found:
        raise ValueError(
            f"model must have a dropout layer, such as torch.nn.Dropout, but {type(model).__name__} has none"
        )
    return found


@contextlib.contextmanager
def dropout_on(model: nn.Module) -> Iterator[None]:
    """Let the dropout layers of a model sample inside a ``with`` block, and no other layer change.

    ``model.train()`` would also make batch norms use the statistics of the batch, and update the running ones.

    Args:
        model: in evaluation mode.

    Raises:
        ValueError: if a layer besides dropout is in training mode, or there is no dropout layer.

    Example:
        >>> import torch
        >>> from fastseg.uncertainty import dropout_on
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.Dropout()).eval()
        >>> with dropout_on(model):
        ...     print([layer.training for layer in model])
        [False, True]
    """
    layers = dropout_layers(model)
    others = [name or type(model).__name__ for name, m in model.named_modules() if m.training and m not in layers]
    if others:
        raise ValueError(f"model must be in evaluation mode (model.eval()), but {others[0]} is in training mode")
    before = [layer.training for layer in layers]
    for layer in layers:
        layer.train()
    try:
        yield
    finally:
        for layer, mode in zip(layers, before, strict=True):
            layer.train(mode)


def _repeated(before: Any, times: int) -> Any:
    """`times` copies of a batch, one after the other, in every tensor."""
    return tree_map_only(Tensor, lambda x: x.repeat(times, *[1] * (x.dim() - 1)), before)


def _passes(model: nn.Module, x: Tensor) -> Callable[[int], Tensor]:
    """A function that gives the logits (times * N, K, H, W) of so many passes.

    A model with `before_dropout` and `after_dropout`, as BayesianSegNet has them, computes the former once.
    """
    if not (hasattr(model, "before_dropout") and hasattr(model, "after_dropout")):
        return lambda times: model(_repeated(x, times))
    before = model.before_dropout(x)
    return lambda times: model.after_dropout(_repeated(before, times))


@torch.no_grad()
def sample(model: nn.Module, x: Tensor, passes: int = 40, chunk: int = 8, seed: int | None = None) -> SoftmaxMoments:
    """Predict with dropout on, several times, and summarize.

    Args:
        model: any model of logits with dropout layers, in evaluation mode. If it has the methods before_dropout and
            after_dropout, what is in front of the first dropout is computed once, not in each pass.
        x: its input.
        passes: how many samples are drawn.
        chunk: how many of them the model computes at a time, as one batch. It changes the time and the memory, and
            which random numbers are drawn; nothing of other chunks is kept.
        seed: draws the same samples in every call with the same chunk, and leaves torch's random numbers as they are.

    Shape:
        - x: (N, ...), model(x): (N, K, H, W).

    Returns:
        SoftmaxMoments: mean (N, K, H, W), whose argmax is the prediction; variance (N, K, H, W), the population
        variance; predictive_entropy (N, H, W), the entropy of the mean; mutual_information (N, H, W), the part of it
        that comes from the disagreement of the passes (BALD).

    Raises:
        ValueError: as :func:`dropout_on`, and for numbers below 1.

    Example:
        >>> import torch, fastseg
        >>> model = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Conv2d(3, 4, 1)).eval()
        >>> samples = fastseg.uncertainty.sample(model, torch.ones(1, 3, 5, 6), passes=10, seed=0)
        >>> samples.count, samples.mean.shape, samples.mutual_information.shape
        (10, torch.Size([1, 4, 5, 6]), torch.Size([1, 5, 6]))
    """
    _require_positive(passes=passes, chunk=chunk)
    devices = [x.device] if x.is_cuda else []
    with torch.random.fork_rng(devices, enabled=seed is not None), dropout_on(model):
        if seed is not None:
            torch.manual_seed(seed)
        run, state = _passes(model, x), None
        for first in range(0, passes, chunk):
            times = min(chunk, passes - first)
            state = softmax_moments(run(times).unflatten(0, (times, len(x))), state)
    assert state is not None  # passes is at least 1
    return state


def measure(samples: SoftmaxMoments, name: str) -> Tensor:
    """One number for the uncertainty of each pixel.

    Args:
        samples: what :func:`sample` returns.
        name: ``"variance"``, its mean over the classes, as in Bayesian SegNet; ``"entropy"``, that of the mean;
            ``"information"``, the mutual information.

    Returns:
        Tensor: (N, H, W).

    Raises:
        ValueError: for another name.
    """
    if name not in MEASURES:
        raise ValueError(f"measure must be one of {', '.join(MEASURES)}, but is {name!r}")
    if name == "variance":
        return samples.variance.mean(1)
    return samples.predictive_entropy if name == "entropy" else samples.mutual_information
