"""Reads an exported program as the same small graph that a recorded run gives.

Every use of a tensor is an edge there, and every operator's schema says what it changes and what
it returns a view of. Sizes that were declared dynamic are tried as numbers, one case each: those
of the export, then the smallest and the largest declared. So rules, which see numbers only, judge
the program over its declared sizes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from operator import getitem
from typing import TYPE_CHECKING, Any

import torch
from torch import SymInt, Tensor
from torch.export.graph_signature import OutputKind
from torch.fx import Node

from torchfuse.graph import Call, Graph, Operand, Value
from torchfuse.graph.kinds import METADATA, SHAPE_ONLY, kind_of, roles

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch.export import ExportedProgram

__all__ = ["ReadProgram", "module_path", "read"]

# They say something of their argument's sizes or dtype; nothing of what is in it.
_CHECKS = frozenset({"_assert_tensor_metadata", "sym_size", "sym_stride", "sym_numel"})
# A size without a bound is tried this much larger than it was.
_FURTHER = 3


@dataclass(frozen=True)
class ReadProgram:
    """An exported program's graph, and the node that each call stands for."""

    graph: Graph
    nodes: dict[int, Node]  # by Call.index; several calls, one per case, may stand for one node


def read(
    program: ExportedProgram, fx_graph: torch.fx.Graph, targets: Mapping[str, str]
) -> ReadProgram:
    """Return the graph of `fx_graph`, which has the nodes of `program` or what became of them.

    `targets` gives the stored tensor (its dotted name) that a placeholder's name stands for.
    """
    sizes = [given for given in _sizes_tried(program) if _are_possible(fx_graph, given)]
    reading = _Reading(Graph("ExportedProgram", tuple(_described(given) for given in sizes)))
    for node in fx_graph.nodes:
        if node.op == "placeholder":
            reading.add_stored_or_input(node, targets.get(node.name))
    changed = {
        str(spec.target)
        for spec in program.graph_signature.output_specs
        if spec.kind in (OutputKind.BUFFER_MUTATION, OutputKind.PARAMETER_MUTATION)
    }
    for case, given in enumerate(sizes):
        reading.add_case(case, fx_graph, given, changed)
    return ReadProgram(reading.graph, reading.nodes)


def module_path(node: Node) -> str | None:
    """The module that `node` ran in, as export noted it; None outside of all modules."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]) if stack and stack[-1][0] else None


class _Reading:
    """A graph while it is read."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.nodes: dict[int, Node] = {}
        self._stored: dict[str, int] = {}  # placeholder → value, the same in all cases
        self._named: dict[str, int] = {}  # dotted name → value

    def add_stored_or_input(self, node: Node, target: str | None) -> None:
        if target is not None and target in self._named:
            self._stored[node.name] = self._named[target]
            return
        index = len(self.graph.values)
        value = Value(index, "model", (target,)) if target is not None else Value(index, "input")
        self.graph.values.append(value)
        self._stored[node.name] = index
        if target is not None:
            self._named[target] = index

    def add_case(
        self, case: int, fx_graph: torch.fx.Graph, sizes: dict[Any, int], changed: set[str]
    ) -> None:
        made: dict[Node, Any] = {}  # what each node gave: operands where it gave tensors
        for node in fx_graph.nodes:
            if node.op == "placeholder":
                value = node.meta.get("val")
                made[node] = (
                    _operand(value, self._stored[node.name], sizes)
                    if isinstance(value, Tensor)
                    else _number(value, sizes)
                )
            elif node.op == "call_function" and node.target is getitem:
                source, index = node.args
                given = made.get(source)
                made[node] = given[index] if isinstance(given, (list, tuple)) else given
            elif node.op == "call_function":
                made[node] = self._add_call(case, node, made, sizes)
            elif node.op == "output":
                self._add_output(case, node, made, changed)
            else:
                made[node] = None  # a submodule of a higher-order operator

    def _add_call(self, case: int, node: Node, made: dict[Node, Any], sizes: dict[Any, int]) -> Any:
        value = node.meta.get("val")
        name = _name(node.target)
        if name in METADATA or name in _CHECKS:
            return (
                _number(value, sizes) if not isinstance(value, Tensor) else self._new(value, sizes)
            )
        args = _filled(node.args, made)
        kwargs = _filled(node.kwargs, made)
        packet = getattr(node.target, "overloadpacket", node.target)
        # The general operators may be transposed, which their name does not say.
        kind = name if name in ("convolution", "_convolution") else kind_of(packet)
        positions = roles(packet)
        named: dict[str, Operand] = {}
        attributes: dict[str, Any] = {}
        given = [
            (positions[i] if i < len(positions) else str(i), entry) for i, entry in enumerate(args)
        ]
        for role, entry in (*given, *kwargs.items()):
            found = list(_operands(entry))
            if isinstance(entry, Operand):
                named[role] = entry
            elif found:
                named |= {f"{role}.{i}": operand for i, operand in enumerate(found)}
            elif entry is not None:
                attributes[role] = entry
        if name in SHAPE_ONLY:
            named = {role: operand for role, operand in named.items() if role == "0"}
        viewed, written = _aliases(node, args, kwargs)
        results = self._results(value, viewed, sizes)
        call = Call(
            index=len(self.graph.calls),
            case=case,
            kind=kind,
            target=name,
            module_path=module_path(node),
            operands=named,
            results=tuple(_operands(results)),
            written=frozenset(written),
            attributes=attributes,
            function=node.target,
            args=tuple(args),
            kwargs=kwargs,
        )
        self.graph.calls.append(call)
        self.nodes[call.index] = node
        return results

    def _results(self, value: Any, viewed: int | None, sizes: dict[Any, int]) -> Any:
        if isinstance(value, Tensor):
            return self._new(value, sizes) if viewed is None else _operand(value, viewed, sizes)
        if isinstance(value, (list, tuple)):
            return [self._results(entry, viewed, sizes) for entry in value]
        return _number(value, sizes)

    def _new(self, value: Tensor, sizes: dict[Any, int]) -> Operand:
        index = len(self.graph.values)
        self.graph.values.append(Value(index, "call"))
        return _operand(value, index, sizes)

    def _add_output(self, case: int, node: Node, made: dict[Node, Any], changed: set[str]) -> None:
        returned = {
            str(i): replace(operand, shape=(), stride=(), offset=0)
            for i, operand in enumerate(_operands(_filled(node.args, made)))
        }
        written = {self._named[target] for target in changed & self._named.keys()}
        index = len(self.graph.calls)
        self.graph.calls.append(
            Call(index, case, "output", "output", None, returned, (), frozenset(written))
        )


