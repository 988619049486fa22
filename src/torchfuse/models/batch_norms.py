"""Batch norms with statistics of their own, without training."""

import torch
from torch import nn


def settle_batch_norms(model: nn.Module, inputs: torch.Tensor) -> nn.Module:
    """Give `model`, in place, the statistics of one pass over `inputs`; return it in eval mode.

    Untouched statistics (mean 0, variance 1) would hide a wrong fold.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative average: one pass replaces the statistics
    with torch.no_grad():
        model.train()(inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()
