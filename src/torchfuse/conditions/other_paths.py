"""Whether a match holds on every path through the code that exploring finds."""

from __future__ import annotations

import inspect
from collections.abc import AsyncGenerator, Awaitable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torchfuse.cases import resized
from torchfuse.conditions.dataflow import origin, owner_path
from torchfuse.conditions.exactness import exact_on_path
from torchfuse.conditions.sources import names_in
from torchfuse.conditions.straight import where_it_may_turn
from torchfuse.conditions.subject import Match
from torchfuse.errors import TorchfuseError
from torchfuse.graph.exploring import output_silenced

if TYPE_CHECKING:
    from torchfuse.cases import Case
    from torchfuse.conditions.subject import Subject

__all__ = [
    "breaks_on_some_path",
    "holds_on_every_path",
    "holds_where_called_itself",
    "is_lost",
    "is_straight_where_called_itself",
    "paths_where_called_itself",
]


def holds_on_every_path(subject: Subject, match: Match) -> bool:
    """Whether the model was followed on all of its paths, and the match is exact on each."""
    if not _can_be_judged(subject, match) or breaks_on_some_path(subject, match) is not None:
        return False
    return subject.execution_paths.lost is None


def breaks_on_some_path(subject: Subject, match: Match) -> str | None:
    """Where a path begins on which the match is not exact: "file.py:12"; None: on none found.

    On a path that calls neither the layer nor the batch norm, there is nothing to be exact.
    """
    if not (_can_be_judged(subject, match) and subject.graph.may_turn):
        return None
    for path, other in zip(subject.execution_paths.paths, subject.others, strict=True):
        if not _holds(other, match):
            return path.left_at
    return None


def holds_where_called_itself(subject: Subject, match: Match, method: str) -> bool | None:
    """Whether the match is exact where a method of the model is called with the inputs of forward.

    None if it cannot be called so, or not followed.
    """
    if not _can_be_judged(subject, match):
        return None
    entry = _entry(subject, method)
    if entry is None:
        return None
    if not _holds(entry, match):
        return False
    if not all(_holds(path, match) for path in entry.others):
        return False
    return None if is_lost(entry) else True


def paths_where_called_itself(subject: Subject, method: str) -> tuple[Subject, ...]:
    """What a method of the model does on the inputs of forward; none if it cannot be called so."""
    entry = _entry(subject, method) if subject.cases else None
    if entry is None:
        return ()
    return (entry, *entry.others)


def _entry(subject: Subject, method: str) -> Subject | None:
    if method not in subject.entries:
        subject.entries[method] = _as_entry(subject, method)
    return subject.entries[method]


def is_lost(subject: Subject) -> bool:
    """Whether something was lost while exploring, on which a branch may depend."""
    return subject.graph.may_turn and subject.execution_paths.lost is not None


def is_straight_where_called_itself(subject: Subject, match: Match, method: str) -> bool:
    """Whether nothing that the method may be given can part the two, once it was called itself."""
    entry = subject.entries[method]
    there = None if entry is None else _as_there(entry, match)
    return entry is not None and there is not None and where_it_may_turn(entry, there) is None


def _can_be_judged(subject: Subject, match: Match) -> bool:
    return bool(subject.cases and match.seconds) and match.seconds[0].kind == "batch_norm"


def _as_entry(subject: Subject, method: str) -> Subject | None:
    """What a public method does with the inputs of forward."""
    function = getattr(subject.model, method)
    if not _takes_inputs(function):
        return None
    entries = []
    for case in subject.cases:
        try:
            inspect.signature(function).bind(*case.args, **case.kwargs)
        except (TypeError, ValueError):
            return None
        entries.append(replace(case, method=method))
    # Small inputs first: what is asked for is the path, and not the time.
    for given in ([resized(c, batch=True, spatial=True) for c in entries], entries):
        if (entry := _recorded(subject, tuple(given))) is not None:
            return entry
    return None


def _takes_inputs(function: Any) -> bool:
    """Whether a method takes an argument at all, and only gives its result back when it has run."""
    if inspect.isgeneratorfunction(function) or inspect.iscoroutinefunction(function):
        return False
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    code = getattr(inspect.unwrap(function), "__code__", None)
    if code is None or names_in(code) & _LEAVING_TRACES:
        return False  # it was not asked for, and what it does cannot be put back
    return any(parameter.default is parameter.empty for parameter in parameters)


# What writes to files, or trains
_LEAVING_TRACES = frozenset(
    {
        *("save", "savez", "savetxt", "savefig", "imsave", "imwrite", "imshow", "show", "tofile"),
        *("open", "write", "writelines", "write_text", "write_bytes", "dump", "to_csv"),
        *("remove", "unlink", "rmtree", "rename", "mkdir", "makedirs", "system", "popen", "Popen"),
        *("check_call", "check_output", "post", "put", "send", "exit", "_exit", "input"),
        *("step", "backward", "zero_grad"),
    }
)


def _recorded(subject: Subject, cases: tuple[Case, ...]) -> Subject | None:
    try:
        with output_silenced():
            graph = subject.recorder.record(cases, accept=_is_finished)
    except (TorchfuseError, SystemExit):
        return None
    return subject.recorded_as(graph, cases)


def _is_finished(value: Any) -> bool:
    """Whether what a method returned has run: no generator, no function."""
    return not callable(value) and not isinstance(value, (Iterator, Awaitable, AsyncGenerator))


def _holds(subject: Subject, match: Match) -> bool:
    # Where the norm does not run, the layer must not run either: it would give normed values.
    if not subject.norms.get(match.second):
        return not _runs(subject, match)
    there = _as_there(subject, match)
    return there is not None and exact_on_path(subject, there) is None


def _as_there(subject: Subject, match: Match) -> Match | None:
    """The match in another recording; None if each norm does not follow the layer there."""
    firsts, between = [], []
    norms = subject.norms.get(match.second, [])
    for norm in norms:
        maker, moved = origin(subject.graph, norm)
        if maker is None or maker.kind != match.firsts[0].kind:
            return None
        if owner_path(subject.graph, maker, ("weight",)) != match.first:
            return None
        firsts.append(maker)
        between.append(moved)
    return Match(match.first, match.second, tuple(firsts), tuple(between), tuple(norms))


def _runs(subject: Subject, match: Match) -> bool:
    """Whether the layer runs, or anything reads its weight."""
    graph = subject.graph
    if graph.module_calls_of(match.first):
        return True
    below = f"{match.first}." if match.first else ""
    return any(
        graph.readers(value.index)
        for value in graph.values
        if any(name.startswith(below) for name in value.names)
    )
