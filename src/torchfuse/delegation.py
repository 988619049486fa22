"""How much of a lowered program the delegate runs, and why it does not run the rest."""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torchfuse.errors import ExportWarning
from torchfuse.serialization import from_plain, plain

if TYPE_CHECKING:
    import torch

__all__ = [
    "Conversion",
    "Delegation",
    "DelegationWarning",
    "OperatorDelegation",
    "delegation_of",
]

# Below this share of the work, what is left outside cannot cost much.
_MATERIAL = 0.02
_MOVING = {
    "_clone_dim_order", "clone", "permute_copy", "slice_copy", "squeeze_copy", "unsqueeze_copy",
    "view_copy",
}  # fmt: skip


class DelegationWarning(ExportWarning):
    """A part of the model that matters runs outside the delegate, on slow portable kernels."""


@dataclass(frozen=True)
class OperatorDelegation:
    """One operator of the program, all its calls together."""

    operator: str  # as in torch.ops.aten, without its overload: "convolution"
    delegated: int  # calls inside the delegate
    left: int  # calls outside
    macs_delegated: int
    macs_left: int
    elements_left: int  # written by the calls outside
    reasons: tuple[str, ...]  # the partitioner's, for the calls outside


@dataclass(frozen=True)
class Conversion:
    """Where int8 becomes float and then int8 again, since something in between is not delegated."""

    around: tuple[str, ...]  # the operators in between, each with the module that called it
    elements: int  # that are converted, in both directions
    inside: bool = False  # in a piece: the delegate takes the operators, and computes in float

    def __str__(self) -> str:
        """As in "softplus (act), 2,048 values"."""
        return f"{', '.join(self.around) or 'two pieces'}, {self.elements:,} values"


@dataclass(frozen=True)
class Delegation:
    """What the delegate took of a program."""

    delegate: str
    partitions: int  # pieces the program is cut into; 1 when everything is delegated
    operators: tuple[OperatorDelegation, ...]
    elements: int  # written by all operators
    conversions: tuple[Conversion, ...]  # of int8 to float and back, between pieces and inside

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the program, for its example inputs."""
        return sum(op.macs_delegated + op.macs_left for op in self.operators)

    @property
    def macs_share(self) -> float | None:
        """Share of the multiply-accumulates that the delegate runs; None: there are none."""
        if not self.macs:
            return None
        return sum(op.macs_delegated for op in self.operators) / self.macs

    @property
    def values_share(self) -> float:
        """Share of the values written that the delegate writes."""
        return 1 - sum(op.elements_left for op in self.left) / max(self.elements, 1)

    @property
    def calls_delegated(self) -> int:
        """Operator calls inside the delegate."""
        return sum(op.delegated for op in self.operators)

    @property
    def calls_left(self) -> int:
        """Operator calls outside the delegate."""
        return sum(op.left for op in self.operators)

    @property
    def left(self) -> tuple[OperatorDelegation, ...]:
        """The operators of which some calls are outside the delegate."""
        return tuple(op for op in self.operators if op.left)

    @property
    def warning(self) -> str | None:
        """A sentence on what runs outside the delegate; None: nothing that matters does."""
        if not self.left:
            return None
        elements_share = 1 - self.values_share
        macs_left_share = 1 - (1.0 if self.macs_share is None else self.macs_share)
        if self.calls_delegated and max(elements_share, macs_left_share) < _MATERIAL:
            return None
        what = ", ".join(f"{op.left}× {op.operator}" for op in self.left)
        reasons = dict.fromkeys(reason for op in self.left for reason in op.reasons)
        share = f"{macs_left_share:.0%} of the multiply-accumulates and " if self.macs else ""
        return (
            f"{self.delegate} does not run {what} ({share}{elements_share:.0%} of the elements "
            f"written), which go to slow portable kernels: {'; '.join(reasons)}."
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, for JSON."""
        return dict(plain(self))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Delegation":
        """Return what `to_dict` was called on."""
        return from_plain(cls, data)

    def __str__(self) -> str:
        """One line per operator, the ones left outside first, and a closing sentence."""
        rows = [("operator", "delegated", "left", "MMACs left", "values left", "reason")]
        for op in sorted(self.operators, key=lambda op: (-op.macs_left, -op.left, op.operator)):
            macs = f"{op.macs_left / 1e6:.1f}" if op.macs_left else ""
            values = f"{op.elements_left / max(self.elements, 1):.1%}" if op.left else ""
            reasons = "; ".join(op.reasons)
            rows.append((op.operator, f"{op.delegated}", f"{op.left or ''}", macs, values, reasons))
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        lines = [
            f"{row[0]:<{widths[0]}}  "
            + "  ".join(f"{row[column]:>{widths[column]}}" for column in (1, 2, 3, 4))
            + f"  {row[5]}"
            for row in rows
        ]
        calls = self.calls_delegated + self.calls_left
        of_macs = "" if self.macs_share is None else f", {self.macs_share:.1%} of the MACs"
        closing = (
            f"{self.delegate} runs {self.calls_delegated} of {calls} operator calls{of_macs}, in "
            f"{self.partitions} {'piece' if self.partitions == 1 else 'pieces'}."
        )
        return "\n".join([line.rstrip() for line in lines] + [closing, *self._converting()])

    def _converting(self) -> list[str]:
        lines = []
        for inside, where in ((False, "Between pieces"), (True, "Inside the delegate")):
            found = [str(each) for each in self.conversions if each.inside is inside]
            if found:
                times = "once" if len(found) == 1 else f"{len(found)} times"
                lines.append(f"{where} int8 becomes float and int8 again {times}, around:")
                lines += [f"  {conversion}" for conversion in found]
        return lines


