"""A copy of an exported program's graph and tensors, while calls of it are replaced.

It keeps placeholders, state dict and graph signature in step; which calls go and come is decided
elsewhere.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram, ModuleCallEntry
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument

if TYPE_CHECKING:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx import Graph, Node

__all__ = ["EditedProgram", "copied_graph", "is_tensor"]


class EditedProgram:
    """A program in the making; `old` is left as it was."""

    def __init__(self, program: ExportedProgram) -> None:
        self.old = program
        self.graph = copied_graph(program.graph)
        self.specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
        self.order = [spec.arg.name for spec in program.graph_signature.input_specs]
        self.state: dict[str, Tensor] = dict(program.state_dict)
        self.stands: dict[str, str] = {}  # a name that is gone → the one whose value it was

    def tensor(self, node: Node) -> Tensor | None:
        """Return the stored tensor that a placeholder stands for; None if it is an input."""
        target = self.specs[node.name].target
        if target is None:
            return None
        found = self.state.get(target, self.old.constants.get(target))
        return found if isinstance(found, Tensor) else None

    @property
    def fake_mode(self) -> FakeTensorMode:
        """The mode of the values that the graph's nodes are noted with."""
        values = (node.meta.get("val") for node in self.graph.nodes)
        return next(value.fake_mode for value in values if isinstance(value, FakeTensor))

    def store(self, tensor: Tensor, target: str, beside: Node) -> Node:
        """Return a new placeholder before `beside`, for a tensor under a name like `target`."""
        while target in self.state or target in self.old.constants:
            target += "_folded"
        with self.graph.inserting_before(beside):
            node = self.graph.placeholder(f"p_{target.replace('.', '_')}")
        # The graph's code names arguments by their target: `p_block-0_bias` would be no name.
        node.target = node.name
        node.meta["val"] = self.fake_mode.from_tensor(tensor, static_shapes=True)
        self.state[target] = tensor
        self.order.insert(self.order.index(beside.name), node.name)
        self.specs[node.name] = InputSpec(
            InputKind.PARAMETER if isinstance(tensor, nn.Parameter) else InputKind.BUFFER,
            TensorArgument(node.name),
            target,
            None if isinstance(tensor, nn.Parameter) else True,
        )
        return node

    def named(self, target: str) -> list[str]:
        """Return the placeholders of the stored tensor of this name."""
        return [name for name, spec in self.specs.items() if spec.target == target]

    def drop_unused(self, names: set[str]) -> None:
        """Take out those of these placeholders that nothing reads, and their tensors."""
        for node in list(self.graph.nodes):
            if node.op == "placeholder" and node.name in names and not node.users:
                self.graph.erase_node(node)
                self.order.remove(node.name)
                target = self.specs.pop(node.name).target
                if not self.named(str(target)):
                    self.state.pop(str(target), None)

    def program(self) -> ExportedProgram:
        """Return the new program; the order of its inputs is the graph's."""
        self.graph.lint()
        old = self.old
        signature = copy.copy(old.graph_signature)
        signature.input_specs = [self.specs[name] for name in self.order]
        signature.output_specs = [
            dataclasses.replace(spec, arg=self._renamed(spec.arg))
            for spec in old.graph_signature.output_specs
        ]
        targets = {spec.target for spec in signature.input_specs}
        # Copies, of what did not change too: a program that runs may change its buffers.
        state, constants = copy.deepcopy(
            (
                self.state,
                {n: c for n, c in old.constants.items() if n in targets or not is_tensor(c)},
            )
        )
        return ExportedProgram(
            torch.fx.GraphModule(old.graph_module, self.graph),
            self.graph,
            signature,
            state,
            old.range_constraints,
            [self._renamed_entry(entry) for entry in old.module_call_graph],
            old.example_inputs,
            constants,
            verifiers=old.verifiers,
        )

    def _renamed(self, argument: Any) -> Any:
        """Return the output `argument`, naming the node that stands for one that is gone."""
        if isinstance(argument, TensorArgument) and argument.name in self.stands:
            return TensorArgument(self.stands[argument.name])
        return argument

    def _renamed_entry(self, entry: ModuleCallEntry) -> ModuleCallEntry:
        if entry.signature is None:
            return entry
        outputs = [self._renamed(argument) for argument in entry.signature.outputs]
        return dataclasses.replace(
            entry, signature=dataclasses.replace(entry.signature, outputs=outputs)
        )


def is_tensor(value: object) -> bool:
    """Whether a constant of a program is a tensor."""
    return isinstance(value, Tensor)


def copied_graph(graph: Graph) -> Graph:
    """Return a copy whose nodes have the same names; a plain one renames `input` to `input_1`."""
    copied = copy.deepcopy(graph)
    for old, new in zip(graph.nodes, copied.nodes, strict=True):
        new.name = old.name
    return copied
