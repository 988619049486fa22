"""Lowering to ExecuTorch without the work that leaves no trace in the program.

Each piece of waste is one context manager that says what is wasted and why leaving it out is safe.
They change functions of torch and ExecuTorch for the time of one lowering, in the whole process,
so one lowering at a time. `benchmarks/lowering.py` measures them and asserts that the bytes are
the same; where an installed version has no such function, that piece does nothing.
"""

import contextlib
import copy
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import detect_fake_mode
from torch._ops import OpOverload
from torch.export import ExportedProgram, exported_program
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.infra.pass_base import PassResult
from torch.fx.traceback import NodeSource
from torch.utils import _pytree as pytree

from torchfuse.fusing.programs.edited_program import copied_graph
from torchfuse.isolation.warning_filters import known_warnings_ignored

__all__ = ["PIECES", "without_waste"]

_one_at_a_time = threading.RLock()


@contextlib.contextmanager
def without_waste(*, but_for: str | None = None) -> Iterator[None]:
    """Leave out everything in this file, but for the piece of that name."""
    with _one_at_a_time, known_warnings_ignored(), contextlib.ExitStack() as stack:
        for name, piece in PIECES.items():
            if name != but_for:
                stack.enter_context(piece())
        yield


@contextlib.contextmanager
def _replaced(owner: Any, name: str, wrap: Callable[[Any], Any]) -> Iterator[None]:
    """Replace `owner.name` by `wrap(owner.name)`, if there is one of its own."""
    if name not in vars(owner):
        yield
        return
    original = vars(owner)[name]
    setattr(owner, name, wrap(original))
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextlib.contextmanager
def _sharing_node_sources() -> Iterator[None]:
    """Share a node's history instead of copying it.

    Every pass gives every new node a NodeSource, which deep-copies the history of the node it
    came from: the n-th pass copies n records per node. They are values (compared and hashed by
    content, never changed once made), so a copy can be the record itself.
    """
    if hasattr(NodeSource, "__deepcopy__"):  # nested, or torch has its own by now
        yield
        return
    NodeSource.__deepcopy__ = lambda source, _memo: source  # type: ignore[attr-defined]
    try:
        yield
    finally:
        del NodeSource.__deepcopy__  # type: ignore[attr-defined]


class _CompiledOnAccess:
    """A class attribute of one graph module that appears when it is asked for."""

    def __init__(self, module: fx.GraphModule, name: str, compile_: Callable[..., Any]) -> None:
        self._module = weakref.ref(module)
        self._name = name
        self._compile = compile_

    def __get__(self, instance: fx.GraphModule | None, owner: type) -> Any:
        module = instance if instance is not None else self._module()
        if module is None:
            raise AttributeError(self._name)
        for name in _COMPILED:
            if isinstance(vars(owner).get(name), _CompiledOnAccess):
                delattr(owner, name)
        self._compile(module)
        return getattr(owner if instance is None else instance, self._name)


# What GraphModule.recompile makes, on the class or on the module.
_COMPILED = ("forward", "_code", "_lineno_map", "_prologue_start")


@contextlib.contextmanager
def _compiling_graphs_when_they_are_called() -> Iterator[None]:
    """Generate a graph module's Python code when someone looks at it, not after every change.

    The passes interpret graphs node by node, and recompile them some 500 times for nobody. Any
    access to `forward` or `code`, also later, compiles as before.
    """

    def lazily(recompile: Callable[..., Any]) -> Callable[..., Any]:
        def mark(module: fx.GraphModule) -> Any:
            owner = type(module)
            if not owner.__qualname__.endswith(".GraphModuleImpl"):  # a class of several modules
                return recompile(module)
            if isinstance(module.graph._codegen, fx.graph._PyTreeCodeGen):
                module._in_spec = module.graph._codegen.pytree_info.in_spec
                module._out_spec = module.graph._codegen.pytree_info.out_spec
            for name in _COMPILED:
                vars(module).pop(name, None)
                setattr(owner, name, _CompiledOnAccess(module, name, recompile))
            return None

        return mark

    with _replaced(fx.GraphModule, "recompile", lazily):
        yield


@contextlib.contextmanager
def _decomposing_only_what_decomposes() -> Iterator[None]:
    """Decompose, in a functional program, the calls that decompose, and none where there are none.

    `run_decompositions` traces the whole program again, through autograd and functionalization,
    though a convolution is all that changes.
    """

    def wrap(run: Callable[..., ExportedProgram]) -> Callable[..., ExportedProgram]:
        def run_decompositions(
            program: ExportedProgram, decomp_table: Any = None, *args: Any, **kwargs: Any
        ) -> ExportedProgram:
            # An exported program is in the training dialect until it was functionalized once.
            flat = not any(node.op == "get_attr" for node in program.graph.nodes)
            if decomp_table and flat and program.verifier.dialect != "TRAINING":
                decomposed = _decomposed(program, decomp_table)
                if decomposed is not None:
                    return decomposed
            return run(program, decomp_table, *args, **kwargs)

        return run_decompositions

    with _replaced(ExportedProgram, "run_decompositions", wrap):
        yield


