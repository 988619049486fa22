"""conv → batch norm: the batch norm is folded into the convolution.

    y  = γ · (W ∗ x + b − μ) / sqrt(σ² + ε) + β
    W' = W · (γ/σ)                 [out, in/groups, *kernel], scaled along out
    b' = (b − μ) · (γ/σ) + β       [out]

Any number of groups and of spatial dimensions; γ, β and b may be missing.
"""

from torchfuse.algebra.folding import fold_batch_norm
from torchfuse.conditions.exactness import exact_in_graph, foldable
from torchfuse.conditions.subject import Rule

RULE = Rule(
    name="conv_bn",
    pattern=("conv", "batch_norm"),
    summary="batch norm folded into the 1-d, 2-d or 3-d convolution before it",
    check=foldable,
    check_in_graph=exact_in_graph,
    rewrite=fold_batch_norm,
)
