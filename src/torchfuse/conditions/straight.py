"""Whether what was recorded between a layer and its batch norm is all that code there can do.

Asked only where exploring lost something, so that a branch may depend on what nobody saw; and of
methods that others may call with arguments that nobody knows. Then every function in between must
have no branch, or call the one right on what the other made. This is read off the bytecode of the
functions that ran: a branch that was not taken is nowhere else.
"""

from __future__ import annotations

import dis
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING

from torch.nn.modules.batchnorm import _BatchNorm

from torchfuse.graph.retracing import leaves_it_to_torch

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import CodeType

    from torchfuse.graph import Call, Frame
    from torchfuse.rules import Match, Subject

__all__ = [
    "branches",
    "branches_on_an_argument",
    "is_straight",
    "may_branch",
    "picks",
    "results_of",
    "stand_side_by_side",
    "where_it_may_turn",
]


def where_it_may_turn(subject: Subject, match: Match) -> str | None:
    """A function between the two that may go on otherwise: "file.py:12"; None: there is none."""
    for first, second in zip(match.firsts, match.seconds, strict=True):
        for code in _turning(subject, match, first, second):
            return f"{code.co_filename.rsplit('/', 1)[-1]}:{code.co_firstlineno}"
    return None


def _turning(subject: Subject, match: Match, first: Call, second: Call) -> Iterator[CodeType]:
    stacks = [_stack(subject, first), _stack(subject, second)]
    known = {frame.code for stack in stacks for frame in stack}
    if _is_traced(subject, match):  # a branch in the norm's own code would have stopped that
        stacks[1] = stacks[1][: len(stacks[1]) - len(second.frames)]
    containers = _containers(subject, match)

    def may_turn(code: CodeType) -> bool:
        return may_branch(subject, code) or picks(code, containers)

    around = 0
    for one, other in zip(*stacks, strict=False):
        if (one.code, one.place) != (other.code, other.place):
            break
        around += 1
    one, other = ([*stack[around : around + 1], None][0] for stack in stacks)
    if one is not None and other is not None and one.code is other.code and _is_users(one):
        around += 1  # it calls both
        straight = is_straight(one.code, one.place, other.place)
        if (straight and picks(one.code, containers)) or (not straight and may_turn(one.code)):
            yield one.code
    elif around and _is_users(stacks[0][around - 1]):  # one place calls both: a loop
        inner = stacks[0][_of_one_call(subject, first, second) : around]
        yield from (f.code for f in inner if _is_users(f) and may_turn(f.code))
    below = [f.code for f in (*stacks[0][around:], *stacks[1][around:]) if _is_users(f)]
    yield from filter(may_turn, below)
    here, there = ([*stack[:around], None][around - 1] for stack in stacks)
    if not below and here and there and not _calls(here.code, here.place, there.place):
        return  # nothing is called in between
    if subject.called is None:  # the model does not run again, so that nobody knows what is
        yield from below or [frame.code for frame in (here,) if frame and _is_users(frame)]
    for position, code in subject.called or ():
        if first.index < position <= second.index and code not in known and may_turn(code):
            yield code


def _containers(subject: Subject, match: Match) -> frozenset[str]:
    """The names of the lists and dictionaries of modules that hold one of the two: `norms`."""
    inner = [path.split(".") for path in match.modules]
    around = [parts[:end] for parts in inner for end in range(1, len(parts))]
    return frozenset(
        parts[-1]
        for parts in around
        if hasattr(type(subject.modules[".".join(parts)]), "__getitem__")
    )


def _is_users(frame: Frame) -> bool:
    return not frame.module.startswith("torch.")


def _is_traced(subject: Subject, match: Match) -> bool:
    norm = subject.modules[match.second]
    return isinstance(norm, _BatchNorm) and not leaves_it_to_torch(norm)


def _of_one_call(subject: Subject, first: Call, second: Call) -> int:
    """How many functions, outermost first, made one call in which both ran."""
    entries = subject.graph.module_calls
    around: list[set[int]] = []
    for call in (first, second):
        index, known = call.within, set[int]()
        while index is not None:
            known.add(index)
            index = entries[index].parent
        around.append(known)
    return sum(len(entries[index].callers) for index in around[0] & around[1])


def _stack(subject: Subject, call: Call) -> list[Frame]:
    """The functions that led to a call, outermost first."""
    frames = list(call.frames)
    index = call.within
    while index is not None:
        entry = subject.graph.module_calls[index]
        frames += entry.callers
        index = entry.parent
    return frames[::-1]


def may_branch(subject: Subject, code: CodeType) -> bool:
    """Whether the function has a branch that may come out otherwise at another call."""
    return branches(code) and not subject.steady.decides(code)


@lru_cache(maxsize=8192)
def branches(code: CodeType) -> bool:
    """Whether the function has a branch or a loop at all."""
    jumps = {*dis.hasjrel, *dis.hasjabs}
    return any(step.opcode in jumps for step in dis.get_instructions(code))


