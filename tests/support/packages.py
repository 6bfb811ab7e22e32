"""Optional packages: imported if they are installed, else the test is skipped."""

import importlib
import importlib.util
import sys

import pytest
import torch

IMPORT_TORCHVISION = ("torchvision", "timm", "segmentation_models_pytorch", "lightning", "transformers")
# The torchvision wheel of the package index is built for CUDA. With a torch without CUDA its library does not load, and
# the import fails at the first operator it registers. Its networks are written in Python and call none of these.
OPERATORS = ("nms", "qnms")
_library = torch.library.Library("torchvision", "FRAGMENT")  # must be kept: the operators are removed with it


def need(name):
    """The imported package; skips the test, with the command to install it, if it is not installed."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"needs {name}: python -m pip install -r tests/support/packages.txt")
    if name in IMPORT_TORCHVISION and importlib.util.find_spec("torchvision") is not None:
        _torchvision()
    return importlib.import_module(name)


def _torchvision():
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        for name in OPERATORS:
            _library.define(f"{name}(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor")
        importlib.import_module("torchvision")
