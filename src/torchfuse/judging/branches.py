"""Whether the code between a layer and its batch norm has another way than the recorded one.

The recording shows that nobody else read the layer's output on the way that was taken. Code that
has no branch, or branches only on the module's own configuration, takes that way for every input.
Where it does branch, and Python looked at values or facts of tensors, the match is left alone.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import math
import sys
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, Any

from torch import Tensor

from torchfuse.judging.sources import RESTLESS, syntax_of
from torchfuse.rules import Match, Refusal, Subject

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torchfuse.graph import Call, ModuleCall

__all__ = ["has_other_ways", "is_direct", "may_fork", "mentioned_elsewhere"]

_HINT = "Call the batch norm directly on the layer's output, or put both in nn.Sequential."

_BUILTINS = frozenset(vars(builtins))
# Functions that answer from their arguments alone, and tell nothing of a tensor's values.
_PLAIN = frozenset(
    {
        *("isinstance", "len", "hasattr", "getattr", "callable", "bool", "any", "all", "range"),
        *("enumerate", "zip", "reversed", "list", "tuple", "int", "str", "type", "sorted", "min"),
        *("max", "dict", "set"),
    }
)


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
        codes = tuple(dict.fromkeys((*between.codes, *looked)))
        if codes in done:
            continue
        done.add(codes)
        doubtful = [code for code in codes if not _branching(code, volatile).one_way]
        if set(doubtful) == {between.meeting} and is_direct(between.meeting, *between.names):
            continue
        for code in doubtful:
            where = f"{code.co_filename.rsplit('/', 1)[-1]}:{code.co_firstlineno}"
            pair = f"`{match.first}` and `{match.second}`"
            branching = _branching(code, volatile)
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
            if reads:
                kind = "values" if any(read.kind == "data" for read in reads) else "shapes"
                return Refusal(
                    f"A branch may depend on {kind} of tensors (read at {reads[0].where}): on its "
                    f"other side `{match.second}` need not follow `{match.first}` (code at "
                    f"{where}).",
                    _HINT,
                )
    return None


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
        if names & _foreign_attributes(code) and has_other_ways(subject, code):
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


def has_other_ways(subject: Subject, code: CodeType) -> bool:
    """Whether the code may take another way for other inputs than it took in the recording."""
    branching = _branching(code, subject.volatile)
    doubtful = bool(subject.graph.reads) or branching.catches or bool(branching.restless)
    return doubtful and not branching.one_way


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
        codes.extend(_helpers(subject, code, span))
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


def _helpers(subject: Subject, code: CodeType, span: _Span) -> Iterator[CodeType]:
    """The user's plain functions and methods that run within the span, and what those call."""
    class_: Any = type(subject.modules[span.path])
    waiting = list(_called(code, span.python_module, class_, span.after, span.before))
    seen: set[CodeType] = set()
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


@dataclass(frozen=True)
class _Branching:
    one_way: bool  # no branch, or only on the module's own configuration
    catches: bool = False
    restless: str = ""  # what a branch asks for that changes from call to call


@lru_cache(maxsize=8192)
def _branching(code: CodeType, volatile: frozenset[str]) -> _Branching:
    function = syntax_of(code)
    if function is None:
        return _Branching(one_way=False)
    tests = list(_tests(function))
    asked = {name for test in tests for name in _attributes_and_names(test)}
    restless = sorted(asked & (RESTLESS | volatile))
    reader = _Reader(function, volatile)
    one_way = all(reader.is_configuration(test) for test in tests) and reader.chooses_nothing()
    nodes = list(ast.walk(function))
    catches = any(isinstance(node, ast.Try) for node in nodes)
    if catches or any(isinstance(node, ast.Match) for node in nodes):
        one_way = False
    return _Branching(one_way, catches, restless[0] if restless else "")


def _tests(function: ast.FunctionDef) -> Iterator[ast.expr]:
    """What the function branches on, apart from checks that only raise."""
    raising: set[int] = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Assert) or (
            isinstance(node, ast.If) and isinstance(node.body[-1], ast.Raise) and not node.orelse
        ):
            raising |= {id(inner) for inner in ast.walk(node.test)}
    for node in ast.walk(function):
        if isinstance(node, (ast.If, ast.IfExp, ast.While)):
            if id(node.test) not in raising:
                yield node.test
        elif isinstance(node, ast.BoolOp) and id(node) not in raising:
            yield node
        elif isinstance(node, ast.comprehension):
            yield from node.ifs


def _attributes_and_names(test: ast.expr) -> Iterator[str]:
    for node in ast.walk(test):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Name):
            yield node.id


