"""VGG16's weights, trained to classify, into the networks whose encoder it is."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

CONVOLUTIONS = 13
FULLY_CONNECTED = {"fc6": "classifier.0", "fc7": "classifier.3"}


def load_vgg16(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy VGG16's convolutions into `model.encoder`, and fc6 and fc7 where `model` has them, as convolutions.

    model: SegNet, DeconvNet or an FCN of width 1. weights: the state_dict of torchvision's vgg16 or vgg16_bn, whose
    batch norms are left out. A fully connected layer (K, C * 7 * 7) is the convolution (K, C, 7, 7) of the same
    numbers. Pictures are to be normalised as that model's were.

    Raises ValueError, before anything is written, where a weight is missing or has another shape.
    """
    pairs = list(_pairs(model, weights).items())
    with torch.no_grad():
        for parameter, tensor in pairs:
            parameter.copy_(tensor)


def _pairs(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[nn.Parameter, Tensor]:
    """What goes where, checked."""
    convolutions = [module for module in model.encoder.modules() if isinstance(module, nn.Conv2d)]
    names = [name.removesuffix(".weight") for name, w in weights.items() if "features." in name and w.dim() == 4]
    if len(convolutions) != CONVOLUTIONS:
        raise ValueError(
            f"model must have the {CONVOLUTIONS} convolutions of a VGG16 in its encoder, but {type(model).__name__} "
            f"has {len(convolutions)}"
        )
    if len(names) != CONVOLUTIONS:
        raise ValueError(
            f"weights must be the state_dict of a VGG16, with {CONVOLUTIONS} convolutions under 'features.', but there "
            f"are {len(names)}"
        )
    targets = dict(zip(names, convolutions, strict=True))
    for ours, theirs in FULLY_CONNECTED.items():
        if hasattr(model, ours):
            targets[theirs] = next(m for m in model.get_submodule(ours).modules() if isinstance(m, nn.Conv2d))
    found = {}
    for name, conv in targets.items():
        for what, parameter in conv.named_parameters():
            key = f"{name}.{what}"
            tensor = weights.get(key)
            if tensor is None:
                raise ValueError(f"weights must have {key!r} for {type(model).__name__}, but there is none")
            if tensor.shape not in (parameter.shape, parameter.flatten(min(1, parameter.dim() - 1)).shape):
                raise ValueError(
                    f"{key} must fit {tuple(parameter.shape)} of {type(model).__name__}, but has shape "
                    f"{tuple(tensor.shape)}"
                )
            found[parameter] = tensor.reshape(parameter.shape)
    return found