def _sizes_tried(program: ExportedProgram) -> Iterator[dict[Any, int]]:
    """A number for each symbolic size: as exported, then the smallest and the largest declared."""
    exported: dict[Any, int] = {}
    for node in program.graph.nodes:
        for size in _symbolic(node.meta.get("val")):
            for symbol in size.node.expr.free_symbols:
                hint = size.node.shape_env.backed_var_to_val.get(symbol)
                exported.setdefault(symbol, _FURTHER if hint is None else int(hint))
    yield exported
    bounds = {str(symbol): bound for symbol, bound in program.range_constraints.items()}
    smallest, largest = dict(exported), dict(exported)
    for symbol, example in exported.items():
        bound = bounds.get(str(symbol))
        if bound is not None:
            # Export treats sizes of 0 and 1 as the same way through the code.
            smallest[symbol] = max(2, int(bound.lower)) if bound.lower <= example else example
            bounded = bound.upper <= 1 << 12
            largest[symbol] = int(bound.upper) if bounded else example + _FURTHER
    for sizes in (smallest, largest):
        if sizes != exported:
            yield sizes


def _symbolic(value: Any) -> Iterator[SymInt]:
    if isinstance(value, SymInt):
        yield value
    elif isinstance(value, Tensor):
        for size in value.shape:
            yield from _symbolic(size)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from _symbolic(entry)


def _are_possible(fx_graph: torch.fx.Graph, sizes: Mapping[Any, int]) -> bool:
    """Whether what is computed of these sizes exists: a view may need them to be divisible."""
    computed = {
        size.node.expr for node in fx_graph.nodes for size in _symbolic(node.meta.get("val"))
    }
    try:
        for expression in computed:
            expression.subs(sizes)
    except ZeroDivisionError:
        return False
    return True


def _number(value: Any, sizes: dict[Any, int]) -> Any:
    """`value` as a plain number; what is no symbolic size stays what it is."""
    return int(value.node.expr.subs(sizes)) if isinstance(value, SymInt) else value


def _operand(value: Tensor, index: int, sizes: dict[Any, int]) -> Operand:
    shape = tuple(_number(size, sizes) for size in value.shape)
    stride: tuple[int, ...] = ()
    offset = 0
    if value.layout is torch.strided:
        stride = tuple(_number(step, sizes) for step in value.stride())
        offset = _number(value.storage_offset(), sizes)
    return Operand(index, shape, stride, offset, str(value.dtype)[len("torch.") :])


def _described(sizes: Mapping[Any, int]) -> str:
    shown = ", ".join(f"{symbol}={size}" for symbol, size in sizes.items())
    return f"the exported method ({shown})" if shown else "the exported method"


def _name(target: Any) -> str:
    packet = getattr(target, "overloadpacket", target)
    return str(getattr(packet, "__name__", packet))


def _filled(value: Any, made: Mapping[Node, Any]) -> Any:
    """Arguments with nodes replaced by what they gave."""
    if isinstance(value, Node):
        return made[value]
    if isinstance(value, (list, tuple)):
        return [_filled(entry, made) for entry in value]
    if isinstance(value, dict):
        return {key: _filled(entry, made) for key, entry in value.items()}
    return value


def _operands(value: Any) -> Iterator[Operand]:
    if isinstance(value, Operand):
        yield value
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from _operands(entry)
    elif isinstance(value, dict):
        yield from _operands(list(value.values()))


def _aliases(node: Node, args: list[Any], kwargs: dict[str, Any]) -> tuple[int | None, set[int]]:
    """The value that the node returns a view of (None: new memory), and the values it writes."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return None, set()
    schema = node.target._schema
    given = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | kwargs
    viewed: int | None = None
    written: set[int] = set()
    returned = {
        name for entry in schema.returns if entry.alias_info for name in entry.alias_info.before_set
    }
    for argument in schema.arguments:
        if argument.alias_info is None:
            continue
        values = {operand.value for operand in _operands(given.get(argument.name))}
        if argument.alias_info.is_write:
            written |= values
        if values and returned & set(argument.alias_info.before_set):
            viewed = next(iter(values))
    return viewed, written
