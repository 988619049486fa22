"""Batch norms whose statistics could not hide a wrong fold.

Fresh ones have mean 0, variance 1, γ 1 and β 0: a fold that forgot any of them would look right.
"""

from collections.abc import Callable

import torch
from torch import nn


def as_if_trained(model: nn.Module, run: Callable[[nn.Module], object], seed: int = 0) -> nn.Module:
    """Return `model` in eval mode: γ, β random, running statistics those of what `run` feeds it.

    `run(model)` calls the model once or more, with more than one value per channel. A batch norm it
    does not reach gets random statistics. γ is negative for some channels.
    """
    generator = torch.Generator().manual_seed(seed)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        randomise(norm, generator)
        norm.momentum = None  # a cumulative average: the statistics of all that was run
        if norm.track_running_stats:
            norm.reset_running_stats()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        run(model.train())
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        if norm.track_running_stats and not norm.num_batches_tracked:
            randomise_statistics(norm, generator)
    return model.eval()


def keep_scale(model: nn.Module) -> None:
    """Give layers random weights that pass on the scale of what they are given.

    Some models' start at nearly 0, and rounding would be all that passes through them.
    """
    for module in model.modules():
        if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")


def randomise(norm: nn.modules.batchnorm._BatchNorm, generator: torch.Generator) -> None:
    """Set γ in ±[0.5, 1.5] (a quarter of them negative) and β ~ N(0, 0.25)."""
    if norm.weight is None:
        return
    shape = norm.weight.shape
    sign = torch.where(torch.rand(shape, generator=generator) < 0.25, -1.0, 1.0)
    with torch.no_grad():
        norm.weight.copy_(sign * (0.5 + torch.rand(shape, generator=generator)))
        norm.bias.copy_(0.5 * torch.randn(shape, generator=generator))


def randomise_statistics(norm: nn.modules.batchnorm._BatchNorm, generator: torch.Generator) -> None:
    """Set running means ~ N(0, 0.25) and running variances in [0.5, 2.5]."""
    shape = norm.running_mean.shape
    norm.running_mean.copy_(0.5 * torch.randn(shape, generator=generator))
    norm.running_var.copy_(0.5 + 2 * torch.rand(shape, generator=generator))
