"""Modules that are batch norms by what they do, of whatever class they are.

Detection libraries freeze batch norms, and write them as arithmetic over four buffers:

    y = x · (γ / sqrt(σ² + ε)) + (β − μ · γ / sqrt(σ² + ε))

In a recording, all that one call of such a module did is put into one call of kind `batch_norm`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torchfuse.graph import Call, Graph, ModuleCall, Operand

__all__ = ["NORM_TENSORS", "is_norm_module", "with_norms_as_calls"]

# What a batch norm holds, and what is gone once it is folded.
NORM_TENSORS = frozenset({"weight", "bias", "running_mean", "running_var", "num_batches_tracked"})


def is_norm_module(module: nn.Module) -> bool:
    """Whether the module, of a class that is none of torch's batch norms, holds just what one does.

    What it computes of that is not looked at here.
    """
    if isinstance(module, _BatchNorm) or module._modules:
        return False
    tensors = {
        name: tensor
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None
    }
    if not {"running_mean", "running_var"} <= tensors.keys() <= NORM_TENSORS:
        return False
    # A tensor in a plain attribute is no part of a batch norm, and would be lost with the module.
    held = [value for value in vars(module).values() if isinstance(value, Tensor)]
    sizes = {tuple(t.shape) for name, t in tensors.items() if name != "num_batches_tracked"}
    return not held and len(sizes) == 1 and len(next(iter(sizes))) == 1


def with_norms_as_calls(graph: Graph, modules: dict[str, nn.Module]) -> None:
    """Puts what each call of a norm module did into one call, where that is a batch norm."""
    paths = {path for path, module in modules.items() if is_norm_module(module)}
    if not paths:
        return
    gone: set[int] = set()
    for index, entry in enumerate(graph.module_calls):
        if entry.path in paths:
            inside = graph.calls[entry.first : entry.last]
            if (norm := _as_norm(graph, entry, index, inside)) is not None:
                gone |= {call.index for call in inside}
                graph.calls[norm.index] = norm
                gone.discard(norm.index)
    if gone:
        _drop(graph, gone)


def _as_norm(graph: Graph, entry: ModuleCall, index: int, inside: Sequence[Call]) -> Call | None:
    """The calls as one batch norm: x · scale + shift, of which only x is from outside."""
    if len(entry.inputs) != 1 or any(call.written or call.within != index for call in inside):
        return None
    (given,) = entry.inputs
    own: dict[str, Operand] = {}
    constant: set[int] = set()
    scaled: Operand | None = None
    last: Call | None = None
    for call in inside:
        if last is not None:
            return None  # something follows the sum
        for operand in call.operands.values():
            for name in graph.values[operand.value].names:
                path, _, attribute = name.rpartition(".")
                if path == entry.path:
                    own.setdefault(attribute, operand)
                    constant.add(operand.value)
        read = [o for o in call.operands.values() if o.value not in constant]
        # Computed of its own tensors alone: the scale and the shift.
        if not read:
            constant |= {result.value for result in call.results}
        elif len(read) != 1 or len(call.results) != 1 or len(call.operands) != 2:
            return None
        elif call.kind == "mul" and scaled is None and read[0].value == given:
            if not _is_by_channel(call, read[0]):
                return None
            source, scaled = read[0], call.results[0]
        elif call.kind == "add" and read[0] == scaled and _is_by_channel(call, read[0]):
            last = call
        else:
            return None
    if last is None or {*own} - NORM_TENSORS or "alpha" in last.attributes:
        return None
    roles = {name: operand for name, operand in own.items() if name != "num_batches_tracked"}
    return replace(
        last,
        kind="batch_norm",
        target="batch norm as arithmetic",
        operands={"input": source, **roles},
        attributes={"training": False},
        function=None,
        args=(),
        kwargs={},
    )


def _is_by_channel(call: Call, read: Operand) -> bool:
    """Whether the other operand has one number for each channel, and the result `read`'s sizes."""
    (other,) = (operand for operand in call.operands.values() if operand is not read)
    sizes = (1,) * (len(read.shape) - len(other.shape)) + other.shape
    by_channel = all(size == 1 for axis, size in enumerate(sizes) if axis != 1)
    return len(sizes) > 1 and by_channel and call.results[0].shape == read.shape


def _drop(graph: Graph, gone: set[int]) -> None:
    """Takes calls out, and numbers the others anew."""
    before = [0]
    for call in graph.calls:
        before.append(before[-1] + (call.index not in gone))
    graph.calls[:] = [
        replace(call, index=before[call.index]) for call in graph.calls if call.index not in gone
    ]
    graph.module_calls[:] = [
        replace(entry, first=before[entry.first], last=before[entry.last])
        for entry in graph.module_calls
    ]
    graph.handed_over = {case: before[position] for case, position in graph.handed_over.items()}
    graph.reads[:] = [replace(read, position=before[read.position]) for read in graph.reads]
