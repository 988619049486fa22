"""Attention without a mask: softmax(s·q·kᵀ)·v, as matrix products and a plain softmax.

Lowering writes `scaled_dot_product_attention` with a softmax that is safe for rows of which all is
masked: `any`, `eq`, `full_like`, `logical_not` and `where`, none of which XNNPACK takes. Without a
mask there is no such row.
"""

import math
from typing import Any

import torch

from torchfuse.lowering.xnnpack_rewrites.writing import Writer, constant, static_shape

__all__ = ["write_attention_without_masking"]

_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
_DEFAULTS: tuple[Any, ...] = (None, None, None, None, 0.0, False, None, False)


def write_attention_without_masking(program: torch.export.ExportedProgram) -> int:
    """Write out each attention that has no mask, no dropout and as many heads everywhere."""
    aten = torch.ops.aten
    count = 0
    attentions = program.graph.find_nodes(
        op="call_function", target=aten.scaled_dot_product_attention.default
    )
    for node in attentions:
        given = dict(zip(_ARGUMENTS, (*node.args, *_DEFAULTS[len(node.args) :]), strict=True))
        query, key, value, mask, dropout, causal, scale, grouped = (given | node.kwargs).values()
        shape = static_shape(query)
        if mask is not None or dropout or causal or grouped or shape is None or len(shape) < 3:
            continue
        write = Writer(node)
        factor = 1 / math.sqrt(shape[-1]) if scale is None else scale
        # A tensor, since XNNPACK takes no number.
        factors = constant(program, f"{node.name}_scale", torch.full([1] * len(shape), factor))
        scaled = write(aten.mul.Tensor, query, factors)
        scores = write(aten.matmul.default, scaled, write(aten.transpose.int, key, -2, -1))
        write.replace_by(write(aten.matmul.default, write(aten.softmax.int, scores, -1), value))
        count += 1
    return count
