"""linear → relu: one module of a fused class, on request.

Eager arithmetic stays the same; quantizers of torch.ao know the pair by the fused class.
"""

import torch.ao.nn.intrinsic as nni
from torch import nn

from torchfuse.rules._merging import merging_rule

RULE = merging_rule(
    "linear_relu",
    "linear",
    {nn.Linear: nni.LinearReLU},
    "linear layer and ReLU in one LinearReLU module (on request: changes keys)",
)
