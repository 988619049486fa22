"""conv → relu (or conv → folded batch norm → relu): one module of a fused class, on request.

Eager arithmetic stays the same; quantizers of torch.ao know the pair by the fused class.
"""

import torch.ao.nn.intrinsic as nni
from torch import nn

from torchfuse.rules._merging import merging_rule

RULE = merging_rule(
    "conv_relu",
    "conv",
    {nn.Conv1d: nni.ConvReLU1d, nn.Conv2d: nni.ConvReLU2d, nn.Conv3d: nni.ConvReLU3d},
    "convolution and ReLU in one ConvReLU module (on request: changes keys)",
)
