"""linear → batch norm: the batch norm is folded into the linear layer.

    W' = W · (γ/σ)                 [out, in], scaled along out
    b' = (b − μ) · (γ/σ) + β       [out]

Exact only if the axis that is normalised is the layer's feature axis: on an (N, C, L) tensor a
linear layer's features are on axis 2 and a batch norm's channels on axis 1 (ao#4116), unless
something between them moves the axis, as in LeViT's `bn(linear(x).flatten(0, 1))`.
"""

from torchfuse.algebra.folding import fold_batch_norm
from torchfuse.conditions.exactness import exact_in_graph, foldable
from torchfuse.conditions.subject import Rule

RULE = Rule(
    name="linear_bn",
    pattern=("linear", "batch_norm"),
    summary="batch norm folded into the linear layer before it",
    check=foldable,
    check_in_graph=exact_in_graph,
    rewrite=fold_batch_norm,
)
