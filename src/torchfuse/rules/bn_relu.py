"""batch norm → relu, where the batch norm stays: one module of a fused class, on request.

Eager arithmetic stays the same; quantizers of torch.ao know the pair by the fused class.
"""

import torch.ao.nn.intrinsic as nni
from torch import nn

from torchfuse.rules._merging import merging_rule

RULE = merging_rule(
    "bn_relu",
    "batch_norm",
    {nn.BatchNorm2d: nni.BNReLU2d, nn.BatchNorm3d: nni.BNReLU3d},
    "batch norm and ReLU in one BNReLU module (on request: changes keys)",
)