@lru_cache(maxsize=8192)
def picks(code: CodeType, containers: frozenset[str]) -> bool:
    """`self.norms[index](y)`: whether it names a container, and takes items by index."""
    steps = [step for step in dis.get_instructions(code) if step.opname != "CACHE"]
    return not containers.isdisjoint(code.co_names) and any(
        step.opname == "BINARY_SUBSCR"
        and before.opname not in ("LOAD_CONST", "BUILD_SLICE", "BUILD_TUPLE")
        for before, step in pairwise(steps)
    )


@lru_cache(maxsize=8192)
def _calls(code: CodeType, first: int, second: int) -> bool:
    """Whether the function may call anything between the calls at these two places."""
    if first >= second:  # a loop
        return True
    between = [step for step in dis.get_instructions(code) if first < step.offset < second]
    return any(step.opname.startswith("CALL") for step in between)


@lru_cache(maxsize=8192)
def branches_on_an_argument(code: CodeType) -> bool:
    """Whether the function tests one of its arguments (the first one, its module, apart)."""
    arguments = {*code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]}
    jumps = {*dis.hasjrel, *dis.hasjabs}
    asked: set[str] = set()
    for step in dis.get_instructions(code):
        if step.is_jump_target or step.opname.startswith("STORE"):
            asked.clear()
        asked |= {*_locals(step, "LOAD_FAST")}
        if step.opcode in jumps and "IF" in step.opname and asked & arguments:
            return True
    return False


@lru_cache(maxsize=8192)
def is_straight(code: CodeType, first: int, second: int) -> bool:
    """Whether the call at `first` is always followed by the one at `second`, which alone reads it.

    `self.second(self.first(x))`, or `y = self.first(x)`, `z = self.second(y)`, where nothing reads
    y but that, before it is assigned again.
    """
    steps = list(dis.get_instructions(code))
    between = [step for step in steps if first < step.offset < second]
    jumps = {*dis.hasjrel, *dis.hasjabs}
    if first >= second or any(
        step.opcode in jumps
        or step.is_jump_target
        or step.opname.startswith(("COPY", "DUP", "ROT", "SWAP", "RETURN", "YIELD", "RAISE"))
        or step.opname in ("STORE_ATTR", "STORE_GLOBAL", "STORE_DEREF", "STORE_SUBSCR")
        for step in between
        if step.opname != "COPY_FREE_VARS"
    ):
        return False
    stored = {name for step in between for name in _locals(step, "STORE_FAST")}
    loads = [name for step in between for name in _locals(step, "LOAD_FAST")]
    after = [step for step in steps if step.offset > second]
    outside = [step for step in steps if not first < step.offset < second]
    for name in stored:
        if loads.count(name) != 1:
            return False
        read = any(name in _locals(step, "LOAD_FAST") for step in outside)
        handled = getattr(code, "co_exceptiontable", b"")  # (3.10 jumps to its handlers)
        if read and (handled or not _is_written_first(after, name)):
            return False
    return True


def _is_written_first(steps: list[dis.Instruction], name: str) -> bool:
    """Whether a local is assigned, or the function ends, before anything can read it."""
    jumps = {*dis.hasjrel, *dis.hasjabs}
    for step in steps:
        if name in _locals(step, "STORE_FAST") or step.opname == "RETURN_VALUE":
            return True
        if step.opcode in jumps or step.is_jump_target or name in _locals(step, "LOAD_FAST"):
            return False
    return False


def _locals(step: dis.Instruction, kind: str) -> tuple[str, ...]:
    """The local variables that an instruction stores, or loads."""
    parts = step.opname.replace("_CHECK", "").replace("_AND_CLEAR", "").split("_FAST")
    names = step.argval if isinstance(step.argval, tuple) else (step.argval,)
    kinds = [f"{part.strip('_')}_FAST" for part in parts[:-1]]  # STORE_FAST_LOAD_FAST
    return tuple(str(n) for n, k in zip(names, kinds, strict=False) if k == kind)


def stand_side_by_side(code: CodeType, first: str, second: str) -> bool:
    """Whether two attributes are loaded once, the one right after the other: `[self.a, self.b]`."""
    loads = [
        step.argval
        for step in dis.get_instructions(code)
        if step.opname in ("LOAD_ATTR", "LOAD_METHOD")
    ]
    if loads.count(first) != 1 or loads.count(second) != 1:
        return False
    return loads.index(second) == loads.index(first) + 1


def results_of(code: CodeType) -> set[str | None] | None:
    """The local variables that a function returns, None among them for nothing at all.

    None if it returns, or yields, anything else.
    """
    found: set[str | None] = set()
    steps = [step for step in dis.get_instructions(code) if step.opname != "CACHE"]
    for before, step in pairwise(steps):
        if step.opname == "RETURN_CONST" or "YIELD" in step.opname:
            if step.argval is not None or "YIELD" in step.opname:
                return None
            found.add(None)
        elif step.opname == "RETURN_VALUE":
            if before.opname == "LOAD_CONST" and before.argval is None:
                found.add(None)
            elif names := _locals(before, "LOAD_FAST"):
                found.add(names[-1])
            else:
                return None
    return found
