"""Plan, fuse, unfuse: from a model to the same model with less to compute."""

from __future__ import annotations

import copy
from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn.modules.batchnorm import _BatchNorm

from torchfuse import proving
from torchfuse.capture import record
from torchfuse.errors import FusionError, InputError
from torchfuse.inputs import Case, cases
from torchfuse.paths import uncertain
from torchfuse.planning import Fusion, FusionPlan, Skip
from torchfuse.rules import RULES, Match, Refusal, Rule, Subject
from torchfuse.surgery import (
    Folded,
    fold_in,
    forget_fusions,
    fusions_of,
    plain_layer,
    take_back,
    was_fused,
)
from torchfuse.tracing import origin

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torchfuse.equivalence import Equivalence
    from torchfuse.graph import Call, Graph

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
    found = _find(model, cases(example_inputs), _chosen(rules))
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
    found = _find(model, given, _chosen(rules))
    expected: list[Any] = []
    tried: list[Case] = []
    if verify:
        tried, expected = _reference(model, given)
        found.drop_unproved(proving.pair_differences(model, found.matches, tried[: len(given) + 1]))
    old_keys = list(model.state_dict())
    target = model if inplace else _copy(model)
    # While a whole-model check may still undo something, the originals are needed.
    applied = _apply(target, found, keep=keep_originals or verify)
    check = None
    if verify:
        check, applied = _verified(target, found, applied, tried, expected)
    record_ = fusions_of(target, create=True)
    for folded in applied:
        if not keep_originals:
            folded.original_layer = folded.original_norm = None
        record_.folded.append(folded)
    plan_ = replace(found.plan(), originals_bytes=sum(folded.originals_bytes for folded in applied))
    return FusionResult(target, plan_, check, _key_map(old_keys, applied))


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
    for folded in reversed(fusions_of(target).folded):
        take_back(target, folded)
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
    folded = fusions_of(model).folded
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
    """A deep copy; tensors that autograd computed (old-style weight norms) are copied as values."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    _copy_shared_memory(model, memo)
    try:
        with torch.inference_mode(False):
            return copy.deepcopy(model, memo)
    except Exception as error:
        raise FusionError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}); pass "
            "inplace=True to change the model itself."
        ) from error


def _copy_shared_memory(model: nn.Module, memo: dict[int, Any]) -> None:
    """Copies parameters that are views of one memory as such; copy.deepcopy would separate them."""
    sharing: dict[int, dict[int, nn.Parameter]] = defaultdict(dict)
    for parameter in model.parameters():
        if parameter.layout is torch.strided:
            sharing[parameter.untyped_storage()._cdata][id(parameter)] = parameter
    for parameters in sharing.values():
        if len(parameters) > 1:
            storage = next(iter(parameters.values())).untyped_storage().clone()
            for key, parameter in parameters.items():
                view = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
                view.set_(storage, parameter.storage_offset(), parameter.shape, parameter.stride())
                memo[key] = nn.Parameter(view, requires_grad=parameter.requires_grad)


# Finding


class _Found:
    """Matches to be fused, and skips, of one model."""

    def __init__(self, subject: Subject, given: Sequence[Case]) -> None:
        self.subject = subject
        self.given = given
        self.matches: list[tuple[Rule, Match]] = []
        self.skips: list[Skip] = []
        self.max_rel: dict[str, float] = {}

    def skip(self, modules: tuple[str, ...], refusal: Refusal, rule: str | None) -> None:
        self.skips.append(Skip(modules, refusal.reason, refusal.hint, rule))

    def drop(self, position: int, reason: str) -> None:
        rule, match = self.matches[position]
        hint = "Please report it: a fold that does not hold is a defect of torchfuse or of torch."
        self.skip(match.modules, Refusal(reason, hint), rule.name)

    def drop_unproved(self, found: dict[int, proving.PairDifference]) -> None:
        """Keeps the matches whose pair was compared and agrees; the rest becomes skips."""
        kept = []
        for position, (rule, match) in enumerate(self.matches):
            pair = found.get(position)
            if pair is None or pair.problem is not None:
                why = "it did not run while comparing." if pair is None else pair.problem
                self.drop(position, f"The fold did not pass its proof: {why}")
            else:
                self.max_rel[match.second] = pair.max_rel
                kept.append((rule, match))
        self.matches = kept

    def plan(self) -> FusionPlan:
        return FusionPlan(
            model=self.subject.graph.model,
            scope=_scope(self.subject.graph),
            fusions=tuple(
                _fusion(self.subject, rule, match, self.max_rel.get(match.second))
                for rule, match in self.matches
            ),
            skips=tuple(self.skips),
        )


def _scope(graph: Graph) -> tuple[str, ...]:
    shown = ", ".join(graph.cases[:3]) + (" …" if len(graph.cases) > 3 else "")
    sentences = [
        f"Holds for {shown}, and for other inputs that take the same way through the code.",
        "Holds for inference: with every module's training flag as it was here (eval mode), the "
        "same attributes, and the same arguments that are not tensors.",
    ]
    if graph.reads:
        places = list(dict.fromkeys(read.where for read in graph.reads))
        sentences.append(
            "The code looks at values or sizes of tensors "
            f"({', '.join(places[:3])}{' …' if len(places) > 3 else ''}); only what holds on "
            "every side of its branches is fused."
        )
    return tuple(sentences)


def _find(model: nn.Module, given: Sequence[Case], rules: Sequence[Rule]) -> _Found:
    graph = record(model, given)
    subject = Subject(model, graph, dict(model.named_modules(remove_duplicate=False)))
    found = _Found(subject, given)
    seen: set[str] = set()
    for second, calls in _norm_calls(subject).items():
        seen.add(second)
        _judge(found, rules, second, calls)
    for path, module in model.named_modules():
        if isinstance(module, _BatchNorm) and path not in seen:
            found.skip(
                (path,),
                Refusal(
                    f"`{path}` did not run on the example inputs{_maybe_a_branch(graph)}.",
                    "Give example inputs that reach it.",
                ),
                None,
            )
    return found


def _maybe_a_branch(graph: Graph) -> str:
    data = [read for read in graph.reads if read.kind == "data"]
    return f" (a branch may depend on the values read at {data[0].where})" if data else ""


def _norm_calls(subject: Subject) -> dict[str, list[Call]]:
    """Batch norm calls by the module whose statistics they use (else the one they ran in)."""
    groups: dict[str, list[Call]] = defaultdict(list)
    for call in subject.graph.calls:
        if call.kind == "batch_norm":
            groups[_owner_path(subject, call, ("running_mean", "weight"))].append(call)
    return groups


def _owner_path(subject: Subject, call: Call, roles: Sequence[str]) -> str:
    """The module that owns the call's parameters; the one it ran in, if they are computed."""
    ran_in = call.module_path or ""
    for role in roles:
        if role in call.operands:
            names = subject.graph.values[call.operands[role].value].names
            owners = [name.rpartition(".")[0] for name in names]
            if owners:
                return ran_in if ran_in in owners else owners[0]
    return ran_in


