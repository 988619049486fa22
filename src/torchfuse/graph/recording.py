"""Records what a model does in one call per case: a Graph.

Two views of the same pass are laid over each other. A `TorchFunctionMode` sees the torch functions
that Python calls, with the module they run in; a `TorchDispatchMode` sees every ATen operator of
the thread. An operator that reads memory which the function around it was not given, or that runs
in no recorded function at all (scripted code), is a reader too.
"""

from __future__ import annotations

import gc
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from torchfuse.cases import half_precision
from torchfuse.errors import CaptureError
from torchfuse.graph import Call, Frame, Graph, ModuleCall, Operand, Read, Value
from torchfuse.graph.ambient import MODES, asked_beside_tensors, catches
from torchfuse.graph.kinds import (
    COUNTABLE,
    DATA_READS,
    HARMLESS,
    METADATA,
    SCOPE,
    SHAPE_ONLY,
    kind_of,
    name_of,
    roles,
)
from torchfuse.graph.memory_blocks import MemoryBlocks, storage_key
from torchfuse.graph.norm_modules import with_norms_as_calls
from torchfuse.graph.parametrized import is_weight_hook
from torchfuse.graph.threads import handing_over
from torchfuse.isolation.snapshot import (
    MODULE_TABLES,
    CopyOnWrite,
    Snapshot,
    is_functional,
    restored,
)
from torchfuse.verifying.named_leaves import named_leaves

if TYPE_CHECKING:
    from torchfuse.cases import Case

__all__ = ["Questions", "Recorder", "record"]

# While a model runs, module calls are watched by wrapping a method of a class, for all threads.
_ONE_AT_A_TIME = threading.RLock()
# Methods of queues and locks that are not written in Python, and cannot be watched.
_SIGNALS = frozenset({"put", "put_nowait", "release"})
# The kinds whose path from the module's call is remembered: rules ask who passed their arguments.
_TRACED = frozenset({"conv", "conv_transpose", "linear", "batch_norm"})
_ANSWERED = DATA_READS | COUNTABLE
# What a thread holds that samples the stacks of the others (a profiler's, one of Dask's workers)
# is let go after some milliseconds.
_MOMENTS_S = (0.0, 0.001, 0.002, 0.004, 0.008, 0.016)


class Questions(Protocol):
    """Who is told what the code asks of tensors, and may answer otherwise."""

    def begin(self, graph: Graph) -> None:
        """A recording begins, which `graph` will hold."""

    def answer(self, name: str, real: Any) -> Any:
        """What code is told that asked a tensor or torch for `name`; the true answer is `real`."""

    def plain(self, value: Any) -> Any:
        """Arguments for torch, with what was made of answers as plain numbers."""

    def called(self, name: str, elements: int) -> None:
        """A function of torch is about to be given tensors of so many elements.

        An error raised here is its own.
        """


def record(
    model: nn.Module,
    cases: Sequence[Case],
    questions: Questions | None = None,
    accept: Callable[[Any], bool] | None = None,
) -> Graph:
    """The graph of what `model` does on `cases`; the model and its inputs are left as they were.

    With `questions`, the code is told what these answer when it asks for facts and values. Where
    `accept` is false of what the model returned, that is a CaptureError.
    """
    return Recorder(model).record(cases, questions, accept)


