"""The networks, layer by layer as their authors' files have them, on fastseg's fused layers."""

from torch import nn

from .deconvnet import DeconvNet
from .plain import PlainSegNet
from .segnet import SegNet, SegNetBasic

MODELS: dict[str, type[nn.Module]] = {"segnet": SegNet, "segnet-basic": SegNetBasic, "deconvnet": DeconvNet}

__all__ = ["MODELS", "DeconvNet", "PlainSegNet", "SegNet", "SegNetBasic"]
