"""Whether the code between a layer and its batch norm has another way than the recorded one.

The recording shows that nobody else read the layer's output on the way that was taken. Code that
has no branch, or branches only on the module's own configuration, takes that way for every input.
Where it does branch, and Python looked at values or facts of tensors, the match is left alone.
"""

from __future__ import annotations

import ast
import inspect
import math
import sys
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from torchfuse.judging.answers import answers_are_seen
from torchfuse.judging.branching import branching_of
from torchfuse.judging.direct import is_direct, names_asked_for
from torchfuse.judging.other_ways import holds_on_every_way, holds_where_called_itself
from torchfuse.judging.sources import syntax_of
from torchfuse.retracing import leaves_it_to_torch
from torchfuse.rules import Match, Refusal, Subject

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from torchfuse.graph import Call, ModuleCall

__all__ = [
    "has_other_ways",
    "is_followed",
    "is_followed_by_itself",
    "may_fork",
    "mentioned_elsewhere",
]

_HINT = "Call the batch norm directly on the layer's output, or put both in nn.Sequential."


def may_fork(subject: Subject, match: Match) -> Refusal | None:
    """None if the code between the two takes the recorded way for every input."""
    reads = subject.graph.reads
    volatile = subject.volatile
    done: set[tuple[CodeType, ...]] = set()
    for first, second in zip(match.firsts, match.seconds, strict=True):
        between = _between(subject, first, second)
        looked = tuple(
            read.code
            for read in reads
            if read.code is not None and first.index < read.position <= second.index
        )
        traced = _traced(subject, match, second)
        codes = tuple(c for c in dict.fromkeys((*between.codes, *looked)) if c not in traced)
        if codes in done:
            continue
        done.add(codes)
        doubtful = [code for code in codes if not branching_of(code, volatile).one_way]
        if set(doubtful) == {between.meeting} and is_direct(between.meeting, *between.names):
            continue
        for code in doubtful:
            where = f"{code.co_filename.rsplit('/', 1)[-1]}:{code.co_firstlineno}"
            pair = f"`{match.first}` and `{match.second}`"
            branching = branching_of(code, volatile)
            if branching.catches:
                return Refusal(
                    f"The code between {pair} ({where}) catches errors, and may take another "
                    "branch for other inputs.",
                    _HINT,
                )
            if branching.restless:
                return Refusal(
                    f"The code between {pair} ({where}) branches on {branching.restless}, which "
                    "may be another at the next call.",
                    _HINT,
                )
            if reads and not is_followed(subject, match, doubtful):
                kind = "values" if any(read.kind == "data" for read in reads) else "shapes"
                return Refusal(
                    f"A branch may depend on {kind} of tensors (read at {reads[0].where}): on its "
                    f"other side `{match.second}` need not follow `{match.first}` (code at "
                    f"{where}).",
                    _HINT,
                )
    return None


def _traced(subject: Subject, match: Match, second: Call) -> frozenset[CodeType]:
    """The code of a norm class of its own that was traced: a branch would have stopped that."""
    norm = subject.modules[match.second]
    if not isinstance(norm, _BatchNorm) or leaves_it_to_torch(norm):
        return frozenset()
    return frozenset(frame.code for frame in second.frames)


def mentioned_elsewhere(subject: Subject, match: Match) -> Refusal | None:
    """None if no code that branches, of other modules, names the layer or the norm: `block.conv`.

    A module may be handed to it, and used on another way than the recorded one.
    """
    if not subject.graph.reads:
        return None
    names = {path.rpartition(".")[2] for path in match.modules}
    callers = {frame.code for call in (*match.firsts, *match.seconds) for frame in call.frames}
    for call in (*match.firsts, *match.seconds):
        for entry in _enclosing(subject, call):
            callers |= {frame.code for frame in entry.callers}
    for code in subject.forwards - callers:
        if names & _foreign_attributes(code) and has_other_ways(subject, code, match):
            named = min(names & _foreign_attributes(code))
            where = f"{code.co_filename.rsplit('/', 1)[-1]}:{code.co_firstlineno}"
            return Refusal(
                f"The code at {where} branches, and names an attribute `{named}` of what it is "
                f"given: on another way it may use that of `{match.modules[0]}` or "
                f"`{match.modules[1]}` on its own.",
                "Hand the layer's output on, in place of the module.",
            )
    return None


@lru_cache(maxsize=8192)
def _foreign_attributes(code: CodeType) -> frozenset[str]:
    """The attributes that a function asks of what it is given beside its `self`: `block.conv`."""
    tree = syntax_of(code)
    if tree is None:
        return frozenset()
    local = {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)} | {
        node.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }
    local -= {argument.arg for argument in tree.args.args[:1]}
    return frozenset(
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and not hasattr(Tensor, node.attr)
        and any(isinstance(inner, ast.Name) and inner.id in local for inner in ast.walk(node.value))
    )


def has_other_ways(subject: Subject, code: CodeType, match: Match) -> bool:
    """Whether the code may take a way on which the match does not hold."""
    branching = branching_of(code, subject.volatile)
    if branching.one_way:
        return False
    if branching.catches or branching.restless:
        return True
    return bool(subject.graph.reads) and not is_followed(subject, match, [code])


def is_followed(subject: Subject, match: Match, codes: Sequence[CodeType]) -> bool:
    """Whether exploring came to every branch of these functions, and the match holds everywhere."""
    readers = {read.code for read in subject.graph.reads}
    if None in readers:  # scripted code
        return False
    if not all(branching_of(code, subject.volatile).only_tests for code in codes):
        return False
    if not holds_on_every_way(subject, match):
        return False
    calls = (*match.firsts, *match.seconds)
    return all(answers_are_seen(subject, calls, code) for code in codes)


