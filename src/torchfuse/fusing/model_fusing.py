"""Plan, fuse, unfuse: from a model to the same model with less to compute."""

from __future__ import annotations

import contextlib
import copy
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from torchfuse.cases import Case, cases, check_model, require_finite_tensors
from torchfuse.errors import FusionError, InputError, UnsupportedError, first_line
from torchfuse.fusing.blocks.candidates import BLOCK_RULES, candidates
from torchfuse.fusing.blocks.replacing import blocks_checked, without_originals
from torchfuse.fusing.checkpoints import key_map
from torchfuse.fusing.finding import find
from torchfuse.fusing.module_edits import (
    attach,
    check_unchanged,
    forget_fusions,
    fusions_of,
    was_fused,
)
from torchfuse.fusing.module_host import apply, undo
from torchfuse.fusing.module_proving import PairProof, fuse_what_agrees
from torchfuse.graph.retracing import traced_once
from torchfuse.isolation.model_copy import calls_of, copied
from torchfuse.isolation.warning_filters import known_warnings_ignored
from torchfuse.planning import FusionResult
from torchfuse.rules import RULES, Rule
from torchfuse.verifying import outputs as checking

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import nn

    from torchfuse.planning import FusionPlan
    from torchfuse.verifying.equivalence import Equivalence

__all__ = [
    "fuse",
    "plan",
    "unfuse",
]


# While a model is looked at, it has hooks, and classes of torch have other methods.
_ONE_AT_A_TIME = threading.RLock()


@contextlib.contextmanager
def _by_itself() -> Iterator[None]:
    """A context that no other thread is in: two that fuse one model would see each other's work."""
    with _ONE_AT_A_TIME, traced_once():
        yield


@_by_itself()
def plan(
    model: nn.Module,
    example_inputs: Any,
    *,
    rules: Sequence[str] | None = None,
    strict: bool = False,
) -> FusionPlan:
    """What can be fused in `model` and what cannot, with the reasons; the model is not changed.

    Args:
        model: its batch norms in eval mode, or they are skipped with this reason.
        example_inputs: a tensor, a tuple of tensors, a dict of keywords, a `Case`, or a list of
            these; the model is run on each.
        rules: names of the rules to use; None: all.
        strict: skip a fusion wherever another path through the code could not be followed; else
            only where something is known against it.

    Raises:
        CaptureError: the model cannot run on an example.
        InputError: no model, no inputs, an unknown rule, or weights that are NaN or Inf.
    """
    check_model(model)
    require_finite_tensors(model)
    pairs, for_blocks = _chosen(rules)
    found = find(model, cases(example_inputs), pairs, strict=strict)
    if for_blocks and candidates(found.subject.graph):
        # Imported here: most models have no such blocks, and torch.export takes a while.
        from torchfuse.fusing.blocks.planned import find_blocks

        find_blocks(found, for_blocks)
    return found.plan()


