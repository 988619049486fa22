"""A batch norm class that does more (an activation, a dropout) without its batch norm.

The class's forward is traced by `torch.fx` with its children as leaves, the call of the batch norm
is taken out, and what is left becomes the forward of a generated subclass. Children, hooks and
names stay, and the module copies, pickles, scripts and exports like any other.
"""

from __future__ import annotations

import importlib
import inspect
import linecache
import re
from contextlib import contextmanager
from contextvars import ContextVar
from enum import Enum
from functools import lru_cache
from itertools import count
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from torchfuse.errors import UnsupportedError, first_line
from torchfuse.graph.kinds import METADATA, kind_of_name
from torchfuse.graph.norm_modules import NORM_TENSORS
from torchfuse.isolation.model_copy import own_tables, shell
from torchfuse.isolation.snapshot import MODULE_TABLES, Snapshot, restored

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator

__all__ = [
    "class_of",
    "code_of",
    "is_retraced",
    "leaves_it_to_torch",
    "operations",
    "recipe_of",
    "retraced_class",
    "settings_of",
    "traced",
    "traced_once",
    "without_batch_norm",
]

_BATCH_NORMS = (F.batch_norm, torch.batch_norm)
# What a batch norm checks of its input
_DIMENSIONS = ((nn.BatchNorm2d, 4), (nn.BatchNorm3d, 5))
_WIDTH = "num_features"
_ANOTHER_WIDTH = 7919  # of no batch norm: a prime
_NUMBER = count()


class Traced(NamedTuple):
    """What the forward of a batch norm class does beside the batch norm."""

    functions: list[str]  # the kinds of the functions that it calls, the batch norm among them
    children: list[str]  # the names of the children that it calls
    source: str  # of a forward without the batch norm
    names: _Names  # what that knows


# By class and settings, while `traced_once` lasts.
_SEEN: ContextVar[dict[Hashable, Traced] | None] = ContextVar("_SEEN", default=None)


@contextmanager
def traced_once() -> Iterator[None]:
    """A context in which batch norms of one class with the same settings are traced once.

    It is as long as one plan or fusion: what a forward reads from outside (a global flag) may be
    another thing later.
    """
    token = _SEEN.set({})
    try:
        yield
    finally:
        _SEEN.reset(token)


def without_batch_norm(norm: nn.Module, known: Traced | None = None) -> nn.Module:
    """The module that stays where `norm` was: what its class does beside the batch norm.

    `norm` is in evaluation mode, and is left as it is. The result shares its children, and holds
    none of the batch norm's own tensors. `known` is what `traced` gave.

    Raises:
        UnsupportedError: that cannot be told apart; the message says what its forward does.
    """
    known = traced(norm) if known is None else known
    rest = _object(type(norm), known.source, known.names)
    vars(rest).update(own_tables(vars(norm)))
    for name in NORM_TENSORS:
        for table in (rest._parameters, rest._buffers):
            if name in table:
                table[name] = None
    vars(rest).update(affine=False, track_running_stats=False)
    return rest


def leaves_it_to_torch(norm: nn.Module) -> bool:
    """Whether the forward of a subclass of torch's batch norms goes on to torch's own."""
    class_: Any = type(norm)  # mypy takes nn.Module's own __hash__ for its class's
    own = class_.__mro__[: class_.__mro__.index(_BatchNorm)]
    forwards = [vars(base)["forward"] for base in own if "forward" in vars(base)]
    return all("super" in inspect.unwrap(forward).__code__.co_names for forward in forwards)


def operations(known: Traced) -> tuple[list[str], list[str]]:
    """The kinds of the functions, and the names of the children, that a traced forward calls."""
    return known.functions, known.children


def _operations(graph: fx.Graph) -> tuple[list[str], list[str]]:
    functions, children = [], []
    for node in graph.nodes:
        if node.op == "call_module":
            children.append(str(node.target))
        elif node.op in ("call_function", "call_method"):
            name = getattr(node.target, "__name__", str(node.target))
            if name not in METADATA and name not in ("getattr", "_assert"):
                functions.append(kind_of_name(name))
    return functions, children


def is_retraced(module: nn.Module) -> bool:
    """Whether the module is what stayed of a batch norm."""
    return isinstance(vars(type(module)).get("_torchfuse_retraced"), tuple)


class _Symbol(fx.Proxy):
    """A tensor that is traced; the input's number of dimensions is known."""

    @property
    def ndim(self) -> Any:
        """As a number, where it is one; else a symbol too."""
        tracer: Any = self.tracer
        known = tracer.dimensions if self.node.op == "placeholder" else None
        return self.__getattr__("ndim") if known is None else known

    def dim(self) -> Any:
        """The same."""
        return self.ndim