def is_followed_by_itself(subject: Subject, match: Match, function: FunctionType) -> bool:
    """Whether a method of the model, called with the inputs of forward, was followed everywhere.

    Whoever calls it may give it more than that, where it takes more: then the two stand in it one
    right after the other.
    """
    code = function.__code__
    if holds_where_called_itself(subject, match, function.__name__) is not True:
        return False
    parameters = list(inspect.signature(function).parameters.values())[1:]
    variable = any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)
    given = {len(case.args) + len(case.kwargs) for case in subject.cases}
    if variable or given != {len(parameters)}:
        first, second = _where_they_part(*match.modules)
        named = names_asked_for(code)
        parts = {part for path in match.modules for part in path.split(".")}
        if named is None or any(fnmatchcase(part, name) for name in named for part in parts):
            return False
        return is_direct(code, first, second)
    entry = subject.entries[function.__name__]
    branching = branching_of(code, subject.volatile)
    return branching.one_way or (
        entry is not None and branching.only_tests and answers_are_seen(entry, (), code)
    )


def _where_they_part(first: str, second: str) -> tuple[str, str]:
    """The names by which the module that holds both knows them: of `a.b.0` and `a.c`, b and c."""
    one, other = first.split("."), second.split(".")
    while len(one) > 1 and len(other) > 1 and one[0] == other[0]:
        one, other = one[1:], other[1:]
    return one[0], other[0]


@dataclass(frozen=True)
class _Between:
    codes: tuple[CodeType, ...]  # the user's functions that hand the tensor on
    meeting: CodeType | None  # the one that calls both
    names: tuple[str, str]  # what that one calls: the modules the two calls ran in


def _between(subject: Subject, first: Call, second: Call) -> _Between:
    chains = [_enclosing(subject, call) for call in (first, second)]
    common = {id(entry) for entry in chains[0]} & {id(entry) for entry in chains[1]}
    spans: dict[CodeType, _Span] = {}
    meetings: list[CodeType | None] = []
    names: list[str] = []
    for call, chain in zip((first, second), chains, strict=True):
        below = [entry for entry in chain if id(entry) not in common]
        groups = [call.frames, *(entry.callers for entry in below)]
        for frames, entry in zip(groups, chain, strict=False):
            for frame in frames:
                if not frame.module.startswith(("torch.", "torchfuse.")):
                    span = spans.setdefault(frame.code, _Span(frame.module, entry.path))
                    if call is first:
                        span.after = frame.line
                    else:
                        span.before = frame.line
        outermost = groups[-1]
        meetings.append(outermost[0].code if len(outermost) == 1 else None)
        names.append(below[-1].path.rpartition(".")[2] if below else "")
    codes = [*spans, *_passed_through(subject, first, second)]
    for code, span in spans.items():
        codes.extend(_helpers(subject, code, span, spans))
    same = meetings[0] if meetings[0] is meetings[1] else None
    return _Between(tuple(dict.fromkeys(codes)), same, (names[0], names[1]))


@dataclass
class _Span:
    """The lines of a function that run after the layer and before the batch norm."""

    python_module: str
    path: str  # of the module that it is a method of
    after: float = 0
    before: float = math.inf


def _enclosing(subject: Subject, call: Call) -> list[ModuleCall]:
    """The module calls around `call`, innermost first."""
    around = []
    index = call.within
    while index is not None:
        entry = subject.graph.module_calls[index]
        around.append(entry)
        index = entry.parent
    return around


def _passed_through(subject: Subject, first: Call, second: Call) -> Iterator[CodeType]:
    """The forward functions of modules that were given the layer's output, and gave it back."""
    made = {result.value for result in first.results}
    start = 0 if first.within is None else first.within + 1  # in the order in which they began
    for entry in subject.graph.module_calls[start:]:
        if entry.first > second.index:
            break
        if first.index < entry.first and entry.last <= second.index and made & set(entry.inputs):
            forward = inspect.unwrap(type(subject.modules[entry.path]).forward)
            if isinstance(forward, FunctionType) and not forward.__module__.startswith("torch."):
                yield forward.__code__


def _helpers(
    subject: Subject, code: CodeType, span: _Span, spans: Collection[CodeType]
) -> Iterator[CodeType]:
    """The user's plain functions and methods that run within the span, and what those call."""
    class_: Any = type(subject.modules[span.path])
    waiting = list(_called(code, span.python_module, class_, span.after, span.before))
    seen = set(spans)  # (those have a span of their own)
    while waiting:
        function = waiting.pop()
        if function.__code__ not in seen and not function.__module__.startswith("torch"):
            seen.add(function.__code__)
            yield function.__code__
            waiting += _called(function.__code__, function.__module__, class_, 0, math.inf)


@lru_cache(maxsize=8192)
def _called(
    code: CodeType, python_module: str, class_: type, after: float, before: float
) -> tuple[FunctionType, ...]:
    tree = syntax_of(code)
    if tree is None:
        return ()
    found: list[FunctionType] = []
    known = vars(sys.modules[python_module]) if python_module in sys.modules else {}
    offset = code.co_firstlineno - 1
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        if (node.end_lineno or 0) + offset < after or node.lineno + offset > before:
            continue
        target: Any = None
        if isinstance(node.func, ast.Name):
            target = known.get(node.func.id)
        elif isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) in {
            "self",
            *(argument.arg for argument in tree.args.args[:1]),
        }:
            target = getattr(class_, node.func.attr, None)
        unwrapped = inspect.unwrap(target) if callable(target) else None
        if isinstance(unwrapped, FunctionType):
            found.append(unwrapped)
    return tuple(found)
