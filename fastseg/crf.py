"""Fully connected conditional random fields: sharper labels from a network's logits and the picture's colours.

The energy of a labelling l is sum_i U_i(l_i) + sum over pairs of pixels with different labels of k_ij, where U is minus
the log-softmax of the logits and k a sum of two Gaussian kernels, one of the pixels' distance, one of distance and
colour. Mean field approximates its distribution by one of independent pixels, in steps

    Q <- softmax(log softmax(logits) + sum over kernels of weight * normalised(K) Q)

Source: Kraehenbuehl and Koltun, "Efficient Inference in Fully Connected CRFs with Gaussian Edge Potentials", 2011, and
"Parameter Learning and Convergent Inference for Dense Random Fields", 2013.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from .functional import mean_field_message

NORMALISATIONS = ("symmetric", "after", "raw")
MOST_EXACT = 2**13  # pixels of mean_field_exact, whose matrix then has 512 MiB
Kernel = tuple[Any, ...]
Message = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class CRFOptions:
    """The kernels and the inference of a dense CRF.

    Args:
        gaussian: (weight, standard deviation of the distance in pixels), or None.
        bilateral: (weight, standard deviation of the distance, of the colours from 0 to 255), or None. Weights are
            numbers, or tensors with one element.
        steps: of mean field.
        normalise: what is done to a kernel K with row sums n. ``"symmetric"``: K_ij / sqrt(n_i n_j), ``"after"``:
            K_ij / n_i, ``"raw"``: nothing; a message then grows with the number of similar neighbours.
        self_term: whether a pixel hears its own value, as in the published implementations but not in the papers'
            formulas.
        radius: pixels farther apart than `radius` standard deviations do not hear each other; None: all do.

    Raises:
        ValueError: for another word or a number out of range.
    """

    gaussian: Kernel | None = (3.0, 3.0)
    bilateral: Kernel | None = (5.0, 20.0, 3.0)
    steps: int = 10
    normalise: str = "symmetric"
    self_term: bool = True
    radius: float | None = 3.0

    def __post_init__(self) -> None:
        for name, entries in (("gaussian", 2), ("bilateral", 3)):
            kernel = getattr(self, name)
            if kernel is None:
                continue
            if len(kernel) != entries:
                words = "weight, sigma" if entries == 2 else "weight, sigma of positions, sigma of colours"
                raise ValueError(f"{name} must be ({words}), but is {kernel!r}")
            if any(not 0 < sigma < math.inf for sigma in kernel[1:]):
                raise ValueError(f"{name} must have positive standard deviations, but is {kernel!r}")
            if isinstance(kernel[0], Tensor) and kernel[0].numel() != 1:
                raise ValueError(f"{name}'s weight must have one element, but has shape {tuple(kernel[0].shape)}")
        if self.normalise not in NORMALISATIONS:
            raise ValueError(f"normalise must be one of {', '.join(NORMALISATIONS)}, but is {self.normalise!r}")
        if self.steps < 0:
            raise ValueError(f"steps must not be negative, but is {self.steps}")
        if self.radius is not None and not 0 < self.radius < math.inf:
            raise ValueError(f"radius must be a positive number or None, but is {self.radius!r}")

    def kernels(self) -> list[tuple[Any, dict[str, float], bool]]:
        """(weight, standard deviations, whether it sees colours) of each kernel."""
        found: list[tuple[Any, dict[str, float], bool]] = []
        if self.gaussian is not None:
            found.append((self.gaussian[0], {"sigma": float(self.gaussian[1])}, False))
        if self.bilateral is not None:
            weight, sigma, sigma_color = self.bilateral
            found.append((weight, {"sigma": float(sigma), "sigma_color": float(sigma_color)}, True))
        return found


PRESETS = {
    "paper": CRFOptions(),
    "code": CRFOptions(normalise="raw"),
    "deeplab": CRFOptions(gaussian=(3.0, 1.0), bilateral=(4.0, 67.0, 3.0)),
}
"""Published settings: DeconvNet's, as its paper and as its code normalise, and DeepLab v2's on PASCAL VOC."""


def _check(name: str, logits: Tensor, image: Tensor | None, options: CRFOptions) -> None:
    if not isinstance(logits, Tensor) or logits.dim() != 4:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"{name}: logits must have shape (N, K, H, W), but is {found}")
    if logits.shape[1] < 2:
        raise ValueError(
            f"{name}: logits must have at least 2 classes, but have shape {tuple(logits.shape)}: with one class every "
            "pixel has it. For a binary mask stack the logits of background and object"
        )
    if not logits.is_floating_point():
        raise TypeError(f"{name}: logits must be floating-point, but are of {logits.dtype}")
    if image is None and options.bilateral is not None:
        raise ValueError(f"{name}: image must be given for the bilateral kernel; bilateral=None needs none")
    if image is None:
        return
    if not isinstance(image, Tensor) or image.dim() != 4:
        found = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
        raise ValueError(f"{name}: image must have shape (N, channels, H, W), but is {found}")
    if (image.shape[0], *image.shape[2:]) != (logits.shape[0], *logits.shape[2:]):
        raise ValueError(
            f"{name}: image must have the batch size, height and width of the logits, {tuple(logits.shape)}, but has "
            f"shape {tuple(image.shape)}"
        )


def _mean_field(logits: Tensor, messages: list[tuple[Any, Message]], options: CRFOptions) -> Tensor:
    """Logits after the steps; each message multiplies by a matrix K, and comes with its weight."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    unary = logits.to(dtype).log_softmax(1)
    before, after = [], []
    for _, message in messages:
        if options.normalise == "raw":
            before.append(None), after.append(None)
            continue
        sums = message(torch.ones_like(unary[:, :1]).contiguous()).clamp(min=1e-20)  # 0 for a pixel without neighbours
        symmetric = options.normalise == "symmetric"
        before.append(sums.rsqrt() if symmetric else None)
        after.append(sums.rsqrt() if symmetric else sums.reciprocal())
    scores = unary
    for _ in range(options.steps):
        q = scores.softmax(1)
        scores = unary
        for (weight, message), inner, outer in zip(messages, before, after, strict=True):
            heard = message(q if inner is None else q * inner)
            weight = weight.to(heard) if isinstance(weight, Tensor) else weight
            scores = scores + weight * (heard if outer is None else heard * outer)
    return scores.to(logits.dtype)