def _judge(found: _Found, rules: Sequence[Rule], second: str, calls: list[Call]) -> None:
    subject = found.subject
    traced = [origin(subject.graph, call) for call in calls]
    makers = [maker for maker, _ in traced]
    kinds = {maker.kind if maker else None for maker in makers}
    known = {rule.pattern[0]: rule for rule in rules if rule.pattern[1] == "batch_norm"}
    foldable = [maker for maker in makers if maker is not None and maker.kind in known]
    if not foldable:
        found.skip((second,), _not_after_a_layer(subject, makers), None)
        return
    rule = known[foldable[0].kind]
    paths = {_owner_path(subject, maker, ("weight",)) for maker in foldable}
    first = _owner_path(subject, foldable[0], ("weight",))
    if len(foldable) < len(makers) or len(paths) > 1:
        others = sorted(paths - {first}) or sorted(str(k) for k in kinds - {foldable[0].kind})
        refusal = Refusal(
            f"`{second}` is called more than once, after `{first}` and after "
            f"{'`' + others[0] + '`' if others and paths - {first} else 'something else'}.",
            "Give each use a batch norm of its own.",
        )
        found.skip((first, second), refusal, rule.name)
        return
    match = Match(
        first,
        second,
        tuple(foldable),
        tuple(between for _, between in traced),
        tuple(calls),
    )
    verdict = rule.check(subject, match)
    if verdict is None:
        verdict = uncertain(subject, match)
    if verdict is None:
        found.matches.append((rule, match))
    else:
        found.skip(match.modules, verdict, rule.name)


def _not_after_a_layer(subject: Subject, makers: Sequence[Call | None]) -> Refusal:
    known = [maker for maker in makers if maker is not None]
    if not known:
        return Refusal(
            "Its input is an input of the model, or was made where the recording cannot see."
        )
    for maker in known:
        path = maker.module_path
        if path is not None and subject.modules[path]._forward_hooks:
            return Refusal(
                f"Its input comes from {maker.target}, in or after a hook of `{path}`.",
                "Remove the hook.",
            )
    shown = ", ".join(sorted({_kind_in_words(maker) for maker in known}))
    return Refusal(
        f"Its input comes from {shown}, not straight from a convolution or linear layer."
    )


