"""A deep copy of a model, or one sentence on why there is none."""

import copy
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from torchfuse.errors import UnsupportedError, first_line
from torchfuse.isolation.held_modules import modules_in
from torchfuse.isolation.snapshot import MODULE_TABLES
from torchfuse.isolation.warning_filters import known_warnings_ignored

__all__ = ["calls_of", "copied", "own_tables", "shell"]

Model = TypeVar("Model", bound=nn.Module)

_CONTAINERS = frozenset({dict, set, list, OrderedDict})


def copied(model: Model) -> Model:
    """Return a copy of `model` that can be changed while `model` stays as it is.

    Tensors that autograd computed (old-style weight norms) are copied as values; parameters that
    are views of one memory stay such. Functions that know a module of `model` (a `forward` that
    was replaced, a hook) know that of the copy.

    Raises:
        UnsupportedError: a part of it cannot be copied, or is its own copy.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            if type(value) in _CONTAINERS:
                # A module has a dozen, and copy.deepcopy goes through pickle's protocol for each.
                if not value:
                    memo[id(value)] = type(value)()
            elif isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    _copy_shared_memory(model, memo)
    try:
        # torch's own graphs hold what torch warns of when it is copied.
        ignoring = known_warnings_ignored() if isinstance(model, GraphModule) else nullcontext()
        with torch.inference_mode(False), ignoring:
            made = copy.deepcopy(model, memo)
            _require_apart(model, made)
            _make_leaves(model, made)
            _Rebinding(model, made).rebind()
            return made
    except UnsupportedError:
        raise
    except Exception as error:
        raise UnsupportedError(
            f"{type(model).__name__} cannot be copied ({first_line(error)}), and the model itself "
            "must stay as it is; leave out what copy.deepcopy cannot copy: locks, open files."
        ) from error


def _copy_shared_memory(model: nn.Module, memo: dict[int, Any]) -> None:
    """Copy parameters that are views of one memory as such; copy.deepcopy would separate them."""
    sharing: dict[int, dict[int, nn.Parameter]] = defaultdict(dict)
    for parameter in model.parameters():
        if parameter.layout is torch.strided:
            sharing[parameter.untyped_storage()._cdata][id(parameter)] = parameter
    for parameters in sharing.values():
        if len(parameters) > 1:
            storage = next(iter(parameters.values())).untyped_storage().clone()
            for key, parameter in parameters.items():
                view = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
                view.set_(storage, parameter.storage_offset(), parameter.shape, parameter.stride())
                memo[key] = nn.Parameter(view, requires_grad=parameter.requires_grad)


def _require_apart(model: nn.Module, made: nn.Module) -> None:
    """Raise UnsupportedError if the copy has a module or tensor of the original."""
    originals = [*model.modules(), *model.parameters(), *model.buffers()]
    known = {id(part) for part in originals}
    for name, part in (*made.named_modules(), *made.named_parameters(), *made.named_buffers()):
        if id(part) in known:
            what = f"`{name}` ({type(part).__name__})" if name else "it"
            raise UnsupportedError(
                f"{type(model).__name__} cannot be copied: by a __deepcopy__ of its own, {what} is "
                "the same object in the copy, and the model itself must stay as it is; let "
                "__deepcopy__ copy all modules and tensors."
            )


def _make_leaves(model: nn.Module, made: nn.Module) -> None:
    """Make the parameters of scripted parts what those of the original are, leaves.

    torch copies them as if that were a part of what gradients flow through, and warns of each whose
    `.grad` is read from then on, as `half()` does.
    """
    for module, its_copy in zip(model.modules(), made.modules(), strict=True):
        if isinstance(its_copy, torch.jit.ScriptModule):
            pairs = zip(
                module.parameters(recurse=False), its_copy.parameters(recurse=False), strict=True
            )
            for parameter, copy_of_it in pairs:
                copy_of_it.detach_().requires_grad_(parameter.requires_grad)


class _Rebinding:
    """Makes functions that know a module of the original anew, for the copy.

    `copy.deepcopy` takes functions as they are: a copy whose `forward` was replaced by a closure
    over the original (as libraries do that wrap models) would run the original.
    """

    def __init__(self, model: nn.Module, made: nn.Module) -> None:
        self.made = made
        copies = dict(made.named_modules(remove_duplicate=False))
        self.copies = {id(m): copies[path] for path, m in model.named_modules() if path in copies}
        self.functions: dict[int, FunctionType] = {}
        self.inside: set[int] = set()  # containers that are being looked into

    def rebind(self) -> None:
        """Replace such functions in the attributes and hooks of the copy's modules."""
        for module in self.made.modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue  # its attributes live in C++
            attributes = vars(module)
            for name, value in list(attributes.items()):
                if name not in MODULE_TABLES:
                    attributes[name] = self._rebound(value)
                elif name not in ("_parameters", "_buffers", "_modules"):
                    for key, hook in value.items():  # in place: handles refer to the table
                        value[key] = self._rebound(hook)

    def _rebound(self, value: Any) -> Any:
        """`value`, or what stands for it in the copy."""
        if isinstance(value, nn.Module):
            return self.copies.get(id(value), value)
        if isinstance(value, FunctionType):
            knows = any(id(module) in self.copies for module in modules_in(value))
            return self._function(value) if knows else value
        if isinstance(value, MethodType):
            parts = [value.__func__, value.__self__]
            function, owner = map(self._rebound, parts)
            return value if _same(parts, [function, owner]) else MethodType(function, owner)
        if type(value) is partial:
            parts = [value.func, *value.args, *value.keywords.values()]
            new = [self._rebound(part) for part in parts]
            if _same(parts, new):
                return value
            function, *given = new
            count = len(value.args)
            keywords = dict(zip(value.keywords, given[count:], strict=True))
            rebound = partial(function, *given[:count], **keywords)
            vars(rebound).update({k: self._rebound(v) for k, v in vars(value).items()})
            return rebound
        if type(value) in (list, tuple, dict) and id(value) not in self.inside:
            self.inside.add(id(value))
            parts = list(value.values() if type(value) is dict else value)
            new = [self._rebound(part) for part in parts]
            self.inside.remove(id(value))
            if not _same(parts, new):
                return (
                    dict(zip(value, new, strict=True)) if type(value) is dict else type(value)(new)
                )
        return value

    def _function(self, function: FunctionType) -> FunctionType:
        if id(function) in self.functions:
            return self.functions[id(function)]
        originals = function.__closure__ or ()
        cells = tuple(CellType() for _ in originals)
        made = FunctionType(
            function.__code__, function.__globals__, function.__name__, None, cells or None
        )
        self.functions[id(function)] = made  # before its cells are filled: it may know itself
        made.__qualname__, made.__doc__ = function.__qualname__, function.__doc__
        made.__module__, made.__annotations__ = function.__module__, function.__annotations__
        made.__defaults__ = self._rebound(function.__defaults__)
        made.__kwdefaults__ = self._rebound(function.__kwdefaults__)
        vars(made).update({name: self._rebound(v) for name, v in vars(function).items()})
        for cell, original in zip(cells, originals, strict=True):
            if original != CellType():  # an empty cell has no contents
                cell.cell_contents = self._rebound(original.cell_contents)
        return made


