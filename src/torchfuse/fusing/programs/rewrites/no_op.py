"""Calls that do nothing: dropout in eval mode, + 0, × 1, a cast to the same dtype, the same shape.

They cost little, but stand between calls that can be merged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch._prims_common import is_contiguous_or_false
from torch.fx import Node

from torchfuse.fusing.programs.reading import arguments, same_shape
from torchfuse.fusing.programs.rewrites._rewrite import Edit, Rewrite

if TYPE_CHECKING:
    from torchfuse.fusing.programs.reading import Reading

__all__ = ["REWRITE"]

aten = torch.ops.aten

_DROPOUTS = (aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default)
_SAME_SHAPE = (
    *(aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.expand.default),
    *(aten.squeeze.dim, aten.squeeze.default, aten.expand_as.default, aten.slice.Tensor),
)
_CASTS = (aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.type_as.default)
_COPIES = (aten.clone.default, aten.alias.default, aten.detach.default)


def _find(reading: Reading, node: Node) -> list[Edit]:
    affine = reading.affine(node)
    x = affine.x if affine is not None else node.args[0] if node.args else None
    if node.target is aten.cat.default and isinstance(x, (list, tuple)) and len(x) == 1:
        (x,) = x  # a dense block's first layer is given a list of one
    if not isinstance(x, Node) or not isinstance(x.meta.get("val"), Tensor):
        return []
    return [Edit((node,), lambda: x)] if _does_nothing(reading, node, x) else []


def _does_nothing(reading: Reading, node: Node, x: Node) -> bool:
    if node.target in _DROPOUTS:
        _, share, training = arguments(node)
        return not training or share == 0
    given, made = x.meta["val"], node.meta["val"]
    if node.target is aten.cat.default:
        return True
    if node.target in _SAME_SHAPE:
        return same_shape(given.shape, made.shape)
    if node.target in _CASTS:
        return bool(given.dtype is made.dtype and given.device == made.device)
    if node.target in _COPIES:
        return not node.kwargs and len(node.args) == 1
    if node.target is aten.contiguous.default:
        # (a view needs it where an input comes in another memory format than the example's)
        views = any(user.target is aten.view.default for user in node.users)
        return not node.kwargs and is_contiguous_or_false(given) and not views
    affine = reading.affine(node)
    return (
        affine is not None and not affine.affine.shifts and bool((affine.affine.scale == 1).all())
    )


REWRITE = Rewrite(
    "no_op",
    "dropout in eval mode, + 0, × 1, casts and reshapes to what it is removed",
    "dropout(x) → x",
    _find,
    makes_room=True,
)
