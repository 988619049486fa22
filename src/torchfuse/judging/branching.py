"""What one function branches on: its module's configuration, or what may change between calls."""

from __future__ import annotations

import ast
import builtins
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from torchfuse.judging.sources import ANY_NAME, RESTLESS, names_in, syntax_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import CodeType

__all__ = ["Branching", "Reader", "branching_of", "tests_of"]

_BUILTINS = frozenset(vars(builtins))
# Functions of `math` that look into a whole number without asking it.
_MATH = frozenset(
    {"comb", "factorial", "gcd", "isqrt", "lcm", "log", "log10", "log1p", "log2", "perm"}
)


# Functions that answer from their arguments alone, and tell nothing of a tensor's values.
_PLAIN = frozenset(
    {
        *("isinstance", "len", "hasattr", "getattr", "callable", "bool", "any", "all", "range"),
        *("enumerate", "zip", "reversed", "list", "tuple", "int", "str", "type", "sorted", "min"),
        *("max", "dict", "set"),
    }
)


@dataclass(frozen=True)
class Branching:
    """How a function chooses its way."""

    one_way: bool  # no branch, or only on the module's own configuration
    only_tests: bool = False  # each branch is a test, and what is tested can be followed
    catches: bool = False
    restless: str = ""  # what a branch asks for that changes from call to call


@lru_cache(maxsize=8192)
def branching_of(code: CodeType, volatile: frozenset[str]) -> Branching:
    """How the function chooses its way; `volatile` are attributes that are state."""
    function = syntax_of(code)
    if function is None:
        return Branching(one_way=False)
    tests = list(tests_of(function))
    asked = {name for test in tests for name in _attributes_and_names(test)}
    restless = sorted(asked & (RESTLESS | volatile))
    reader = Reader(function, volatile)
    one_way = all(reader.is_configuration(test) for test in tests) and reader.chooses_nothing()
    nodes = list(ast.walk(function))
    catches = "suppress" in names_in(code) or any(isinstance(node, ast.Try) for node in nodes)
    matches = any(isinstance(node, ast.Match) for node in nodes)
    if catches or matches:
        one_way = False
    only_tests = reader.chooses_nothing() and not matches and reader.can_be_followed(code)
    return Branching(one_way, only_tests, catches, restless[0] if restless else "")


def tests_of(function: ast.FunctionDef) -> Iterator[ast.expr]:
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


class Reader:
    """What in one function is fixed: its module's configuration, globals, loops over those."""

    def __init__(self, function: ast.FunctionDef, volatile: frozenset[str]) -> None:
        self.function = function
        self.volatile = volatile
        # Those of functions inside it, too
        self.parameters = {a.arg for a in ast.walk(function) if isinstance(a, ast.arg)}
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
            if isinstance(node, ast.Name) and (
                node.id not in self.fixed or node.id in self.volatile
            ):
                return False
            if isinstance(node, ast.Attribute) and (
                node.attr in self.volatile | RESTLESS or ANY_NAME in self.volatile
            ):
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
            and test.left.id
            in {a.arg for a in ast.walk(self.function.args) if isinstance(a, ast.arg)}
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

    def can_be_followed(self, code: CodeType) -> bool:
        """Whether no number goes where it is read without being asked: a range, a logarithm."""
        names = names_in(code)
        if names & {"np", "numpy", "ctypes", "itertools"} or ("math" in names and names & _MATH):
            return False
        for node in ast.walk(self.function):
            if isinstance(node, ast.comprehension) and not self.is_fixed_loop(node.iter):
                return False
            if isinstance(node, ast.Call) and not self._is_fixed_range(node):
                return False
        return True

    def _is_fixed_range(self, call: ast.Call) -> bool:
        is_range = isinstance(call.func, ast.Name) and call.func.id == "range"
        return not is_range or all(map(self.is_fixed, call.args))

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
        if isinstance(call.func, ast.Call):  # `nn.ConstantPad2d((1, 0), 0)(x)`
            made = call.func
            values = [*made.args, *(keyword.value for keyword in made.keywords)]
            return self._is_fixed_callee(made) and all(map(self.is_fixed, (made.func, *values)))
        computed = isinstance(call.func, (ast.Subscript, ast.IfExp, ast.Dict))
        return not computed or self.is_fixed(call.func)