def delegation_of(
    graph_module: "torch.fx.GraphModule", delegate: str, reasons: Mapping[str, str]
) -> Delegation:
    """Return what `delegate` took of a lowered edge program.

    `reasons` maps the name of a node to the partitioner's reason for leaving it.
    """
    calls: dict[tuple[str, bool], list[torch.fx.Node]] = defaultdict(list)
    why: dict[str, set[str]] = defaultdict(set)
    partitions = 0
    for node in _calls(graph_module):
        if _operator(node) == "executorch_call_delegate":
            partitions += 1
            lowered = getattr(graph_module, str(node.args[0].target))  # type: ignore[union-attr]
            for inner in _calls(lowered.original_module.graph_module):
                calls[_operator(inner), True].append(inner)
        elif _operator(node) != "getitem":
            calls[_operator(node), False].append(node)
            no_rule = f"{_operator(node)}: its partitioner has no rule for this operator"
            why[_operator(node)].add(
                f"{_operator(node)}: {reasons[node.name]}" if node.name in reasons else no_rule
            )
    names = {name for name, _ in calls if name != "getitem"}
    operators = tuple(
        OperatorDelegation(
            operator=name,
            delegated=len(calls[name, True]),
            left=len(calls[name, False]),
            macs_delegated=sum(map(_macs, calls[name, True])),
            macs_left=sum(map(_macs, calls[name, False])),
            elements_left=sum(map(_elements, calls[name, False])),
            reasons=tuple(sorted(why[name])),
        )
        for name in sorted(names)
    )
    return Delegation(
        delegate=delegate,
        partitions=partitions,
        operators=operators,
        elements=sum(sum(map(_elements, nodes)) for nodes in calls.values()),
        conversions=(*_conversions(graph_module), *_conversions_inside(graph_module)),
    )


def _conversions(graph_module: "torch.fx.GraphModule") -> "Iterator[Conversion]":
    """Yield each place where what was dequantized is quantized again outside a piece."""
    order = {node: number for number, node in enumerate(graph_module.graph.nodes)}
    dequantized = set(_dequantized(graph_module))
    for source in _to_be_quantized(graph_module):
        between: set[torch.fx.Node] = set()
        exits: set[torch.fx.Node] = set()
        ahead = [source]
        while ahead:
            node = ahead.pop()
            if node in dequantized:
                exits.add(node)
            elif node.op == "call_function" and node not in between and not _is_of_piece(node):
                between.add(node)
                ahead += node.all_input_nodes
        if exits:
            named = [_named(node) for node in sorted(between, key=order.__getitem__)]
            elements = _elements(source) + sum(map(_elements, exits))
            yield Conversion(tuple(dict.fromkeys(named)), elements)


def _conversions_inside(graph_module: "torch.fx.GraphModule") -> "Iterator[Conversion]":
    """Yield each place within a piece where the delegate computes in float between int8."""
    for call in _calls(graph_module):
        if _operator(call) != "executorch_call_delegate":
            continue
        lowered = getattr(graph_module, str(call.args[0].target))  # type: ignore[union-attr]
        graph = lowered.original_module.graph
        order = {node: number for number, node in enumerate(graph.nodes)}
        for node in graph.nodes:
            if not _converts(node, "quantize"):
                continue
            between: set[torch.fx.Node] = set()
            exits: set[torch.fx.Node] = set()
            ahead = list(node.all_input_nodes[:1])
            while ahead:
                source = ahead.pop()
                if _converts(source, "dequantize"):
                    exits.add(source)
                elif (
                    source.op == "call_function"
                    and source not in between
                    and "quantize_per" not in _operator(source)
                ):
                    between.add(source)
                    ahead += source.all_input_nodes
            if exits and between:
                named = [_named(each) for each in sorted(between, key=order.__getitem__)]
                elements = _elements(node) + sum(map(_elements, exits))
                yield Conversion(tuple(dict.fromkeys(named)), elements, inside=True)


