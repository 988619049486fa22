"""Run a model and leave no trace: whatever a call changed is put back afterwards."""

from __future__ import annotations

import contextvars
import copy
import inspect
import os
import random
import sys
import threading
import types
from collections import deque
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["CopyOnWrite", "Snapshot", "is_functional", "put_back", "random_state_kept", "restored"]

# How deep plain objects in a module's attributes are entered (module → cache → its list → …).
_DEPTH = 4

# Batch norms write their running statistics (arguments 3 and 4) when argument 5, `training`, is
# set, but these operators' schemas do not say so.
_BATCH_NORMS = {"aten::native_batch_norm", "aten::cudnn_batch_norm", "aten::miopen_batch_norm"}

# What a run that draws random numbers changes, and the generator behind `random.random()`.
_RANDOM_STATE = "Python's random state"
_GENERATOR = getattr(random.random, "__self__", None)
_STEPS = {"random", "getrandbits", "seed"}  # its methods that all others draw with

# Dictionaries that every module has: parameters, submodules, hooks.
MODULE_TABLES = frozenset(
    name for name, value in vars(nn.Module()).items() if isinstance(value, dict)
)


class CopyOnWrite(TorchDispatchMode):
    """Backs up memory that existed before the mode was entered, just before it is written to.

    It sees every ATen operator of this thread, also inside scripted functions. Backing up on the
    first write, and not the whole model beforehand, is what keeps a pass over a large model cheap.
    """

    supports_higher_order_operators = True  # torch.cond and the like, each as one operator

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would import its compiler just to keep it off this mode

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self._backups: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        self._fresh: set[int] = set()
        self.wrote = False  # whether memory from before was written to

    def __torch_dispatch__(
        self, func: Any, classes: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if not is_functional(func):
            self.back_up(func, args, kwargs)
        result = func(*args, **(kwargs or {}))
        self.note_fresh(args, result)
        return result

    def back_up(self, func: Any, args: tuple[Any, ...], kwargs: Any = None) -> None:
        """Copies what `func` is about to write, unless it was made under this mode."""
        written = self.written(func, args) if hasattr(func, "_schema") else _flat(args)
        for tensor in written:
            self._copy(tensor)
        if kwargs and hasattr(func, "_schema"):
            for tensor in _flat(kwargs.get(name) for name in _written_keywords(func)):
                self._copy(tensor)

    def written(self, func: Any, args: tuple[Any, ...]) -> list[torch.Tensor]:
        """The tensors among `args` that `func` writes to (none, for a higher-order operator)."""
        if not hasattr(func, "_schema"):
            return []
        positions = _written_arguments(func)
        if not positions or (func._schema.name in _BATCH_NORMS and not args[5]):
            return []
        return list(_flat(args[p] for p in positions if p < len(args)))

    def note_fresh(self, args: tuple[Any, ...], result: Any) -> None:
        """Remembers the memory of `result` as made under this mode, unless `args` brought it."""
        brought = {storage._cdata for tensor in _flat(args) if (storage := _storage(tensor))}
        for tensor in _flat((result,)):
            storage = _storage(tensor)
            if storage is not None and storage._cdata not in brought:
                self._fresh.add(storage._cdata)

    def _copy(self, tensor: torch.Tensor) -> None:
        storage = _storage(tensor)
        if storage is None or storage._cdata in self._fresh or storage._cdata in self._backups:
            return
        if storage.device.type != "meta":
            self.wrote = True
            self._backups[storage._cdata] = (storage, storage.clone())

    def put_back(self) -> None:
        """Restores every backed-up storage and forgets the backups."""
        for storage, backup in self._backups.values():
            storage.copy_(backup)
        self._backups.clear()


class Snapshot:
    """What it takes to put a model back after each of several runs, as `restored` does.

    Watching for writes to memory that was there before takes some time at every operator; those
    who know that there are none need not `watch`.
    """

    def __init__(self, model: Any, *, watch: bool = True) -> None:
        self.watch = watch
        self.wrote = False  # whether a run was seen to write to such memory
        modules = list(model.modules()) if isinstance(model, nn.Module) else []
        self._undo = _random_state()
        self._undo += _tensors(modules)
        self._undo += _script_tensors([m for m in modules if isinstance(m, torch.jit.ScriptModule)])
        kept = _Attributes()
        for module in modules:
            if not isinstance(module, torch.jit.ScriptModule):  # its attributes live in C++
                kept.keep_module(module)
        kept.keep_globals(modules)
        self.changed = kept.changed  # names of attributes and entries that a run changed
        self._undo.append(kept.put_back)
        self._undo.append(_noting_draws(kept.changed))

    def put_back(self) -> None:
        """Undo what a run did to attributes, flags, hooks and random states."""
        for step in reversed(self._undo):
            step()

    def changed_by(self, run: Callable[[], object]) -> set[str]:
        """What `run`, which is over and was put back, changed: the names in `changed`.

        It is called once more where a thread beside it may have drawn the random numbers (in
        numpy's, which threads seldom share, that is not looked for).
        """
        if _RANDOM_STATE in self.changed and not _draws(run):
            self.changed.remove(_RANDOM_STATE)
        return self.changed


@contextmanager
def restored(
    model: Any, mode: CopyOnWrite | None = None, snapshot: Snapshot | None = None
) -> Iterator[None]:
    """A context in which `model` can be called without gradients, and is unchanged afterwards.

    Put back: parameters, buffers and inputs written in place, tensors and modules assigned to
    attributes, `.grad`, training flags, hooks, plain containers and objects, random generators and
    arrays in attributes, and the random state of torch, Python and numpy. `model` may also be a
    plain callable: then only what is not an attribute of a module is. `snapshot` is one of `model`
    as it is now, for those who call it several times.
    """
    mode = CopyOnWrite() if mode is None else mode
    snapshot = Snapshot(model) if snapshot is None else snapshot
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if snapshot.watch:
                stack.enter_context(mode)
            if "torch._dynamo" in sys.modules:  # compiled parts run as the Python they came from
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            yield
    finally:
        with torch.no_grad():
            snapshot.put_back()
            snapshot.wrote |= mode.wrote
            mode.put_back()


def put_back(model: nn.Module, buffers: Mapping[str, torch.Tensor]) -> None:
    """Gives the buffers of those names copies of these values, whatever became of them."""
    copies: dict[int, torch.Tensor] = {}  # one for each tensor, so that shared ones stay shared
    for name, value in buffers.items():
        owner, _, attribute = name.rpartition(".")
        copied = copies.setdefault(id(value), value.clone())
        setattr(model.get_submodule(owner), attribute, copied)


@contextmanager
def random_state_kept() -> Iterator[None]:
    """A context after which the random state of torch, Python and numpy is as it was before."""
    undo = _random_state()
    try:
        yield
    finally:
        for step in undo:
            step()


def _noting_draws(changed: set[str]) -> Callable[[], object]:
    """Adds to `changed` whose random numbers were drawn, Python's or numpy's.

    (A tensor of torch's random numbers is asked for its truth, if a branch depends on it.)
    """
    before = random.getstate()
    numpy = sys.modules.get("numpy")
    numbers = numpy.random.get_state()[2] if numpy is not None else None

    def note() -> None:
        if random.getstate() != before:
            changed.add(_RANDOM_STATE)
        if numpy is not None and numpy.random.get_state()[2] != numbers:
            changed.add("numpy's random state")

    return note


def _draws(run: Callable[[], object]) -> bool:
    """Whether `run` draws Python's random numbers, and not a thread beside it.

    All threads draw from one generator; whose numbers they are is told by who calls it.
    """
    if sys.getprofile() is not None:  # who profiles the process goes on seeing all of it
        return True
    drawn = set()

    def look(_: object, event: str, called: Any) -> None:
        if event == "c_call" and getattr(called, "__self__", None) is _GENERATOR:
            drawn.add(called.__name__)

    sys.setprofile(look)
    try:
        run()
    finally:
        sys.setprofile(None)
    return not _STEPS.isdisjoint(drawn)


def _random_state() -> list[Callable[[], object]]:
    state = torch.get_rng_state()
    python_state = random.getstate()
    undo: list[Callable[[], object]] = [
        lambda: torch.set_rng_state(state),
        lambda: random.setstate(python_state),
    ]
    if torch.cuda.is_initialized():
        cuda_states = torch.cuda.get_rng_state_all()
        undo.append(lambda: torch.cuda.set_rng_state_all(cuda_states))
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy_state = numpy.random.get_state()
        undo.append(lambda: numpy.random.set_state(numpy_state))
    return undo


def _tensors(modules: list[nn.Module]) -> list[Callable[[], object]]:
    """Undoes `parameter.data = …`, `.grad = …` and `.requires_grad_(…)`."""
    seen: dict[int, torch.Tensor] = {}
    for module in modules:
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                seen[id(tensor)] = tensor
    before = [(t, t.data, _grad(t), t.requires_grad) for t in seen.values()]

    def undo() -> None:
        for tensor, data, grad, requires_grad in before:
            if tensor.data_ptr() != data.data_ptr() or tensor.shape != data.shape:
                tensor.data = data
            if _grad(tensor) is not grad:
                tensor.grad = grad
            if tensor.requires_grad != requires_grad:
                tensor.requires_grad_(requires_grad)

    return [undo]


def _grad(tensor: torch.Tensor) -> torch.Tensor | None:
    """Its gradient; torch warns where one is asked for that it never keeps."""
    return tensor.grad if tensor.is_leaf or tensor.retains_grad else None


def _script_tensors(modules: list[torch.jit.ScriptModule]) -> list[Callable[[], object]]:
    """Undoes `self.buffer = …` in scripted modules, whose attributes are TorchScript's own."""
    before = [
        (module, name, tensor)
        for module in modules
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
    ]

    def undo() -> None:
        for module, name, tensor in before:
            if getattr(module, name) is not tensor:
                setattr(module, name, tensor)

    return [undo]


class _Attributes:
    """Shallow copies of the modules' attributes, and of the plain containers below them."""

    def __init__(self) -> None:
        self.mappings: list[tuple[str, MutableMapping[Any, Any], dict[Any, Any]]] = []
        self.sequences: list[tuple[str, Any, list[Any]]] = []
        self.sets: list[tuple[str, set[Any], set[Any]]] = []
        self.globals: list[tuple[dict[str, Any], str, Any]] = []
        self.classes: list[tuple[Any, dict[str, Any]]] = []
        self.cells: list[tuple[types.CellType, Any]] = []
        self.variables: list[tuple[contextvars.ContextVar[Any], Any]] = []
        self.environment: dict[str, str] | None = None
        self.states: list[tuple[str, _State, Any]] = []  # of what has a state and no entries
        self.seen: set[int] = set()
        self.changed: set[str] = set()

    def keep_module(self, module: nn.Module) -> None:
        attributes = dict(vars(module))
        self.mappings.append(("", vars(module), attributes))
        for name, value in attributes.items():
            if name in MODULE_TABLES:
                self.mappings.append((name, value, dict(value) if value else _NOTHING))
            elif type(value) not in _PLAIN and not _is_atom(value):
                self.keep(value, _DEPTH, name)
                if isinstance(value, Iterator):
                    self.changed.add(name)  # whoever takes its next entry changes it

    def keep_globals(self, modules: list[nn.Module]) -> None:
        """Keeps what the modules' methods name, or hold, that is no attribute of a module."""
        classes: set[Any] = {type(module) for module in modules}
        known = {id(f): f for class_ in classes for f in _functions_of(class_)}
        for function in known.values():
            for cell in function.__closure__ or ():
                self._keep_cell(cell)
            self.mappings.append(("", vars(function), dict(vars(function)) or _NOTHING))
            for value in (
                *(function.__defaults__ or ()),
                *(function.__kwdefaults__ or {}).values(),
            ):
                self._keep_outside(value, function.__name__)
        for space, name in {
            (id(space), name): (space, name)
            for f in known.values()
            for space, name in _globals_of(f)
        }.values():
            value = space.get(name)
            if isinstance(value, _NUMBERS):
                self.globals.append((space, name, value))
            self._keep_outside(value, name)
        for base in dict.fromkeys(chain(*map(_users, classes))):
            self.classes.append((base, dict(vars(base))))
            for name, value in vars(base).items():
                self._keep_outside(value, name)

    def _keep_cell(self, cell: types.CellType) -> None:
        if cell == types.CellType():  # an empty one has no contents
            return
        value = cell.cell_contents
        if isinstance(value, _NUMBERS):
            self.cells.append((cell, value))
        self._keep_outside(value, "a closure")

    def _keep_outside(self, value: Any, name: str) -> None:
        kind = type(value)
        if kind in _PLAIN:
            return
        if isinstance(value, contextvars.ContextVar):
            try:
                self.variables.append((value, value.get()))
            except LookupError:
                return  # it has no value, and cannot be given none again
        elif kind in (list, dict, set, deque):
            self.keep(value, 0, name)
        elif isinstance(value, Iterator):
            self.changed.add(name)  # whoever takes its next entry changes it
        elif value is os:
            self.environment = dict(os.environ)
        elif isinstance(value, threading.local) or (
            not _is_atom(value)
            and not self._keep_state(value, name)
            and type(getattr(value, "__dict__", None)) is dict
            and not kind.__module__.startswith(("torch.", "functools", "logging"))
        ):
            self.keep(vars(value), 0, name)

    def keep(self, value: Any, depth: int, name: str) -> None:
        if id(value) in self.seen or depth < 0:
            return
        children: Any
        if isinstance(value, MutableMapping):
            entries = dict(value)
            self.mappings.append((name, value, entries))
            children = entries.values()
        elif isinstance(value, (list, deque)):
            children = list(value)
            self.sequences.append((name, value, children))
        elif isinstance(value, set):
            children = ()
            self.sets.append((name, value, set(value)))
        elif self._keep_state(value, name):
            children = ()
        elif isinstance(value, tuple):
            children = value
        elif isinstance(getattr(value, "__dict__", None), dict):
            children = (vars(value),)
        else:
            return
        self.seen.add(id(value))
        for child in children:
            if not _is_atom(child):
                self.keep(child, depth - 1, name)

    def _keep_state(self, value: Any, name: str) -> bool:
        """Keeps the state of a random generator or an array; False if it is neither."""
        state = _state_of(value)
        if state is not None and id(value) not in self.seen:
            self.seen.add(id(value))
            self.states.append((name, state, state.read()))
        return state is not None

    def put_back(self) -> None:
        for name, mapping, entries in self.mappings:
            if mapping or entries:
                self.changed.update(key or name for key in _refill(mapping, entries))
        for name, sequence, items in self.sequences:
            if _refill_sequence(sequence, items):
                self.changed.add(name)
        for name, value, members in self.sets:
            if value != members:
                self.changed.add(name)
                value.clear()
                value.update(members)
        for space, name, value in self.globals:
            if space.get(name) is not value:
                self.changed.add(name)
                space[name] = value
        for class_, attributes in self.classes:
            now = vars(class_)
            if len(now) == len(attributes) and all(map(is_, now.values(), attributes.values())):
                continue
            for name in {**now, **attributes}:
                before = attributes.get(name, _NOTHING)
                after = now.get(name, _NOTHING)
                if before is after or not isinstance(after, (*_NUMBERS, str)):
                    continue
                self.changed.add(name)
                delattr(class_, name) if before is _NOTHING else setattr(class_, name, before)
        for cell, value in self.cells:
            if cell.cell_contents is not value:
                self.changed.add("a closure")
                cell.cell_contents = value
        for variable, value in self.variables:
            if variable.get() is not value:
                self.changed.add(variable.name)
                variable.set(value)
        if self.environment is not None and dict(os.environ) != self.environment:
            self.changed.add("environ")
            os.environ.clear()
            os.environ.update(self.environment)
        for name, state, before in self.states:
            if not _is_same(state.read(), before):
                state.write(before)
                if not isinstance(before, torch.Tensor):
                    self.changed.add(name)


def _users(class_: Any) -> Iterator[Any]:
    """A class and its bases, without Python's and torch's own."""
    return (base for base in class_.__mro__ if not base.__module__.startswith(_OWN))


@lru_cache(maxsize=4096)
def _functions_of(class_: Any) -> tuple[types.FunctionType, ...]:
    """The methods of a class, and the functions that those name."""
    members = [
        inspect.unwrap(member)
        for base in _users(class_)
        for member in vars(base).values()
        if isinstance(member, types.FunctionType)
    ]
    found = [member for member in members if isinstance(member, types.FunctionType)]
    named = [space[name] for function in found for space, name in _globals_of(function)]
    found += [f for f in named if isinstance(f, types.FunctionType)]
    return tuple(f for f in found if not (f.__module__ or "").startswith(_OWN))


@lru_cache(maxsize=8192)
def _globals_of(function: types.FunctionType) -> tuple[tuple[dict[str, Any], str], ...]:
    """The global names in a function."""
    space = function.__globals__
    return tuple((space, name) for name in function.__code__.co_names if name in space)


@dataclass(frozen=True)
class _State:
    """How to read what a random generator or an array holds, and how to write it."""

    read: Callable[[], Any]
    write: Callable[[Any], object]


def _state_of(value: Any) -> _State | None:
    """The state of a random generator or an array; None if it is neither."""
    if isinstance(value, torch.Generator):
        return _State(value.get_state, value.set_state)
    if isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):
        return _State(value.getstate, value.setstate)
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return None
    if isinstance(value, numpy.random.Generator):
        bits = value.bit_generator
        return _State(
            lambda: copy.deepcopy(bits.state), lambda state: setattr(bits, "state", state)
        )
    if isinstance(value, numpy.random.RandomState):
        return _State(value.get_state, value.set_state)
    if isinstance(value, numpy.ndarray) and value.flags.writeable:
        return _State(value.copy, lambda entries: numpy.copyto(value, entries))
    return None