@_by_itself()
def fuse(
    model: nn.Module,
    example_inputs: Any,
    *,
    rules: Sequence[str] | None = None,
    strict: bool = False,
    graph: bool = False,
    inplace: bool = False,
    verify: bool = True,
    keep_originals: bool = True,
) -> FusionResult:
    """The model with every exact fusion done, the plan, the proof, and where each key went.

    Args:
        model: as for `plan`; it is unchanged without `inplace`.
        example_inputs: as for `plan`.
        rules: as for `plan`.
        strict: as for `plan`.
        graph: export the model and fuse it as a program, where more can be merged (see
            `fuse_exported`). The result is that program as a plain `torch.fx.GraphModule`: of
            inputs of the example's sizes, without the model's class and methods, and not to be
            unfused.
        inplace: change the model itself.
        verify: compare each fusion on what the original computes, then the whole model on the
            example inputs and on others like them; what differs is undone and becomes a skip.
        keep_originals: so that the result can be unfused; the plan says how many bytes that takes.

    Raises:
        CaptureError: the model cannot run on an example.
        FusionError: the model cannot be copied, or its copy would run the original.
        InputError: as for `plan`; options that exclude each other; a model without values.
        UnsupportedError: `graph`, and torch.export cannot take the model, or the model does
            something else when it is called again.
    """
    check_model(model)
    if graph:
        return _fused_graph(model, example_inputs, rules, inplace=inplace, verify=verify)
    if verify and _has_no_values(model):
        raise InputError(
            "The model is on the meta device, where there are no values to compare: load its "
            "weights first, or pass verify=False."
        )
    require_finite_tensors(model)
    given = cases(example_inputs)
    pairs, for_blocks = _chosen(rules)
    found = find(model, given, pairs, strict=strict)
    old_keys = list(model.state_dict())
    tried: list[Case] = []
    if verify:
        proof = PairProof(model, found.matches, keep=keep_originals)
        tried, expected = proof.reference(given)
        found.drop_unproved(proof.found)
    found.subject.recorder.let_go()  # the model may be edited in place, and block after block
    target = model if inplace else _copy(model)
    check: Equivalence | None = None
    scope: tuple[str, ...] = ()
    with _on_its_own(model, target):
        if verify:
            check, done, scope = fuse_what_agrees(
                target,
                found,
                tried,
                expected,
                keep=keep_originals,
                weights=proof.weights,
                # A copy does what the original was seen to do on the same inputs.
                watch=inplace or proof.wrote,
            )
        else:
            if not inplace:
                checking.run(target, given[0])
            done = apply(target, found.subject.graph, found.matches, keep=keep_originals)
    # (behind what watches the original, whose hooks are looked at)
    if for_blocks and candidates(found.subject.graph):
        # Imported here: most models have no such blocks, and torch.export takes a while.
        from torchfuse.fusing.blocks.planned import keep_what_agrees, merge_blocks

        try:
            merging = merge_blocks(target, found, for_blocks, given, verify=verify)
            if found.blocks and verify:
                watch = inplace or proof.wrote
                check, decided = keep_what_agrees(merging, found, tried, expected, watch=watch)
                scope = scope if decided else (*scope, _BLOCKS_NOT_IN_FLOAT64)
        except BaseException:
            if keep_originals:
                undo(target, done)
            raise
        done.blocks = tuple(merging.done)
        if not keep_originals:
            done.blocks = tuple(map(without_originals, done.blocks))
    attach(target, done)
    plan_ = found.plan()
    plan_ = replace(
        plan_,
        scope=(*plan_.scope, *_sizes_compared(tried), *scope),
        originals_bytes=sum(f.originals_bytes for f in done.folded)
        + sum(block.originals_bytes for block in done.blocks),
    )
    return FusionResult(target, plan_, check, key_map(old_keys, done))


_BLOCKS_NOT_IN_FLOAT64 = (
    "Each merged block was compared on its own: the whole model differs by more than rounding in "
    "one layer explains, and does not run in float64, which would tell."
)


def _fused_graph(
    model: nn.Module,
    example_inputs: Any,
    rules: Sequence[str] | None,
    *,
    inplace: bool,
    verify: bool,
) -> FusionResult:
    # Imported here: it is built on this module, which needs it for nothing else.
    from torchfuse.fusing.programs.program_fusing import fuse_exported

    given = cases(example_inputs)
    if inplace:
        raise InputError("A graph is a new module: pass graph=True or inplace=True, not both.")
    if len(given) != 1 or given[0].method != "forward":
        raise InputError(
            f"Expected one example input of forward for graph=True, got {len(given)} cases, the "
            f"first of {given[0].method}: a graph is of one call. Give one, or leave graph out."
        )
    with known_warnings_ignored():
        try:
            program = torch.export.export(model, given[0].args, dict(given[0].kwargs), strict=False)
        except Exception as error:
            raise UnsupportedError(
                f"torch.export cannot take this model ({type(error).__name__}: "
                f"{first_line(error)}); leave graph=True out."
            ) from error
        if verify:
            _check_second_call(model, program, given[0])
        fused = fuse_exported(program, rules=rules, verify=verify)
        return fused._replace(model=fused.model.module())


