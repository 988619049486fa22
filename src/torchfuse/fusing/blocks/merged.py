"""A module whose branches are one layer: what its forward becomes, and which layers it then has.

Its forward is traced by `torch.fx` with its children as leaves, exported so that all values of the
trace are known in the program, and merged there by the rules of `programs/rewrites`. What is left
is written back as calls of the same children: a merged layer takes the place of one of those it
was made of. Nothing of the module is changed here.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from torchfuse.errors import first_line
from torchfuse.fusing.programs.edited_program import copied_graph
from torchfuse.fusing.programs.rewriting import rewrite
from torchfuse.graph.retracing import code_of, settings_of
from torchfuse.isolation.model_copy import shell
from torchfuse.isolation.snapshot import restored
from torchfuse.isolation.warning_filters import known_warnings_ignored
from torchfuse.planning import Refusal

if TYPE_CHECKING:
    from collections.abc import Collection, Hashable, Sequence

    from torchfuse.planning import Fusion

    Exports = dict[Hashable, ExportedProgram]  # of blocks that differ in values alone

__all__ = ["ELSEWHERE", "Exports", "Merge", "merged", "merges_at_one_size"]

aten = torch.ops.aten

_CONVS: dict[Any, type[nn.Module]] = {
    aten.conv1d.default: nn.Conv1d,
    aten.conv2d.default: nn.Conv2d,
    aten.conv3d.default: nn.Conv3d,
}
_FUNCTIONS: dict[Any, Any] = {aten.add.Tensor: operator.add, aten.sub.Tensor: operator.sub}
# Moves that a merged layer may be left before, as methods of a tensor
_METHODS: dict[Any, str] = {
    target: str(target).split(".")[1]
    for target in (
        *(aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.unsqueeze.default),
        *(aten.permute.default, aten.transpose.int, aten.movedim.int, aten.movedim.intlist),
        *(aten.squeeze.dim, aten.squeeze.dims, aten.unflatten.int),
    )
}
# Modules that are gone into, one after the other, where only a part of one is left
_DEEPEST = 40
ELSEWHERE = "Use fuse(…, graph=True) or fuse_exported, where calls themselves are replaced."


@dataclass(frozen=True, eq=False)
class Merge:
    """What becomes of a block. Paths and keys are below it."""

    source: str  # of its forward
    names: Any  # what that knows
    layers: dict[str, nn.Module]  # those that come, by the path of what they replace
    absorbed: dict[str, tuple[str, ...]]  # module → its tensors that are no longer used
    kept: frozenset[str]  # children that are called as before
    key_map: dict[str, str | None]  # old key → new one; None: taken in
    fusions: tuple[Fusion, ...]


class _NotCarriedError(Exception):
    """What is left is nothing that calls of the block's modules could do; says why."""


class _PartlyLeftError(Exception):
    """A part of what a child does is left: it is to be gone into."""


def merged(
    block: nn.Module,
    args: Sequence[Tensor],
    *,
    rules: Collection[str],
    prove: bool,
    exports: Exports,
) -> Merge | Refusal | None:
    """Return what becomes of `block`, called with `args`; None if there is nothing to merge.

    With `prove`, each edit is compared on `args`; otherwise only their shapes matter. `exports` are
    what blocks before were exported to, and takes up what this one is: exporting takes the most of
    the time, and a net repeats its blocks.
    """
    inlined: set[str] = set()
    for _ in range(_DEEPEST):
        try:
            trace = _traced(block, len(args), inlined)
            return _Merging(block, trace, args, rules, prove, inlined, exports).merge()
        except _PartlyLeftError as left:
            inlined.add(str(left))
        except _NotCarriedError as why:
            return Refusal(str(why), ELSEWHERE)
    return Refusal("Too much of it would be written anew.", ELSEWHERE)