class _Reader:
    """What in one function is fixed: its module's configuration, globals, loops over those."""

    def __init__(self, function: ast.FunctionDef, volatile: frozenset[str]) -> None:
        self.function = function
        self.volatile = volatile
        self.parameters = {a.arg for a in ast.walk(function.args) if isinstance(a, ast.arg)}
        nodes = list(ast.walk(function))
        names = {node.id for node in nodes if isinstance(node, ast.Name)}
        stored = {
            node.id
            for node in nodes
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
        }
        # A parameter may well have the name of a builtin: `input`.
        self.fixed = ((names | _BUILTINS) - stored - self.parameters) | {"self", "cls"}
        for node in nodes:
            if isinstance(node, (ast.For, ast.comprehension)) and self.is_fixed_loop(node.iter):
                self.fixed |= {n.id for n in ast.walk(node.target) if isinstance(n, ast.Name)}

    def is_fixed(self, value: ast.expr) -> bool:
        """Whether `value` is the same at every call."""
        for node in ast.walk(value):
            if isinstance(node, ast.Name) and node.id not in self.fixed:
                return False
            if isinstance(node, ast.Attribute) and node.attr in self.volatile | RESTLESS:
                return False
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                plain = name in _PLAIN or name.endswith(
                    (".children", ".named_children", ".items", ".values", ".keys", ".modules")
                )
                if not plain and not name.startswith(("torch.jit.is_", "torch.onnx.is_")):
                    return False
        return True

    def is_fixed_loop(self, loop: ast.expr) -> bool:
        """Whether a loop over `loop` runs equally often at every call."""
        if isinstance(loop, ast.Call) and ast.unparse(loop.func) == "zip":
            return any(self.is_fixed(argument) for argument in loop.args)
        return self.is_fixed(loop)

    def is_configuration(self, test: ast.expr) -> bool:
        """Whether `test` asks only about what is fixed, or whether an argument is given."""
        if isinstance(test, ast.BoolOp):
            return all(self.is_configuration(value) for value in test.values)
        if isinstance(test, ast.UnaryOp):
            return self.is_configuration(test.operand)
        if (
            isinstance(test, ast.Compare)
            and isinstance(test.left, ast.Name)
            and test.left.id in self.parameters
            and all(isinstance(op, (ast.Is, ast.IsNot)) for op in test.ops)
        ):
            return True  # an argument that was given here is given in the plan's scope
        return self.is_fixed(test)

    def chooses_nothing(self) -> bool:
        """Whether no module is picked, and no loop run, by what is not fixed."""
        for node in ast.walk(self.function):
            if isinstance(node, ast.For) and not self.is_fixed_loop(node.iter):
                return False
            if isinstance(node, ast.Subscript) and not self._is_fixed_item(node):
                return False
            if isinstance(node, ast.Call) and not self._is_fixed_callee(node):
                return False
        return True

    def _is_fixed_item(self, item: ast.Subscript) -> bool:
        """`self.layers[i]`: whether always the same child is meant, if it is one at all."""
        if isinstance(item.slice, (ast.Slice, ast.Tuple)):
            return True
        roots = {node.id for node in ast.walk(item.value) if isinstance(node, ast.Name)}
        of_self = roots & {"self", *(argument.arg for argument in self.function.args.args[:1])}
        return not of_self or self.is_fixed(item.slice)

    def _is_fixed_callee(self, call: ast.Call) -> bool:
        if isinstance(call.func, ast.Name) and call.func.id == "getattr":
            return all(self.is_fixed(argument) for argument in call.args[1:2])
        computed = isinstance(call.func, (ast.Call, ast.Subscript, ast.IfExp, ast.Dict))
        return not computed or self.is_fixed(call.func)


def is_direct(code: CodeType | None, first: str, second: str) -> bool:
    """Whether the code calls `second` on the output of `first` with no way around it.

    `self.second(self.first(x))`, or `y = self.first(x)`, `z = self.second(y)` one after the other
    in one block, where no other statement mentions y before it is assigned again.
    """
    function = None if code is None else syntax_of(code)
    if function is None:
        return False
    outers = [n for n in ast.walk(function) if _calls(n, second)]
    if len(outers) != 1 or sum(_calls(n, first) for n in ast.walk(function)) != 1:
        return False
    (outer,) = outers
    assert isinstance(outer, ast.Call)
    if not outer.args:
        return False
    source = _unmoved(outer.args[0])
    if _calls(source, first):
        return True
    if not isinstance(source, ast.Name):
        return False
    return any(
        _assigns(one, source.id, first) and _uses_only(function, then, outer, source.id)
        for block in _blocks(function)
        for one, then in pairwise(block)
    )


def _unmoved(value: ast.expr) -> ast.expr:
    """`y` of `y.flatten(0, 1)`: what a chain of tensor methods starts from."""
    while (
        isinstance(value, ast.Call)
        and isinstance(value.func, ast.Attribute)
        and not (isinstance(value.func.value, ast.Name) and value.func.value.id == "self")
        and isinstance(value.func.value, (ast.Call, ast.Name))
        and not _is_torch(value.func.value)
    ):
        value = value.func.value
    return value


def _is_torch(value: ast.expr) -> bool:
    return isinstance(value, ast.Name) and value.id in ("torch", "F", "nn")


def _calls(node: ast.AST, attribute: str) -> bool:
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == attribute
    )


def _assigns(statement: ast.stmt, name: str, first: str) -> bool:
    """Whether the statement is `name = self.first(…)`, moved or not."""
    return (
        isinstance(statement, ast.Assign)
        and len(statement.targets) == 1
        and isinstance(statement.targets[0], ast.Name)
        and statement.targets[0].id == name
        and _calls(_unmoved(statement.value), first)
    )


def _uses_only(function: ast.FunctionDef, then: ast.stmt, outer: ast.Call, name: str) -> bool:
    """Whether `then` calls the batch norm on every way, and `name` is not used after it."""
    if not isinstance(then, (ast.Return, ast.Assign)) or then.value is None:
        return False
    if all(node is not outer for node in ast.walk(then.value)):
        return False
    if any(isinstance(n, (ast.IfExp, ast.BoolOp, ast.Lambda)) for n in ast.walk(then.value)):
        return False
    again = isinstance(then, ast.Return) or any(
        isinstance(target, ast.Name) and target.id == name for target in then.targets
    )
    return again or _loads(function, name) == _loads(then, name)


def _blocks(function: ast.AST) -> Iterable[list[ast.stmt]]:
    for node in ast.walk(function):
        for name in ("body", "orelse", "finalbody"):
            block = getattr(node, name, None)
            if isinstance(block, list) and block:
                yield block


def _loads(tree: ast.AST, name: str) -> int:
    return sum(
        isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, ast.Load)
        for node in ast.walk(tree)
    )
