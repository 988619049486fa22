"""Plan, fuse, unfuse: from a model to the same model with less to compute."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from torchfuse import proving
from torchfuse.copying import copied
from torchfuse.equivalence import Equivalence, OutputDifference
from torchfuse.errors import FusionError, InputError, UnsupportedError
from torchfuse.inputs import Case, cases
from torchfuse.judging.finding import Found, find
from torchfuse.rules import RULES, Match, Rule
from torchfuse.surgery import (
    Fusions,
    attach,
    fold_in,
    forget_fusions,
    fusions_of,
    merge_in,
    plain_layer,
    separate,
    separated,
    take_back,
    was_fused,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torchfuse.planning import FusionPlan

__all__ = [
    "FusionResult",
    "fuse",
    "load_unfused_state_dict",
    "plan",
    "unfuse",
]


class FusionResult(NamedTuple):
    """What `fuse` gives back."""

    model: Any  # the fused model (for `fuse_exported` an ExportedProgram)
    plan: FusionPlan
    check: Equivalence | None  # None: not verified
    key_map: dict[str, str | None]  # old state_dict key → new one; None: gone


def plan(
    model: nn.Module, example_inputs: Any, *, rules: Sequence[str] | None = None
) -> FusionPlan:
    """What can be fused in `model` and what cannot, with the reasons; the model is not changed.

    `rules` names the rules to use; the default is every rule that changes no class and no key of
    a layer that stays.
    """
    _check_model(model)
    found = find(model, cases(example_inputs), _chosen(rules))
    return found.plan()


def fuse(
    model: nn.Module,
    example_inputs: Any,
    *,
    rules: Sequence[str] | None = None,
    inplace: bool = False,
    verify: bool = True,
    keep_originals: bool = True,
) -> FusionResult:
    """The model with every exact fusion done, the plan, the proof, and where each key went.

    With `verify`, each fusion is compared on what the original computes, then the whole model on
    the example inputs and on others like them; what differs is undone and reported as a skip.
    With `keep_originals` the result can be unfused; the plan says how many bytes that takes.
    """
    _check_model(model)
    given = cases(example_inputs)
    found = find(model, given, _chosen(rules))
    expected: list[Any] = []
    tried: list[Case] = []
    if verify:
        tried, expected = _reference(model, given)
        found.drop_unproved(proving.pair_differences(model, found.matches, tried[: len(given) + 1]))
    old_keys = list(model.state_dict())
    target = model if inplace else _copy(model)
    # While a whole-model check may still undo something, the originals are needed.
    done = _apply(target, found, keep=keep_originals or verify)
    check = None
    if verify:
        check, done = _verified(target, found, done, tried, expected)
    if not keep_originals:
        for folded in done.folded:
            folded.original_layer = folded.original_norm = None
    attach(target, done)
    plan_ = found.plan()
    plan_ = replace(
        plan_,
        scope=(*plan_.scope, *_sizes_compared(tried)),
        originals_bytes=sum(f.originals_bytes for f in done.folded),
    )
    return FusionResult(target, plan_, check, _key_map(old_keys, done))


def unfuse(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """The model as it was before `fuse`, bit for bit.

    Refuses if fused weights changed since, or if the originals were not kept.
    """
    _check_model(model)
    if not was_fused(model):
        raise FusionError(
            f"This {type(model).__name__} was never fused by torchfuse.fuse, or is already "
            "unfused: there is nothing to undo."
        )
    target = model if inplace else _copy(model)
    for done in reversed(fusions_of(target)):
        _undo(target, done, check=True)
    forget_fusions(target)
    return target


def load_unfused_state_dict(model: nn.Module, state_dict: dict[str, Any]) -> None:
    """Loads a checkpoint of the unfused model into a fused one, folding what was fused.

    All keys of the unfused model must be there and no others; nothing is changed otherwise. Kept
    originals become the checkpoint's, so that `unfuse` gives it back.
    """
    _check_model(model)
    if not was_fused(model):
        raise FusionError(
            f"This {type(model).__name__} was not fused by torchfuse.fuse; use its own "
            "load_state_dict."
        )
    with separated(model):
        _load_unfused(model, state_dict)


def _load_unfused(model: nn.Module, state_dict: dict[str, Any]) -> None:
    folded = [entry for done in fusions_of(model) for entry in done.folded]
    fused_keys = set(model.state_dict())
    kept = set(fused_keys)
    expected: set[str] = set()
    for entry in folded:
        for paths, shape in ((entry.first, entry.layer), (entry.second, entry.norm)):
            for path in paths:
                inside = set(_below(path, model.get_submodule(path).state_dict()))
                kept -= inside
                expected |= set(_below(path, shape.state_dict()))
    expected |= kept
    missing = sorted(
        key for key in expected - set(state_dict) if not key.endswith("num_batches_tracked")
    )
    unexpected = sorted(set(state_dict) - expected)
    if missing or unexpected:
        raise InputError(
            "Expected the state_dict of the unfused model; "
            + "; ".join(
                f"{word} {', '.join(keys[:5])}{' …' if len(keys) > 5 else ''}"
                for word, keys in (("missing:", missing), ("not in it:", unexpected))
                if keys
            )
            + ". A fused checkpoint loads with the model's own load_state_dict."
        )
    loaded = [_loaded(model, entry, state_dict) for entry in folded]
    rest = {key: value for key, value in state_dict.items() if key in kept}
    for key, value in rest.items():
        if value.shape != (own := model.state_dict()[key]).shape:
            raise InputError(
                f"{key} has the shape {list(value.shape)}, expected {list(own.shape)}: this is a "
                "checkpoint of another model."
            )
    model.load_state_dict(rest, strict=False)
    with torch.no_grad():
        for entry, (layer, norm, weight, bias) in zip(folded, loaded, strict=True):
            target = model.get_submodule(entry.first[0])
            target.weight.copy_(weight)  # type: ignore[operator]
            target.bias.copy_(bias)  # type: ignore[operator]
            if entry.original_layer is not None and entry.original_norm is not None:
                class_, attributes = entry.original_layer
                shell = class_.__new__(class_)
                vars(shell).update(attributes)
                shell.load_state_dict(layer.state_dict())
                entry.original_norm.load_state_dict(norm.state_dict())


def _below(path: str, names: Any) -> list[str]:
    return [f"{path}.{name}" if path else name for name in names]


def _loaded(
    model: nn.Module, entry: Any, state_dict: dict[str, Any]
) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """The layer and the norm with the checkpoint's values, and the weights folded from them."""
    device = model.get_submodule(entry.first[0]).weight.device
    modules = []
    for paths, shape in ((entry.first, entry.layer), (entry.second, entry.norm)):
        module = copy.deepcopy(shape).to_empty(device=device)
        state = {
            name: state_dict[key]
            for name, key in zip(
                module.state_dict(), _below(paths[0], module.state_dict()), strict=True
            )
            if key in state_dict
        }
        try:
            module.load_state_dict(state, strict=False)
        except RuntimeError as error:
            raise InputError(
                f"The checkpoint does not fit `{paths[0]}` ({error}); it is of another model."
            ) from error
        modules.append(module)
    layer, norm = modules
    rule = next(rule for rule in RULES if rule.name == entry.rule)
    assert rule.rewrite is not None
    weight, bias = rule.rewrite(plain_layer(layer), norm)
    return layer, norm, weight, bias


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        hint = ""
        if isinstance(model, ExportedProgram):
            hint = " Use torchfuse.fuse_exported for an ExportedProgram."
        raise InputError(f"Expected a torch.nn.Module, got {type(model).__name__}.{hint}")
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError(
            "A scripted or traced module cannot be edited; fuse the nn.Module it was made from."
        )