def _check_second_call(model: nn.Module, program: torch.export.ExportedProgram, case: Case) -> None:
    """Raises UnsupportedError if the model does something else when it is called again.

    Its attributes may say so (a cache that the first call fills, a counter); a program keeps
    buffers alone.
    """
    found = checking.verify(_TwoCalls(model), _TwoCalls(program.module()), case)
    first_agrees, second_agrees = (
        all(each.passed for each in found.outputs if each.name.startswith(f"output[{number}]"))
        for number in range(2)
    )
    if first_agrees and not second_agrees:
        raise UnsupportedError(
            f"This {type(model).__name__} computes something else when it is called again with "
            "the same inputs, by what it keeps in its attributes, and a graph would repeat its "
            "first call; leave graph=True out."
        )


class _TwoCalls(torch.nn.Module):
    """What a module returns at each of two calls in a row."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.training = module.training

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        first = checking.copied_leaves(self.module(*args, **kwargs))
        return first, checking.copied_leaves(self.module(*args, **kwargs))


def _has_no_values(model: nn.Module) -> bool:
    # Looked at here and not in fuse, where the tensors would be kept for as long as it lasts.
    tensors = (*model.parameters(), *model.buffers())
    return bool(tensors) and all(tensor.is_meta for tensor in tensors)


@_by_itself()
def unfuse(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """The model as it was before `fuse`, bit for bit.

    Raises:
        FusionError: it was never fused, its weights changed since, or nothing was kept of it.
    """
    check_model(model)
    if not was_fused(model):
        raise FusionError(
            f"This {type(model).__name__} was never fused by torchfuse.fuse, or is already "
            "unfused: there is nothing to undo."
        )
    target = model if inplace else _copy(model)
    with blocks_checked(target):  # all of it first: a refusal leaves the model as it is
        check_unchanged(target)
    for done in reversed(fusions_of(target)):
        undo(target, done)
    forget_fusions(target)
    return target


def _chosen(names: Sequence[str] | None) -> tuple[tuple[Rule, ...], tuple[str, ...]]:
    """The rules for pairs of modules, and the names of those for blocks."""
    if names is None:
        return RULES, BLOCK_RULES
    if isinstance(names, str):
        names = [names]
    known = {rule.name: rule for rule in RULES}
    for name in names:
        if name not in known and name not in BLOCK_RULES:
            known_names = ", ".join((*known, *BLOCK_RULES))
            raise InputError(f"There is no rule {name!r}; the rules are {known_names}.")
    return (
        tuple(rule for rule in RULES if rule.name in names),
        tuple(name for name in BLOCK_RULES if name in names),
    )


def _copy(model: nn.Module) -> nn.Module:
    try:
        target = copied(model)
    except UnsupportedError as error:
        raise FusionError(f"{error} Or pass inplace=True to change the model itself.") from error
    if not was_fused(target):  # compiled modules are copied without their attributes
        for done in copy.deepcopy(fusions_of(model)):
            attach(target, done)
    return target


@contextlib.contextmanager
def _on_its_own(model: nn.Module, target: nn.Module) -> Iterator[None]:
    """A context in which `target` is run; raises FusionError if that ran what it is a copy of."""
    if target is model:
        yield
        return
    with calls_of(model) as called:
        yield
    if called:
        part = f"its `{called[0]}`" if called[0] else "it"
        raise FusionError(
            f"A copy of this {type(model).__name__} runs the original ({part}), which its code "
            "reaches by a way that copy.deepcopy does not copy, such as a global name; pass "
            "inplace=True to change the model itself."
        )


def _sizes_compared(tried: Sequence[Case]) -> tuple[str, ...]:
    """The sentence that says on which calls the whole model was compared; none if it was not."""
    calls = list(dict.fromkeys(map(str, tried)))
    if not calls:
        return ()
    shown = ", ".join(calls[:6]) + (f" and {len(calls) - 6} more" if len(calls) > 6 else "")
    return (f"Compared, before and after, on {shown}.",)
