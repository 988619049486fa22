"""Calls that do nothing: dropout in eval mode, + 0, × 1, a cast to the same dtype, the same shape.

They cost little, but stand between calls that can be merged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.fx import Node

from torchfuse.exported.reading import arguments, same_shape
from torchfuse.exported.rewrites._rewrite import Edit, Rewrite

if TYPE_CHECKING:
    from torchfuse.exported.reading import Reading

__all__ = ["REWRITE"]

aten = torch.ops.aten

_DROPOUTS = (aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default)
_SAME_SHAPE = (
    *(aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.expand.default),
    *(aten.squeeze.dim, aten.squeeze.default),
)
_CASTS = (aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.type_as.default)
_COPIES = (aten.clone.default, aten.alias.default, aten.detach.default)


def _find(reading: Reading, node: Node) -> list[Edit]:
    x = node.args[0] if node.args else None
    if not isinstance(x, Node) or not isinstance(x.meta.get("val"), Tensor):
        affine = reading.affine(node)  # 0 + x
        if affine is None:
            return []
        x = affine.x
    return [Edit((node,), lambda: x)] if _does_nothing(reading, node, x) else []


def _does_nothing(reading: Reading, node: Node, x: Node) -> bool:
    if node.target in _DROPOUTS:
        _, share, training = arguments(node)
        return not training or share == 0
    given, made = x.meta["val"], node.meta["val"]
    if node.target in _SAME_SHAPE:
        return same_shape(given.shape, made.shape)
    if node.target in _CASTS:
        return bool(given.dtype is made.dtype and given.device == made.device)
    if node.target in _COPIES:
        return not node.kwargs and len(node.args) == 1
    affine = reading.affine(node)
    return (
        affine is not None
        and affine.x is x
        and not affine.affine.shifts
        and bool((affine.affine.scale == 1).all())
    )


REWRITE = Rewrite(
    "no_op",
    "dropout in eval mode, + 0, × 1, casts and reshapes to what it is removed",
    "dropout(x) → x",
    _find,
    makes_room=True,
)
