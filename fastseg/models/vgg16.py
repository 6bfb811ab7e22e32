"""The weights of a VGG16 classifier for networks that have its encoder."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

CONVOLUTIONS = 13
FULLY_CONNECTED = {"fc6": "classifier.0", "fc7": "classifier.3"}


def load_vgg16(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy the weights of a VGG16 classifier into a network that has its encoder.

    VGG16's 13 convolutions go to `model.encoder`, and its first two fully connected layers to `model.fc6` and
    `model.fc7` if the model has them: the weight (K, C * 7 * 7) of a fully connected layer is the weight (K, C, 7, 7)
    of a convolution. Batch norms are not copied. Images must be normalized as for the VGG16.

    Args:
        model: a SegNet, DeconvNet or FCN with the channel counts of the VGG16 (width 1 for torchvision's).
        weights: the state_dict of torchvision's vgg16 or vgg16_bn.

    Raises:
        ValueError: if a weight is missing or has another shape. Nothing is written in this case.

    Example:
        >>> import torch, fastseg
        >>> from torch import nn
        >>> channels = (3, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8)
        >>> convolutions = [nn.Conv2d(i, o, 3) for i, o in zip(channels, channels[1:])]
        >>> small_vgg16 = nn.ModuleDict({"features": nn.Sequential(*convolutions)})
        >>> model = fastseg.models.SegNet(width=0.01)
        >>> fastseg.models.load_vgg16(model, small_vgg16.state_dict())
        >>> torch.equal(model.encoder[0][0][0].weight, convolutions[0].weight)
        True

    Source:
        Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR 2015
    """
    pairs = list(_pairs(model, weights).items())
    with torch.no_grad():
        for parameter, tensor in pairs:
            parameter.copy_(tensor)


def _pairs(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[nn.Parameter, Tensor]:
    """The tensor for each parameter of the model, with its shape checked."""
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
                raise ValueError(f"weights must have {key!r} for {type(model).__name__}, but it is missing")
            if tensor.shape not in (parameter.shape, parameter.flatten(min(1, parameter.dim() - 1)).shape):
                raise ValueError(
                    f"{key} must have shape {tuple(parameter.shape)} for {type(model).__name__}, but has "
                    f"{tuple(tensor.shape)}"
                )
            found[parameter] = tensor.reshape(parameter.shape)
    return found
