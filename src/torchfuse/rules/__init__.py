"""The rules, in the order they are tried."""

from torchfuse.rules import conv_bn, conv_transpose_bn, linear_bn
from torchfuse.rules._rule import Match, Refusal, Rule, Subject

__all__ = ["RULES", "Match", "Refusal", "Rule", "Subject"]

RULES: tuple[Rule, ...] = (conv_bn.RULE, conv_transpose_bn.RULE, linear_bn.RULE)