def _chosen(names: Sequence[str] | None) -> tuple[Rule, ...]:
    if names is None:
        return tuple(rule for rule in RULES if not rule.on_request)
    if isinstance(names, str):
        names = [names]
    known = {rule.name: rule for rule in RULES}
    for name in names:
        if name not in known:
            raise InputError(f"There is no rule {name!r}; the rules are {', '.join(known)}.")
    return tuple(rule for rule in RULES if rule.name in names)


def _copy(model: nn.Module) -> nn.Module:
    try:
        return copied(model)
    except UnsupportedError as error:
        raise FusionError(f"{error} Or pass inplace=True to change the model itself.") from error


# Applying and proving


def _apply(target: nn.Module, found: Found, *, keep: bool) -> Fusions:
    done = Fusions()
    paths = found.subject.graph.paths
    for rule, match in found.matches:
        first, second = _all(paths, match.first), _all(paths, match.second)
        if rule.merge is None:
            done.folded.append(fold_in(target, rule, first, second, keep=keep))
    for rule, match in found.matches:
        first, second = _all(paths, match.first), _all(paths, match.second)
        if rule.merge is not None:
            done.merged.append(merge_in(target, rule, first, second))
    return done


def _undo(target: nn.Module, done: Fusions, *, check: bool) -> None:
    for merged in reversed(done.merged):
        separate(target, merged)
    for folded in reversed(done.folded):
        take_back(target, folded, check=check)


