"""Today's mobile target: an ExecuTorch program (`.pte`) for XNNPACK, and the runtime it runs on."""

import dataclasses
import functools
import logging
import operator
import re
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from torchfuse.copying import copied
from torchfuse.delegation import Delegation, delegation_of
from torchfuse.errors import ArtifactError, InputError, UnsupportedError, first_line
from torchfuse.exported.fusing import fuse_all
from torchfuse.exported.norms import write_batch_norms_plainly
from torchfuse.exported.rewriting import rewrite
from torchfuse.first_load import SCALAR_TYPES
from torchfuse.inputs import Case
from torchfuse.quieting import quiet, quiet_runtime
from torchfuse.targets.fast_lowering import without_waste

__all__ = [
    "ExecutorchModel",
    "Lowered",
    "capture",
    "input_shapes",
    "lower",
    "operators",
    "set_threads",
    "size_range",
    "threads",
]

_DELEGATE = "XNNPACK"
_SPLITS = (
    torch.ops.aten.chunk.default,
    torch.ops.aten.split.Tensor,
    torch.ops.aten.split_with_sizes.default,
    torch.ops.aten.tensor_split.sections,
    torch.ops.aten.tensor_split.indices,
)


@dataclass(frozen=True)
class Lowered:
    """An ExecuTorch program, and what the delegate took of it."""

    program: bytes
    delegation: Delegation
    signature: Mapping[str, Any]  # how arguments and results are nested, for ExecutorchModel
    operators: tuple[str, ...]  # that it needs kernels for, outside the delegate: "aten::add.out"
    backends: tuple[str, ...]  # the delegates that it needs, by the runtime's names


def with_default_strides(value: Any) -> Any:
    """Return a tensor with the strides that its shape has by default; other values as they are.

    The runtime takes no others. `contiguous()` does not do: it leaves the strides of dimensions of
    size 1 alone, by which ExecuTorch takes `[1, 1, 8, 8]` from a slice for channels_last.
    """
    if not isinstance(value, torch.Tensor):
        return value
    stride = 1
    for size, actual in zip(reversed(value.shape), reversed(value.stride()), strict=True):
        if actual != stride:
            return value.clone(memory_format=torch.contiguous_format)
        stride *= max(size, 1)
    return value


def capture(
    model: nn.Module, case: Case, dynamic_shapes: Any = None
) -> torch.export.ExportedProgram:
    """Return the exported program of `model`, in which all is merged that can be.

    Raises:
        UnsupportedError: torch.export cannot capture the model, or not with these dynamic shapes;
            or the model writes to its inputs or buffers.
    """
    if any(with_default_strides(t) is not t for t in model.state_dict(keep_vars=True).values()):
        # XNNPACK lays out its weights itself, and its partitioner takes contiguous ones only.
        model = copied(model)
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.data = with_default_strides(tensor.data)
    case = _traceable(case, dynamic_shapes)
    program = _export(model, case, dynamic_shapes)
    _require_pure(program)
    # What is made of it is compared as a whole.
    if _has_batch_norms(program):
        program = fuse_all(program, prove=False).program
    else:  # (without a copy, if there is nothing to do)
        program = rewrite(program, prove=False).program
    if _has_batch_norms(program):
        with quiet():
            graph_module = program.module(check_guards=False)
        if write_batch_norms_plainly(graph_module):
            program = _export(graph_module, case, dynamic_shapes)
    _spell_out(program.graph)
    return program


def _has_batch_norms(program: torch.export.ExportedProgram) -> bool:
    return any(node.target is torch.ops.aten.batch_norm.default for node in program.graph.nodes)


def _require_pure(program: torch.export.ExportedProgram) -> None:
    """Raise UnsupportedError if the program writes to an input or a buffer of its own."""
    if not any(map(_may_write_to_input, program.graph.nodes)):
        return
    with quiet():
        signature = program.run_decompositions({}).graph_signature  # in the form that tells exactly
    written = (*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values())
    if written:
        raise UnsupportedError(
            f"Expected a model that leaves its inputs and buffers as they are, got one that writes "
            f"to {' and '.join(written)}, which an ExecuTorch program does not keep; compute new "
            "tensors: `x = x - 0.5` in place of `x.sub_(0.5)`."
        )


