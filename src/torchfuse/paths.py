"""What one recorded run cannot show: other branches of the code, and other methods.

A fold changes what lies between a layer and its batch norm. The recording shows that nobody else
read it on the way that was taken; the source says whether there is another way. Code between the
two that has no branch, or branches only on the module's own configuration, holds for every input.
Where it does branch, and the pass looked at values or sizes of tensors, the match is left alone.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from dataclasses import dataclass
from functools import lru_cache
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, Any

from torch import nn

from torchfuse.rules import Match, Refusal, Subject

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torchfuse.graph import Call, Frame, ModuleCall

__all__ = ["uncertain"]

# Methods that set a model up or print it, and compute nothing from its inputs.
_SETUP = ("init", "reset", "extra_repr", "__repr__", "__setstate__", "__getstate__", "_load_from")


def uncertain(subject: Subject, match: Match) -> Refusal | None:
    """None if the match holds on every way through the code that the recording speaks for."""
    return _branches(subject, match) or _other_methods(subject, match)


# Branches


def _branches(subject: Subject, match: Match) -> Refusal | None:
    hint = "Call the batch norm directly on the layer's output, or put both in nn.Sequential."
    reads = subject.graph.reads
    done: set[tuple[CodeType, ...]] = set()
    for first, second in zip(match.firsts, match.seconds, strict=True):
        codes, meeting, names = _between(subject, first, second)
        if codes in done:
            continue
        done.add(codes)
        doubtful = [code for code in codes if not _branching(code).one_way]
        if not doubtful or (set(doubtful) == {meeting} and _is_direct(meeting, *names)):
            continue
        code = doubtful[0]
        where = f"{code.co_filename.rsplit('/', 1)[-1]}:{code.co_firstlineno}"
        if _branching(code).catches:
            return Refusal(
                f"The code between `{match.first}` and `{match.second}` ({where}) catches errors, "
                "and may take another branch for other inputs.",
                hint,
            )
        if reads:
            kind = "values" if any(read.kind == "data" for read in reads) else "shapes"
            return Refusal(
                f"A branch may depend on {kind} of tensors (read at {reads[0].where}): on its "
                f"other side `{match.second}` need not follow `{match.first}` (code at {where}).",
                hint,
            )
    return None


def _between(
    subject: Subject, first: Call, second: Call
) -> tuple[tuple[CodeType, ...], CodeType | None, tuple[str, str]]:
    """The user's functions that hand the tensor on; the one where the two meet; names of the two.

    The two are the modules, called by the function where they meet, that the calls ran in.
    """
    chains = [_enclosing(subject, call) for call in (first, second)]
    common = {id(entry) for entry in chains[0]} & {id(entry) for entry in chains[1]}
    codes: list[CodeType] = []
    meetings: list[CodeType | None] = []
    names: list[str] = []
    for call, chain in zip((first, second), chains, strict=True):
        groups = [call.frames, *(entry.callers for entry in chain if id(entry) not in common)]
        codes += [frame.code for frames in groups for frame in frames if _is_users(frame)]
        last = groups[-1]
        meetings.append(last[0].code if last and len(last) == 1 else None)
        below = [entry for entry in chain if id(entry) not in common]
        names.append(below[-1].path.rpartition(".")[2] if below else "")
    same = meetings[0] if meetings[0] is meetings[1] else None
    return tuple(dict.fromkeys(codes)), same, (names[0], names[1])


def _is_users(frame: Frame) -> bool:
    return not frame.module.startswith(("torch.", "torchfuse."))


def _enclosing(subject: Subject, call: Call) -> list[ModuleCall]:
    """The module calls around `call`, innermost first."""
    around = []
    index = call.within
    while index is not None:
        entry = subject.graph.module_calls[index]
        around.append(entry)
        index = entry.parent
    return around


@dataclass(frozen=True)
class _Branching:
    one_way: bool  # no branch, or only on the module's own configuration
    catches: bool


@lru_cache(maxsize=4096)
def _branching(code: CodeType) -> _Branching:
    function = _syntax(code)
    if function is None:
        return _Branching(one_way=False, catches=False)
    parameters = {arg.arg for arg in ast.walk(function.args) if isinstance(arg, ast.arg)}
    fixed = {"self", "cls"} | _globals_and_loops(function, parameters)
    one_way, catches = True, False
    for node in ast.walk(function):
        if isinstance(node, ast.Try):
            catches = True
        if isinstance(node, (ast.If, ast.IfExp, ast.While)):
            refuses = isinstance(node, ast.If) and _only_raises(node.body) and not node.orelse
            if not refuses and not _is_configuration(node.test, fixed, parameters):
                one_way = False
        elif isinstance(node, ast.BoolOp):
            if not all(_is_configuration(v, fixed, parameters) for v in node.values) and not (
                _is_in_a_raising_test(function, node)
            ):
                one_way = False
        elif isinstance(node, ast.For):
            mentioned = {n.id for n in ast.walk(node.iter) if isinstance(n, ast.Name)}
            if not mentioned & fixed:
                one_way = False
        elif isinstance(node, ast.comprehension):
            if not all(_is_configuration(test, fixed, parameters) for test in node.ifs):
                one_way = False
        elif isinstance(node, (ast.Try, ast.Match)):
            one_way = False
    return _Branching(one_way, catches)


def _globals_and_loops(function: ast.FunctionDef, parameters: set[str]) -> set[str]:
    """Names that are not the function's own variables, and loop variables over such."""
    stored = {
        node.id
        for node in ast.walk(function)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }
    names = {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}
    fixed = names - stored - parameters
    fixed.add("self")
    for node in ast.walk(function):
        if isinstance(node, (ast.For, ast.comprehension)):
            used = {n.id for n in ast.walk(node.iter) if isinstance(n, ast.Name)}
            if used <= fixed | {"self"}:
                fixed |= {n.id for n in ast.walk(node.target) if isinstance(n, ast.Name)}
    return fixed