def _all(paths: dict[str, tuple[str, ...]], path: str) -> tuple[str, ...]:
    return next((names for names in paths.values() if path in names), (path,))


def _reference(model: nn.Module, given: Sequence[Case]) -> tuple[list[Case], list[Any]]:
    """The cases to compare on (given ones first), and what the original returns on them."""
    tried, expected = list(given), proving.outputs_of(model, given)
    for one in given:
        for case in proving.variations(one):
            try:
                (output,) = proving.outputs_of(model, [case])
            except Exception:  # noqa: BLE001 - the model does not take such inputs, and need not
                output = None
            if output is not None and proving.is_finite(output):
                tried.append(case)
                expected.append(output)
    return tried, expected


def _sizes_compared(tried: Sequence[Case]) -> tuple[str, ...]:
    """The sentence that says on which calls the whole model was compared; none if it was not."""
    calls = list(dict.fromkeys(map(str, tried)))
    if not calls:
        return ()
    shown = ", ".join(calls[:6]) + (f" and {len(calls) - 6} more" if len(calls) > 6 else "")
    return (f"Compared, before and after, on {shown}.",)


def _verified(
    target: nn.Module,
    found: Found,
    done: Fusions,
    tried: list[Case],
    expected: list[dict[str, Any]],
) -> tuple[Equivalence, Fusions]:
    """The whole-model comparison, and what remains fused after undoing what differs."""
    check = _compared(target, tried, expected)
    if not found.matches or (check.passed and not proving.is_blurred(expected)):
        return check, done
    _undo(target, done, check=False)
    # In float64 only a wrong fold differs by more than its last digits.
    wide = proving.widened(_copy, target, tried)
    if wide is None and check.passed:
        return check, _apply(target, found, keep=True)
    subject, inputs, outputs = wide if wide is not None else (target, tried, expected)

    def outcome(matches: list[tuple[Rule, Match]]) -> Equivalence:
        found.matches = matches
        trial = _apply(subject, found, keep=True)
        result = _compared(subject, inputs, outputs)
        _undo(subject, trial, check=False)
        return result

    everything = found.matches
    kept: list[tuple[Rule, Match]] = []

    def search(group: list[tuple[Rule, Match]]) -> None:
        if not group or outcome(kept + group).passed:
            kept.extend(group)
        elif len(group) > 1:
            search(group[: len(group) // 2])
            search(group[len(group) // 2 :])
        else:
            found.reject(
                group[0],
                "With it the model's outputs differ, although the pair itself agrees; something "
                "that was not recorded depends on it.",
            )

    search([entry for entry in everything if entry[0].merge is None])
    found.matches = kept + [entry for entry in everything if entry[0].merge is not None]
    found.drop_orphans()
    search([entry for entry in found.matches if entry[0].merge is not None])
    exact = outcome(list(kept))
    done = _apply(target, found, keep=True)
    check = _compared(target, tried, expected)
    return check if check.passed else exact, done


def _compared(model: nn.Module, tried: list[Case], expected: list[dict[str, Any]]) -> Equivalence:
    try:
        return proving.compare(expected, proving.outputs_of(model, tried))
    except Exception as error:  # noqa: BLE001 - the user's code fails where the original did not
        problem = f"the fused model fails: {type(error).__name__}: {error}"
        return Equivalence((OutputDifference("output", None, None, None, False, problem),))


def _key_map(old_keys: list[str], done: Fusions) -> dict[str, str | None]:
    """Old key → the new key that its value went into; None if it is gone."""
    new: dict[str, str | None] = {key: key for key in old_keys}
    into = {"bias": "bias", "running_mean": "bias", "num_batches_tracked": None}
    for folded in done.folded:
        for path in folded.second:
            for name in folded.norm.state_dict():
                last = into.get(name, "weight")
                new[f"{path}.{name}"] = f"{folded.first[0]}.{last}" if last else None
        for path in folded.first:
            for name in folded.layer.state_dict():
                new[f"{path}.{name}"] = f"{path}.{'bias' if 'bias' in name else 'weight'}"
    for merged in done.merged:
        for path in merged.first:
            for key, target in new.items():
                if target is not None and target.startswith(f"{path}."):
                    new[key] = f"{path}.0.{target[len(path) + 1 :]}"
    return {key: new[key] for key in old_keys}