def _is_same(a: Any, b: Any) -> bool:
    """Whether two states are the same, bit for bit."""
    if isinstance(a, dict):
        return all(_is_same(a[key], b[key]) for key in a)
    if isinstance(a, tuple):
        return all(map(_is_same, a, b))
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    return bool(a.tobytes() == b.tobytes() if hasattr(a, "tobytes") else a == b)


_OWN = ("builtins", "torch.", "torchfuse.")  # their classes and functions are nobody's state
_NOTHING: dict[Any, Any] = {}
_PLAIN = frozenset({str, int, float, bool, type(None)})  # what most attributes are
_NUMBERS = (int, float, type(None))
# Modules are kept one by one, tensors by `_tensors`; the rest has no state that a call changes.
_ATOMS = (
    *(str, bytes, int, float, complex, type(None), type, nn.Module, torch.Tensor),
    *(types.FunctionType, types.MethodType, types.BuiltinFunctionType, types.ModuleType),
    *(torch.dtype, torch.device, torch.Size),
)


def _is_atom(value: Any) -> bool:
    """Whether there is nothing in it to put back, or others do that."""
    return issubclass(type(value), _ATOMS)  # (isinstance asks what is none for its `__class__`)


def _refill(mapping: MutableMapping[Any, Any], entries: dict[Any, Any]) -> list[str]:
    """Gives a dictionary its entries back; the names of those that were no tensors."""
    if (
        len(mapping) == len(entries)
        and all(map(is_, mapping, entries))
        and all(map(is_, mapping.values(), entries.values()))
    ):
        return []
    changed = [
        key if isinstance(key, str) else ""
        for key in {**mapping, **entries}
        if (now := mapping.get(key)) is not (before := entries.get(key))
        and not (_is_tensors(now) and _is_tensors(before))
    ]
    mapping.clear()
    mapping.update(entries)
    return changed