class Recorder:
    """Records one model as often as is asked for.

    What its modules and tensors are called is found once, for as long as the model is not edited:
    who is about to edit it says so before, by `let_go`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._keeps = True
        self._names: _Names | None = None

    def record(
        self,
        cases: Sequence[Case],
        questions: Questions | None = None,
        accept: Callable[[Any], bool] | None = None,
    ) -> Graph:
        """As `record` does."""
        with _ONE_AT_A_TIME:
            compiler = "torch._dynamo" in sys.modules
            try:
                recording = self._recorded(cases, questions, accept)
            except CaptureError:
                if compiler or "torch._dynamo" not in sys.modules:
                    raise
                # The model loaded torch's compiler (`torch.cond` does), which stumbles over our
                # modes unless it was there when the run began: `restored` then keeps it from
                # compiling.
                torch._dynamo.reset()
                recording = self._recorded(cases, questions, accept)
        graph = recording.graph
        with_norms_as_calls(graph, recording.names.modules)
        graph.reads += [
            Read(
                "error",
                f"{code.co_filename.rsplit('/', 1)[-1]}:{code.co_firstlineno}",
                path,
                0,
                code,
            )
            for code, path in graph.codes
            if catches(code)
        ]
        if any(_SIGNALS & {*code.co_names} for code, _ in graph.codes):
            graph.handed_over.update(dict.fromkeys(range(len(cases)), 0))
        return graph

    def _recorded(
        self,
        cases: Sequence[Case],
        questions: Questions | None,
        accept: Callable[[Any], bool] | None,
    ) -> _Recording:
        names = self._names or _Names(self.model)
        if self._keeps:
            self._names = names
        recording = _Recording(names, tuple(map(str, cases)), questions, accept)
        if questions is not None:
            questions.begin(recording.graph)
        for index, case in enumerate(cases):
            recording._torchfuse_run(index, case)
        return recording

    def let_go(self) -> None:
        """From now on the model may be another at each recording."""
        self._keeps, self._names = False, None


class _Names:
    """What a model's modules and tensors are called, as every recording of it begins."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = dict(model.named_modules())
        self.path_of: dict[int, str] = {}
        self.paths: dict[str, tuple[str, ...]] = {}
        self.values: list[Value] = []
        self.memory = MemoryBlocks(self.values)
        self.spanned: list[tuple[int, ...]] = []  # values that one of its tensors views at once
        named = list(model.named_modules(remove_duplicate=False))
        self._name_modules(named)
        self._name_tensors(named)

    def _name_modules(self, named: Sequence[tuple[str, nn.Module]]) -> None:
        paths: dict[str, list[str]] = {}
        for path, module in named:
            first = self.path_of.setdefault(id(module), path)
            paths.setdefault(first, []).append(path)
        self.paths = {first: tuple(names) for first, names in paths.items()}

    def _name_tensors(self, named: Sequence[tuple[str, nn.Module]]) -> None:
        names: dict[int, list[str]] = {}
        attributes: dict[int, list[str]] = {}
        plain = {id(module): [*_plain_attributes(module)] for module in self.modules.values()}
        self.memory.divide(
            tensor
            for module in self.modules.values()
            for tensor in (
                *module._parameters.values(),
                *module._buffers.values(),
                *(tensor for _, tensor in plain[id(module)]),
            )
            if tensor is not None and not is_lazy(tensor)
        )
        for path, module in named:
            prefix = f"{path}." if path else ""
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is None:
                    continue
                if is_lazy(tensor):
                    raise CaptureError(
                        f"{prefix}{name} has no shape yet (lazy module): run the model once on "
                        "real inputs before planning."
                    )
                names.setdefault(self._value_of(tensor), []).append(prefix + name)
            for name, tensor in plain.pop(id(module), ()):
                attributes.setdefault(self._value_of(tensor), []).append(prefix + name)
        for index in {*names, *attributes}:
            self.values[index] = Value(
                index, "model", tuple(names.get(index, ())), tuple(attributes.get(index, ()))
            )

    def _value_of(self, tensor: Tensor) -> int:
        value = self.memory.value_of(tensor, "model")
        self.spanned += self.memory.spanned
        self.memory.spanned.clear()
        return value


