"""Lowering: an exported program to an ExecuTorch program, for XNNPACK as far as XNNPACK can."""

import logging
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from torchfuse.delegation import Delegation, delegation_of
from torchfuse.errors import InputError, UnsupportedError, first_line
from torchfuse.isolation.warning_filters import known_warnings_ignored
from torchfuse.lowering.capture import signature_of
from torchfuse.lowering.xnnpack_rewrites import REWRITES_ONCE_QUANTIZED, rewrite
from torchfuse.targets.executorch.fast_lowering import without_waste
from torchfuse.targets.executorch.program import runtime

__all__ = ["Lowered", "lower", "operators"]

_DELEGATE = "XNNPACK"
_OTHERS = "'.pt' has all operators, and '.onnx' and '.xml' have others; or replace it in the model"


@dataclass(frozen=True)
class Lowered:
    """An ExecuTorch program, and what the delegate took of it."""

    program: bytes
    delegation: Delegation
    signature: Mapping[str, Any]  # how arguments and results are nested, for ExecutorchModel
    operators: tuple[str, ...]  # that it needs kernels for, outside the delegate: "aten::add.out"
    backends: tuple[str, ...]  # the delegates that it needs, by the runtime's names


def lower(program: torch.export.ExportedProgram) -> Lowered:
    """Return `program` as an ExecuTorch program that runs on XNNPACK as far as XNNPACK can.

    What XNNPACK does not take runs on ExecuTorch's portable kernels. `program` is used up: it is
    rewritten in place.

    Raises:
        InputError: a dynamic size without a maximum.
        UnsupportedError: ExecuTorch cannot lower it, or this runtime lacks an operator it needs.
    """
    for symbol, allowed in program.range_constraints.items():
        if not allowed.upper.is_finite or allowed.upper >= sys.maxsize - 1:
            raise InputError(
                f"Expected a maximum for every dynamic size, but {symbol} has none; ExecuTorch "
                "plans memory for the largest: torch.export.Dim('batch', max=8)."
            )
    rewrite(program, REWRITES_ONCE_QUANTIZED)
    with known_warnings_ignored():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        try:
            with _Reasons() as reasons, without_waste():
                edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
                delegation = delegation_of(
                    edge.exported_program().graph_module, _DELEGATE, reasons.by_node
                )
                executorch_program = edge.to_executorch()
        except Exception as error:
            raise UnsupportedError(
                f"ExecuTorch cannot lower the model: {_reason(error)}"
            ) from error
    plans = executorch_program.executorch_program.execution_plan
    needed = {name for plan in plans for name in operators(plan)}
    _check_operators(needed)
    return Lowered(
        bytes(executorch_program.buffer),
        delegation,
        signature_of(program),
        tuple(sorted(needed)),
        tuple(sorted({delegate.id for plan in plans for delegate in plan.delegates})),
    )


def operators(plan: Any) -> set[str]:
    """Return the names of the operators that a method of a program calls outside its delegates."""
    return {f"{op.name}.{op.overload}" if op.overload else op.name for op in plan.operators}


def _reason(error: Exception) -> str:
    """Return what ExecuTorch says, or the operator that it has no form of."""
    found = re.search(r"Operator torch\._ops\.([\w.]+) is not in Core ATen", str(error))
    if found is not None:
        return f"it has no form of {found[1]}; {_OTHERS}."
    return first_line(error)


class _Reasons(logging.Handler):
    """The partitioner's reasons for leaving nodes, which it only writes to its DEBUG log."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.by_node: dict[str, str] = {}
        self._logger = logging.getLogger("executorch.backends.xnnpack.partition")

    def emit(self, record: logging.LogRecord) -> None:
        why = record.msg  # a WhyNoPartition, not its text
        if hasattr(why, "node") and hasattr(why, "reason"):
            self.by_node[str(why.node)] = str(why.reason).rstrip(".")

    def __enter__(self) -> "_Reasons":
        self._before = (self._logger.level, self._logger.propagate)
        self._logger.setLevel(logging.DEBUG)
        self._logger.propagate = False
        self._logger.addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._logger.removeHandler(self)
        self._logger.level, self._logger.propagate = self._before
        self._logger.setLevel(self._before[0])  # also forgets what it cached as enabled


def _check_operators(needed: set[str]) -> None:
    if missing := sorted(needed - set(runtime()._get_operator_names())):
        raise UnsupportedError(
            f"The ExecuTorch runtime has no kernel for {', '.join(missing)}, which the model "
            f"needs; {_OTHERS}."
        )
