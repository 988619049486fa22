"""Whether exploring saw what each branch of a function depends on.

A comparison of sizes is seen, and answered otherwise, where it is made of followed numbers. A flag
is not: it may be what is left of a comparison that nobody saw (`0.5 * h > 100` in the caller). So
the source says where a flag comes from: up through the recorded callers, to something that is the
same at every call, or to a comparison that was seen.
"""

from __future__ import annotations

import ast
import inspect
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from torchfuse.judging.branching import Reader, tests_of
from torchfuse.judging.sources import functions_of, syntax_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import CodeType

    from torch import nn

    from torchfuse.graph import Call, Frame
    from torchfuse.rules import Subject

__all__ = ["answers_are_seen"]

# How many assignments and callers a flag is followed through.
_DEPTH = 12
_BOUND = frozenset({"isinstance", "hasattr", "callable"})  # asks for the kind of an argument
_RANK = frozenset({"dim", "ndim", "ndimension"})  # part of every plan's scope
_GIVING_BACK = frozenset({"bool", "any", "all", "len", "str", "int"})
_ON_TENSORS = frozenset({"shape", "requires_grad"})


def answers_are_seen(subject: Subject, calls: Sequence[Call], code: CodeType) -> bool:
    """Whether each test in the function was seen, or is the same at every call in the scope.

    `calls` are recorded ones that the function may have led to: their callers give it its flags.
    """
    function = syntax_of(code)
    if function is None:
        return False
    stacks = dict.fromkeys(_stack(subject, call) for call in calls)
    known = _KNOWN.setdefault(subject, {})
    key = (code, tuple(stacks))
    if key not in known:
        known[key] = _answers_are_seen(subject, tuple(stacks), code, function)
    return known[key]


# What was found out of each subject: most pairs of a model lie in the same code.
_KNOWN: WeakKeyDictionary[Subject, dict[Any, bool]] = WeakKeyDictionary()


def _answers_are_seen(
    subject: Subject, stacks: Sequence[tuple[Frame, ...]], code: CodeType, function: ast.FunctionDef
) -> bool:
    places = [
        _Place(subject, tuple(stack[at:]))
        for stack in stacks
        for at, frame in enumerate(stack)
        if frame.code is code
    ]
    here = _Function(subject, code, function)
    return all(here.is_seen(test, places, _DEPTH, whole=True) for test in tests_of(function))


def _stack(subject: Subject, call: Call) -> tuple[Frame, ...]:
    """The functions that led to a call, innermost first, out to the model's own call."""
    frames = list(call.frames)
    index = call.within
    while index is not None:
        entry = subject.graph.module_calls[index]
        frames += entry.callers
        index = entry.parent
    return tuple(frames)


@dataclass(frozen=True)
class _Place:
    """One recorded call of a function: its frame, and those of its callers."""

    subject: Subject
    frames: tuple[Frame, ...]

    def is_given_what_is_seen(self, name: str, depth: int) -> bool:
        """Whether the caller gives a parameter nothing that depends on what nobody saw."""
        known = _KNOWN.setdefault(self.subject, {})
        if (self.frames, name) not in known:
            known[self.frames, name] = self._is_given_what_is_seen(name, depth)
        return known[self.frames, name]

    def _is_given_what_is_seen(self, name: str, depth: int) -> bool:
        if len(self.frames) == 1:
            return True  # the model's own arguments are part of the scope
        caller = self.frames[1]
        if caller.module.startswith("torch."):
            return caller.module == "torch.nn.modules.container"  # gives one input, no flag
        made, tree = syntax_of(self.frames[0].code), syntax_of(caller.code)
        if made is None or tree is None or depth == 0:
            return False
        names = [a.arg for a in (*made.args.posonlyargs, *made.args.args)]
        position = names.index(name) if name in names else len(names)
        position -= names[:1] in (["self"], ["cls"])
        line = caller.line - caller.code.co_firstlineno + 1
        outer = _Function(self.subject, caller.code, tree)
        around = _Place(self.subject, self.frames[1:])
        for call in ast.walk(tree):
            if not isinstance(call, ast.Call):
                continue
            if not call.lineno <= line <= (call.end_lineno or call.lineno):
                continue
            given = [k.value for k in call.keywords if k.arg == name]
            before = call.args[: position + 1]
            unpacked = [k.value for k in call.keywords if k.arg is None]
            starred = [a.value for a in before if isinstance(a, ast.Starred)]
            if len(before) > position and not starred:
                given.append(before[position])
            own = {a.arg for a in (tree.args.vararg, tree.args.kwarg) if a is not None}
            for value in (*unpacked, *starred):
                if outer.reader.is_configuration(value):
                    continue
                if not (isinstance(value, ast.Name) and value.id in own):
                    return False  # `**{"norm": …}`
                if not around.is_given_what_is_seen(name, depth - 1):
                    return False
            if not all(outer.is_seen(value, [around], depth - 1) for value in given):
                return False
        return True