def _converts(node: "torch.fx.Node", what: str) -> bool:
    """Whether XNNPACK runs this node: those around what it computes in int8 are tagged implicit."""
    if node.op != "call_function" or not _operator(node).startswith(f"{what}_per_tensor"):
        return False
    return not node.meta.get("IS_IMPLICIT_Q_DQ_TAG", False)


def _is_of_piece(node: "torch.fx.Node") -> bool:
    """Whether the node is a call of the delegate, or one of its results."""
    source = node.args[0] if _operator(node) == "getitem" else node
    return _operator(source) == "executorch_call_delegate"  # type: ignore[arg-type]


def _dequantized(graph_module: "torch.fx.GraphModule") -> "Iterator[torch.fx.Node]":
    """Yield what comes out of a dequantization, at the end of a piece or outside of all."""
    for node in _calls(graph_module):
        if _operator(node) == "getitem" and _is_of_piece(node):
            lowered = getattr(graph_module, str(node.args[0].args[0].target))  # type: ignore[union-attr]
            (output,) = lowered.original_module.graph.find_nodes(op="output")
            made = output.args[0][node.args[1]]
            while made.op == "call_function" and _operator(made) in _MOVING:
                made = made.all_input_nodes[0]
            if made.op == "call_function" and _operator(made).startswith("dequantize_per_tensor"):
                yield node
        elif _operator(node).startswith("dequantize_per_tensor"):
            yield node


def _to_be_quantized(graph_module: "torch.fx.GraphModule") -> "Iterator[torch.fx.Node]":
    """Yield what goes into a quantization, at the beginning of a piece or outside of all."""
    for node in _calls(graph_module):
        if _operator(node) == "executorch_call_delegate":
            lowered = getattr(graph_module, str(node.args[0].target))  # type: ignore[union-attr]
            inner = lowered.original_module.graph.find_nodes(op="placeholder")
            by_name = {placeholder.name: placeholder for placeholder in inner}
            for source in node.all_input_nodes[1:]:
                placeholder = by_name.get(source.name)
                readers = [] if placeholder is None else _read_by(placeholder)
                if any(_operator(user).startswith("quantize_per_tensor") for user in readers):
                    yield source
        elif _operator(node).startswith("quantize_per_tensor"):
            yield node.all_input_nodes[0]


def _read_by(node: "torch.fx.Node") -> "Iterator[torch.fx.Node]":
    """Yield what computes with the node's value, past what only moves it."""
    for user in node.users:
        if user.op == "call_function" and _operator(user) in _MOVING:
            yield from _read_by(user)
        elif user.op == "call_function":
            yield user


def _named(node: "torch.fx.Node") -> str:
    """The operator, with the path of the module that called it if that is not the model itself."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    path = str(stack[-1][0]).removeprefix("L['self']").lstrip(".") if stack else ""
    return f"{_operator(node)} ({path})" if path else _operator(node)


def _calls(graph_module: "torch.fx.GraphModule") -> "Iterator[torch.fx.Node]":
    return (node for node in graph_module.graph.nodes if node.op == "call_function")


def _operator(node: "torch.fx.Node") -> str:
    # "aten.convolution.default" → "convolution", "dim_order_ops._to_dim_order_copy.default" → …
    name = getattr(node.target, "__name__", str(node.target))
    parts = re.sub(r"^(aten|quantized_decomposed|dim_order_ops)\.", "", name).split(".")
    return parts[0]


def _shape(value: Any) -> list[int]:
    # A dynamic size counts as it is in the example inputs.
    return [
        size if isinstance(size, int) else int(size.node.hint)
        for size in getattr(value, "shape", ())
    ]


def _elements(node: "torch.fx.Node") -> int:
    value = node.meta.get("val")
    outputs = value if isinstance(value, list | tuple) else [value]
    return sum(math.prod(_shape(output)) for output in outputs if hasattr(output, "shape"))


def _macs(node: "torch.fx.Node") -> int:
    """Multiply-accumulates of one call; the operators that have none worth counting have 0."""

    def shape(argument: int) -> list[int]:
        return _shape(node.args[argument].meta["val"])  # type: ignore[union-attr]

    match _operator(node):
        case "convolution":
            weight, transposed = shape(1), node.args[6]
            # weight: [out, in/groups, *kernel], transposed: [in, out/groups, *kernel]
            positions = math.prod(shape(0)) if transposed else _elements(node)
            return positions * math.prod(weight[1:])
        case "linear" | "mm" | "bmm" | "matmul":
            return _elements(node) * shape(0)[-1]
        case "addmm":
            return _elements(node) * shape(1)[-1]
    return 0
