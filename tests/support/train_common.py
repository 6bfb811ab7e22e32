"""What the tests of training share: a short run of a small network."""

import torch

from fastseg.commands import train

SMALL = {"model": "segnet-basic", "width": 0.125, "size": (32, 32), "batch_size": 2, "device": "cpu", "workers": 2}


def run(steps_until=None, **options):
    """A new run, stopped after that many steps."""
    made = train.start(SMALL | options)
    made.run(lambda: made.step == steps_until)
    return made


def same(a, b):
    """Whether two nests of dicts, lists and tensors are equal to the bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b
