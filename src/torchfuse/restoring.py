"""Run a model and leave no trace: whatever a call changed is put back afterwards."""

from __future__ import annotations

import random
import sys
import types
from collections import deque
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["CopyOnWrite", "restored"]

# How deep plain objects in a module's attributes are entered (module → cache → its list → …).
_DEPTH = 4

# Batch norms write their running statistics, but these operators' schemas do not say so.
_STATISTICS = {
    "aten::native_batch_norm": (3, 4, 5),
    "aten::cudnn_batch_norm": (3, 4, 5),
    "aten::miopen_batch_norm": (3, 4, 5),
}


class CopyOnWrite(TorchDispatchMode):
    """Backs up memory that existed before the mode was entered, just before it is written to.

    It sees every ATen operator of this thread, also inside scripted functions. Backing up on the
    first write, and not the whole model beforehand, is what keeps a pass over a large model cheap.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self._backups: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        self._fresh: set[int] = set()
        self._written: dict[Any, tuple[int, ...]] = {}

    def __torch_dispatch__(
        self, func: Any, classes: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.back_up(func, args)
        result = func(*args, **(kwargs or {}))
        self.note_fresh(args, result)
        return result

    def back_up(self, func: Any, args: tuple[Any, ...]) -> None:
        """Copies what `func` is about to write, unless it was made under this mode."""
        written = self._written.get(func)
        if written is None:
            written = self._written[func] = _written_arguments(func)
        for index in written:
            if index < len(args):
                for tensor in _flat((args[index],)):
                    self._copy(tensor)

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
            self._backups[storage._cdata] = (storage, storage.clone())

    def put_back(self) -> None:
        """Restores every backed-up storage and forgets the backups."""
        for storage, backup in self._backups.values():
            storage.copy_(backup)
        self._backups.clear()


@contextmanager
def restored(model: Any, mode: CopyOnWrite | None = None) -> Iterator[None]:
    """A context in which `model` can be called without gradients, and is unchanged afterwards.

    Put back: parameters, buffers and inputs written in place, tensors and modules assigned to
    attributes, `.grad`, training flags, hooks, plain containers and objects in attributes, and the
    random state of torch, Python and numpy. `model` may also be a plain callable: then only what
    is not an attribute of a module is.
    """
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    mode = CopyOnWrite() if mode is None else mode
    undo = _random_state()
    undo += _tensors(modules)
    undo += _attributes(modules)
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(mode)
            if "torch._dynamo" in sys.modules:  # compiled parts run as the Python they came from
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            yield
    finally:
        with torch.no_grad():
            for step in reversed(undo):
                step()
            mode.put_back()


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
    before = [(t, t.data, t.grad, t.requires_grad) for t in seen.values()]

    def undo() -> None:
        for tensor, data, grad, requires_grad in before:
            if tensor.data_ptr() != data.data_ptr() or tensor.shape != data.shape:
                tensor.data = data
            if tensor.grad is not grad:
                tensor.grad = grad
            if tensor.requires_grad != requires_grad:
                tensor.requires_grad_(requires_grad)

    return [undo]


def _attributes(modules: list[nn.Module]) -> list[Callable[[], object]]:
    """Undoes what assignments, and changes to plain containers and objects, did to attributes."""
    undo: list[Callable[[], object]] = []
    seen: set[int] = set()
    for module in modules:
        _keep(vars(module), _DEPTH, seen, undo)
    return undo


def _keep(value: Any, depth: int, seen: set[int], undo: list[Callable[[], object]]) -> None:
    if isinstance(value, _ATOMS) or id(value) in seen or depth < 0:
        return
    if isinstance(value, MutableMapping):
        entries = dict(value)
        undo.append(lambda: _refill(value, entries))
        children: Any = entries.values()
    elif isinstance(value, (list, deque)):
        items = list(value)
        undo.append(lambda: _refill_sequence(value, items))
        children = items
    elif isinstance(value, set):
        members = set(value)
        undo.append(lambda: value.symmetric_difference_update(value ^ members))
        children = ()
    elif isinstance(value, torch.Generator):
        state = value.get_state()
        undo.append(lambda: value.set_state(state))
        return
    elif isinstance(value, tuple):
        children = value
    elif isinstance(getattr(value, "__dict__", None), dict):
        children = (vars(value),)
    else:
        return
    seen.add(id(value))
    for child in children:
        if not isinstance(child, _ATOMS):
            _keep(child, depth - 1, seen, undo)


# Modules are kept one by one, tensors by `_tensors`; the rest has no state that a call changes.
_ATOMS = (
    *(str, bytes, int, float, complex, type(None), type, nn.Module, torch.Tensor),
    *(types.FunctionType, types.MethodType, types.BuiltinFunctionType, types.ModuleType),
)


def _refill(mapping: MutableMapping[Any, Any], entries: dict[Any, Any]) -> None:
    if len(mapping) == len(entries) and all(
        key is old_key and mapping[key] is old
        for key, (old_key, old) in zip(mapping, entries.items(), strict=True)
    ):
        return
    mapping.clear()
    mapping.update(entries)


def _refill_sequence(sequence: Any, items: list[Any]) -> None:
    if len(sequence) != len(items) or any(
        now is not old for now, old in zip(sequence, items, strict=True)
    ):
        sequence.clear()
        sequence.extend(items)


def _written_arguments(func: Any) -> tuple[int, ...]:
    """Positions of the arguments that an ATen operator writes to.

    `out=` arguments are keyword-only; torch's own functions pass new tensors there.
    """
    schema = func._schema
    by_name = _STATISTICS.get(schema.name, ())
    return tuple(
        index
        for index, argument in enumerate(schema.arguments)
        if index in by_name or (argument.alias_info is not None and argument.alias_info.is_write)
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