class _Tracer(fx.Tracer):
    """Goes into nothing but the class's own code."""

    proxy_buffer_attributes = True

    def __init__(self, dimensions: int | None) -> None:
        super().__init__()
        self.dimensions = dimensions
        self.reads_width = False

    def is_leaf_module(self, _: nn.Module, __: str) -> bool:
        """No child is gone into."""
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """What stands for a tensor."""
        return _Symbol(node, self)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """The attribute, or what stands for it if it is a tensor."""
        self.reads_width |= attr == _WIDTH  # which is no plain attribute of a stand-in
        return super().getattr(attr, attr_val, parameter_proxy_cache)


def traced(norm: nn.Module) -> Traced:
    """What the class's own forward does beside the batch norm, its children as leaves.

    Raises:
        UnsupportedError: it does not do the same at every call, or the batch norm cannot be taken
            out of it; the message says what it does.
    """
    seen = _SEEN.get()
    key = None if seen is None else settings_of(norm)
    if seen is not None and key in seen:
        return seen[key]
    graph, _ = _traced(shell(type(norm), vars(norm)), norm)
    source = code_of(graph)[0]
    shared = key is not None and source == _of_another(norm)
    if not shared and source != code_of(_traced(shell(type(norm), vars(norm)), norm)[0])[0]:
        raise UnsupportedError("does something else at every call")
    functions, children = _operations(graph)
    _take_out(graph)
    known = Traced(functions, children, *code_of(graph))
    if seen is not None and shared:
        seen[key] = known
    return known


def _of_another(norm: nn.Module) -> str | None:
    """The traced source for a norm of another width with no values; None if it asks for those."""
    if hasattr(type(norm), _WIDTH):
        return None
    stand_in = shell(type(norm), vars(norm))
    # Where a module's tensors are, the tracer is asked for it.
    stand_in._buffers[_WIDTH] = vars(stand_in).pop(_WIDTH, None)
    for table in (stand_in._parameters, stand_in._buffers):
        for name, tensor in table.items():
            if isinstance(tensor, Tensor):
                shape = [_ANOTHER_WIDTH] if tensor.dim() == 1 else tensor.shape
                other: Any = torch.empty(shape, dtype=tensor.dtype, device="meta")
                is_parameter = isinstance(tensor, nn.Parameter)
                table[name] = nn.Parameter(other, requires_grad=False) if is_parameter else other
    try:
        graph, reads_width = _traced(stand_in, norm)
    except UnsupportedError:
        return None
    return None if reads_width else code_of(graph)[0]


def _traced(stand_in: nn.Module, norm: nn.Module) -> tuple[fx.Graph, bool]:
    """What the forward does, and whether it asks for the width.

    What it assigns, it assigns to `stand_in`, which has the children of `norm`.
    """
    before = _identities(stand_in)
    known = next((n for class_, n in _DIMENSIONS if isinstance(norm, class_)), None)
    tracer = _Tracer(known)
    snapshot = Snapshot(norm)  # its containers, and the random state
    with restored(norm, snapshot=snapshot):
        try:
            graph = tracer.trace(stand_in)
        except Exception as error:
            raise UnsupportedError(f"cannot be traced ({first_line(error)})") from error
        if _identities(stand_in) != before or _holds_symbols(vars(stand_in)):
            raise UnsupportedError("changes attributes")

    def again() -> None:
        with restored(norm):
            _Tracer(known).trace(stand_in)

    if snapshot.changed_by(again):
        raise UnsupportedError("does something else at every call")
    return graph, tracer.reads_width


def settings_of(module: nn.Module) -> Hashable | None:
    """All that a module's code can ask of it but values and sizes; None if that is not plain."""
    try:
        return _of_module(module)
    except (_NotPlainError, RecursionError):
        return None


class _NotPlainError(Exception):
    pass


def _of_module(module: nn.Module) -> Hashable:
    class_: Any = type(module)  # mypy takes nn.Module's own __hash__ for its class's
    asked = (class_.__getattr__, class_.__getattribute__)
    if asked != (nn.Module.__getattr__, nn.Module.__getattribute__):
        raise _NotPlainError
    own = {name: entry for name, entry in vars(module).items() if name != _WIDTH}
    return class_, tuple((name, _entry(name, entry)) for name, entry in own.items())


def _plain_settings(value: Any) -> Hashable:
    kind = type(value)  # (one of a subclass may have attributes of its own)
    if kind in (tuple, list, torch.Size):
        return kind, tuple(map(_plain_settings, value))
    if kind is set:
        return set, frozenset(map(_plain_settings, value))
    if kind is float:
        return float, repr(value)  # 0.0 is equal to -0.0
    if kind not in _PLAIN and not isinstance(value, (type, Enum)):
        raise _NotPlainError
    return kind, value


