"""Whether other methods of the model, or its own code, tell a folded pair from an unfolded one.

A method that reaches the layer without its batch norm (or the other way round) returns something
else once the pair is folded. One that ran in the recording was seen; the others are read here.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from torch import nn

from torchfuse.conditions.mentions import BELOW, TENSORS, mentions_of, only_hands_itself_on
from torchfuse.conditions.other_paths import (
    holds_on_every_path,
    holds_where_called_itself,
    is_lost,
    is_straight_where_called_itself,
    paths_where_called_itself,
)
from torchfuse.conditions.pair import Pair, delegates
from torchfuse.conditions.sources import (
    descriptors_of,
    edits_modules,
    functions_of,
    is_setup,
    names_asked_for,
    names_in,
)
from torchfuse.conditions.straight import (
    branches_on_an_argument,
    may_branch,
    results_of,
    stand_side_by_side,
)
from torchfuse.conditions.subject import Match, Refusal, Subject

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from types import CodeType, FunctionType

__all__ = ["called_by_themselves", "parts_of_forward", "reached_apart"]


def reached_apart(subject: Subject, match: Match, *, outside: str | None = None) -> Refusal | None:
    """None if no method reaches one of the two without the other, or asks what folding changes.

    With `outside`, methods of the module at that path, and of those in it, are not looked at.
    """
    pair = Pair(subject, match)
    if (refusal := _reached_by_attached(subject, pair)) is not None:
        return refusal
    for path in _ancestors(match):
        if outside is not None and f"{path}.".startswith(f"{outside}."):
            continue
        module = subject.modules[path]
        if (refusal := _reached_by_descriptors(path, module, pair)) is not None:
            return refusal
        for function in _methods_of(module).reaching(pair.names_towards(path)):
            if is_setup(function.__name__):
                if (refusal := _computes_apart(subject, match, path, function)) is not None:
                    return refusal
                continue
            ran = _ran(subject, function.__code__, path)
            if ran and (asked := pair.asked_by(path, function)) is not None:
                return Refusal(
                    f"{type(module).__name__}.{function.__name__} asks for {asked}, which folding "
                    "changes.",
                    "Keep what it needs in an attribute of its own.",
                )
            if path and not _is_mentioned(subject, function.__name__):
                continue
            caller = _on_its_own(subject, path, function) if ran else function.__name__
            reached = pair.reached_by(path, function)
            if not reached:
                continue
            if caller is None:  # runs only as it ran, on paths that are explored
                once = pair.calls_each_once(path, function)  # what is between is asked for there
                if once or not is_lost(subject) or not may_branch(subject, function.__code__):
                    continue
                return Refusal(
                    f"{type(module).__name__}.{function.__name__} mentions `{min(reached)}`, and "
                    "branches, and not every path could be followed: "
                    f"{subject.execution_paths.lost}.",
                    "Leave out that use, or give it a layer of its own.",
                )
            both = {match.first, match.second} <= reached
            if ran and both and not _may_be_asked_otherwise(subject, path, function):
                continue  # recorded with both: what it does with them is in the graph
            if _is_explored(subject, match, path, function) or (
                not ran
                and (
                    _only_hands_on(path, function, pair)
                    or _only_past_the_model(subject, path, function)
                )
            ):
                continue
            how = "a method that can be called by itself" if ran else "which did not run here"
            if caller != function.__name__:
                how = f"which {caller} calls as well"
            return Refusal(
                f"{type(module).__name__}.{function.__name__}, {how}, uses `{min(reached)}` on its "
                "own.",
                "If it is needed, record it too: example_inputs=[…, Case(args, "
                f'method="{caller.rpartition(".")[2]}")]; otherwise remove it, or pass '
                "graph=True to fuse, where forward alone is kept.",
            )
    return None


def _may_be_asked_otherwise(subject: Subject, path: str, function: FunctionType) -> bool:
    """Whether a method that ran branches on an argument, and others than forward may give it one.

    `features(x, stage="bn")`, which anyone may call with another stage.
    """
    if not branches_on_an_argument(function.__code__):
        return False
    name = function.__name__
    return _is_public(subject, path, name) or any(
        _is_public(subject, where, caller.__name__) and not _ran(subject, caller.__code__, where)
        for where, caller in subject.mentions.get(name, ())
    )


def _computes_apart(
    subject: Subject, match: Match, path: str, function: FunctionType
) -> Refusal | None:
    """None unless a method that is named as if it set the model up was run, and told them apart."""
    name = function.__name__
    pair = Pair(subject, match)
    if not _is_public(subject, path, name) or not pair.reached_by(path, function):
        return None
    if holds_where_called_itself(subject, match, name) is not False:
        return None
    return Refusal(
        f"{type(subject.model).__name__}.{name}, which was tried, uses one of the two on its own.",
        "Remove it, or let it read the batch norm's output.",
    )


def _is_explored(
    subject: Subject,
    match: Match,
    path: str,
    function: FunctionType,
    seen: frozenset[CodeType] = frozenset(),
) -> bool:
    """Whether all that leads to this method by itself was run, and the match holds there.

    A method of the model itself is called with the inputs of forward; one of an inner module, by
    whatever names it.
    """
    name = function.__name__
    if _is_public(subject, path, name):
        return _is_followed_by_itself(subject, match, function)
    seen |= {function.__code__}
    named = [c for c in subject.mentions.get(name, ()) if c[1].__code__ not in seen]
    # One of each code is enough, of many modules of one class.
    callers = list(
        {(c[1].__code__, _ran(subject, c[1].__code__, c[0]), c[0] == ""): c for c in named}.values()
    )
    if _takes_one_input(function):  # so that no caller can ask it for something else
        asked = [c for c in callers if _is_public(subject, c[0], c[1].__name__)]
        if any(holds_where_called_itself(subject, match, c[1].__name__) is not True for c in asked):
            return False
        if asked:
            callers = [c for c in callers if c not in asked]
            if not callers:
                return True
    return bool(callers) and all(
        holds_on_every_path(subject, match)
        if _ran(subject, caller.__code__, where) and not _is_public(subject, where, caller.__name__)
        else _is_explored(subject, match, where, caller, seen)
        for where, caller in callers
    )


def _is_followed_by_itself(subject: Subject, match: Match, function: FunctionType) -> bool:
    """Whether a method of the model, called with the inputs of forward, was followed everywhere.

    Whoever calls it may give it more than that, where it takes more: then the two stand in it one
    right after the other. So they do where something was lost.
    """
    holds = holds_where_called_itself(subject, match, function.__name__)
    if holds is False or subject.entries.get(function.__name__) is None:
        return False
    parameters = list(inspect.signature(function).parameters.values())[1:]
    variable = any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)
    given = {len(case.args) + len(case.kwargs) for case in subject.cases}
    if holds and not variable and given == {len(parameters)}:
        return True
    named = names_asked_for(function.__code__)
    parts = {part for path in match.modules for part in path.split(".")}
    if named is None or any(fnmatchcase(part, name) for name in named for part in parts):
        return False
    once = Pair(subject, match).calls_each_once("", function, by_name=True)
    return once and is_straight_where_called_itself(subject, match, function.__name__)


def _takes_one_input(function: FunctionType) -> bool:
    parameters = list(inspect.signature(function).parameters.values())[1:]
    return [p.kind for p in parameters] == [inspect.Parameter.POSITIONAL_OR_KEYWORD] and (
        parameters[0].default is inspect.Parameter.empty
    )


def _only_hands_on(path: str, function: FunctionType, pair: Pair) -> bool:
    """Whether a method only makes a sequence of the two, or changes the model.

    `as_sequential()`, `fuse()`: what takes nothing is never tried out; `from_pretrained(url)`.
    """
    if not _takes_nothing(function):
        return _loads_weights(function)
    mentions = [m for m in mentions_of(function) or () if pair.split(path, m) is not None]
    if _changes_the_model(function):
        # (or it hands the whole of itself to a function that does: torch.ao's `fuse_modules`)
        return all(mention.usage != "called" or mention.chain == (None,) for mention in mentions)
    return (
        sorted(str(pair.split(path, m)) for m in mentions) == sorted((pair.first, pair.second))
        and all(m.usage == "read" and not TENSORS & {*m.chain} for m in mentions)
        and "Sequential" in names_in(function.__code__)
        and stand_side_by_side(
            function.__code__, *(inner.rpartition(".")[2] for inner in (pair.first, pair.second))
        )
    )


def _loads_weights(function: FunctionType) -> bool:
    """Whether a method loads weights: it hands itself on, with their place, and gives nothing back.

    docTR's `from_pretrained`. Another method of that kind may put outputs into an argument.
    """
    named = {"from_pretrained", "load_pretrained"} & {function.__name__}
    return bool(named) and only_hands_itself_on(function) and _changes_the_model(function)


def _changes_the_model(function: FunctionType) -> bool:
    """Whether a method gives nothing back, or its own module: `fuse()`."""
    returned = results_of(function.__code__)
    return returned is not None and returned <= {None, *function.__code__.co_varnames[:1]}


def _only_past_the_model(
    subject: Subject, path: str, function: FunctionType, seen: frozenset[CodeType] = frozenset()
) -> bool:
    """Whether a method of an inner module is called by others that nothing in the model calls.

    `fuse_bn_tensor(self, branch)`, which `get_kernel_bias(self)` calls, which only those call that
    re-parameterise the block themselves. Or a method, also of the model, which an attribute of the
    module has replaced: its class's `forward` below `model.forward = …`.
    """
    seen |= {function.__code__}
    callers = {c.__code__: (p, c) for p, c in subject.mentions.get(function.__name__, ())}
    replaced = function.__name__ in vars(subject.modules[path])  # by one of the module's own
    return (path != "" or replaced) and all(
        code not in seen
        and not _ran(subject, code, where)
        and _only_past_the_model(subject, where, caller, seen)
        for code, (where, caller) in callers.items()
    )


def _takes_nothing(function: FunctionType) -> bool:
    parameters = list(inspect.signature(function).parameters.values())[1:]
    return all(parameter.default is not parameter.empty for parameter in parameters)


def parts_of_forward(subject: Subject, match: Match) -> Iterator[str]:
    """Public methods of inner modules that return other values, if called from outside the model.

    DenseNet's `bn_function`: its layer's forward calls it, and no other code of the model does.
    """
    pair = Pair(subject, match)
    for path in filter(None, _ancestors(match)):
        by_name = _methods_of(subject.modules[path]).by_name
        functions = {f for name in pair.names_towards(path) for f in by_name.get(name, ())}
        for function in functions:
            name = function.__name__
            if name.startswith("_") or name == "forward":
                continue
            reached = pair.reached_by(path, function)
            if reached and not {match.first, match.second} <= reached:
                yield f"{path}.{name}"


def _reached_by_attached(subject: Subject, pair: Pair) -> Refusal | None:
    """Hooks, and functions in attributes, can be called without a trace in the recorded pass."""
    for entry in subject.attached:
        reached = pair.reached_by(entry.path, entry.function, entry.owner)
        if reached and (entry.is_hook or entry.owner or not _loads_weights(entry.function)):
            what = "A hook" if entry.is_hook else "The function"
            return Refusal(
                f"{what} in `{entry.where}` uses `{min(reached)}` on its own.",
                "Remove it, or let it read the batch norm's output.",
            )
    return None


def _ran(subject: Subject, code: CodeType, path: str) -> bool:
    """Whether the method with this code ran on the module at `path` in the recorded pass."""
    codes = subject.graph.codes
    if (code, path) in codes:
        return True
    # A call past nn.Module.__call__ (a compiled wrapper) runs, for all we see, in its caller.
    unseen = not subject.graph.module_calls_of(path)
    return unseen and code in subject.graph.functions


def _on_its_own(
    subject: Subject, path: str, function: FunctionType, seen: frozenset[CodeType] = frozenset()
) -> str | None:
    """Who may run a method that ran without what ran around it; None: nobody.

    Its own name, if it is one of the model itself that anyone may call; else a `Class.method` that
    calls it and did not run, of another module, or that may itself run on its own. How the
    module's own code goes on after it, on other paths, is the question of `other_paths.py`.
    """
    name = function.__name__
    inherited = False
    if name in ("forward", "__call__"):
        inherited = not _is_own(subject.modules[path], function)
        if not inherited:  # called as the module itself
            return None
    elif _is_public(subject, path, name):
        return name
    seen |= {function.__code__}
    for where, caller in subject.mentions.get(name, ()):
        if caller.__code__ in seen or (inherited and not _calls_super(caller, where == path)):
            continue
        ran = _ran(subject, caller.__code__, where)
        if (
            (not ran and where != path and (not where or _is_mentioned(subject, caller.__name__)))
            or _is_public(subject, where, caller.__name__)
            or ((ran or inherited) and _on_its_own(subject, where, caller, seen) is not None)
        ):
            return f"{type(subject.modules[where]).__name__}.{caller.__name__}"
    return None


def _is_own(module: nn.Module, function: FunctionType) -> bool:
    """Whether calling the module runs this function, and not one that overrides it."""
    own = inspect.unwrap(getattr(type(module), function.__name__))
    return own.__code__ is function.__code__


def _calls_super(caller: FunctionType, same_module: bool) -> bool:
    return same_module and "super" in names_in(caller.__code__)


def _is_public(subject: Subject, path: str, name: str) -> bool:
    """Whether the method is one of the model itself that anyone may call, and not an entry here."""
    entries = {"forward", "__call__", *(case.split("(")[0] for case in subject.graph.cases)}
    return path == "" and not name.startswith("_") and name not in entries


def called_by_themselves(subject: Subject, path: str) -> Iterator[Subject]:
    """What the model's methods that reach a module do, each called with the inputs of forward."""
    for function in _methods_of(subject.model).reaching({path.partition(".")[0]}):
        name = function.__name__
        if name != "forward" and _is_public(subject, "", name):
            yield from paths_where_called_itself(subject, name)


