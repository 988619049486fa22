"""The rules of `fuse_exported` beyond folding, in the order they are tried at a node."""

from torchfuse.fusing.programs.rewrites import (
    affine_chain,
    affine_layer,
    branches,
    cancelling,
    cat_affine,
    layer_affine,
    layer_chain,
    layer_pool,
    no_op,
    pad_conv,
)
from torchfuse.fusing.programs.rewrites._rewrite import Rewrite

__all__ = ["REWRITES"]

REWRITES: tuple[Rewrite, ...] = (
    # What does nothing stands between calls that belong together: it goes first.
    no_op.REWRITE,
    cancelling.REWRITE,
    # A layer takes in what follows at no cost, whatever its padding; only then what comes before.
    layer_affine.REWRITE,
    cat_affine.REWRITE,
    affine_chain.REWRITE,
    affine_layer.REWRITE,
    pad_conv.REWRITE,
    # A branch is merged when it is one layer; what cannot be a layer by itself, it tries as a sum.
    layer_chain.REWRITE,
    branches.REWRITE,
    # Last: behind its pool, a convolution is no longer next to what it could be merged with.
    layer_pool.REWRITE,
)
