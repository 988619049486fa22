"""Transposed conv → batch norm: the batch norm is folded into the transposed convolution.

As in `conv_bn`, but the weight is [in, out/groups, *kernel]: the out channels of group g belong to
the g-th block of rows, which is what other fusers get wrong (pytorch#180995).
"""

from torchfuse.algebra.folding import fold_batch_norm
from torchfuse.conditions.exactness import exact_in_graph, foldable
from torchfuse.conditions.subject import Rule

RULE = Rule(
    name="conv_transpose_bn",
    pattern=("conv_transpose", "batch_norm"),
    summary="batch norm folded into the 1-d, 2-d or 3-d transposed convolution before it",
    check=foldable,
    check_in_graph=exact_in_graph,
    rewrite=fold_batch_norm,
)
