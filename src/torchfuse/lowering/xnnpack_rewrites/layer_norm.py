"""Layer norm over the last axis, written out, with its sums as products with a vector of ones.

XNNPACK takes no layer norm, and no mean but over height and width. With c channels:

    d = x − x·(1/c)        a linear layer of one output, and a broadcast
    y = d · rsqrt(d²·(1/c) + ε) · γ + β        ε is the bias of another

Between two permutes, of channels to the last axis and back, the linear layers are 1×1 convolutions
and the permutes go.
"""

from typing import Any

import torch
from torch import fx

from torchfuse.lowering.xnnpack_rewrites.writing import Writer, constant, static_shape

__all__ = ["write_out_layer_norms"]

_LAST, _BACK = [0, 2, 3, 1], [0, 3, 1, 2]


def write_out_layer_norms(program: torch.export.ExportedProgram) -> int:
    """Write out each layer norm in float32 over the last axis alone."""
    aten = torch.ops.aten
    count = 0
    for node in program.graph.find_nodes(op="call_function", target=aten.layer_norm.default):
        defaults: tuple[Any, ...] = (None, None, None, None, 1e-5)
        source, axes, weight, bias, eps = (*node.args, *defaults[len(node.args) :])[:5]
        shape = static_shape(source)
        if shape is None or len(shape) < 2 or len(axes) != 1 or node.kwargs:
            continue
        if source.meta["val"].dtype != torch.float32:  # in half, d² may be too large
            continue
        back = _permuted_back(node) if _is_permute(source, _LAST) else None
        if back is None:
            write = Writer(node)
            write.replace_by(_written(program, node.name, write, source, weight, bias, eps, False))
        else:
            write = Writer(back)
            before = source.args[0]
            write.replace_by(_written(program, node.name, write, before, weight, bias, eps, True))
        count += 1
    return count


def _is_permute(node: Any, order: list[int]) -> bool:
    if not isinstance(node, fx.Node) or node.target is not torch.ops.aten.permute.default:
        return False
    return [axis % 4 for axis in node.args[1]] == order  # type: ignore[union-attr,operator]


def _permuted_back(node: fx.Node) -> fx.Node | None:
    """Return the permute that undoes the one before the norm, if nothing else reads the norm."""
    users = list(node.users)
    return users[0] if len(users) == 1 and _is_permute(users[0], _BACK) else None


def _written(
    program: torch.export.ExportedProgram,
    name: str,
    write: Writer,
    x: fx.Node,
    weight: fx.Node | None,
    bias: fx.Node | None,
    eps: float,
    is_image: bool,
) -> fx.Node:
    """Return the norm of `x` over its last axis; of an image, [n, c, h, w], over its channels."""
    aten = torch.ops.aten
    shape = x.meta["val"].shape
    channels = shape[1 if is_image else -1]
    operator = aten.conv2d.default if is_image else aten.linear.default
    ones = torch.full([1, channels, 1, 1] if is_image else [1, channels], 1 / channels)
    averaging = constant(program, f"{name}_ones", ones)
    mean = write(operator, x, averaging)
    centred = write(aten.sub.Tensor, x, mean)
    squares = write(aten.mul.Tensor, centred, centred)
    variance = write(
        operator, squares, constant(program, f"{name}_ones_again", ones.clone()),
        constant(program, f"{name}_eps", torch.full([1], eps)),
    )  # fmt: skip
    made = write(aten.mul.Tensor, centred, write(aten.rsqrt.default, variance))
    for operation, values in ((aten.mul.Tensor, weight), (aten.add.Tensor, bias)):
        if values is not None:
            if is_image:
                values = write(aten.reshape.default, values, [1, channels, 1, 1])
            made = write(operation, made, values)
    return made
