"""Proves fusions in an exported program: each by itself, then the whole on other inputs too."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.export.graph_signature import InputKind
from torch.utils._pytree import tree_leaves

from torchfuse.cases import Case
from torchfuse.fusing.proving import (
    PairDifference,
    Whole,
    decided,
    other_inputs,
    outputs_of,
    prove,
    unwrapped,
)
from torchfuse.isolation.warning_filters import known_warnings_ignored

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch.export import ExportedProgram
    from torch.fx import Node

    # The old and the new program in float64
    _InFloat64 = Callable[[], tuple[ExportedProgram, ExportedProgram]]

__all__ = ["ProgramPair", "example_arguments", "pair_differences", "whole_difference"]

# What rounding may do to max|a − b| / max|a| at one batch norm; beyond it, float64 decides.
_ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-4}
# Where the program does not run in float64, this decides in dtypes of fewer digits.
_TOLERANCE = _ROUNDING | {torch.float16: 5e-3, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class ProgramPair:
    """Names in the new graph, for a batch norm of the old one."""

    layer: str  # the call that took it in
    stands: str  # the node whose value is what the batch norm put out


def whole_difference(
    old: ExportedProgram,
    norms: Sequence[str],
    fused: Callable[[Sequence[str]], ExportedProgram],
    in_float64: Callable[[], tuple[ExportedProgram, Callable[[Sequence[str]], ExportedProgram]]],
) -> Whole[str]:
    """Return how far the new program is from `old` on the example inputs, and on others like them.

    `fused` makes the one in which these batch norms of `norms` are folded; `in_float64` gives
    `old` there, and what makes the other one.
    """
    assert old.example_inputs is not None
    args, kwargs = old.example_inputs
    case = Case(tuple(args), dict(kwargs))
    tried = [case, other_inputs(case, seed=0)]
    with known_warnings_ignored():
        trial = _ProgramTrial(old, fused)
        expected = trial.outputs([], tried)
        return prove(trial, norms, tried, expected, lambda: _ProgramTrial(*in_float64()))


class _ProgramTrial:
    """A program, and the one in which given batch norms of it are folded."""

    def __init__(
        self, old: ExportedProgram, fused: Callable[[Sequence[str]], ExportedProgram]
    ) -> None:
        self.old, self.fused = old, fused

    def outputs(self, matches: Sequence[str], cases: Sequence[Case]) -> list[dict[str, Any]]:
        """Return what it returns on each case."""
        program = self.fused(matches) if matches else self.old
        return outputs_of(_module(program), cases, watch=True)


def _module(program: ExportedProgram) -> torch.nn.Module:
    # Of a copy: running a program may change its buffers.
    return copy.deepcopy(program).module(check_guards=False)


def pair_differences(
    old: ExportedProgram,
    new: ExportedProgram,
    pairs: Mapping[str, ProgramPair],
    in_float64: _InFloat64,
) -> dict[str, PairDifference]:
    """Return per batch norm how far its output moved."""
    if not pairs:
        return {}
    stand = {pair.stands for pair in pairs.values()}
    before = _Recorder(old, outputs=set(pairs), inputs={pair.layer for pair in pairs.values()})
    # Each folded layer is given what it was given before, so that only its own fold can differ.
    after = _Recorder(new, outputs=stand, replacements=before.inputs)

    @cache
    def wide() -> tuple[dict[str, Tensor], dict[str, Tensor]] | None:
        inputs = {name: given.double() for name, given in before.inputs.items()}
        try:
            wide_old, wide_new = in_float64()
            exact = _Recorder(wide_old, outputs=set(pairs), replacements=inputs)
        except Exception:  # noqa: BLE001 - the program insists on its dtypes
            return None
        return exact.outputs, _Recorder(wide_new, outputs=stand, replacements=inputs).outputs

    def difference(norm: str, stands: str) -> PairDifference:
        expected, fused = before.outputs[norm], after.outputs[stands]
        dtype = expected.dtype
        known = _ROUNDING if dtype in _ROUNDING or wide() is not None else _TOLERANCE

        def both() -> tuple[Tensor, Tensor]:
            found = wide()
            return (expected, fused) if found is None else (found[0][norm], found[1][stands])

        return decided(expected, fused, known.get(dtype, 0.0), both)

    return {norm: difference(norm, pair.stands) for norm, pair in pairs.items()}


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
            self.run(*example_arguments(program))

    def run_node(self, n: Node) -> Any:
        if n.name in self._wanted_inputs:
            given = self.env[n.args[0]]  # type: ignore[index]
            if given is unwrapped(given):  # (inside torch.vmap it is of this run alone)
                self.inputs[n.name] = given.clone()  # it may be changed in place later
        if n.name in self._replacements:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            assert callable(n.target)
            value = n.target(self._replacements[n.name], *args[1:], **kwargs)
        else:
            value = super().run_node(n)
        if n.name in self._wanted_outputs:
            self.outputs[n.name] = unwrapped(value).clone()
        return value


def example_arguments(program: ExportedProgram) -> list[Any]:
    """Return copies of what the graph's inputs are on the program's example inputs, in order."""
    assert program.example_inputs is not None
    given = iter(tree_leaves(copy.deepcopy(program.example_inputs)))
    stored = {**program.constants, **program.state_dict}
    return [
        next(given) if spec.kind is InputKind.USER_INPUT else copy.deepcopy(stored[spec.target])
        for spec in program.graph_signature.input_specs
    ]
