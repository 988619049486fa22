"""Whether the model really runs the listed modules as listed, from a recorded run."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from torchfuse.cases import cases
from torchfuse.errors import FusionError, first_line
from torchfuse.fusing.finding import find
from torchfuse.rules import RULES
from torchfuse.verifying.outputs import verify

if TYPE_CHECKING:
    from torch import nn

    from torchfuse.graph import Graph, ModuleCall

__all__ = ["check_fused_output", "check_order"]


# Whether a layer and its batch norm can be edited is asked where they are, hooks with a warning.
_FOLDS = tuple(replace(rule, check=lambda *_: None) for rule in RULES)


def check_order(
    model: nn.Module, lists: list[list[str]], example_inputs: Any, *, folded: list[list[str]]
) -> None:
    """Run `model` once per case, without a trace, and refuse a list that it does not run so.

    Of the lists that are `folded`, other methods and other paths through the code are looked at
    too, as `torchfuse.fuse` does.

    Raises:
        FusionError: in some case a listed module runs not once, or they run in another order, or
            one does not read the output of the one before, or something else reads it too.
    """
    found = find(model, cases(example_inputs), _FOLDS)
    graph = found.subject.graph
    first_path = {alias: first for first, aliases in graph.paths.items() for alias in aliases}
    for names in lists:
        paths = {name: first_path[name] for name in names}
        for case in range(len(graph.cases)):
            calls = [
                [call for call in graph.module_calls_of(paths[name]) if call.case == case]
                for name in names
            ]
            problem = _problem(graph, names, calls)
            if problem is not None:
                where = f" on {graph.cases[case]}" if len(graph.cases) > 1 else ""
                raise FusionError(f"cannot fuse {', '.join(names)}: {problem}{where}")
    skipped = {skip.modules: skip for skip in found.skips}
    for names in folded:
        skip = skipped.get(tuple(first_path[name] for name in names[:2]))
        if skip is not None:
            raise FusionError(f"cannot fuse {', '.join(names)}: {skip.reason} {skip.hint}".rstrip())


def _problem(graph: Graph, names: list[str], calls: list[list[ModuleCall]]) -> str | None:
    for name, of_name in zip(names, calls, strict=True):
        if not of_name:
            return f"{name} is never run"
        if len(of_name) > 1:
            return f"{name} runs {len(of_name)} times, and each time would be changed"
    only = [of_name[0] for of_name in calls]
    running = sorted(zip(names, only, strict=True), key=lambda pair: pair[1].first)
    order = [name for name, _ in running]
    if order != names:
        return f"forward runs {', '.join(order)}, in this order"
    for (name, call), (next_name, next_call) in pairwise(zip(names, only, strict=True)):
        if not set(call.outputs) & set(next_call.inputs):
            return f"{next_name} does not read the output of {name}"
        if _read_elsewhere(graph, call, next_call):
            return f"the output of {name} is read by something else than {next_name}"
    return None


def _read_elsewhere(graph: Graph, call: ModuleCall, next_call: ModuleCall) -> bool:
    for value in call.outputs:
        for reader in graph.readers(value):
            inside = next_call.first <= reader.index < next_call.last
            # What the next module changes in place is its own output from then on.
            changed = value in next_call.outputs and reader.index >= next_call.last
            # A view is no use of its own: who reads it reads the same value.
            view = not reader.written and {result.value for result in reader.results} == {value}
            # Hooks have a warning of their own.
            harmless = inside or changed or view or reader.kind == "hook"
            if reader.index >= call.last and not harmless:
                return True
    return False


def check_fused_output(model: nn.Module, fused: nn.Module, example_inputs: Any) -> None:
    """Refuse a fused model whose output differs by more than rounding explains.

    Raises:
        FusionError: with the largest difference of each output that differs.
    """
    try:
        result = verify(model, fused, example_inputs)
    except Exception as error:
        raise FusionError(
            f"the fused model cannot run: {first_line(error)}; forward may use a listed module "
            "in another way than calling it"
        ) from error
    if not result.passed:
        raise FusionError(
            f"the fused model's output differs: {'; '.join(result.problems)} "
            "Check that each list names modules that follow one another"
        )
