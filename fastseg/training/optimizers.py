"""The optimizer of a run, its learning rate in each step, and the state that a checkpoint keeps of it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .config import TrainConfig


def learning_rate(config: TrainConfig, step: int) -> float:
    r"""Return the learning rate of a step.

    ``"constant"`` is `config.lr`. ``"cosine"`` falls from `config.lr` to 0 along half a cosine:
    :math:`\text{lr} \cdot (1 + \cos(\pi \cdot \text{step} / \text{steps})) / 2`. ``"one-cycle"`` first rises linearly
    from 4 % of `config.lr` during a fifth of the steps, then falls in the same way. Both count steps from
    `config.schedule_start`.

    Args:
        config: its `lr`, `schedule`, `schedule_start` and `steps` are used.
        step: 0 for the first step.

    Example::

        >>> from fastseg.training.config import TrainConfig
        >>> from fastseg.training.optimizers import learning_rate
        >>> learning_rate(TrainConfig(schedule="cosine", lr=0.1, steps=100), 50)
        0.05
    """
    if config.schedule == "constant":
        return config.lr
    steps, step = config.steps - config.schedule_start, max(step - config.schedule_start, 0)
    rise = 0.2 * steps if config.schedule == "one-cycle" else 0
    if step < rise:
        return config.lr * (0.04 + 0.96 * step / rise)
    return config.lr * (0.5 + 0.5 * math.cos(math.pi * (step - rise) / (steps - rise)))


def make_optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer that `config` names, for the parameters of `model`."""
    options = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), momentum=config.momentum, **options)
    return torch.optim.AdamW(model.parameters(), betas=(config.momentum, 0.999), **options)


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[Any, Any]) -> None:
    """Give an optimizer the state of a checkpoint. Its parameter groups follow from the config and stay."""
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def fits_optimizer(state: dict[Any, Any], config: TrainConfig, model: nn.Module) -> bool:
    """Whether exactly the trainable parameters have state, and exactly the tensors that this optimizer keeps.

    SGD without momentum keeps nothing.
    """
    names = {"momentum_buffer"} if config.optimizer == "sgd" else {"step", "exp_avg", "exp_avg_sq"}
    if names == {"momentum_buffer"} and not config.momentum:
        return not any(state.values())
    trained = {index: p for index, p in enumerate(model.parameters()) if p.requires_grad}
    if state.keys() != trained.keys():
        return False
    for index, parameter in trained.items():
        entry = state[index]
        if not isinstance(entry, dict) or entry.keys() != names:
            return False
        for name, value in entry.items():
            shape = () if name == "step" else parameter.shape
            if not (isinstance(value, Tensor) and value.is_floating_point() and value.shape == shape):
                return False
    return True
