"""A model as an exported program for any runtime: pure, with no batch norm left to fold."""

import dataclasses
import operator
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from torchfuse.cases import Case
from torchfuse.errors import InputError, UnsupportedError, first_line
from torchfuse.fusing.programs import rewriting
from torchfuse.fusing.programs.norms import write_batch_norms_plainly
from torchfuse.fusing.programs.program_fusing import fuse_all
from torchfuse.isolation.model_copy import copied
from torchfuse.isolation.warning_filters import known_warnings_ignored
from torchfuse.lowering.xnnpack_rewrites import rewrite

__all__ = [
    "ANY_SIZE",
    "capture",
    "input_shapes",
    "plainly_nested",
    "require_tensor_outputs",
    "signature_of",
    "size_range",
    "with_default_strides",
]

ANY_SIZE = 2**31 - 1  # the largest size of an axis that has no maximum
_SPLITS = (
    torch.ops.aten.chunk.default,
    torch.ops.aten.split.Tensor,
    torch.ops.aten.split_with_sizes.default,
    torch.ops.aten.tensor_split.sections,
    torch.ops.aten.tensor_split.indices,
)


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
    model: nn.Module,
    case: Case,
    dynamic_shapes: Any = None,
    *,
    fold_batch_norms: bool = True,
    for_xnnpack: bool = True,
) -> torch.export.ExportedProgram:
    """Return the exported program of `model`, in which all is merged that can be.

    With `for_xnnpack`, operators are in the form in which XNNPACK takes them.

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
    if fold_batch_norms and _has_batch_norms(program):
        program = fuse_all(program, prove=False).program
    elif fold_batch_norms:  # (without a copy, if there is nothing to do)
        program = rewriting.rewrite(program, prove=False).program
    if for_xnnpack and _has_batch_norms(program):
        with known_warnings_ignored():
            graph_module = program.module(check_guards=False)
        if write_batch_norms_plainly(graph_module):
            program = _export(graph_module, case, dynamic_shapes)
    if for_xnnpack:
        _spell_out(program.graph)
        rewrite(program)
    return program


def _has_batch_norms(program: torch.export.ExportedProgram) -> bool:
    return any(node.target is torch.ops.aten.batch_norm.default for node in program.graph.nodes)


def _require_pure(program: torch.export.ExportedProgram) -> None:
    """Raise UnsupportedError if the program writes to an input or a buffer of its own."""
    if not any(map(_may_write_to_input, program.graph.nodes)):
        return
    with known_warnings_ignored():
        signature = program.run_decompositions({}).graph_signature  # in the form that tells exactly
    written = (*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values())
    if written:
        raise UnsupportedError(
            f"Expected a model that leaves its inputs and buffers as they are, got one that writes "
            f"to {' and '.join(written)}, which a file does not keep; compute new "
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
        with known_warnings_ignored(), torch.no_grad():
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


def signature_of(program: torch.export.ExportedProgram) -> dict[str, Any]:
    """Return how arguments and results are nested, and the sizes and types that inputs may have."""
    values = _input_values(program)
    signature: dict[str, Any] = {
        "sizes": [_sizes(program, getattr(value, "shape", None)) for value in values],
        "types": [str(getattr(value, "dtype", "")).removeprefix("torch.") for value in values],
    }
    for name in ("in_spec", "out_spec"):
        spec = getattr(program.call_spec, name)
        signature[name] = pytree.treespec_dumps(plainly_nested(spec))
    return signature


def plainly_nested(spec: pytree.TreeSpec) -> pytree.TreeSpec:
    """Return `spec` with dicts, lists and tuples only, which are known to every process.

    Mappings (a ModelOutput of transformers) and dataclasses become dicts, others tuples.
    """
    if spec.is_leaf():
        return spec
    children = [plainly_nested(child) for child in spec.children()]
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


def require_tensor_outputs(program: torch.export.ExportedProgram, suffix: str) -> None:
    """Raise UnsupportedError if the program returns anything but tensors."""
    for index, spec in enumerate(program.graph_signature.output_specs):
        if not isinstance(spec.arg, torch.export.graph_signature.TensorArgument):
            value = getattr(spec.arg, "value", spec.arg)
            raise UnsupportedError(
                f"'{suffix}' returns tensors only, and output {index} of this model is {value!r}; "
                "leave it out, or use '.pte'."
            )


def input_shapes(program: torch.export.ExportedProgram) -> list[Sequence[Any] | None]:
    """Return the shapes of the user's inputs, sizes as int or SymInt; None for a number."""
    return [getattr(value, "shape", None) for value in _input_values(program)]


def _input_values(program: torch.export.ExportedProgram) -> list[Any]:
    values = {
        node.name: node.meta.get("val") for node in program.graph.find_nodes(op="placeholder")
    }
    return [
        values[spec.arg.name]
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
    endless = not allowed.upper.is_finite or allowed.upper >= ANY_SIZE
    return max(int(allowed.lower), 1), ANY_SIZE if endless else int(allowed.upper)


def _sizes(
    program: torch.export.ExportedProgram, shape: Sequence[Any] | None
) -> list[tuple[int, int]] | None:
    return None if shape is None else [size_range(program, size) for size in shape]