def _kind_in_words(maker: Call) -> str:
    return f"outside torch's functions ({maker.target})" if maker.kind == "unseen" else maker.kind


def _fusion(subject: Subject, rule: Rule, match: Match, max_rel: float | None) -> Fusion:
    norm = subject.modules[match.second]
    saved = sum(parameter.numel() for parameter in norm.parameters(recurse=False))
    if "bias" not in match.firsts[0].operands:
        saved -= match.seconds[0].operands["input"].shape[1]
    once = [call.operands["input"] for call in match.seconds if call.case == 0]
    size = getattr(torch, match.seconds[0].operands["input"].dtype).itemsize
    return Fusion(
        rule=rule.name,
        modules=match.modules,
        parameters_saved=saved,
        # The batch norm read and wrote its whole input once.
        traffic_saved_bytes=sum(2 * operand.numel * size for operand in once),
        macs_saved=sum(operand.numel for operand in once),
        max_rel=max_rel,
    )


# Applying and proving


def _apply(target: nn.Module, found: _Found, *, keep: bool) -> list[Folded]:
    paths = found.subject.graph.paths
    return [
        fold_in(target, rule, _all(paths, match.first), _all(paths, match.second), keep=keep)
        for rule, match in found.matches
    ]


def _all(paths: dict[str, tuple[str, ...]], path: str) -> tuple[str, ...]:
    return next((names for names in paths.values() if path in names), (path,))


def _reference(model: nn.Module, given: Sequence[Case]) -> tuple[list[Case], list[Any]]:
    """The cases to compare on (given ones first), and what the original returns on them."""
    tried, expected = list(given), proving.outputs_of(model, given)
    for case in proving.variations(given[0]):
        try:
            (output,) = proving.outputs_of(model, [case])
        except Exception:  # noqa: BLE001 - the model does not take such inputs, and need not
            output = None
        if output is not None and proving.is_finite(output):
            tried.append(case)
            expected.append(output)
    return tried, expected


def _verified(
    target: nn.Module,
    found: _Found,
    applied: list[Folded],
    tried: list[Case],
    expected: list[Any],
) -> tuple[Equivalence, list[Folded]]:
    """The whole-model comparison, and what remains fused after undoing what differs."""
    check = proving.compare(expected, proving.outputs_of(target, tried))
    if check.passed or not applied:
        return check, applied
    for folded in reversed(applied):
        take_back(target, folded, check=False)
    paths = found.subject.graph.paths

    # In float64 only a wrong fold differs by more than its last digits.
    subjects = [(target, tried, expected)]
    wide = proving.widened(_copy, target, tried)
    if wide is not None:
        subjects = [wide]
    subject, inputs, outputs = subjects[0]

    def compared(group: list[tuple[Rule, Match]]) -> Equivalence:
        done = [
            fold_in(subject, rule, _all(paths, m.first), _all(paths, m.second), keep=True)
            for rule, m in group
        ]
        result = proving.compare(outputs, proving.outputs_of(subject, inputs))
        for folded in reversed(done):
            take_back(subject, folded, check=False)
        return result

    kept: list[tuple[Rule, Match]] = []

    def search(group: list[tuple[Rule, Match]]) -> None:
        if compared(kept + group).passed:
            kept.extend(group)
        elif len(group) > 1:
            search(group[: len(group) // 2])
            search(group[len(group) // 2 :])
        else:
            found.drop(
                found.matches.index(group[0]),
                "With it the model's outputs differ, although the pair itself agrees; something "
                "that was not recorded depends on it.",
            )

    search(found.matches)
    found.matches = [entry for entry in found.matches if entry in kept]
    final = compared(found.matches)
    return final, _apply(target, found, keep=True)


def _key_map(old_keys: list[str], applied: Sequence[Folded]) -> dict[str, str | None]:
    """Old key → the new key that its value went into; None if it is gone."""
    new: dict[str, str | None] = {key: key for key in old_keys}
    for folded in applied:
        for path in folded.second:
            for name in folded.norm.state_dict():
                into = {"bias": "bias", "running_mean": "bias", "num_batches_tracked": None}
                last = into.get(name, "weight")
                key = f"{path}.{name}"
                new[key] = f"{folded.first[0]}.{last}" if last else None
        for path in folded.first:
            for name in folded.layer.state_dict():
                last = name if name in ("weight", "bias") else "weight"
                if "bias" in name:
                    last = "bias"
                new[f"{path}.{name}"] = f"{path}.{last}"
    return {key: new[key] for key in old_keys}
