"""Padding in int8: without the quantization after it, which is that before it.

    dequantize → pad with zeros → quantize → dequantize → conv   becomes   dequantize → pad → conv

ExecuTorch takes a pad for one in int8 only if nothing quantizes it again; else XNNPACK converts to
float, pads and converts back, where it would merge the pad into the convolution.
"""

from typing import Any

import torch
from torch import fx

__all__ = ["leave_padding_in_int8"]


def leave_padding_in_int8(program: torch.export.ExportedProgram) -> int:
    """Take out each pair of quantize and dequantize after a pad, if its input has the same scale.

    Zero is a number of int8 in any scale, and everything else in the pad is one already.
    """
    aten = torch.ops.aten
    count = 0
    for target in (aten.pad.default, aten.constant_pad_nd.default):
        for pad in program.graph.find_nodes(op="call_function", target=target):
            (quantize,) = users if len(users := list(pad.users)) == 1 else (None,)
            if quantize is None or not _is(quantize, "quantize") or not _pads_with_zeros(pad):
                continue
            scale, source = quantize.args[1:], pad.args[0]
            pairs = list(quantize.users)
            if not _is(source, "dequantize") or source.args[1:] != scale:
                continue
            if not all(_is(pair, "dequantize") and pair.args[1:] == scale for pair in pairs):
                continue
            for pair in pairs:
                pair.replace_all_uses_with(pad)
                program.graph.erase_node(pair)
            program.graph.erase_node(quantize)
            count += 1
    return count


def _is(node: Any, what: str) -> bool:
    # The operators are known once torchao is imported, which this module need not do.
    name = f"quantized_decomposed.{what}_per_tensor.default"
    return isinstance(node, fx.Node) and str(node.target) == name


def _pads_with_zeros(pad: fx.Node) -> bool:
    if pad.target is torch.ops.aten.constant_pad_nd.default:
        return not any(pad.args[2:])
    mode = pad.args[2] if len(pad.args) > 2 else "constant"
    return mode == "constant" and not any(pad.args[3:])