class _Function:
    """One function: its tree, what in it is fixed, and where in it exploring was asked."""

    def __init__(self, subject: Subject, code: CodeType, tree: ast.FunctionDef) -> None:
        self.tree = tree
        self._subject, self._code = subject, code
        self.reader = Reader(tree, subject.volatile)
        self.before = code.co_firstlineno - 1
        self.margin = _margin(code)
        self.asked = [span for asking, span in subject.ways.asked if asking is code]

    def is_seen(
        self, value: ast.expr, places: Sequence[_Place], depth: int, *, whole: bool = False
    ) -> bool:
        """Whether a value is the same at every call, or came out otherwise while exploring.

        `whole`: it is all that a branch asks for.
        """
        if depth == 0:
            return False
        if isinstance(value, ast.Constant) or self.reader.is_configuration(value):
            return True
        if isinstance(value, ast.BoolOp):
            return self._all_seen(value, places, depth)
        if isinstance(value, ast.IfExp):
            if not self.is_seen(value.test, places, depth - 1, whole=True):
                return False
            return all(self.is_seen(v, places, depth - 1) for v in (value.body, value.orelse))
        if isinstance(value, ast.UnaryOp):
            inner = self.is_seen(value.operand, places, depth, whole=whole)
            return inner or self._was_asked(value, exactly=True)
        if isinstance(value, ast.Compare):
            if self._was_asked(value, exactly=True):
                return True
            parts = [value.left, *value.comparators]
            return all(self.is_seen(part, places, depth - 1) for part in parts)
        if (whole or not isinstance(value, ast.Name)) and self._was_asked(value, exactly=False):
            return True
        if isinstance(value, ast.Name):
            return self._name_is_seen(value.id, places, depth - 1)
        inner_values = self._parts(value)
        return inner_values is not None and all(
            self.is_seen(part, places, depth - 1) for part in inner_values
        )

    def _all_seen(self, whole: ast.BoolOp, places: Sequence[_Place], depth: int) -> bool:
        """`a and b`; what stands behind a part of the configuration may never have been asked."""
        configured = False
        for value in whole.values:
            if self._settles(value, to=isinstance(whole.op, ast.Or)):
                return True
            seen = self.is_seen(value, places, depth)
            if not seen and not (configured and self._would_be_seen(value)):
                return False
            configured = configured or self.reader.is_configuration(value)
        return True

    def _settles(self, value: ast.expr, *, to: bool) -> bool:
        """Whether it is an attribute that is true (or false) in each module that has this code."""
        if isinstance(value, ast.UnaryOp) and isinstance(value.op, ast.Not):
            return self._settles(value.operand, to=not to)
        owner = self.tree.args.args[0].arg if self.tree.args.args else None
        if not (
            isinstance(value, ast.Attribute)
            and isinstance(value.value, ast.Name)
            and value.value.id == owner
            and self.reader.is_configuration(value)
        ):
            return False
        known = [
            vars(module).get(value.attr, _UNKNOWN)
            for module in self._subject.modules.values()
            if self._code in _codes_of(_class_of(module))
        ]
        return bool(known) and all(type(k) in _SIMPLE and bool(k) is to for k in known)

    def _would_be_seen(self, value: ast.expr) -> bool:
        """Whether it asks a tensor right there: `x.requires_grad`, `x.shape[-1] > 3`."""
        asked = {
            id(node.value)
            for node in ast.walk(value)
            if isinstance(node, ast.Attribute) and node.attr in _ON_TENSORS
        }
        return all(
            isinstance(node, (ast.Attribute, ast.Compare, ast.Subscript, ast.UnaryOp, ast.Constant))
            or (isinstance(node, ast.Name) and id(node) in asked)
            or not isinstance(node, ast.expr)
            for node in ast.walk(value)
        )

    def _parts(self, value: ast.expr) -> list[ast.expr] | None:
        """What a value is made of, if it is seen where those are; None if that is not known."""
        if isinstance(value, (ast.List, ast.Tuple, ast.Set)):
            return value.elts
        if isinstance(value, ast.Attribute) and value.attr in _RANK:
            return []
        if isinstance(value, ast.Call):
            if isinstance(value.func, ast.Attribute) and value.func.attr in _RANK:
                return []
            name = ast.unparse(value.func)
            if name in _BOUND:
                return value.args[1:]
            if name in _GIVING_BACK and not value.keywords:
                return value.args
        return None

    def _name_is_seen(self, name: str, places: Sequence[_Place], depth: int) -> bool:
        values = list(self._assigned(name))
        arguments = self.tree.args
        declared = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        if name in {argument.arg for argument in declared}:
            if not places or not all(p.is_given_what_is_seen(name, depth) for p in places):
                return False
        elif not values:
            return False
        return all(v is not None and self.is_seen(v, places, depth) for v in values)

    def _assigned(self, name: str) -> Iterator[ast.expr | None]:
        """The values that a name is given; None for one that is not plainly assigned."""
        plain: set[int] = set()
        for node in ast.walk(self.tree):
            if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                for target in targets:
                    if isinstance(target, ast.Name) and target.id == name:
                        plain.add(id(target))
                        yield node.value
        for node in ast.walk(self.tree):
            if (
                isinstance(node, ast.Name)
                and node.id == name
                and not isinstance(node.ctx, ast.Load)
                and id(node) not in plain
            ):
                yield None

    def _was_asked(self, value: ast.expr, *, exactly: bool) -> bool:
        """Whether exploring was asked there; the truth of a value is asked by its statement."""
        last, end = value.end_lineno or value.lineno, value.end_col_offset or value.col_offset
        start = (value.lineno + self.before, value.col_offset + self.margin)
        stop = (last + self.before, end + self.margin)
        for first_line, first_column, last_line, last_column in self.asked:
            if first_column < 0:  # Python 3.10 knows only lines
                if start[0] <= first_line <= stop[0]:
                    return True
                continue
            begins, ends = (first_line, first_column), (last_line, last_column)
            if (begins, ends) == (start, stop):
                return True
            if not exactly and begins <= start and stop <= ends:
                return True
        return False


_UNKNOWN = object()
_SIMPLE = (bool, int, float, str, type(None))


@lru_cache(maxsize=4096)
def _codes_of(class_: Any) -> frozenset[CodeType]:
    return frozenset(function.__code__ for _, function in functions_of(class_))


def _class_of(module: nn.Module) -> Any:  # mypy takes nn.Module's own __hash__ for its class's
    return type(module)


def _margin(code: CodeType) -> int:
    """How far the function stands to the right in its file."""
    lines = inspect.getsource(code).splitlines()
    return min(len(line) - len(line.lstrip()) for line in lines if line.strip())