def _may_write_to_input(node: fx.Node) -> bool:
    """Return whether the node writes to memory that a view, or a no-op, may have of an input."""
    if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable:
        return False
    written: Any = node.args[0] if node.args else None
    while isinstance(written, fx.Node) and written.op == "call_function":
        schema = getattr(written.target, "_schema", None)
        arguments = [] if schema is None else schema.arguments
        is_view = any(argument.alias_info is not None for argument in arguments)
        if not is_view and written.target is not torch.ops.aten.dropout.default:
            return False
        written = written.args[0] if written.args else None
    return True


def _spell_out(graph: fx.Graph) -> None:
    """Write some operators in the form in which XNNPACK's partitioner takes them and runs them.

    It reads the stride of a max-pooling, which torch leaves out where it is the kernel's size; it
    takes the values of any `max` along a dimension, of which its own serializer refuses all
    but those along one of the two last of four, kept; it takes a `prelu` of any dimensions,
    of which its own passes can only convert four; and it takes slices, but no chunks and splits.
    """
    aten = torch.ops.aten
    for node in list(graph.nodes):
        if node.target is aten.max_pool2d.default and not (len(node.args) > 2 and node.args[2]):
            x, kernel, *rest = node.args
            node.args = (x, kernel, kernel, *rest[1:])
        elif node.target is aten.max.dim:
            x, dim, keep = (*node.args, False)[:3]
            is_taken = keep and dim in (2, 3) and x.meta["val"].dim() == 4
            used = {user.args[1]: user for user in node.users if user.users}
            if list(used) == [0] and not is_taken:
                used[0].target, used[0].args = aten.amax.default, (x, [dim], keep)
                graph.eliminate_dead_code()
        elif node.target is aten.prelu.default and node.meta["val"].dim() in (2, 3):
            _write_with_four_dimensions(graph, node)
        elif node.target in _SPLITS:
            _write_as_slices(graph, node)


def _write_as_slices(graph: fx.Graph, node: fx.Node) -> None:
    """Replace the parts of a split or chunk by slices, if all of its sizes are known."""
    aten = torch.ops.aten
    source = node.args[0]
    assert isinstance(source, fx.Node)
    dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
    assert isinstance(dim, int)
    sizes = [part.shape[dim] for part in node.meta["val"]]
    if not all(isinstance(size, int) for size in sizes):
        return
    for part in list(node.users):
        assert part.target is operator.getitem
        index = part.args[1]
        assert isinstance(index, int)
        start = sum(sizes[: index % len(sizes)])
        part.target = aten.slice.Tensor
        part.args = (source, dim, start, start + sizes[index])
    graph.erase_node(node)


def _write_with_four_dimensions(graph: fx.Graph, node: fx.Node) -> None:
    """Put sizes of 1 at the end of what a pointwise operator along dimension 1 is given."""
    aten = torch.ops.aten
    missing = 4 - node.meta["val"].dim()

    def placed(target: Any, *args: Any) -> fx.Node:
        with graph.inserting_before(node):
            new = graph.call_function(target, args)
        values = [arg.meta["val"] if isinstance(arg, fx.Node) else arg for arg in args]
        new.meta = {**node.meta, "val": target(*values)}
        return new

    x, *rest = node.args
    for _ in range(missing):
        x = placed(aten.unsqueeze.default, x, -1)
    made = placed(node.target, x, *rest)
    for _ in range(missing):
        made = placed(aten.squeeze.dim, made, -1)
    node.replace_all_uses_with(made)
    graph.erase_node(node)


