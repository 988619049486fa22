"""The rules, in the order they are tried."""

from torchfuse.conditions.subject import Match, Refusal, Rule, Subject
from torchfuse.rules import conv_bn, conv_transpose_bn, linear_bn

__all__ = ["RULES", "Match", "Refusal", "Rule", "Subject"]

RULES: tuple[Rule, ...] = (conv_bn.RULE, conv_transpose_bn.RULE, linear_bn.RULE)