class _Recording:
    """The graph while it grows."""

    def __init__(
        self,
        names: _Names,
        cases: tuple[str, ...],
        questions: Questions | None,
        accept: Callable[[Any], bool] | None,
    ) -> None:
        self.names = names
        self.model = names.model
        self.questions = questions
        self.accept = accept
        self.graph = Graph(type(names.model).__name__, cases, [*names.values], paths=names.paths)
        self.memory = names.memory.copied(self.graph.values)
        self.case = 0
        self.before = 0  # so many values were known when this case began
        self.current: _Open | None = None
        self.running = False
        self.stack: list[int] = []  # open module calls
        self.path_of = names.path_of
        self.memory.spanned += names.spanned
        self._note_spanning()

    # Values

    def value_of(self, tensor: Tensor, origin: str) -> int:
        """The value that `tensor` views; a new one, of the given origin, if it is not known."""
        value = self.memory.value_of(tensor, origin)
        if self.memory.spanned:
            self._note_spanning()
        return value

    def _note_spanning(self) -> None:
        # A view of several parameters reads each of them.
        for values in self.memory.spanned:
            self.add("unseen", "a view of several parameters", values, self.module_path())
        self.memory.spanned.clear()

    def operand(self, tensor: Tensor, origin: str) -> Operand:
        """`tensor` as a call sees it."""
        seen = self.memory.operand(tensor, origin)
        if self.memory.spanned:
            self._note_spanning()
        return seen

    def answered(self, name: str, real: Any) -> Any:
        """What the code is told."""
        return real if self.questions is None else self.questions.answer(name, real)

    # Calls

    def add(self, kind: str, target: str, values: Sequence[int], module: str | None) -> None:
        """Adds a reader that is no torch function: an output, a hook, something that holds."""
        if values:
            operands = {str(i): Operand(v, (), (), 0, "") for i, v in enumerate(values)}
            self.graph.calls.append(
                Call(len(self.graph.calls), self.case, kind, target, module, operands)
            )

    def alive(self) -> tuple[int, ...]:
        """The values made in this pass that something still holds."""
        return tuple(self.memory.alive(self.before))

    def module_path(self) -> str | None:
        return self.graph.module_calls[self.stack[-1]].path if self.stack else None

    def values_in(self, value: Any) -> tuple[int, ...]:
        with torch._C.DisableTorchFunction():  # our own questions are not the model's
            return tuple(dict.fromkeys(self.value_of(t, "unknown") for t in _tensors(value)))

    def _torchfuse_run(self, index: int, case: Case) -> None:
        self.case = index
        for tensor in _tensors((case.args, dict(case.kwargs))):
            self.value_of(tensor, "input")
        self.before = before = len(self.graph.values)
        mode = _Operators(self)
        snapshot = Snapshot(self.model)
        with restored(self.model, mode, snapshot), _frozen(), ExitStack() as stack:
            stack.enter_context(_patched(self))
            stack.enter_context(_Functions(self))
            self.running = True
            try:
                output = case.method_of(self.model)(*case.args, **case.kwargs)
                if self.accept is not None and not self.accept(output):
                    raise CaptureError(f"{case} returns a {type(output).__name__}.")
            except CaptureError:
                raise
            except Exception as error:
                if (half := half_precision(self.model, case, error)) is not None:
                    raise half from error
                raise CaptureError(
                    f"{type(self.model).__name__} failed on {case}: {type(error).__name__}: {error}"
                ) from error
            finally:
                self.stack.clear()
                self.current = None
                self.running = False
            stack.close()
            returned = self.values_in([leaf for _, leaf in named_leaves(output)])
            self.add("output", "output", returned, "")
            self.memory.forget_objects()
            # What is alive now is held by something outside, or by the output in other ways.
            self._note_held(before, set(returned))
            del output

        def again() -> None:
            with restored(self.model):
                case.method_of(self.model)(*case.args, **case.kwargs)

        self.graph.changed |= snapshot.changed_by(again)

    def _note_held(self, before: int, returned: set[int]) -> None:
        """Marks what outlives the pass (before attributes are put back) as read."""
        held = self.memory.alive(before)
        for moment_s in _MOMENTS_S if threading.active_count() > 1 else _MOMENTS_S[:1]:
            if not set(held) - returned:
                break
            time.sleep(moment_s)
            gc.collect()  # a reference cycle is nobody's; what is older than the pass is frozen
            held = self.memory.alive(before)
        self.add("held", "held after the pass", [v for v in held if v not in returned], None)


class _Open:
    """A recorded function while it runs: the memory it was given or made, and what else it read."""

    __slots__ = ("extra", "ignored", "known", "written")

    def __init__(self, known: set[int], *, ignored: bool = False) -> None:
        self.known = known
        self.ignored = ignored
        self.extra: list[Operand] = []
        self.written: set[int] = set()