def _same(parts: Sequence[Any], others: Sequence[Any]) -> bool:
    return all(part is other for part, other in zip(parts, others, strict=True))


@contextmanager
def calls_of(model: nn.Module) -> Iterator[list[str]]:
    """A context that gives the paths of the modules of `model` that this thread calls in it."""
    called: list[str] = []
    thread = threading.get_ident()

    def noting(path: str) -> Callable[..., None]:
        def note(*_: Any) -> None:
            if threading.get_ident() == thread:
                called.append(path)

        return note

    with ExitStack() as stack:
        for path, module in model.named_modules():
            if not isinstance(module, torch.jit.ScriptModule):
                stack.callback(module.register_forward_pre_hook(noting(path)).remove)
        yield called


def shell(class_: type[nn.Module], attributes: dict[str, Any]) -> nn.Module:
    """Return a module of this class with these attributes: tensors shared, tables of its own."""
    made = class_.__new__(class_)
    vars(made).update(own_tables(attributes))
    return made


def own_tables(attributes: dict[str, Any]) -> dict[str, Any]:
    """Return attributes with the dictionaries (parameters, hooks …) copied one level deep."""

    def own(value: Any) -> Any:
        if type(value) in (dict, OrderedDict):  # copy.copy goes through pickle's protocol
            return value.copy()
        return copy.copy(value) if isinstance(value, dict) else value

    return {name: own(value) for name, value in attributes.items()}
