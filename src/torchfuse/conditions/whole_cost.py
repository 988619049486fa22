"""What a whole recorded call costs, for the share of it that fusing saves."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

import torch

from torchfuse.planning import WholeCost

if TYPE_CHECKING:
    from collections.abc import Collection

    from torchfuse.graph import Call, Graph, Operand

__all__ = ["whole"]

_NO_CALLS = frozenset({"output", "hook", "held"})


def whole(graph: Graph, merged: Collection[str]) -> WholeCost:
    """Return what the first case costs in all; `merged` are the paths of batch norms that go.

    Multiply-adds are those of convolutions, linear layers, products of matrices and batch norms.
    Traffic is every activation that a call reads or writes.
    """
    calls = [call for call in graph.calls if call.case == 0 and call.kind not in _NO_CALLS]
    norms = {call.module_path for call in calls if call.kind == "batch_norm"}
    return WholeCost(
        macs=sum(map(_macs, calls)),
        traffic_bytes=sum(_traffic_bytes(call, graph) for call in calls),
        norms=len(norms),
        norms_merged=len(norms & set(merged)),
    )


def _macs(call: Call) -> int:
    if not call.results:
        return 0
    weight, given = call.operands.get("weight"), call.operands.get("input")
    made = call.results[0].numel
    if call.kind == "batch_norm":
        return made
    if call.kind == "conv_transpose" and weight is not None and given is not None:
        return given.numel * prod(weight.shape[1:])
    if call.kind in ("conv", "linear") and weight is not None:
        return made * prod(weight.shape[1:])
    if call.kind == "matmul" and call.operands:
        first = next(iter(call.operands.values()))
        return made * first.shape[-1] if first.shape else 0
    return 0


def _traffic_bytes(call: Call, graph: Graph) -> int:
    read = [o for o in call.operands.values() if graph.values[o.value].origin != "model"]
    is_view = {o.value for o in call.results} <= {o.value for o in read} and not call.written
    return 0 if is_view else sum(map(_bytes, (*read, *call.results)))


def _bytes(operand: Operand) -> int:
    dtype: torch.dtype = getattr(torch, operand.dtype)
    return operand.numel * dtype.itemsize