def _is_mentioned(subject: Subject, method: str) -> bool:
    """Whether any code of the model's own classes names the method of an inner module.

    What nothing in the model calls could only be called past the model, from outside.
    """
    return method in ("forward", "__call__") or method in subject.mentions


def _ancestors(match: Match) -> Iterator[str]:
    """Paths of all modules that contain the layer or the batch norm, each once."""
    seen: dict[str, None] = {}
    for path in match.modules:
        while path:
            path = path.rpartition(".")[0]
            seen.setdefault(path)
    return iter(seen)


@dataclass(frozen=True)
class _Methods:
    """Methods of one class and its bases, by the attribute names that they mention."""

    by_name: dict[str, list[FunctionType]]
    dynamic: list[FunctionType]  # may reach any child

    def reaching(self, names: Collection[str]) -> list[FunctionType]:
        found = [f for name in names for f in self.by_name.get(name, ())]
        return list(dict.fromkeys([*found, *self.dynamic]))


_DYNAMIC = frozenset(
    {
        *("children", "named_children", "modules", "named_modules", "get_submodule", "_modules"),
        *("getattr", "__getattr__", "values", "items", "__dict__", "get_parameter"),
    }
)


def _methods_of(module: nn.Module) -> _Methods:
    class_: Any = type(module)  # mypy takes nn.Module's own __hash__ for its class's
    return _methods(class_)


