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
from functools import lru_cache
from itertools import count
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from torchfuse.capture.kinds import METADATA, kind_of_name
from torchfuse.copying import own_tables, shell
from torchfuse.errors import UnsupportedError, first_line
from torchfuse.restoring import restored

__all__ = [
    "NORM_TENSORS",
    "is_retraced",
    "leaves_it_to_torch",
    "operations",
    "traced",
    "without_batch_norm",
]

# What a batch norm holds, and what is gone once it is folded.
NORM_TENSORS = frozenset({"weight", "bias", "running_mean", "running_var", "num_batches_tracked"})
_BATCH_NORMS = (F.batch_norm, torch.batch_norm)
# What a batch norm checks of its input
_DIMENSIONS = ((nn.BatchNorm2d, 4), (nn.BatchNorm3d, 5))
_NUMBER = count()


def without_batch_norm(norm: nn.Module, graph: fx.Graph | None = None) -> nn.Module:
    """The module that stays where `norm` was: what its class does beside the batch norm.

    `norm` is in evaluation mode, and is left as it is. The result shares its children, and holds
    none of the batch norm's own tensors. `graph` is what `traced` gave, and is used up.

    Raises:
        UnsupportedError: that cannot be told apart; the message says what its forward does.
    """
    graph = _traced(norm) if graph is None else graph
    _take_out(graph)
    source, names = _code(graph)
    rest = _object(type(norm), source, names)
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


def operations(graph: fx.Graph) -> tuple[list[str], list[str]]:
    """The kinds of the functions, and the names of the children, that a traced forward calls."""
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

    def is_leaf_module(self, _: nn.Module, __: str) -> bool:
        """No child is gone into."""
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """What stands for a tensor."""
        return _Symbol(node, self)


def traced(norm: nn.Module) -> fx.Graph:
    """What the class's own forward does, its children as leaves.

    Raises:
        UnsupportedError: it does not do the same at every call; the message says what it does.
    """
    graph = _traced(norm)
    if _code(graph)[0] != _code(_traced(norm))[0]:
        raise UnsupportedError("does something else at every call")
    return graph


def _traced(norm: nn.Module) -> fx.Graph:
    stand_in = shell(type(norm), vars(norm))  # what its forward assigns, it assigns to this one
    known = (n for class_, n in _DIMENSIONS if isinstance(norm, class_))
    with restored(norm):  # its containers, and the random state
        try:
            graph = _Tracer(next(known, None)).trace(stand_in)
        except Exception as error:
            raise UnsupportedError(f"cannot be traced ({first_line(error)})") from error
        if _identities(stand_in) != _identities(norm) or _holds_symbols(vars(stand_in)):
            raise UnsupportedError("changes attributes")
    return graph


def _holds_symbols(value: Any) -> bool:
    return any(isinstance(leaf, fx.Proxy) for leaf in tree_leaves(value))


def _code(graph: fx.Graph) -> tuple[str, _Names]:
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