def _decomposed(program: ExportedProgram, table: Any) -> ExportedProgram | None:
    """Return the flat functional program with the table's operators decomposed, each where it is.

    None: one of them becomes something that only a trace of the whole program gets right.
    """
    found = [node for node in program.graph.nodes if node.target in table]
    if not found:
        return program
    # Composite operators that are not in the table stay, inside of decompositions too.
    composite, others = exported_program._split_decomp_table_to_cia_and_python_decomp(dict(table))
    with (
        exported_program._override_composite_implicit_decomp(composite),
        enable_python_dispatcher(),
        torch.no_grad(),
    ):
        pieces = {node: _decomposition(node, others) for node in found}
    if None in pieces.values():
        return None
    graph = copied_graph(program.graph)
    signature = copy.deepcopy(program.graph_signature)
    for node, old in zip(list(graph.nodes), program.graph.nodes, strict=True):
        piece = pieces.get(old)
        if piece is None:
            continue
        made = dict(zip(piece.find_nodes(op="placeholder"), node.all_input_nodes, strict=True))
        with graph.inserting_before(node):
            for call in piece.nodes:
                if call.op == "call_function":
                    made[call] = graph.node_copy(call, made.__getitem__)
                    made[call].meta = {**node.meta, "val": call.meta["val"]}
        result = made[piece.output_node().args[0]]
        node.replace_all_uses_with(result)
        graph.erase_node(node)
        signature.replace_all_uses(node.name, result.name)
    module = fx.GraphModule(program.graph_module, graph, "GraphModule")
    module.meta.update(program.graph_module.meta)
    return program._update(module, signature)


def _decomposition(node: fx.Node, table: Any) -> fx.Graph | None:
    """Return what one call becomes, as a graph of its tensors; None: see `_decomposed`."""
    tensors = [given.meta.get("val") for given in node.all_input_nodes]
    mode = detect_fake_mode(tensors)
    static = all(isinstance(each, Tensor) and _is_static(each) for each in tensors)
    if mode is None or not static or not isinstance(node.meta.get("val"), Tensor):
        return None

    def call(*given: Tensor) -> Any:
        by_node = dict(zip(node.all_input_nodes, given, strict=True))
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), by_node.__getitem__)
        return node.target(*args, **kwargs)  # type: ignore[operator]  # found in the table

    try:
        with mode:
            piece = make_fx(call, decomposition_table=table)(*tensors).graph
    except Exception:  # noqa: BLE001  # the trace of the whole will say what is wrong, or not
        return None
    calls = [each for each in piece.nodes if each.op not in ("placeholder", "output")]
    functional = all(
        isinstance(each.target, OpOverload)
        and not each.target._schema.is_mutable
        and not any(returned.alias_info for returned in each.target._schema.returns)
        for each in calls
    )
    decomposes = any(each.target is not node.target for each in calls)
    return piece if functional and decomposes else None


def _is_static(tensor: Tensor) -> bool:
    return all(isinstance(size, int) for size in (*tensor.shape, *tensor.stride()))


@dataclass(frozen=True)
class _Patterns:
    """The function that makes a pass's patterns: it exports and lowers several small models."""

    module: str
    function: str
    nothing: Any  # what it returns when there are none
    operators: tuple[str, ...]  # each pattern contains one of them


_PATTERNS = (
    _Patterns(
        "executorch.backends.xnnpack.partition.graphs.bilinear_2d",
        "get_graphs_dict",
        {},
        ("index", "_unsafe_index", "upsample_bilinear2d"),
    ),
    _Patterns(
        "executorch.backends.xnnpack.partition.graphs.sdpa",
        "get_graphs",
        [],
        ("_softmax", "softmax", "scaled_dot_product_attention"),
    ),
)


@contextlib.contextmanager
def _without_patterns_that_cannot_match() -> Iterator[None]:
    """Do not make patterns to look for in a graph that has none of their operators."""
    from executorch.backends.xnnpack._passes import XNNPACKPassManager

    def wrap(transform: Callable[..., Any]) -> Callable[..., Any]:
        def with_fewer_patterns(manager: Any) -> Any:
            present = operators(manager.exported_program.graph)
            with contextlib.ExitStack() as stack:
                for patterns in _PATTERNS:
                    if present.isdisjoint(patterns.operators):
                        stack.enter_context(_returning_nothing(patterns))
                return transform(manager)

        return with_fewer_patterns

    with _replaced(XNNPACKPassManager, "transform", wrap):
        yield


def _returning_nothing(patterns: _Patterns) -> contextlib.AbstractContextManager[None]:
    module = import_module(patterns.module)
    return _replaced(module, patterns.function, lambda _: lambda: patterns.nothing)


def operators(graph: fx.Graph) -> set[str]:
    """Return the names of the operators in a graph of the edge dialect, without overloads."""
    names = (getattr(node.target, "__name__", "") for node in graph.nodes)
    return {name.removeprefix("aten.").split(".")[0] for name in names}