def merges_at_one_size(block: nn.Module, args: Sequence[Tensor], rules: Collection[str]) -> bool:
    """Whether anything is to be merged in `block` at the sizes of `args`, or that cannot be told.

    Where code computes with sizes, an export for all of them takes seconds to simplify what it
    computes, and one for these alone does not.
    """
    with known_warnings_ignored(), torch.no_grad(), restored(block):
        try:
            program = torch.export.export(block, tuple(_examples(args)), strict=False)
        except Exception:  # noqa: BLE001  # whoever exports it for all sizes says why
            return True
    fusions = rewrite(program, prove=False, rules=rules, at_example=True).fusions
    return any(fusion.rule == "branches" for fusion in fusions)


class _Tracer(fx.Tracer):
    """Goes into nothing but what it is told to."""

    def __init__(self, inlined: set[str]) -> None:
        super().__init__()
        self.inlined = inlined

    def is_leaf_module(self, _: nn.Module, module_qualified_name: str) -> bool:
        """A child is called, unless it is to be gone into."""
        return module_qualified_name not in self.inlined


def _traced(block: nn.Module, inputs: int, inlined: set[str]) -> fx.Graph:
    """The block's forward; traced twice, since it must do the same at every call."""
    with restored(block):
        try:
            first, second = (
                _Tracer(inlined).trace(shell(type(block), vars(block))) for _ in range(2)
            )
        except Exception as error:
            raise _NotCarriedError(
                f"Its forward cannot be traced ({first_line(error)})."
            ) from error
    if code_of(first)[0] != code_of(second)[0]:
        raise _NotCarriedError("Its forward does something else at every call.")
    if sum(node.op == "placeholder" for node in first.nodes) != inputs:
        raise _NotCarriedError("Its forward has arguments that were not given here.")
    for node in first.nodes:
        name = getattr(node.target, "__name__", str(node.target))
        written = name.endswith("_") and not name.endswith("__")
        if node.op in ("call_function", "call_method") and (written or node.kwargs.get("inplace")):
            raise _NotCarriedError(f"Its forward calls {name}, which changes a tensor in place.")
        if node.op == "get_attr" and not hasattr(block, str(node.target).partition(".")[0]):
            raise _NotCarriedError("Its forward makes a tensor of numbers, as torch.tensor does.")
        if "training" in node.kwargs or ("dropout" in name and node.op != "call_module"):
            raise _NotCarriedError(f"Its forward calls {name}, which is told the training mode.")
    return first