def _entry(name: str, value: Any) -> Hashable:
    if name in ("_parameters", "_buffers"):
        return tuple((key, tensor is None or tensor.dim()) for key, tensor in value.items())
    if name == "_modules":
        return tuple(
            (key, None if child is None else _of_module(child)) for key, child in value.items()
        )
    if name in MODULE_TABLES:
        if value:
            raise _NotPlainError  # a hook
        return None
    return _plain_settings(value)


# Functions stand for themselves.
_PLAIN: frozenset[Any] = frozenset(
    {
        *(int, bool, str, bytes, complex, type(None), FunctionType, BuiltinFunctionType),
        *(torch.dtype, torch.device),
    }
)


def _holds_symbols(value: Any) -> bool:
    return any(isinstance(leaf, fx.Proxy) for leaf in tree_leaves(value))


def code_of(graph: fx.Graph) -> tuple[str, _Names]:
    """The source of a forward that does what the graph says, and the names that it knows."""
    code = graph.python_code("self")
    words = frozenset(re.findall(r"\w+", code.src))
    return code.src, _Names({name: code.globals[name] for name in code.globals if name in words})


def _identities(module: nn.Module) -> dict[str, Any]:
    return {
        name: {key: id(entry) for key, entry in value.items()}
        if isinstance(value, dict)
        else id(value)
        for name, value in vars(module).items()
    }


def _take_out(graph: fx.Graph) -> None:
    """Takes the one batch norm out of the graph; raises if more than that would change."""
    norms = [node for node in graph.nodes if node.target in _BATCH_NORMS]
    if len(norms) != 1:
        raise UnsupportedError(f"calls a batch norm {len(norms)} times")
    (norm,) = norms
    source = norm.args[0] if norm.args else norm.kwargs["input"]
    norm.replace_all_uses_with(source)
    graph.erase_node(norm)
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op != "get_attr")
    for node in graph.nodes:
        name = getattr(node.target, "__name__", str(node.target))
        if node.op == "get_attr" and node.target in NORM_TENSORS:
            raise UnsupportedError(f"reads `{node.target}` beside the batch norm")
        if any(a.op == "get_attr" for a in node.all_input_nodes) and _writes(name):
            raise UnsupportedError("writes to a tensor of its own")
        if "training" in node.kwargs or "dropout" in name:
            raise UnsupportedError("calls a function that is told the training mode")


def _writes(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")


class _Names:
    """The names that generated code knows, by what can be pickled; equal if the names are."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Names) and self.values == other.values

    def __hash__(self) -> int:
        return hash(tuple(sorted(self.values)))

    def __reduce__(self) -> Any:
        modules = {k: v.__name__ for k, v in self.values.items() if isinstance(v, ModuleType)}
        others = {k: v for k, v in self.values.items() if k not in modules}
        return _names, (modules, others)


def _names(modules: dict[str, str], others: dict[str, Any]) -> _Names:
    return _Names({**{k: importlib.import_module(v) for k, v in modules.items()}, **others})


def retraced_class(class_: Any, source: str, names: _Names) -> Any:
    """The subclass whose forward is this code; of what `class_` was made from, if it is one."""
    return _class(recipe_of(class_)[0], source, names)


def recipe_of(class_: Any) -> tuple[Any, ...]:
    """What can be pickled of a class: itself, or what `class_of` makes it again from."""
    recipe: tuple[Any, ...] = vars(class_).get("_torchfuse_retraced", (class_,))
    return recipe


def class_of(recipe: tuple[Any, ...]) -> Any:
    """The class that `recipe_of` was given."""
    return recipe[0] if len(recipe) == 1 else _class(*recipe)


def _object(base: Any, source: str, names: _Names) -> nn.Module:
    class_ = _class(base, source, names)
    made = class_.__new__(class_)
    assert isinstance(made, nn.Module)
    return made


@lru_cache(maxsize=1024)
def _class(base: type[nn.Module], source: str, names: _Names) -> Any:
    """The subclass of `base` whose forward is this code; the same for the same code."""
    known: dict[str, Any] = dict(names.values)
    # Where inspect, and so torch.jit.script, looks for the source of code that is in no file.
    file = f"<what stayed of {base.__name__} {next(_NUMBER)}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    exec(compile(source, file, "exec"), known)  # noqa: S102 - what torch.fx wrote from the class
    namespace = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__reduce_ex__": _reduce,
        "_torchfuse_retraced": (base, source, names),
        "forward": known["forward"],
    }
    try:
        return type(base.__name__, (base,), namespace)
    except Exception as error:
        raise UnsupportedError(f"has no subclasses ({first_line(error)})") from error


def _reduce(self: Any, _: Any) -> Any:
    return _object, type(self)._torchfuse_retraced, self.__dict__
