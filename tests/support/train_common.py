"""Shared by the tests of training: a short run of a small network."""

import torch

from fastseg.training.config import TrainConfig
from fastseg.training.runs import start_run

SMALL = {"model": "segnet-basic", "width": 0.125, "size": (32, 32), "batch_size": 2, "device": "cpu", "workers": 2}


def start(**options):
    """Prepare a new run of a small network."""
    return start_run(TrainConfig(**SMALL | options))


def run(steps_until=None, **options):
    """Start a new run and stop it after `steps_until` steps; None trains to the end."""
    trainer = start(**options)
    trainer.run(lambda: trainer.step == steps_until)
    return trainer


def trained_checkpoint(out, steps):
    """Train a small network on digit scenes for some steps, and return the path of its checkpoint."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    trainer = start(batch_size=4, lr=1e-2, steps=steps, out=str(out), eval_every=1000)
    trainer.val_set.length = 8
    trainer.run()
    return trainer.path


def same(a, b):
    """Whether two nested dicts and lists of tensors are bitwise equal."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b