def _traceable(case: Case, dynamic_shapes: Any) -> Case:
    """Return the case with default strides, and no 1 where a size is dynamic.

    torch.export takes a size of 1 in the example for a constant, whatever was declared.
    """

    def require_shapes(given: Any) -> None:
        if not isinstance(given, Mapping | tuple | list | None):
            raise InputError(
                "Expected dynamic_shapes for each argument of forward, as torch.export takes them "
                f"(`({{0: torch.export.Dim('batch', max=8)}},)` for one), got {given!r} in "
                f"{dynamic_shapes!r}."
            )

    def traceable(value: Any, sizes: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        require_shapes(sizes)
        dynamic = dict(enumerate(sizes) if isinstance(sizes, tuple | list) else sizes or {})
        ones = [
            isinstance(size, torch.export.Dim) and value.shape[dim : dim + 1] == (1,) < (size.max,)
            for dim, size in dynamic.items()
        ]
        repeats = [1] * value.dim()
        for dim, is_one in zip(dynamic, ones, strict=True):
            if is_one:
                repeats[dim] = 2
        return with_default_strides(value.repeat(repeats) if any(ones) else value)

    require_shapes(dynamic_shapes)
    names = list(case.kwargs)
    if isinstance(dynamic_shapes, Mapping):
        declared = [*dynamic_shapes.values(), *[None] * len(case.args)][: len(case.args)]
        by_name = {name: dynamic_shapes.get(name) for name in names}
    else:
        declared = [*(dynamic_shapes or ()), *[None] * len(case.args)][: len(case.args)]
        by_name = dict.fromkeys(names)
    return Case(
        tuple(map(traceable, case.args, declared)),
        {name: traceable(value, by_name[name]) for name, value in case.kwargs.items()},
    )


def _export(model: nn.Module, case: Case, dynamic_shapes: Any) -> torch.export.ExportedProgram:
    try:
        with quiet(), torch.no_grad():
            return torch.export.export(
                model, case.args, dict(case.kwargs), dynamic_shapes=dynamic_shapes
            )
    except Exception as error:
        raise UnsupportedError(
            f"torch.export cannot capture {type(model).__name__} for {case}"
            f"{' with these dynamic shapes' if dynamic_shapes else ''}: {_export_reason(error)}."
        ) from error


def _export_reason(error: Exception) -> str:
    text = str(error)
    if "Constraints violated" in text:  # the first line only names the sizes
        reasons = re.findall(r"^\s+- (.*)$", text, re.MULTILINE)
        fixes = re.findall(r"^\s+(\w+ = .*)$", text, re.MULTILINE)
        advice = f"; torch.export suggests {', '.join(fixes)}" if fixes else ""
        return " ".join(reasons).rstrip(".") + advice
    return first_line(error)


def lower(program: torch.export.ExportedProgram) -> Lowered:
    """Return `program` as an ExecuTorch program that runs on XNNPACK as far as XNNPACK can.

    What XNNPACK does not take runs on ExecuTorch's portable kernels.

    Raises:
        InputError: a dynamic size without a maximum.
        UnsupportedError: ExecuTorch cannot lower it, or this runtime lacks an operator it needs.
    """
    for symbol, allowed in program.range_constraints.items():
        if not allowed.upper.is_finite or allowed.upper >= sys.maxsize - 1:
            raise InputError(
                f"Expected a maximum for every dynamic size, but {symbol} has none; ExecuTorch "
                "plans memory for the largest: torch.export.Dim('batch', max=8)."
            )
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
    plans = executorch_program.executorch_program.execution_plan
    needed = {name for plan in plans for name in operators(plan)}
    _check_operators(needed)
    return Lowered(
        bytes(executorch_program.buffer),
        delegation,
        _signature(program),
        tuple(sorted(needed)),
        tuple(sorted({delegate.id for plan in plans for delegate in plan.delegates})),
    )


def operators(plan: Any) -> set[str]:
    """Return the names of the operators that a method of a program calls outside its delegates."""
    return {f"{op.name}.{op.overload}" if op.overload else op.name for op in plan.operators}


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


def _check_operators(needed: set[str]) -> None:
    if missing := sorted(needed - set(_runtime()._get_operator_names())):
        raise UnsupportedError(
            f"The ExecuTorch runtime has no kernel for {', '.join(missing)}, which the model "
            "needs; replace the operator in the model."
        )


def _signature(program: torch.export.ExportedProgram) -> dict[str, Any]:
    signature: dict[str, Any] = {"sizes": [_sizes(program, s) for s in input_shapes(program)]}
    for name in ("in_spec", "out_spec"):
        spec = getattr(program.call_spec, name)
        signature[name] = pytree.treespec_dumps(_plainly_nested(spec))
    return signature


def _plainly_nested(spec: pytree.TreeSpec) -> pytree.TreeSpec:
    """Return `spec` with dicts, lists and tuples only, which are known to every process.

    Mappings (a ModelOutput of transformers) and dataclasses become dicts, others tuples.
    """
    if spec.is_leaf():
        return spec
    children = [_plainly_nested(child) for child in spec.children()]
    if spec.type in (dict, list, tuple):
        return pytree.TreeSpec(spec.type, spec.context, children)
    names: Any = None
    if spec.type is defaultdict:
        _, names = spec.context
    elif isinstance(spec.type, type) and issubclass(spec.type, Mapping):  # a namedtuple's is none
        names = spec.context
    elif dataclasses.is_dataclass(spec.type) and isinstance(spec.context, list | tuple):
        names = spec.context[0] if spec.context else None  # torch's own way: with the None ones
    if isinstance(names, list | tuple) and len(names) == len(children):
        return pytree.TreeSpec(dict, list(names), children)
    return pytree.TreeSpec(tuple, None, children)


def input_shapes(program: torch.export.ExportedProgram) -> list[Sequence[Any] | None]:
    """Return the shapes of the user's inputs, sizes as int or SymInt; None for a number."""
    values = {
        node.name: node.meta.get("val") for node in program.graph.find_nodes(op="placeholder")
    }
    return [
        getattr(values[spec.arg.name], "shape", None)
        for spec in program.graph_signature.input_specs
        if spec.kind is torch.export.graph_signature.InputKind.USER_INPUT
    ]


def size_range(program: torch.export.ExportedProgram, size: Any) -> tuple[int, int]:
    """Return the smallest and the largest value that a size may have."""
    if isinstance(size, int):
        return size, size
    allowed = program.range_constraints.get(size.node.expr)
    if allowed is None:  # derived from another size
        allowed = size.node.shape_env.bound_sympy(size.node.expr)
    return max(int(allowed.lower), 1), int(allowed.upper)


def _sizes(
    program: torch.export.ExportedProgram, shape: Sequence[Any] | None
) -> list[tuple[int, int]] | None:
    return None if shape is None else [size_range(program, size) for size in shape]


@functools.cache
def _runtime() -> Any:
    """Return ExecuTorch's runtime.

    Not by executorch.runtime, whose import brings all of its exporter in and takes seconds.
    """
    with quiet(), quiet_runtime():
        from executorch.extension.pybindings import _portable_lib

        return _portable_lib


# The runtime's thread pool is one per process. Methods that were loaded with the one before keep
# pointing at it, so they are loaded again before they run.
_pool = 0


def threads() -> int:
    """Return how many threads the runtime's thread pool has."""
    with quiet_runtime():
        return int(_runtime()._threadpool_get_thread_count())


def set_threads(count: int) -> None:
    """Give the runtime, for the whole process, a thread pool of `count` threads."""
    global _pool
    if count != threads():
        with quiet_runtime():
            _runtime()._unsafe_reset_threadpool(count)
        _pool += 1


def _read(spec: str | None) -> pytree.TreeSpec | None:
    """Return a spec of the signature; files of earlier versions hold other types than plain ones.

    Raises:
        ArtifactError: it names a type that this process does not know.
    """
    try:
        return None if spec is None else pytree.treespec_loads(spec)
    except NotImplementedError as error:
        raise ArtifactError(
            f"its results are of a type that this process does not know ({first_line(error)}); "
            "import the library that the model is from, or export it again."
        ) from error


class ExecutorchModel:
    """A loaded program: call it as the model it was made from.

    Results are nested as the model's, of dicts, lists and tuples only; without a `signature` (a
    program that torchfuse did not write), one output comes as a tensor and several as a tuple.
    `preprocessing` says how the input is made, if the file says so.

    Raises:
        ArtifactError: the runtime refuses the program.
    """

    def __init__(
        self,
        program: bytes,
        signature: Mapping[str, Any] | None = None,
        preprocessing: Mapping[str, Any] | None = None,
    ) -> None:
        signature = signature or {}
        self.preprocessing = preprocessing
        self._in_spec = _read(signature.get("in_spec"))
        self._out_spec = _read(signature.get("out_spec"))
        self._bytes = program
        self._load()
        self._inputs = _inputs(self._method.method_meta(), signature.get("sizes"))
        self._takes_tensors = self._in_spec is not None and self._in_spec == pytree.tree_structure(
            ((0,) * len(self._inputs), {})
        )
        self._ran = False

    def __repr__(self) -> str:
        """What it takes, and how that is made."""
        takes = ", ".join(map(str, self._inputs))
        made = "" if self.preprocessing is None else f"; made by {dict(self.preprocessing)}"
        return f"ExecutorchModel(takes {takes}{made})"

    def largest_ones(self) -> Case | None:
        """Return inputs of ones of the largest sizes that it takes; None: one is no tensor."""
        leaves = [
            torch.ones([largest for _, largest in given.sizes], dtype=given.dtype)
            for given in self._inputs
            if given.dtype is not None
        ]
        if len(leaves) < len(self._inputs):
            return None
        if self._in_spec is None:
            return Case(tuple(leaves))
        args, kwargs = pytree.tree_unflatten(leaves, self._in_spec)
        return Case(args, kwargs)

    def _load(self) -> None:
        try:
            # The method points into the program, and the program into the bytes: all are kept.
            with quiet_runtime():
                self._program = _runtime()._load_program_from_buffer(
                    self._bytes, program_verification=_runtime().Verification.InternalConsistency
                )
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
            UnsupportedError: a kernel of the runtime refuses them.
        """
        if self._pool != _pool:
            self._load()
        inputs = self.flat(args, kwargs)
        self._check(inputs)
        outputs = self._execute(inputs)
        if self._out_spec is not None and not self._out_spec.is_leaf():
            return pytree.tree_unflatten(outputs, self._out_spec)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def flat(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        """Return the arguments in the order in which the program itself takes them.

        Raises:
            InputError: other arguments, or other nesting, than it was made for.
        """
        if self._in_spec is None:
            if kwargs:
                raise InputError(
                    f"The program does not say which of its inputs are {', '.join(kwargs)}; give "
                    "all inputs by position."
                )
            flat = pytree.tree_leaves(args)
        elif self._takes_tensors and not kwargs and len(args) == len(self._inputs):
            flat = list(args)  # the common case, without the flattening that costs more than a look
        else:
            names = self._in_spec.child(1).context
            flat, spec = pytree.tree_flatten((args, kwargs))
            spec = _plainly_nested(spec)
            if spec != self._in_spec:
                flat, spec = pytree.tree_flatten(_with_keys_in_order((args, kwargs), self._in_spec))
            if spec != self._in_spec:
                raise InputError(
                    f"The program takes {self._in_spec.child(0).num_children} inputs by position "
                    f"and {list(names)} by name; got {len(args)} and {list(kwargs)}, or other "
                    "nesting."
                )
        return [with_default_strides(leaf) for leaf in flat]

    def _execute(self, inputs: list[Any]) -> Sequence[Any]:
        if self._ran:  # then it is unlikely to fail, and listening to the runtime costs time
            try:
                outputs: Sequence[Any] = self._method(inputs)
            except RuntimeError:
                return self._listening(inputs)
            return outputs
        outputs = self._listening(inputs)
        self._ran = True
        return outputs

    def _listening(self, inputs: list[Any]) -> Sequence[Any]:
        # The runtime's exceptions hold an error number, and the reason is what it prints.
        lines: list[str] = []
        try:
            with quiet_runtime() as lines:
                outputs: Sequence[Any] = self._method(inputs)
        except RuntimeError as error:
            reasons = [re.sub(r"^\[.*?\] (Check failed \(.*?\): )?", "", line) for line in lines]
            raise UnsupportedError(
                f"ExecuTorch cannot run the program on {_described(inputs)}: "
                f"{(reasons or [first_line(error)])[0].rstrip('.')}."
            ) from error
        return outputs

    def _check(self, inputs: list[Any]) -> None:
        # The runtime only gives an error number, and runs on sizes that were not declared.
        if len(inputs) == len(self._inputs) and all(map(_Input.takes, self._inputs, inputs)):
            return
        made = dict(self.preprocessing or {})
        raise InputError(
            f"The program takes {', '.join(map(str, self._inputs))}; got {_described(inputs)}."
            f"{'' if self.preprocessing is None else f' Its input is made by {made}.'}"
        )


def _with_keys_in_order(value: Any, spec: pytree.TreeSpec) -> Any:
    """Return nested arguments with the keys of their dicts in the order that `spec` has."""
    kind = type(value)
    if kind not in (dict, list, tuple) or kind is not spec.type or len(value) != spec.num_children:
        return value
    if kind is dict and set(value) != set(spec.context):
        return value
    keys = list(spec.context) if kind is dict else range(len(value))
    children = [_with_keys_in_order(value[key], spec.child(i)) for i, key in enumerate(keys)]
    return dict(zip(keys, children, strict=True)) if kind is dict else kind(children)


@dataclass(frozen=True)
class _Input:
    dtype: torch.dtype | None  # None: a number, not a tensor
    sizes: tuple[tuple[int, int], ...] = ()  # smallest and largest

    def takes(self, value: Any) -> bool:
        if self.dtype is None or not isinstance(value, torch.Tensor):
            return self.dtype is None and not isinstance(value, torch.Tensor)
        return (
            value.dtype is self.dtype
            and value.dim() == len(self.sizes)
            and all(
                low <= size <= high
                for size, (low, high) in zip(value.shape, self.sizes, strict=True)
            )
        )

    def __str__(self) -> str:
        if self.dtype is None:
            return "a number"
        sizes = [str(low) if low == high else f"({low}…{high})" for low, high in self.sizes]
        return f"{'×'.join(sizes) or 'a scalar'} {str(self.dtype).removeprefix('torch.')}"


def _inputs(described: Any, sizes: Sequence[Any] | None) -> tuple[_Input, ...]:
    """Return what the program takes; without `sizes`, any size up to the program's own."""
    inputs = []
    for index in range(described.num_inputs()):
        info = _tensor_info(described, index)
        if info is None:
            inputs.append(_Input(None))
        else:
            ranges = sizes[index] if sizes else [(0, size) for size in info.sizes()]
            inputs.append(_Input(SCALAR_TYPES.get(info.dtype()), tuple(map(tuple, ranges))))
    return tuple(inputs)


def _tensor_info(described: Any, index: int) -> Any:
    try:
        with quiet_runtime():  # the exception says enough
            return described.input_tensor_meta(index)
    except (RuntimeError, IndexError):  # not a tensor
        return None


def _described(inputs: list[Any]) -> str:
    return ", ".join(
        str(_Input(leaf.dtype, tuple((size, size) for size in leaf.shape)))
        if isinstance(leaf, torch.Tensor)
        else repr(leaf)
        for leaf in inputs
    )