@contextlib.contextmanager
def _tracing_only_what_changed() -> Iterator[None]:
    """Give back a graph that was just traced and has not changed since, instead of tracing it.

    Most passes find nothing to change in a given model, and trace it again all the same. One that
    hooks into the calls is asked of each whether it would change it; one that hooks into more of
    the tracing always traces.
    """
    from executorch.exir.pass_base import ExportPass, _ExportPassBase

    hooks = {
        name
        for base in (_ExportPassBase, ExportPass)
        for name, value in vars(base).items()
        if callable(value) and name not in ("__init__", "call")
    }
    traced: weakref.WeakKeyDictionary[fx.GraphModule, list[Any]] = weakref.WeakKeyDictionary()

    def changes_nothing(pass_: Any, graph_module: fx.GraphModule) -> bool:
        if not isinstance(pass_, ExportPass):
            return False
        own = {n for n in hooks if getattr(type(pass_), n) is not getattr(ExportPass, n)}
        return not own or (own == {"call_operator"} and _hands_on_every_call(pass_, graph_module))

    def wrap(call: Callable[..., Any]) -> Callable[..., Any]:
        def call_if_changed(pass_: Any, graph_module: fx.GraphModule) -> Any:
            if _same(traced.get(graph_module), _state(graph_module)) and changes_nothing(
                pass_, graph_module
            ):
                return PassResult(graph_module, True)
            result = call(pass_, graph_module)
            traced[result.graph_module] = _state(result.graph_module)
            return result

        return call_if_changed

    with _replaced(_ExportPassBase, "call", wrap):
        yield


def _hands_on_every_call(pass_: Any, graph_module: fx.GraphModule) -> bool:
    """Whether a pass's `call_operator` calls its base's with what it is given, and no more."""
    from executorch.exir.pass_base import NodeMetadata, ProxyValue, _ExportPassBase

    handed_on: list[tuple[Any, ...]] = []

    def note(_: Any, *given: Any) -> Any:
        handed_on.append(given)
        return value

    with _replaced(_ExportPassBase, "call_operator", lambda _: note):
        for node in graph_module.graph.nodes:
            if node.op != "call_function":
                continue
            if not isinstance(node.target, OpOverload) or "val" not in node.meta:
                return False
            args, kwargs = fx.node.map_arg(
                (node.args, node.kwargs),
                lambda arg: ProxyValue(arg.meta.get("val"), fx.Proxy(arg)),
            )
            given = (node.target, args, dict(kwargs), NodeMetadata(node.meta))
            value = ProxyValue(node.meta["val"], fx.Proxy(node))
            handed_on.clear()
            try:
                pass_.call_operator(*given)
            except Exception:  # noqa: BLE001  # it needs a real trace
                return False
            if len(handed_on) != 1 or not _identical(handed_on[0], given):
                return False
            if not _identical(given[3].data, dict(node.meta)):
                return False
    return True


def _identical(some: Any, others: Any) -> bool:
    """Whether two nestings have one form, and the very same things in it."""
    (leaves, spec), (other_leaves, other_spec) = map(pytree.tree_flatten, (some, others))
    return bool(spec == other_spec) and all(
        a is b for a, b in zip(leaves, other_leaves, strict=True)
    )


@contextlib.contextmanager
def _verifying_only_what_changed() -> Iterator[None]:
    """Run a graph, or its copy, through the check of its operators' types once.

    The check runs every operator on fake tensors, after every step.
    """
    verifier = import_module("executorch.exir.verification.verifier")
    checked: set[tuple[Any, ...]] = set()

    def wrap(check: Callable[..., None]) -> Callable[..., None]:
        def check_if_changed(graph_module: fx.GraphModule) -> None:
            typed = tuple(
                (node.name, node.op, node.target, str(node.args), str(node.kwargs), _dtypes(node))
                for node in graph_module.graph.nodes
            )
            if typed not in checked:
                check(graph_module)
                checked.add(typed)

        return check_if_changed

    with _replaced(verifier, "_check_tensor_args_matching_op_allowed_dtype", wrap):
        yield


def _dtypes(node: fx.Node) -> tuple[Any, ...]:
    return tuple(getattr(leaf, "dtype", None) for leaf in pytree.tree_leaves(node.meta.get("val")))


def _state(graph_module: fx.GraphModule) -> list[Any]:
    # Nodes hold their arguments in tuples and dicts that are replaced, not changed.
    state: list[Any] = []
    for node in graph_module.graph.nodes:
        state += [node, node.target, node.args, node.kwargs]
        if node.op in ("placeholder", "get_attr"):
            state.append(node.meta.get("val"))
    return state


def _same(before: list[Any] | None, now: list[Any]) -> bool:
    return (
        before is not None
        and len(before) == len(now)
        and all(old is new for old, new in zip(before, now, strict=True))
    )


PIECES: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {
    "copying node sources": _sharing_node_sources,
    "compiling graphs": _compiling_graphs_when_they_are_called,
    "decomposing again": _decomposing_only_what_decomposes,
    "patterns that cannot match": _without_patterns_that_cannot_match,
    "tracing what did not change": _tracing_only_what_changed,
    "verifying what did not change": _verifying_only_what_changed,
}