class _Functions(TorchFunctionMode):
    """The torch functions that Python calls."""

    def __init__(self, recording: _Recording) -> None:
        super().__init__()
        self.recording = recording

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        recording = self.recording
        if recording.questions is not None:
            args, kwargs = recording.questions.plain(args), recording.questions.plain(kwargs)
        if recording.current is not None:  # inside a function that is already recorded
            return func(*args, **kwargs)
        name = name_of(func)
        if name in METADATA:
            recording.current = _Open(set(), ignored=True)
            try:
                fact = func(*args, **kwargs)
            finally:
                recording.current = None
                if name not in HARMLESS and name not in SCOPE:
                    self._note_read("shape")
            return recording.answered(name, fact)
        if recording.questions is None:
            for frame in _around(sys._getframe(1)):
                if catches(frame.f_code) and not _is_torch(frame):
                    self._note_read("error", frame)
        known: set[int] = set()
        seen_args = _replaced(args, recording, known)
        positions = roles(func)
        attributes: dict[str, Any] = {}
        named: dict[str, Operand] = {}
        for position, value in enumerate(seen_args):
            role = positions[position] if position < len(positions) else str(position)
            _assign(role, value, named, attributes)
        seen_kwargs = _replaced(kwargs, recording, known)
        for key, value in seen_kwargs.items():
            _assign(key, value, named, attributes)
        if recording.questions is not None:
            recording.questions.called(name, sum(operand.numel for operand in named.values()))
        current = recording.current = _Open(known)
        try:
            result = func(*args, **kwargs)
        finally:
            recording.current = None
        kind = kind_of(func)
        if name in DATA_READS:
            self._note_read("data")
        elif name in COUNTABLE:
            self._note_read("shape")
        results = tuple(recording.operand(t, "call") for t in _tensors(result))
        for number, operand in enumerate(current.extra):
            named[f"unseen{number}"] = operand
        graph = recording.graph
        frames = _frames(sys._getframe(1)) if kind in _TRACED else ()
        around = recording.module_path()
        graph.codes.update((frame.code, around or "") for frame in frames)
        if name in SHAPE_ONLY:  # of the other tensor only the sizes count
            named = {role: operand for role, operand in named.items() if role == "0"}
        graph.calls.append(
            Call(
                index=len(graph.calls),
                case=recording.case,
                kind=kind,
                target=name,
                module_path=around,
                operands=named,
                results=results,
                written=frozenset(current.written),
                attributes=attributes,
                function=func,
                args=seen_args,
                kwargs=seen_kwargs,
                frames=frames,
                within=recording.stack[-1] if recording.stack else None,
            )
        )
        return recording.answered(name, result) if name in _ANSWERED else result

    def _note_read(self, kind: str, frame: Any = None) -> None:
        frame = frame or sys._getframe(2)
        while frame.f_globals.get("__name__") in ("torch._tensor", "torch.overrides"):
            frame = frame.f_back  # a method of Tensor that is written in Python
        if kind == "shape" and _is_torch(frame):
            return  # torch's own layers do not hand sizes on to anyone's branch
        where = f"{frame.f_code.co_filename.rsplit('/', 1)[-1]}:{frame.f_lineno}"
        recording = self.recording
        recording.graph.reads.append(
            Read(kind, where, recording.module_path(), len(recording.graph.calls), frame.f_code)
        )


