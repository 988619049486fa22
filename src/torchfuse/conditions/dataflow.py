"""Follows values through a graph: what made what a call reads, and who else reads it."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchfuse.graph import Call, Graph, Operand
from torchfuse.graph.kinds import MOVES, SHAPE_ONLY

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = [
    "batch_norms",
    "keeps_channels",
    "origin",
    "other_readers",
    "owner_path",
    "replay",
]


def batch_norms(graph: Graph) -> dict[str, list[Call]]:
    """Batch norm calls by the module whose statistics they use (else the one they ran in)."""
    groups: dict[str, list[Call]] = defaultdict(list)
    for call in graph.calls:
        if call.kind == "batch_norm":
            groups[owner_path(graph, call, ("running_mean", "weight"))].append(call)
    return groups


def owner_path(graph: Graph, call: Call, roles: Sequence[str] = ("weight",)) -> str:
    """The module that owns the call's parameters; the one it ran in, if they are computed."""
    ran_in = call.module_path or ""
    for role in roles:
        if role in call.operands:
            names = graph.values[call.operands[role].value].names
            owners = [name.rpartition(".")[0] for name in names]
            if owners:
                return ran_in if ran_in in owners else owners[0]
    return ran_in


def origin(graph: Graph, call: Call) -> tuple[Call | None, tuple[Call, ...]]:
    """What made the input of `call`, and the calls that moved it on the way, in running order.

    None if nothing recorded made it (an input of the model, another thread).
    """
    between: list[Call] = []
    operand, before = call.operands.get("input"), call.index
    while operand is not None:
        maker = _maker(graph, operand, call.case, before)
        # What changes its input in place computes, whatever it is called.
        if maker is None or maker.kind not in MOVES or maker.written:
            return maker, tuple(reversed(between))
        between.append(maker)
        operand, before = next(iter(maker.operands.values()), None), maker.index
    return None, tuple(reversed(between))


def _maker(graph: Graph, operand: Operand, case: int, before: int) -> Call | None:
    """The last call before `before` that wrote to `operand` or returned just this view of it."""
    for call in reversed(graph.writers(operand.value)):
        if call.index < before and call.case == case:
            # One that returned another view of the same memory did not make what is read here.
            if operand.value in call.written or operand in call.results:
                return call
            if call.kind == "unseen":
                return call
    return None


def other_readers(graph: Graph, path: Sequence[Call], last: Call) -> Iterator[Call]:
    """Readers of anything that `path` (a layer, then moves) made, apart from `path` and `last`."""
    expected = {id(call) for call in (*path, last)}
    values = dict.fromkeys(result.value for call in path for result in call.results)
    # Writers too: what is written into it afterwards is read by whoever reads it next.
    readers = [r for value in values for r in (*graph.readers(value), *graph.writers(value))]
    # A hook explains what it then calls.
    yield from sorted(
        (reader for reader in readers if id(reader) not in expected),
        key=lambda reader: reader.kind != "hook",
    )


def replay(between: Sequence[Call], last: Call, tensor: Tensor, made: Operand) -> Tensor:
    """`tensor` (in place of `made`) after the calls `between`, as `last` reads it.

    Raises ValueError where a call needs another tensor's values.
    """
    current: dict[Operand, Tensor] = {made: tensor}
    for call in between:
        args = _filled(call.args, call, current)
        kwargs = _filled(call.kwargs, call, current)
        result = call.function(*args, **kwargs)
        outputs = [result] if isinstance(result, Tensor) else list(result)
        current = dict(zip(call.results, outputs, strict=True))
    return current[last.operands["input"]]


def _filled(value: Any, call: Call, current: dict[Operand, Tensor]) -> Any:
    if isinstance(value, Operand):
        if value in current:
            return current[value]
        # Of the other tensor in `x.view_as(y)` only the sizes count.
        if call.target in SHAPE_ONLY:
            return torch.empty(value.shape, dtype=getattr(torch, value.dtype), device="cpu")
        raise ValueError(f"{call.target} reads another tensor.")
    if isinstance(value, (list, tuple)):
        entries = [_filled(entry, call, current) for entry in value]
        return entries if isinstance(value, list) else tuple(entries)
    if isinstance(value, dict):
        return {key: _filled(entry, call, current) for key, entry in value.items()}
    return value


def keeps_channels(first: Call, between: Sequence[Call], last: Call, axis: int) -> bool:
    """Whether what is channel c on `axis` of `first`'s result is channel c on axis 1 for `last`.

    Tried out: the calls between are run on a tensor that holds the number of each channel.
    """
    made = first.results[0]
    channels = made.shape[axis]
    seen = last.operands["input"]
    if len(seen.shape) < 2 or seen.shape[1] != channels:
        return False
    if not between:
        return axis == 1
    numbers = torch.arange(channels, dtype=torch.float32, device="cpu")
    column = numbers.reshape(-1, *[1] * (len(made.shape) - axis - 1))
    probe = torch.empty_strided(made.shape, made.stride, dtype=torch.float32, device="cpu")
    probe.copy_(column.expand(made.shape))
    # A reshape may keep the channels apart only at this size: N×C×1×1 to (−1, C).
    larger = [size if i == axis else size + 1 for i, size in enumerate(made.shape)]
    return _is_by_channel(probe, first, between, last, numbers) is True and (
        _is_by_channel(column.expand(larger).clone(), first, between, last, numbers) is not False
    )


def _is_by_channel(
    probe: Tensor, first: Call, between: Sequence[Call], last: Call, numbers: Tensor
) -> bool | None:
    """Whether `probe`, moved, has number c in all of channel c; None if it cannot be moved so."""
    try:
        moved = replay(between, last, probe, first.results[0])
    except (ValueError, RuntimeError, KeyError, TypeError, IndexError):
        return None
    if moved.dim() < 2 or moved.shape[1] != len(numbers):
        return None  # a batch norm of this many channels refuses it as well
    expected = numbers.reshape(-1, *[1] * (moved.dim() - 2)).expand(moved.shape)
    return torch.equal(moved.float(), expected)