def dense_crf(logits: Tensor, image: Tensor | None, options: CRFOptions = PRESETS["paper"]) -> Tensor:
    """The logits after mean-field inference in a fully connected CRF.

    Every weight between two pixels within the radius is computed, none is approximated, and no matrix of them is
    stored. :func:`fastseg.functional.mean_field_message` does the work.

    Args:
        logits: a network's scores of at least two classes; not energies, not labels.
        image: the picture, uint8 or floating-point from 0 to 255, RGB or BGR; may be None without a bilateral kernel.
        options: see :class:`CRFOptions`.

    Shape:
        - logits: (N, K, H, W).
        - image: (N, C, H, W).
        - output: (N, K, H, W).

    Returns:
        Logits in the dtype of the input. Their softmax is the mean field Q, their argmax the labels.

    Raises:
        ValueError, TypeError: for another shape or dtype, or a single class.

    Note:
        Deterministic. Computed in float32 (float64 for float64 logits). Differentiable in the logits and the weights,
        through all steps, any number of times; not in the image and the standard deviations.

    Example:
        >>> import torch
        >>> from fastseg.crf import CRFOptions, dense_crf
        >>> logits = torch.tensor([[[[2.0, 2.0, -0.5, 2.0]], [[0.0, 0.0, 0.0, 0.0]]]])  # the third pixel differs
        >>> dense_crf(logits, None, CRFOptions(gaussian=(3.0, 1.0), bilateral=None)).argmax(1)
        tensor([[[0, 0, 0, 0]]])
    """
    _check("dense_crf", logits, image, options)

    def message(sigmas: dict[str, float], colours: bool) -> Message:
        picture = image if colours else None
        return lambda q: mean_field_message(q, picture, radius=options.radius, self_term=options.self_term, **sigmas)

    kernels = [(weight, message(sigmas, colours)) for weight, sigmas, colours in options.kernels()]
    return _mean_field(logits, kernels, options)


