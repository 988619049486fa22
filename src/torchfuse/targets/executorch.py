"""Today's mobile target: an ExecuTorch program (`.pte`) for XNNPACK, and the runtime it runs on."""

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from torchfuse.delegation import Delegation, DelegationWarning, delegation_of
from torchfuse.errors import ArtifactError, InputError, UnsupportedError, first_line
from torchfuse.exported_norms import fold_batch_norms
from torchfuse.first_load import SCALAR_TYPES
from torchfuse.inputs import Case
from torchfuse.quieting import quiet, quiet_runtime
from torchfuse.targets.fast_lowering import without_waste

__all__ = ["ExecutorchModel", "Lowered", "capture", "lower", "set_threads", "threads"]

_DELEGATE = "XNNPACK"


@dataclass(frozen=True)
class Lowered:
    """An ExecuTorch program, and what the delegate took of it."""

    program: bytes
    delegation: Delegation
    signature: Mapping[str, Any]  # how arguments and results are nested, for ExecutorchModel


def capture(
    model: nn.Module, case: Case, dynamic_shapes: Any = None
) -> torch.export.ExportedProgram:
    """Return the exported program of `model`, with no batch norm left that could be folded.

    Raises:
        UnsupportedError: torch.export cannot capture the model, or not with these dynamic shapes.
    """
    program = _export(model, case, dynamic_shapes)
    if any(node.target is torch.ops.aten.batch_norm.default for node in program.graph.nodes):
        with quiet():
            graph_module = program.module(check_guards=False)
        if fold_batch_norms(graph_module):
            program = _export(graph_module, case, dynamic_shapes)
    return program


def _export(model: nn.Module, case: Case, dynamic_shapes: Any) -> torch.export.ExportedProgram:
    try:
        with quiet(), torch.no_grad():
            return torch.export.export(
                model, case.args, dict(case.kwargs), dynamic_shapes=dynamic_shapes
            )
    except Exception as error:
        raise UnsupportedError(
            f"torch.export cannot capture {type(model).__name__} for {case}"
            f"{' with these dynamic shapes' if dynamic_shapes else ''}: {first_line(error)}"
        ) from error


def lower(program: torch.export.ExportedProgram) -> Lowered:
    """Return `program` as an ExecuTorch program that runs on XNNPACK as far as XNNPACK can.

    What XNNPACK does not take runs on ExecuTorch's portable kernels; a DelegationWarning says so
    if it matters.

    Raises:
        UnsupportedError: ExecuTorch cannot lower it, or this runtime lacks an operator it needs.
    """
    with quiet():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        try:
            with _Reasons() as reasons, without_waste():
                edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
                delegation = delegation_of(
                    edge.exported_program().graph_module, _DELEGATE, reasons.by_node
                )
                executorch_program = edge.to_executorch()
        except Exception as error:
            raise UnsupportedError(
                f"ExecuTorch cannot lower the model: {first_line(error)}"
            ) from error
    _check_operators(executorch_program.executorch_program)
    if delegation.warning:
        warnings.warn(delegation.warning, DelegationWarning, stacklevel=3)
    return Lowered(bytes(executorch_program.buffer), delegation, _signature(program))


class _Reasons(logging.Handler):
    """The partitioner's reasons for leaving nodes, which it only writes to its DEBUG log."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.by_node: dict[str, str] = {}
        self._logger = logging.getLogger("executorch.backends.xnnpack.partition")

    def emit(self, record: logging.LogRecord) -> None:
        why = record.msg  # a WhyNoPartition, not its text
        if hasattr(why, "node") and hasattr(why, "reason"):
            self.by_node[str(why.node)] = str(why.reason).rstrip(".")

    def __enter__(self) -> "_Reasons":
        self._before = (self._logger.level, self._logger.propagate)
        self._logger.setLevel(logging.DEBUG)
        self._logger.propagate = False
        self._logger.addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._logger.removeHandler(self)
        self._logger.level, self._logger.propagate = self._before
        self._logger.setLevel(self._before[0])  # also forgets what it cached as enabled


def _check_operators(program: Any) -> None:
    available = set(_runtime().operator_registry.operator_names)
    for plan in program.execution_plan:
        needed = {f"{op.name}.{op.overload}" if op.overload else op.name for op in plan.operators}
        if missing := sorted(needed - available):
            raise UnsupportedError(
                f"The ExecuTorch runtime has no kernel for {', '.join(missing)}, which the model "
                "needs; replace the operator in the model."
            )


def _signature(program: torch.export.ExportedProgram) -> dict[str, Any]:
    try:
        return {
            "in_spec": pytree.treespec_dumps(program.call_spec.in_spec),
            "out_spec": pytree.treespec_dumps(program.call_spec.out_spec),
        }
    except NotImplementedError:  # a container without a registered name: results come flat
        return {}


def _runtime() -> Any:
    with quiet(), quiet_runtime():
        from executorch.runtime import Runtime

        return Runtime.get()


# The runtime's thread pool is one per process. Methods that were loaded with the one before keep
# pointing at it, so they are loaded again before they run.
_pool = 0


def threads() -> int:
    """Return how many threads the runtime's thread pool has."""
    from executorch.extension.pybindings import portable_lib

    return int(portable_lib._threadpool_get_thread_count())