def _is_tensors(value: Any) -> bool:
    """Whether it is one of tensors' values, which code cannot branch on without being seen."""
    if isinstance(value, (list, tuple)):
        return bool(value) and all(map(_is_tensors, value))
    return isinstance(value, torch.Tensor)


def _refill_sequence(sequence: Any, items: list[Any]) -> bool:
    """Gives a list its entries back, and says whether they were others."""
    if len(sequence) == len(items) and all(map(is_, sequence, items)):
        return False
    sequence.clear()
    sequence.extend(items)
    return True


@lru_cache(maxsize=4096)
def is_functional(func: Any) -> bool:
    """Whether an operator of torch says that it writes nothing and gives no views, as most do.

    (Some give views without saying so: `unsafe_split`.)
    """
    schema = getattr(func, "_schema", None)
    return (
        schema is not None
        and schema.name.startswith("aten::")
        and schema.name not in _BATCH_NORMS
        and all(entry.alias_info is None for entry in (*schema.arguments, *schema.returns))
    )


@lru_cache(maxsize=4096)
def _written_arguments(func: Any) -> tuple[int, ...]:
    """Positions of the arguments that an ATen operator writes to."""
    if func._schema.name in _BATCH_NORMS:
        return (3, 4)
    return tuple(
        index
        for index, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )


@lru_cache(maxsize=4096)
def _written_keywords(func: Any) -> tuple[str, ...]:
    """The names of those that it is given by keyword alone: `out`, and others of that kind."""
    return tuple(
        argument.name
        for argument in func._schema.arguments
        if argument.kwarg_only and argument.alias_info is not None and argument.alias_info.is_write
    )


def _flat(values: Any) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _flat(value)


def _storage(tensor: torch.Tensor) -> torch.UntypedStorage | None:
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):  # sparse and other storage-less tensors
        return None