def mean_field_exact(logits: Tensor, image: Tensor | None, options: CRFOptions = PRESETS["paper"]) -> Tensor:
    """What :func:`dense_crf` computes, from the whole matrix of weights in float64: for small pictures and for tests.

    Args:
        logits, image, options: as for :func:`dense_crf`.

    Returns:
        Logits in float64.

    Raises:
        ValueError, TypeError: as :func:`dense_crf`, and for more than 8192 pixels.

    Example:
        >>> import torch
        >>> from fastseg.crf import dense_crf, mean_field_exact
        >>> logits, image = torch.randn(1, 3, 6, 7), torch.randint(256, (1, 3, 6, 7))
        >>> exact = mean_field_exact(logits, image.byte())
        >>> bool((dense_crf(logits, image.byte()) - exact).abs().max() < 1e-3)
        True
    """
    _check("mean_field_exact", logits, image, options)
    height, width = logits.shape[2:]
    if height * width > MOST_EXACT:
        raise ValueError(f"mean_field_exact: logits must have at most {MOST_EXACT} pixels, but have {height}x{width}")
    place = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")).flatten(1)
    squared = (place[:, :, None] - place[:, None, :]).square().sum(0).to(logits.device)

    def message(sigma: float, sigma_color: float | None = None) -> Message:
        exponent = squared.double()[None] / (2 * sigma**2)
        if sigma_color is not None:
            assert image is not None  # _check
            colour = image.double().flatten(2)
            steps = (colour[..., :, None] - colour[..., None, :]).square().sum(1)
            exponent = exponent + steps / (2 * sigma_color**2)
        matrix = (-exponent).exp()
        if options.radius is not None:
            matrix = matrix * (squared <= (options.radius * sigma) ** 2)
        if not options.self_term:
            matrix = matrix * (squared > 0)
        return lambda q: torch.einsum("nij,nkj->nki", matrix.expand(len(q), -1, -1), q.flatten(2)).view_as(q)

    kernels = [(weight, message(**sigmas)) for weight, sigmas, _ in options.kernels()]
    return _mean_field(logits.double(), kernels, options)


class DenseCRF(nn.Module):
    """A fully connected CRF behind a network, whose weights can be trained: :func:`dense_crf` as a module.

    Args:
        gaussian, bilateral, steps, normalise, self_term, radius: as for :class:`CRFOptions`; the weights are numbers.

    Attributes:
        gaussian_weight, bilateral_weight: the weights of the kernels, parameters; None for a kernel that is None.
        options: a :class:`CRFOptions` with the weights at construction.

    Shape:
        - logits: (N, K, H, W); image: (N, C, H, W), from 0 to 255; output: (N, K, H, W).

    Example:
        >>> import torch
        >>> from fastseg.crf import DenseCRF
        >>> crf = DenseCRF(bilateral=(5, 20, 3), steps=2)
        >>> logits, image = torch.randn(1, 4, 8, 9), torch.randint(256, (1, 3, 8, 9))
        >>> crf(logits, image.byte()).sum().backward()
        >>> sorted(name for name, weight in crf.named_parameters() if weight.grad is not None)
        ['bilateral_weight', 'gaussian_weight']
    """

    def __init__(
        self,
        gaussian: tuple[float, float] | None = (3.0, 3.0),
        bilateral: tuple[float, float, float] | None = (5.0, 20.0, 3.0),
        steps: int = 10,
        normalise: str = "symmetric",
        self_term: bool = True,
        radius: float | None = 3.0,
    ) -> None:
        super().__init__()
        self.options = CRFOptions(gaussian, bilateral, steps, normalise, self_term, radius)
        for name, kernel in (("gaussian", gaussian), ("bilateral", bilateral)):
            weight = None if kernel is None else nn.Parameter(torch.tensor(float(kernel[0])))
            self.register_parameter(f"{name}_weight", weight)

    def forward(self, logits: Tensor, image: Tensor | None = None) -> Tensor:
        given = {field.name: getattr(self.options, field.name) for field in fields(self.options)}
        for name in ("gaussian", "bilateral"):
            if given[name] is not None:
                given[name] = (getattr(self, f"{name}_weight"), *given[name][1:])
        return dense_crf(logits, image, CRFOptions(**given))

    def extra_repr(self) -> str:
        return ", ".join(f"{field.name}={getattr(self.options, field.name)!r}" for field in fields(self.options))
