"""The statistics that a call normalizes with, of one process or of a process group."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ...kernels.batch_norm.arguments import NormArguments, RunningStatistics
from .arguments import BatchNormCall, BatchNormOptions
from .batch_norm import BATCH_NORM_STATS, update_running, writable


class Statistics(NamedTuple):
    """Mean (in two terms, see NormArguments) and variance of each channel.

    count: the number of pixels of all processes of a group, or None without a group.
    """

    mean: Tensor
    shift: Tensor | None
    var: Tensor
    count: Tensor | None

    def norm_arguments(self, weight: Tensor | None, bias: Tensor | None, options: BatchNormOptions) -> NormArguments:
        """The arguments of the operators."""
        return NormArguments(self.mean, self.shift, self.var, weight, bias, options.eps, options.relu)


def statistics_of(call: BatchNormCall) -> Statistics:
    """The running statistics in evaluation. In training those of the batch, after updating the running ones.

    With a process group the batch is that of all its processes together.
    """
    input_bias = None if call.input_bias is None else call.input_bias.detach()
    if not call.options.training:
        running_mean, running_var = call.running_mean, call.running_var
        assert running_mean is not None and running_var is not None  # BatchNormCall.check requires them
        if torch.is_grad_enabled():  # a training call ahead of the backward would update them in place
            running_mean, running_var = running_mean.clone(), running_var.clone()
        return Statistics(running_mean, input_bias, running_var, None)
    input, running = call.input.detach(), None
    if call.running_mean is not None and call.running_var is not None:
        running = RunningStatistics(writable(call.running_mean), writable(call.running_var), call.options.momentum)
    if call.options.process_group is None:
        mean, shift, var = BATCH_NORM_STATS(input, input_bias, running).unbind()
        return Statistics(mean, shift, var, None)
    return _group_statistics(input, input_bias, running, call.options.process_group)


def _group_statistics(
    input: Tensor, input_bias: Tensor | None, running: RunningStatistics | None, group: Any
) -> Statistics:
    """The statistics of the batches of all processes, merged in float64 by Chan's rule."""
    # 1. Exchange the statistics and pixel counts of each process
    stats = BATCH_NORM_STATS(input, None, None)
    pixels = stats.new_full((1, input.shape[1]), input.numel() // input.shape[1])
    mine = torch.cat([stats, pixels]).double()
    gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, mine, group=group)
    means, shifts, variances, counts = torch.stack(gathered).unbind(1)
    # 2. Merge them; a process with an empty batch has NaN for statistics and counts nothing
    count = counts.sum(0)
    weights = counts / count
    means = (means - shifts).masked_fill(counts == 0, 0)
    mean = (weights * means).sum(0)
    var = (weights * (variances.masked_fill(counts == 0, 0) + (means - mean) ** 2)).sum(0)
    if running is not None:
        update_running(running, mean, var * (count / (count - 1)), input_bias)
    # 3. Round; shift is the rounding error of the mean
    rounded = mean.to(stats.dtype)
    return Statistics(rounded, (rounded - mean).to(stats.dtype), var.to(stats.dtype), count[0])


def gradient_means(sums: Tensor, count: Tensor | None, group: Any) -> Tensor:
    """(2, C): the means of grad and grad * x_hat over the pixels of all processes of the group."""
    if group is None:
        return sums[2:]
    total = sums[:2].clone()
    dist.all_reduce(total, group=group)
    return total / count.to(total.dtype)