@dataclass(eq=False)
class _Merging:
    """One block while it is merged."""

    block: nn.Module
    trace: fx.Graph
    args: Sequence[Tensor]
    rules: Collection[str]
    prove: bool
    inlined: set[str]
    exports: Exports
    value: dict[fx.Node, fx.Node] = field(default_factory=dict)  # of the trace → of the program
    new: dict[fx.Node, fx.Node] = field(default_factory=dict)  # of the trace → written anew
    layers: dict[str, nn.Module] = field(default_factory=dict)

    def merge(self) -> Merge | None:
        """Return what becomes of the block; None: nothing."""
        program = self._exported()
        self.old = {node.name: node for node in program.graph.nodes}
        result = rewrite(program, prove=self.prove, rules=self.rules, at_example=True)
        if not any(fusion.rule == "branches" for fusion in result.fusions):
            return None  # anything else is folded without a new forward, or not worth one
        self.program = result.program
        self.left = {node.name: node for node in self.program.graph.nodes}
        self.specs = {spec.arg.name: spec for spec in self.program.graph_signature.input_specs}
        self.stands = {node.name: first for first, node in reversed(self.value.items())}
        graph = self._written()
        absorbed = self._absorbed(program)
        source, names = code_of(graph)
        return Merge(
            source,
            names,
            self.layers,
            absorbed,
            frozenset(
                str(node.target)
                for node in graph.nodes
                if node.op == "call_module" and node.target not in self.layers
            ),
            self._key_map(result.key_map, absorbed),
            tuple(map(self._once, result.fusions)),
        )

    def _once(self, fusion: Fusion) -> Fusion:
        """The same, of the arguments, where a batch of two of them was looked at."""
        if (
            fusion.traffic_saved_bytes is None
            or fusion.macs_saved is None
            or not _is_single(self.args)
        ):
            return fusion
        return replace(
            fusion,
            traffic_saved_bytes=fusion.traffic_saved_bytes // 2,
            macs_saved=fusion.macs_saved // 2,
        )

    # The block as a program

    def _exported(self) -> ExportedProgram:
        """The program of the trace; `value` tells what each node of the trace gives in it."""
        watched = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        result = watched.graph_copy(self.trace, copies)
        tensors = self._tensors()
        order = [node for node in self.trace.nodes if node in tensors]
        marked: dict[fx.Node, fx.Node] = {}
        for node in order:  # a value as it is then: it may be changed in place later
            with watched.inserting_after(marked.get(node, copies[node])):
                marked[node] = watched.call_function(aten.alias.default, (copies[node],))
        _moved_behind_inputs(watched)
        (output,) = (node for node in self.trace.nodes if node.op == "output")
        outputs = result if isinstance(result, (tuple, list)) else (result,)
        if not all(isinstance(out, fx.Node) for out in outputs):
            raise _NotCarriedError("It returns something else than tensors.")
        self.outputs = list(output.all_input_nodes)
        if len(self.outputs) != len(outputs):
            raise _NotCarriedError("It returns a tensor twice.")
        watched.output(tuple(marked[node] for node in order))
        args = tuple(_examples(self.args))
        alike = _alike(self.block, watched, args)
        program = self.exports.get(alike)
        if program is None:
            sizes = [_declared(arg) for arg in args]
            with known_warnings_ignored(), torch.no_grad():
                try:
                    program = torch.export.export(
                        fx.GraphModule(self.block, watched),
                        args,
                        dynamic_shapes=(tuple(sizes),) if _takes_star(watched) else tuple(sizes),
                        strict=False,
                    )
                except Exception as error:
                    raise _NotCarriedError(
                        f"It cannot be exported ({first_line(error)})."
                    ) from error
            if alike is not None and not program.constants:  # (which are values)
                self.exports[alike] = program
        return self._with_outputs(program, order, args)

    def _tensors(self) -> set[fx.Node]:
        """The nodes of the trace that give tensors."""
        found: set[fx.Node] = set()

        class Watching(fx.Interpreter):
            def run_node(self, n: fx.Node) -> Any:
                value = super().run_node(n)
                if isinstance(value, Tensor) and n.op != "output":
                    found.add(n)
                return value

        with restored(self.block):
            Watching(fx.GraphModule(self.block, self.trace), graph=self.trace).run(
                *(arg.clone() for arg in self.args)
            )
        return found

    def _with_outputs(
        self, program: ExportedProgram, order: list[fx.Node], args: tuple[Tensor, ...]
    ) -> ExportedProgram:
        """The program with the block's outputs alone, having noted where the others are.

        It may be that of another block which differs in values alone.
        """
        signature = program.graph_signature
        kinds = {spec.kind for spec in signature.output_specs}
        if kinds - {OutputKind.USER_OUTPUT}:
            raise _NotCarriedError("It changes what it is given, or its buffers.")
        graph = copied_graph(program.graph)
        (output,) = (node for node in graph.nodes if node.op == "output")
        marks = dict(zip(order, output.args[0], strict=True))
        self.value = {node: mark.args[0] for node, mark in marks.items()}
        specs = dict(zip(order, signature.output_specs, strict=True))
        output.args = (tuple(self.value[node] for node in self.outputs),)
        for mark in marks.values():
            graph.erase_node(mark)
        kept = []
        for node in self.outputs:
            arg = replace(specs[node].arg, name=self.value[node].name)
            kept.append(replace(specs[node], arg=arg))
        for spec, arg in zip(
            [spec for spec in signature.input_specs if spec.kind is InputKind.USER_INPUT],
            [node for node in self.trace.nodes if node.op == "placeholder"],
            strict=True,
        ):
            node = next(node for node in graph.nodes if node.name == spec.arg.name)
            # (its channels, whichever axis they are)
            if sum(isinstance(size, int) for size in node.meta["val"].shape) > 1:
                raise _NotCarriedError(f"It takes `{arg.name}` at one size only.")
        return ExportedProgram(
            fx.GraphModule(program.graph_module, graph),
            graph,
            replace_outputs(signature, kept),
            {key: tensor for key, tensor in _named(self.block) if key in program.state_dict},
            program.range_constraints,
            program.module_call_graph,
            (args, {}),
            program.constants,
            verifiers=program.verifiers,
        )

    # What is left, as calls of the block's modules

    def _written(self) -> fx.Graph:
        """The new forward."""
        needed: set[fx.Node] = set()
        for node in self.outputs:
            self._need(node, needed)
        graph = fx.Graph()
        for node in self.trace.nodes:
            if node.op == "placeholder":
                self.new[node] = graph.node_copy(node)
            elif node in needed:
                if self._is_new(node):
                    self.new[node] = self._call(graph, self.left[self.value[node].name])
                else:
                    self.new[node] = graph.node_copy(node, self.new.__getitem__)
        (output,) = (node for node in self.trace.nodes if node.op == "output")
        graph.node_copy(output, self.new.__getitem__)
        graph.lint()
        return graph

    def _need(self, node: fx.Node, needed: set[fx.Node]) -> None:
        if node in needed or node.op == "placeholder":
            return
        needed.add(node)
        if self._is_new(node):
            self._need_inputs(self.left[self.value[node].name], needed)
            return
        if node in self.value:
            self._require_whole(node)
        for given in node.all_input_nodes:
            self._need(given, needed)

    def _need_inputs(self, call: fx.Node, needed: set[fx.Node]) -> None:
        for given in call.all_input_nodes:
            if self._is_stored(given):
                continue
            stands = self.stands.get(given.name)
            if stands is not None:
                self._need(stands, needed)
            elif given.name in self.old and not self._is_other(given.name):
                raise self._inside(given.name)
            else:
                self._need_inputs(given, needed)

    def _is_stored(self, node: fx.Node) -> bool:
        return node.op == "placeholder" and self.specs[node.name].kind is not InputKind.USER_INPUT

    def _is_new(self, node: fx.Node) -> bool:
        """Whether another call stands for the value of this node of the trace."""
        return node in self.value and self._is_other(self.value[node].name)

    def _is_other(self, name: str) -> bool:
        """Whether what has this name in the program is another call than it was."""
        old, left = self.old.get(name), self.left.get(name)
        if left is None:
            return False
        return old is None or _described(old) != _described(left)

    def _require_whole(self, node: fx.Node) -> None:
        """All calls that give the value of this node, from its inputs on, must still be there."""
        ends = {self.value[given].name for given in node.all_input_nodes if given in self.value}
        pending = [self.old[self.value[node].name]]
        while pending:
            call = pending.pop()
            if call.name in ends or call.op == "placeholder":
                continue
            if call.name not in self.left or self._is_other(call.name):
                if node.op == "call_module":
                    raise _PartlyLeftError(node.target)
                raise _NotCarriedError("Only a part of one of its calls would be left.")
            pending += call.all_input_nodes

    def _inside(self, name: str) -> Exception:
        """What to raise for a value that only a child knows, while it runs."""
        for node in self.trace.nodes:
            if node.op == "call_module" and node in self.value:
                ends = {self.value[given].name for given in node.all_input_nodes}
                pending = [self.old[self.value[node].name]]
                while pending:
                    call = pending.pop()
                    if call.name == name:
                        return _PartlyLeftError(node.target)
                    if call.name not in ends and call.op != "placeholder":
                        pending += call.all_input_nodes
        return _NotCarriedError("A value that is needed lies inside of one of its calls.")

    def _call(self, graph: fx.Graph, call: fx.Node) -> fx.Node:
        """Write a call of the program that is new."""
        stands = self.stands.get(call.name)
        if stands is not None and stands in self.new:
            return self.new[stands]

        def written(given: Any) -> Any:
            if isinstance(given, (list, tuple)):
                return [written(entry) for entry in given]
            return self._call(graph, given) if isinstance(given, fx.Node) else given

        if call.target in _FUNCTIONS and all(isinstance(arg, fx.Node) for arg in call.args):
            operands = tuple(map(written, call.args))
            if call.kwargs:  # a factor, which operators do not take
                function = torch.add if call.target is aten.add.Tensor else torch.sub
                return graph.call_function(function, operands, dict(call.kwargs))
            return graph.call_function(_FUNCTIONS[call.target], operands)
        if call.target is aten.constant_pad_nd.default:
            x, sizes = call.args
            return graph.call_function(torch.nn.functional.pad, (written(x), sizes))
        if call.target in _METHODS and len(call.all_input_nodes) == 1:
            return graph.call_method(_METHODS[call.target], tuple(map(written, call.args)))
        if call.target is aten.cat.default:
            return graph.call_function(torch.cat, tuple(map(written, call.args)))
        if call.target is aten.linear.default or call.target in _CONVS:
            return graph.call_module(self._layer(call), (written(call.args[0]),))
        name = str(call.target).removeprefix("aten.")
        raise _NotCarriedError(f"What is left is a call of {name}, which no module of it makes.")

    def _layer(self, call: fx.Node) -> str:
        """Make the layer of a call; return the path of what it replaces."""
        given: list[Any] = [*call.args, *_DEFAULTS[len(call.args) :]]
        weight, bias = (
            None if node is None else self.program.state_dict.get(str(self.specs[node.name].target))
            for node in given[1:3]
        )
        key = str(self.specs[given[1].name].target)
        path = key.removesuffix(".weight")
        replaced = self.block.get_submodule(path) if path and key.endswith(".weight") else None
        if weight is None or replaced is None or path in self.layers:
            raise _NotCarriedError("The merged layer would have no module's place.")
        made = _made(call.target, weight, given[3:])
        trains = any(parameter.requires_grad for parameter in self.block.parameters())
        with torch.inference_mode(False):
            shift = weight.new_zeros(weight.shape[0]) if bias is None else bias.detach().clone()
            made.weight = nn.Parameter(weight.detach().clone(), requires_grad=trains)
            made.bias = nn.Parameter(shift.detach(), requires_grad=trains)
        self.layers[path] = made.train(replaced.training)
        return path

    # What is no longer used

    def _absorbed(self, program: ExportedProgram) -> dict[str, tuple[str, ...]]:
        left = {str(spec.target) for spec in self.program.graph_signature.input_specs}
        used = {node.name for node in program.graph.nodes if node.users}
        gone = {
            str(spec.target)
            for spec in program.graph_signature.input_specs
            if spec.target and spec.arg.name in used and spec.target not in left
        }
        found: dict[str, tuple[str, ...]] = {}
        for path, module in self.block.named_modules():
            own = {
                name: f"{path}.{name}" if path else name
                for table in (module._parameters, module._buffers)
                for name, tensor in table.items()
                if tensor is not None
            }
            taken = [name for name, key in own.items() if key in gone or path in self.layers]
            counter = "num_batches_tracked"
            if taken and counter in own and counter not in taken:
                taken.append(counter)  # it counts what is no longer there
            if taken and path not in self.layers:
                if len(taken) < len(own):
                    raise _NotCarriedError(f"Only a part of the tensors of `{path}` is used up.")
                found[path] = tuple(taken)
        return found

    def _key_map(self, went: Any, absorbed: dict[str, tuple[str, ...]]) -> dict[str, str | None]:
        new = {f"{path}.{name}" for path in self.layers for name in ("weight", "bias")}
        gone = {f"{path}.{n}" if path else n for path, names in absorbed.items() for n in names}
        found: dict[str, str | None] = {}
        for key in self.block.state_dict():
            target = went.get(key, key)
            if key in gone or key.rpartition(".")[0] in self.layers:
                found[key] = target if target in new else None
            else:
                found[key] = key
        return found


