"""A device that only torch's dispatcher knows, as mps, xpu or a vendor's backend is to fastseg.

Its tensors hold a CPU tensor, and every operator of torch runs on that. Operators of other libraries have no
implementation for the device, unless they are registered for every device.
"""

import torch

from fastseg.torch_internals import empty_on_python_device, python_device, schema_arguments, tree_map

python_device("toy")


class ToyTensor(torch.Tensor):
    """A tensor on device "toy"."""

    @staticmethod
    def __new__(cls, data):
        result = empty_on_python_device(data.shape, data.dtype)
        result.__class__ = cls
        return result

    def __init__(self, data):
        self.on_cpu = data


def _to_cpu(x):
    if isinstance(x, torch.device):
        return torch.device("cpu")
    return x.on_cpu if isinstance(x, ToyTensor) else x


def _to_toy(x):
    return ToyTensor(x) if isinstance(x, torch.Tensor) else x


def _fallback(op, *given, **named):
    if op.namespace != "aten":
        raise NotImplementedError(f"{op} has no implementation for device toy")
    args, kwargs = tree_map(_to_cpu, (given, named))
    arguments = schema_arguments(op)  # numbers that torch wraps as tensors reach Python as numbers
    args = [
        torch.tensor(x) if isinstance(x, (int, float)) and str(argument.type) == "Tensor" else x
        for x, argument in zip(args, arguments, strict=False)
    ]
    if op.name() == "aten::_copy_from":  # copies between devices, which a CPU tensor alone does not have
        return ToyTensor(args[1].copy_(args[0]))
    result = op(*args, **kwargs)
    for x in (*given, *named.values()):
        if isinstance(x, ToyTensor) and x.shape != x.on_cpu.shape:  # an output that the operator resized
            x.data = ToyTensor(x.on_cpu)
    return tree_map(_to_toy, result)


library = torch.library.Library("_", "IMPL")
library.fallback(_fallback, "PrivateUse1")