def _is_configuration(test: ast.expr, fixed: set[str], parameters: set[str]) -> bool:
    """Whether `test` asks only about the module's attributes, constants, or absent arguments."""
    if isinstance(test, ast.BoolOp):
        return all(_is_configuration(value, fixed, parameters) for value in test.values)
    if isinstance(test, ast.UnaryOp):
        return _is_configuration(test.operand, fixed, parameters)
    if (
        isinstance(test, ast.Compare)
        and isinstance(test.left, ast.Name)
        and test.left.id in parameters
        and all(isinstance(op, (ast.Is, ast.IsNot)) for op in test.ops)
    ):
        return True  # an argument that was given here is given in the plan's scope
    for node in ast.walk(test):
        if isinstance(node, ast.Name) and node.id not in fixed:
            return False
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            allowed = name in ("isinstance", "len", "hasattr", "getattr", "callable", "bool", "any")
            if not allowed and not name.startswith(("torch.jit.is_", "torch.onnx.is_")):
                return False
    return True


def _only_raises(body: list[ast.stmt]) -> bool:
    return isinstance(body[-1], ast.Raise)


def _is_in_a_raising_test(function: ast.FunctionDef, inner: ast.BoolOp) -> bool:
    tests = [
        node.test
        for node in ast.walk(function)
        if isinstance(node, ast.Assert)
        or (isinstance(node, ast.If) and _only_raises(node.body) and not node.orelse)
    ]
    return any(found is inner for test in tests for found in ast.walk(test))


def _is_direct(code: CodeType | None, first: str, second: str) -> bool:
    """Whether the code calls `second` on the output of `first` with no way around it.

    `self.second(self.first(x))`, or `y = self.first(x)`, `z = self.second(y)` one after the other
    in one block, where no other statement mentions y before it is assigned again.
    """
    function = None if code is None else _syntax(code)
    if function is None:
        return False
    callers = [n for n in ast.walk(function) if _calls(n, second)]
    if len(callers) != 1 or sum(_calls(n, first) for n in ast.walk(function)) != 1:
        return False
    (outer,) = callers
    if any(_calls(node, first) for node in ast.walk(outer)):
        return not any(isinstance(n, (ast.IfExp, ast.BoolOp, ast.Lambda)) for n in ast.walk(outer))
    for block in _blocks(function):
        for number, statement in enumerate(block[:-1]):
            if not (
                isinstance(statement, ast.Assign)
                and len(statement.targets) == 1
                and isinstance(statement.targets[0], ast.Name)
                and any(_calls(node, first) for node in ast.walk(statement.value))
                and not _forks(statement.value)
            ):
                continue
            name, then = statement.targets[0].id, block[number + 1]
            if (
                isinstance(then, (ast.Return, ast.Assign))
                and then.value is not None
                and any(node is outer for node in ast.walk(then))
                and not _forks(then.value)
            ):
                again = isinstance(then, ast.Return) or any(
                    isinstance(target, ast.Name) and target.id == name for target in then.targets
                )
                return again or _loads(function, name) == _loads(then, name)
    return False