def _alike(block: nn.Module, graph: fx.Graph, args: tuple[Tensor, ...]) -> Hashable:
    """What two blocks must have in common that differ in values alone; None: it cannot be told."""
    settings = settings_of(block)
    if settings is None:
        return None
    first: dict[int, str] = {}  # a tensor of two names is one
    stored = tuple((key, first.setdefault(id(t), key), _kind(t)) for key, t in _named(block))
    widths = tuple(vars(module).get("num_features") for module in block.modules())
    return settings, widths, stored, code_of(graph)[0], tuple(map(_kind, args))


def _named(block: nn.Module) -> list[tuple[str, Tensor]]:
    """All parameters and buffers, by each of their names; a class may give them others itself."""
    return [
        (f"{path}.{name}" if path else name, tensor)
        for path, module in block.named_modules(remove_duplicate=False)
        for table in (module._parameters, module._buffers)
        for name, tensor in table.items()
        if tensor is not None
    ]


def _kind(tensor: Tensor) -> Hashable:
    kind = (type(tensor), tensor.dtype, tensor.device, tensor.layout, tensor.requires_grad)
    if tensor.layout is not torch.strided:
        return (*kind, tuple(tensor.shape))
    return (*kind, tuple(tensor.shape), tensor.stride(), tensor.storage_offset())


