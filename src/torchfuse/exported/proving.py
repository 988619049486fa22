"""Proves fusions in an exported program: each by itself, then the whole on other inputs too."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.export.graph_signature import InputKind
from torch.utils._pytree import tree_leaves

from torchfuse.checking import verify as compare
from torchfuse.errors import InputError
from torchfuse.inputs import Case
from torchfuse.proving import other_inputs
from torchfuse.quieting import quiet

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch.export import ExportedProgram
    from torch.fx import Node

    from torchfuse.equivalence import Equivalence

__all__ = ["Pair", "pair_differences", "whole_difference"]

# What rounding may do to max|a − b| / max|a| at one batch norm.
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Pair:
    """Names in the new graph, for a batch norm of the old one."""

    layer: str  # the call that took it in
    stands: str  # the node whose value is what the batch norm put out


def whole_difference(old: ExportedProgram, new: ExportedProgram) -> Equivalence:
    """Return how far `new` is from `old` on the example inputs, and on others of their sizes."""
    if old.example_inputs is None:
        raise _no_example_inputs()
    args, kwargs = old.example_inputs
    case = Case(tuple(args), dict(kwargs))
    with quiet():
        # Copies: running a program may change its buffers.
        before, after = copy.deepcopy(old).module(), copy.deepcopy(new).module()
        return compare(before, after, [case, other_inputs(case, seed=0)])


def _no_example_inputs() -> InputError:
    return InputError(
        "The exported program holds no example inputs to prove the fusions on; export it with "
        "them, or pass verify=False."
    )


def pair_differences(
    old: ExportedProgram, new: ExportedProgram, pairs: Mapping[str, Pair]
) -> dict[str, float]:
    """Return per batch norm how far its output moved, in units of what rounding explains."""
    if not pairs:
        return {}
    if old.example_inputs is None:
        raise _no_example_inputs()
    before = _Recorder(old, outputs=set(pairs), inputs={pair.layer for pair in pairs.values()})
    # Each folded layer is given what it was given before, so that only its own fold can differ.
    after = _Recorder(
        new, outputs={pair.stands for pair in pairs.values()}, replacements=before.inputs
    )
    return {
        norm: _difference(before.outputs[norm], after.outputs[pair.stands])
        for norm, pair in pairs.items()
    }


class _Recorder(torch.fx.Interpreter):
    """One pass over a program's example inputs, and what some of its nodes were given and gave."""

    def __init__(
        self,
        program: ExportedProgram,
        outputs: set[str],
        inputs: frozenset[str] | set[str] = frozenset(),
        replacements: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(program.graph_module)
        self._wanted_outputs, self._wanted_inputs = outputs, inputs
        self._replacements = replacements or {}
        self.outputs: dict[str, Tensor] = {}
        self.inputs: dict[str, Tensor] = {}
        with torch.no_grad():
            self.run(*_example_arguments(program), enable_io_processing=False)

    def run_node(self, n: Node) -> Any:
        if n.name in self._wanted_inputs:
            self.inputs[n.name] = self.env[n.args[0]].clone()  # type: ignore[index]  # it may be changed in place later
        if n.name in self._replacements:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            assert callable(n.target)
            value = n.target(self._replacements[n.name], *args[1:], **kwargs)
        else:
            value = super().run_node(n)
        if n.name in self._wanted_outputs:
            self.outputs[n.name] = value.clone()
        return value


def _example_arguments(program: ExportedProgram) -> list[Any]:
    """Return copies of what the graph's inputs are on the program's example inputs, in order."""
    assert program.example_inputs is not None
    given = iter(tree_leaves(copy.deepcopy(program.example_inputs)))
    stored = {**program.constants, **program.state_dict}
    return [
        next(given) if spec.kind is InputKind.USER_INPUT else copy.deepcopy(stored[spec.target])
        for spec in program.graph_signature.input_specs
    ]


def _difference(a: Tensor, b: Tensor) -> float:
    tolerance = _TOLERANCE[a.dtype]
    scale = a.double().abs().max().clamp(min=torch.finfo(a.dtype).tiny)
    return ((a.double() - b.double()).abs().max() / scale / tolerance).item()
