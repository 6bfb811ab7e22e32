"""SegNet, DeconvNet and FCN, layer by layer as in their authors' files, built from fastseg's fused layers."""

from torch import nn

from .bayesian_segnet import BayesianSegNet, BayesianSegNetBasic
from .deconvnet import DeconvNet
from .fcn import FCN8s, FCN8sAtOnce, FCN16s, FCN32s
from .plain_segnet import PlainSegNet
from .segnet import SegNet, SegNetBasic
from .vgg16 import load_vgg16

MODELS: dict[str, type[nn.Module]] = {
    "segnet": SegNet, "segnet-basic": SegNetBasic, "deconvnet": DeconvNet,
    "bayesian-segnet": BayesianSegNet, "bayesian-segnet-basic": BayesianSegNetBasic,
    "fcn-32s": FCN32s, "fcn-16s": FCN16s, "fcn-8s": FCN8s, "fcn-8s-at-once": FCN8sAtOnce,
}  # fmt: skip

__all__ = [
    "MODELS", "BayesianSegNet", "BayesianSegNetBasic", "DeconvNet", "FCN8s", "FCN8sAtOnce", "FCN16s", "FCN32s",
    "PlainSegNet", "SegNet", "SegNetBasic", "load_vgg16",
]  # fmt: skip