_DEFAULTS = (None, None, None, (1,), (0,), (1,), 1)  # of a convolution's arguments


def _made(target: Any, weight: Tensor, sizes: list[Any]) -> nn.Module:
    """A layer of that shape, without values."""
    with torch.device("meta"):  # nothing is drawn at random
        if target is aten.linear.default:
            return nn.Linear(weight.shape[1], weight.shape[0])
        class_: Any = _CONVS[target]
        stride, padding, dilation, groups = sizes
        layer: nn.Module = class_(
            weight.shape[1] * groups,
            weight.shape[0],
            tuple(weight.shape[2:]),
            tuple(stride),
            padding=tuple(padding),
            dilation=tuple(dilation),
            groups=groups,
        )
        return layer


def replace_outputs(signature: Any, kept: list[Any]) -> Any:
    return replace(signature, output_specs=kept)


def _described(node: fx.Node) -> tuple[Any, ...]:
    """A call by its target and the names of what it is given."""
    named = fx.node.map_arg((node.args, node.kwargs), lambda given: f"%{given.name}")
    return node.op, node.op == "placeholder" or node.target, str(named)


def _moved_behind_inputs(graph: fx.Graph) -> None:
    """Put calls that stand between placeholders behind the last of them."""
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    between: list[fx.Node] = []
    for node in graph.nodes:
        if node is last:
            break
        if node.op != "placeholder":
            between.append(node)
    for node in reversed(between):
        last.append(node)


def _takes_star(graph: fx.Graph) -> bool:
    return any(
        node.op == "placeholder" and str(node.target).startswith("*") for node in graph.nodes
    )


def _is_single(args: Sequence[Tensor]) -> bool:
    return all(arg.dim() and arg.shape[0] == 1 for arg in args)


def _examples(args: Sequence[Tensor]) -> list[Tensor]:
    """The arguments, of a batch of more than one: one would be taken for one always."""
    return [
        torch.cat([arg, arg.flip(0)]) if arg.dim() and arg.shape[0] == 1 else arg.clone()
        for arg in args
    ]


def _declared(arg: Tensor) -> dict[int, Any]:
    return dict.fromkeys(range(arg.dim()), Dim.AUTO)