def set_threads(count: int) -> None:
    """Give the runtime, for the whole process, a thread pool of `count` threads."""
    global _pool
    _runtime()
    from executorch.extension.pybindings import portable_lib

    if count != threads():
        with quiet_runtime():
            portable_lib._unsafe_reset_threadpool(count)
        _pool += 1


class ExecutorchModel:
    """A loaded program: call it as the model it was made from.

    Results are nested as the model's; without a `signature` (a program that torchfuse did not
    write), one output comes as a tensor and several as a tuple.

    Raises:
        ArtifactError: the runtime refuses the program.
    """

    def __init__(self, program: bytes, signature: Mapping[str, Any] | None = None) -> None:
        signature = signature or {}
        load = pytree.treespec_loads
        self._in_spec = load(signature["in_spec"]) if "in_spec" in signature else None
        self._out_spec = load(signature["out_spec"]) if "out_spec" in signature else None
        self._bytes = program
        self._load()

    def _load(self) -> None:
        try:
            # The method points into the program, and the program into the bytes: all are kept.
            with quiet_runtime():
                self._program = _runtime().load_program(self._bytes)
                self._method = self._program.load_method("forward")
        except (RuntimeError, KeyError) as error:
            raise ArtifactError(
                f"ExecuTorch's runtime cannot load the program: {first_line(error)}; it may need "
                "another version, or a backend or kernel that this build of the runtime lacks."
            ) from error
        self._pool = _pool

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program.

        Raises:
            InputError: other inputs than it was made for.
        """
        if self._pool != _pool:
            self._load()
        inputs = self._flat(args, kwargs)
        self._check(inputs)
        try:
            outputs: Sequence[Any] = self._method.execute(inputs)
        except RuntimeError as error:
            raise InputError(
                f"The program cannot run on {_described(inputs)}: {first_line(error)}."
            ) from error
        if self._out_spec is not None:
            return pytree.tree_unflatten(outputs, self._out_spec)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def _flat(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        if self._in_spec is None:
            if kwargs:
                raise InputError(
                    f"The program does not say which of its inputs are {', '.join(kwargs)}; give "
                    "all inputs by position."
                )
            flat = pytree.tree_leaves(args)
        else:
            names = self._in_spec.child(1).context
            if set(names) == set(kwargs):
                kwargs = {name: kwargs[name] for name in names}
            flat, spec = pytree.tree_flatten((args, kwargs))
            if spec != self._in_spec:
                raise InputError(
                    f"The program takes {self._in_spec.child(0).num_children} inputs by position "
                    f"and {list(names)} by name; got {len(args)} and {list(kwargs)}, or other "
                    "nesting."
                )
        # The runtime takes default strides only.
        return [leaf.contiguous() if isinstance(leaf, torch.Tensor) else leaf for leaf in flat]

    def _check(self, inputs: list[Any]) -> None:
        # The runtime only gives an error number, and may run on sizes above what was declared.
        described = self._method.metadata
        expected = [_tensor_info(described, index) for index in range(described.num_inputs())]
        if len(inputs) == len(expected) and all(map(_accepts, expected, inputs)):
            return
        shown = ", ".join(
            "a number" if info is None else f"{_shown(info.sizes())} {_shown_dtype(info)}"
            for info in expected
        )
        raise InputError(
            f"Expected {shown} (where a size is dynamic, at most that), got {_described(inputs)}."
        )


def _tensor_info(described: Any, index: int) -> Any:
    try:
        return described.input_tensor_meta(index)
    except RuntimeError:  # not a tensor
        return None


def _accepts(info: Any, value: Any) -> bool:
    if info is None or not isinstance(value, torch.Tensor):
        return info is None and not isinstance(value, torch.Tensor)
    sizes = info.sizes()
    return (
        value.dtype is SCALAR_TYPES.get(info.dtype())
        and value.dim() == len(sizes)
        and all(size <= most for size, most in zip(value.shape, sizes, strict=True))
    )


def _shown(sizes: Sequence[int]) -> str:
    return "×".join(map(str, sizes)) or "a scalar"


def _shown_dtype(info: Any) -> str:
    return str(SCALAR_TYPES.get(info.dtype(), "another type")).removeprefix("torch.")


def _described(inputs: list[Any]) -> str:
    return ", ".join(
        f"{_shown(leaf.shape)} {str(leaf.dtype).removeprefix('torch.')}"
        if isinstance(leaf, torch.Tensor)
        else repr(leaf)
        for leaf in inputs
    )