@lru_cache(maxsize=4096)
def _methods(class_: type) -> _Methods:
    by_name: dict[str, list[FunctionType]] = {}
    dynamic: list[FunctionType] = []
    indexed = issubclass(class_, (nn.Sequential, nn.ModuleList, nn.ModuleDict))
    indexed = indexed or delegates(class_)
    for name, function in functions_of(class_):
        if name.startswith("__") and name != "__call__":
            continue
        if edits_modules(function.__code__):
            continue
        names = names_in(function.__code__)
        for mentioned in names:
            by_name.setdefault(mentioned, []).append(function)
        static = isinstance(inspect.getattr_static(class_, name), staticmethod)
        if not static and (indexed or names & _DYNAMIC or _hands_self_on(function)):
            dynamic.append(function)
    return _Methods(by_name, dynamic)


def _reached_by_descriptors(path: str, module: nn.Module, pair: Pair) -> Refusal | None:
    """Objects of classes of their own that stand in the module's class in place of a method."""
    class_: Any = type(module)  # as above
    for name, function in descriptors_of(class_):
        if reached := pair.named_by(path, function):
            return Refusal(
                f"{type(module).__name__}.{name}, a {function.__qualname__.rpartition('.')[0]}, "
                f"mentions `{min(reached)}`, and may use it on its own.",
                "Make it a method, or remove it.",
            )
    return None


@lru_cache(maxsize=4096)
def _hands_self_on(function: FunctionType) -> bool:
    mentions = mentions_of(function)
    return any(mention.chain in ((None,), (BELOW,)) for mention in mentions or ())