class _Operators(CopyOnWrite):
    """The ATen operators of this thread, laid over the functions."""

    def __init__(self, recording: _Recording) -> None:
        super().__init__()
        self.recording = recording

    def __torch_dispatch__(
        self, func: Any, classes: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        with torch._C.DisableTorchFunction():
            writes = not is_functional(func)
            if writes:
                self.back_up(func, args, kwargs)
            result = func(*args, **(kwargs or {}))
            self.note_fresh(args, result)
        recording = self.recording
        current = recording.current
        if current is None:
            with torch._C.DisableTorchFunction():
                self._unseen(func, args, kwargs, result)
        elif not current.ignored:  # (no function mode is active here)
            known = current.known
            for tensor in _tensors((args, kwargs)):
                key = storage_key(tensor)
                if key not in known:
                    known.add(key)
                    current.extra.append(recording.operand(tensor, "unknown"))
            for tensor in _tensors(result):
                known.add(storage_key(tensor))
            for tensor in self.written(func, args) if writes else ():
                if storage_key(tensor) in known:
                    current.written.add(recording.value_of(tensor, "unknown"))
        return result

    def _unseen(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        recording = self.recording
        if not recording.running:
            return  # our own work after the call
        reads = {
            str(i): recording.operand(t, "unknown") for i, t in enumerate(_tensors((args, kwargs)))
        }
        if func is torch.ops.aten._local_scalar_dense.default:
            position = len(recording.graph.calls)
            recording.graph.reads.append(
                Read("data", "scripted code", recording.module_path(), position, None)
            )
        results = tuple(recording.operand(t, "call") for t in _tensors(result))
        written = frozenset(
            recording.value_of(tensor, "unknown") for tensor in self.written(func, args)
        )
        graph = recording.graph
        graph.calls.append(
            Call(
                index=len(graph.calls),
                case=recording.case,
                kind="unseen",
                target=str(func),
                module_path=recording.module_path(),
                operands=reads,
                results=results,
                written=written,
                within=recording.stack[-1] if recording.stack else None,
            )
        )


@contextmanager
def _frozen() -> Iterator[None]:
    """Garbage collection looks only at what is made inside."""
    if gc.get_freeze_count():  # frozen by the user, and to stay so
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def _patched(recording: _Recording) -> Iterator[None]:
    """Watches module calls, and what is handed to other threads and libraries."""
    original = nn.Module.__call__
    thread = threading.get_ident()

    def _torchfuse_call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        path = recording.path_of.get(id(module))
        if path is not None and threading.get_ident() != thread:
            recording.graph.handed_over[recording.case] = 0
            return original(module, *args, **kwargs)
        if path is None or recording.current is not None:
            return original(module, *args, **kwargs)
        return _torchfuse_module_call(recording, original, module, path, args, kwargs)

    def to_thread() -> None:
        graph = recording.graph
        if recording.case not in graph.handed_over:
            graph.handed_over[recording.case] = len(graph.calls)
        # What is gone by now, no thread can read.
        recording.add("unseen", "another thread", recording.alive(), recording.module_path())

    def to_library(tensor: Tensor) -> None:
        recording.add("unseen", "DLPack", recording.values_in(tensor), recording.module_path())

    def to_mode(name: str, real: Any, frame: Any) -> Any:
        graph = recording.graph
        if name not in MODES:
            graph.changed.add(f"the {name}")
            return real
        where = f"{frame.f_code.co_filename.rsplit('/', 1)[-1]}:{frame.f_lineno}"
        position = len(graph.calls)
        graph.reads.append(Read("mode", where, recording.module_path(), position, frame.f_code))
        return recording.answered(name, real)

    def _torchfuse_setattr(module: nn.Module, name: str, value: Any) -> None:
        recording.graph.written.add(name)
        setting(module, name, value)

    setting = nn.Module.__setattr__
    with handing_over(to_thread, to_library), asked_beside_tensors(to_mode):
        nn.Module.__call__ = _torchfuse_call  # type: ignore[method-assign]  # put back below
        nn.Module.__setattr__ = _torchfuse_setattr  # type: ignore[method-assign,assignment]  # too
        try:
            yield
        finally:
            nn.Module.__call__ = original  # type: ignore[method-assign]  # as it was
            nn.Module.__setattr__ = setting  # type: ignore[method-assign]  # too


def _torchfuse_module_call(
    recording: _Recording,
    original: Any,
    module: nn.Module,
    path: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    graph = recording.graph
    callers = _frames(sys._getframe(2))  # who called `_torchfuse_call`
    around = recording.module_path()
    graph.codes.update((frame.code, around or "") for frame in callers)
    position = len(graph.module_calls)
    parent = recording.stack[-1] if recording.stack else None
    first = len(graph.calls)
    inputs = recording.values_in((args, kwargs))
    entry = ModuleCall(path, recording.case, parent, inputs, (), first, first, callers)
    graph.module_calls.append(entry)
    recording.stack.append(position)
    hooks = _hooks_of(module)
    if hooks:
        recording.add("hook", f"{hooks} of {path or 'the model'}", inputs, path)
    try:
        result = original(module, *args, **kwargs)
        outputs = recording.values_in(result)
        if hooks and "forward_pre_hook" not in hooks:
            recording.add("hook", f"{hooks} of {path or 'the model'}", outputs, path)
    finally:
        if recording.stack:
            recording.stack.pop()
    graph.module_calls[position] = replace(entry, outputs=outputs, last=len(graph.calls))
    return result


def _hooks_of(module: nn.Module) -> str:
    """The kind of hook that sees what goes in or out of `module`; empty if there is none."""
    for hooks, name in (
        (module._forward_hooks, "forward_hook"),
        (module._backward_hooks, "backward_hook"),
        (module._backward_pre_hooks, "backward_pre_hook"),
        (nn.modules.module._global_forward_hooks, "global forward_hook"),
        (nn.modules.module._global_forward_pre_hooks, "global hook before forward"),
        (nn.modules.module._global_backward_hooks, "global backward_hook"),
    ):
        if hooks:
            return name
    # torch's own hooks that recompute a weight do not look at the inputs.
    own = [hook for hook in module._forward_pre_hooks.values() if not is_weight_hook(hook)]
    return "forward_pre_hook" if own else ""


def _frame(frame: Any) -> Frame:
    module = frame.f_globals.get("__name__", "")
    return Frame(frame.f_code, frame.f_lineno, module, frame.f_lasti)


def _frames(frame: Any) -> tuple[Frame, ...]:
    """The functions from `frame` out to the module call around, innermost first; not our own."""
    return tuple(map(_frame, _around(frame)))


def _around(frame: Any) -> Iterator[Any]:
    """The same, as Python's frames. A module that is none of the model's is a function like any."""
    while frame is not None and (name := frame.f_code.co_name) not in _RECORDED:
        if name != "_torchfuse_call" and not (name in _CALLING and _is_torch(frame)):
            yield frame
        frame = frame.f_back


def _is_torch(frame: Any) -> bool:
    return str(frame.f_globals.get("__name__", "")).startswith("torch.")


_RECORDED = frozenset({"_torchfuse_module_call", "_torchfuse_run"})
_CALLING = frozenset({"_call_impl", "_wrapped_call_impl"})


# What most arguments and attributes are, and what certainly holds no tensor.
_PLAIN = frozenset(
    {int, float, bool, str, type(None), torch.Size, torch.dtype, torch.device, torch.layout}
)


def _plain_attributes(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors in a module's attributes that are neither parameters nor buffers, by name."""
    for name, value in vars(module).items():
        if type(value) not in _PLAIN and name not in MODULE_TABLES:
            for tensor in _tensors(value):
                yield name, tensor


def _tensors(value: Any) -> list[Tensor]:
    """The tensors in nested arguments or results."""
    if type(value) is Tensor:
        return [value]
    found: list[Tensor] = []
    _collect(value, found)
    return found


def _collect(value: Any, found: list[Tensor]) -> None:
    kind = type(value)  # (isinstance asks an object that is none of these for its `__class__`)
    if kind in _PLAIN:
        return
    if issubclass(kind, Tensor):
        found.append(value)
    elif issubclass(kind, (list, tuple, set)):
        for entry in value:
            if type(entry) not in _PLAIN:
                _collect(entry, found)
    elif issubclass(kind, (dict, Mapping)):
        for entry in value.values():
            _collect(entry, found)


def _replaced(value: Any, recording: _Recording, known: set[int]) -> Any:
    """`value` with operands in place of tensors; notes their memory in `known`."""
    kind = type(value)
    if kind in _PLAIN:
        return value
    if issubclass(kind, Tensor):
        known.add(storage_key(value))
        return recording.operand(value, "unknown")
    if issubclass(kind, (list, tuple)):
        entries = [_replaced(entry, recording, known) for entry in value]
        return entries if issubclass(kind, list) else tuple(entries)
    if issubclass(kind, dict):
        return {key: _replaced(entry, recording, known) for key, entry in value.items()}
    return value


def _assign(
    role: str, value: Any, operands: dict[str, Operand], attributes: dict[str, Any]
) -> None:
    if isinstance(value, Operand):
        operands[role] = value
    elif isinstance(value, (list, tuple)) and any(isinstance(v, Operand) for v in value):
        for number, entry in enumerate(value):
            _assign(f"{role}.{number}", entry, operands, attributes)
    elif isinstance(value, dict):
        for key, entry in value.items():
            _assign(f"{role}.{key}", entry, operands, attributes)
    else:
        attributes[role] = value
