"""The rules, in the order they are tried."""

from torchfuse.rules import (
    bn_relu,
    conv_bn,
    conv_relu,
    conv_transpose_bn,
    linear_bn,
    linear_relu,
)
from torchfuse.rules._rule import Match, Refusal, Rule, Subject

__all__ = ["RULES", "Match", "Refusal", "Rule", "Subject"]

# Folding comes first: what it absorbs is gone before an activation looks for its neighbour.
RULES: tuple[Rule, ...] = (
    conv_bn.RULE,
    conv_transpose_bn.RULE,
    linear_bn.RULE,
    conv_relu.RULE,
    linear_relu.RULE,
    bn_relu.RULE,
)