def _calls(node: ast.AST, attribute: str) -> bool:
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == attribute
    )


def _forks(value: ast.AST) -> bool:
    return any(isinstance(n, (ast.IfExp, ast.BoolOp, ast.Lambda)) for n in ast.walk(value))


def _blocks(function: ast.AST) -> Iterator[list[ast.stmt]]:
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


@lru_cache(maxsize=4096)
def _syntax(code: CodeType) -> ast.FunctionDef | None:
    """The function's syntax tree; None if there is no source, or it is no plain function."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(code)))
    except (OSError, TypeError, SyntaxError, IndentationError):
        return None
    return next((node for node in tree.body[:1] if isinstance(node, ast.FunctionDef)), None)


# Other methods


def _other_methods(subject: Subject, match: Match) -> Refusal | None:
    """A method that did not run here, and that would reach one of the two without the other."""
    pair = _Pair(subject, match)
    for path in _ancestors(match):
        module = subject.modules[path]
        for function in _methods_of(module).reaching(_children_towards(path, match)):
            mentions = _mentions(function)
            if _ran(subject, function, path):
                read = next(filter(None, (pair.breaks(path, m) for m in mentions)), None)
                if read is not None:
                    return Refusal(
                        f"{type(module).__name__}.{function.__name__} asks for `{read}`, which "
                        "folding changes.",
                        "Keep what it needs in an attribute of its own.",
                    )
                continue
            if path and not _is_mentioned(subject, function.__name__):
                continue
            reached = next(filter(None, (pair.split(path, m) for m in mentions)), None)
            if reached is not None and not pair.is_direct(path, function):
                return Refusal(
                    f"{type(module).__name__}.{function.__name__}, which did not run here, uses "
                    f"`{reached}` on its own.",
                    f"If it is needed, record it too: example_inputs=[…, Case(args, "
                    f'method="{function.__name__}")]; otherwise remove it.',
                )
    return None


def _ran(subject: Subject, function: FunctionType, path: str) -> bool:
    """Whether the method ran on the module at `path` in the recorded pass."""
    codes = subject.graph.codes
    if (function.__code__, path) in codes:
        return True
    # A call past nn.Module.__call__ (a compiled wrapper) runs, for all we see, in its caller.
    unseen = not subject.graph.module_calls_of(path)
    return unseen and any(code is function.__code__ for code, _ in codes)


def _is_mentioned(subject: Subject, method: str) -> bool:
    """Whether any code of the model's own classes names the method of an inner module.

    What nothing in the model calls could only be called past the model, from outside.
    """
    if method in ("forward", "__call__"):  # called as the module itself
        return True
    return any(method in _methods_named_by(class_) for class_ in subject.classes)


@lru_cache(maxsize=4096)
def _methods_named_by(class_: type) -> frozenset[str]:
    names: set[str] = set()
    for base in class_.__mro__:
        if base is nn.Module or base.__module__.startswith("torch."):
            continue
        for member in vars(base).values():
            function = member.fget if isinstance(member, property) else member
            if isinstance(function, FunctionType):
                names |= _names(function.__code__)
    return frozenset(names)


def _ancestors(match: Match) -> Iterator[str]:
    """Paths of all modules that contain the layer or the batch norm, each once."""
    seen: dict[str, None] = {}
    for path in match.modules:
        while path:
            path = path.rpartition(".")[0]
            seen.setdefault(path)
    return iter(seen)


def _children_towards(path: str, match: Match) -> set[str]:
    prefix = f"{path}." if path else ""
    return {p[len(prefix) :].split(".")[0] for p in match.modules if p.startswith(prefix)}


@dataclass(frozen=True)
class _Methods:
    """Methods of one class and its bases, by the attribute names that they mention."""

    by_name: dict[str, list[FunctionType]]
    dynamic: list[FunctionType]  # may reach any child

    def reaching(self, names: set[str]) -> list[FunctionType]:
        found = [f for name in names for f in self.by_name.get(name, ())]
        return list(dict.fromkeys([*found, *self.dynamic]))


_DYNAMIC = frozenset(
    {
        *("children", "named_children", "modules", "named_modules", "get_submodule", "_modules"),
        *("getattr", "__getattr__", "values", "items"),
    }
)


def _methods_of(module: nn.Module) -> _Methods:
    class_: Any = type(module)  # mypy takes nn.Module's own __hash__ for its class's
    return _methods(class_)


@lru_cache(maxsize=4096)
def _methods(class_: type) -> _Methods:
    by_name: dict[str, list[FunctionType]] = {}
    dynamic: list[FunctionType] = []
    taken: set[str] = set()
    for base in class_.__mro__:
        if base is nn.Module or base.__module__.startswith("torch."):
            continue
        for name, member in vars(base).items():
            if name in taken or (name.startswith("__") and name != "__call__"):
                continue
            function = member.fget if isinstance(member, property) else member
            if not isinstance(function, FunctionType) or any(word in name for word in _SETUP):
                continue
            taken.add(name)
            names = _names(function.__code__)
            for mentioned in names:
                by_name.setdefault(mentioned, []).append(function)
            if names & _DYNAMIC or issubclass(class_, (nn.Sequential, nn.ModuleList)):
                dynamic.append(function)
    return _Methods(by_name, dynamic)


def _names(code: CodeType) -> set[str]:
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= _names(constant)
        elif isinstance(constant, str):
            names.add(constant)
    return names


@dataclass(frozen=True)
class _Mention:
    """One way in which a method reaches what is below `self`: `self.layers[0].conv(x)`."""

    chain: tuple[str | None, ...]  # ("layers", "0", "conv"); None: any child
    usage: str  # "called", "compared", "read"


@lru_cache(maxsize=4096)
def _mentions(function: FunctionType) -> tuple[_Mention, ...]:
    tree = _syntax(function.__code__)
    if tree is None or not tree.args.args:
        return ()
    owner = tree.args.args[0].arg
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    called_names = {
        n.func.id
        for n in ast.walk(tree)
        if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
    }
    found = (
        _mention(node, parents, called_names)
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and node.id == owner and isinstance(node.ctx, ast.Load)
    )
    return tuple(mention for mention in found if mention is not None)


def _mention(
    node: ast.AST, parents: dict[ast.AST, ast.AST], called_names: set[str]
) -> _Mention | None:
    chain: list[str | None] = []
    while True:
        parent = parents[node]
        if isinstance(parent, ast.Attribute):
            if isinstance(parent.ctx, ast.Store):
                return None
            if parent.attr in ("children", "named_children", "modules", "named_modules"):
                return _dynamic(parent, parents, chain, called_names)
            if parent.attr in ("get_submodule", "_modules"):
                return _dynamic(parent, parents, chain, called_names)
            chain.append(parent.attr)
        elif isinstance(parent, ast.Subscript) and parent.value is node:
            index = parent.slice
            chain.append(str(index.value) if isinstance(index, ast.Constant) else None)
            if chain[-1] is None and isinstance(parents[parent], ast.Call):
                return _Mention(tuple(chain), "called")
        else:
            break
        node = parent
    if isinstance(parent, ast.Call):
        if parent.func is node:
            return _Mention(tuple(chain), "called")
        name = ast.unparse(parent.func)
        if name == "getattr" and not chain and len(parent.args) > 1:
            named = parent.args[1]
            if isinstance(named, ast.Constant) and isinstance(named.value, str):
                return _Mention((named.value,), "called")
            return _dynamic(parent, parents, chain, called_names)
        if name in ("isinstance", "hasattr", "len", "type", "id", "super") or "init" in name:
            return None
        if name in ("enumerate", "zip", "iter", "reversed", "list", "tuple", "next"):
            return _Mention((*chain, None), "called") if called_names else None
    if isinstance(parent, ast.Compare):
        return _Mention(tuple(chain), "compared")
    if isinstance(parent, ast.Delete):
        return None
    if isinstance(parent, (ast.For, ast.comprehension)) and parent.iter is node:
        return _Mention((*chain, None), "called") if called_names else None
    return _Mention(tuple(chain), "read")


def _dynamic(
    node: ast.AST,
    parents: dict[ast.AST, ast.AST],
    chain: list[str | None],
    called_names: set[str],
) -> _Mention | None:
    """Any child may be reached: it counts if what is reached is called."""
    while node in parents:
        parent = parents[node]
        if (
            isinstance(parent, ast.Call)
            and parent.func is node
            and not isinstance(node, ast.Attribute)
        ):
            return _Mention((*chain, None), "called")
        if isinstance(parent, (ast.For, ast.comprehension)):
            targets = {n.id for n in ast.walk(parent.target) if isinstance(n, ast.Name)}
            return _Mention((*chain, None), "called") if targets & called_names else None
        if isinstance(parent, ast.Assign):
            targets = {n.id for t in parent.targets for n in ast.walk(t) if isinstance(n, ast.Name)}
            return _Mention((*chain, None), "called") if targets & called_names else None
        node = parent
    return None


_TENSORS = frozenset({"weight", "bias", "running_mean", "running_var"})
_IDENTITY = nn.Identity()
_FACTS = frozenset({"dtype", "device", "shape", "size", "dim", "numel", "ndim", "requires_grad"})


class _Pair:
    """The layer and the batch norm of one match, as paths."""

    def __init__(self, subject: Subject, match: Match) -> None:
        self.subject = subject
        self.first, self.second = match.modules
        self._children: dict[str, frozenset[str]] = {}

    def split(self, path: str, mention: _Mention) -> str | None:
        """The path that `mention`, in a method of the module at `path`, uses without the other."""
        if len(mention.chain) < 2 and len(self._towards(path)) < 2:
            return None  # it leads no further than to a child that holds both
        for reached, rest in self._resolved(path, mention.chain):
            has_first, has_second = (self._contains(reached, p) for p in (self.first, self.second))
            if has_first == has_second or mention.usage == "compared":
                continue
            if not rest:
                return reached
            if rest[0] == "forward":
                return reached
            if rest[0] in _TENSORS and not (len(rest) > 1 and rest[1] in _FACTS):
                return f"{reached}.{rest[0]}"
            if has_second and reached == self.second and mention.usage == "read":
                return f"{reached}.{rest[0]}"
        return None

    def is_direct(self, path: str, function: FunctionType) -> bool:
        """Whether the method calls the batch norm right on the layer's output, and does no more."""
        below = f"{path}." if path else ""
        names = self.first.removeprefix(below), self.second.removeprefix(below)
        reaching = [m for m in _mentions(function) if self.split(path, m) is not None]
        return (
            [m.usage for m in reaching] == ["called", "called"]
            and {m.chain for m in reaching} == {(names[0],), (names[1],)}
            and _is_direct(function.__code__, *names)
        )

    def breaks(self, path: str, mention: _Mention) -> str | None:
        """What the mention asks for that is another thing, or gone, once the pair is folded."""
        for reached, rest in self._resolved(path, mention.chain):
            if not rest:
                continue
            if reached == self.second and not hasattr(_IDENTITY, rest[0]):
                return f"{reached}.{rest[0]}"
            if reached == self.first and rest[0] == "bias" and self._adds_bias:
                return f"{reached}.bias"
        return None

    def _towards(self, path: str) -> frozenset[str]:
        """Names of the children of the module at `path` that hold one of the two, or are it."""
        known = self._children.get(path)
        if known is None:
            below = f"{path}." if path else ""
            known = self._children[path] = frozenset(
                p[len(below) :].split(".")[0]
                for p in (self.first, self.second)
                if p.startswith(below)
            )
        return known

    @property
    def _adds_bias(self) -> bool:
        return getattr(self.subject.modules[self.first], "bias", None) is None

    def _resolved(
        self, path: str, chain: tuple[str | None, ...]
    ) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Modules that the chain leads to, and what of it is left (an attribute of that module)."""
        if not chain:
            return
        name, *rest = chain
        below = f"{path}." if path else ""
        if name is None:
            for child in self._towards(path):
                if rest:
                    yield from self._resolved(below + child, tuple(rest))
                else:
                    yield below + child, ()
        elif below + name in self.subject.modules:
            if rest:
                yield from self._resolved(below + name, tuple(rest))
            else:
                yield below + name, ()
        elif path:
            yield path, tuple(entry or "" for entry in chain)

    @staticmethod
    def _contains(path: str, inner: str) -> bool:
        return path == "" or inner == path or inner.startswith(f"{path}.")
