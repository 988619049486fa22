"""Rewrites a program by the rules of `rewrites/`, until none has anything left to do.

Conditions are asked here, for all rules alike: what goes is read by nobody else, nothing writes to
it, the result has the size and dtype of what it stands for, and it costs less.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._dispatch.python import enable_python_dispatcher
from torch.export.graph_signature import TensorArgument
from torch.fx import Node
from torch.fx.node import map_arg

from torchfuse.fusing.programs.costs import Cost, cost
from torchfuse.fusing.programs.edited_program import EditedProgram
from torchfuse.fusing.programs.memory import is_view
from torchfuse.fusing.programs.reading import Reading, same_shape
from torchfuse.fusing.programs.replaying import Replay, named, replay
from torchfuse.fusing.programs.rewrites import REWRITES
from torchfuse.fusing.programs.rewrites._rewrite import Constant, Edit, NewCall, Rewrite
from torchfuse.graph.exported_program import module_path
from torchfuse.planning import Fusion, Refusal, Skip

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping

    from torch.export import ExportedProgram
    from torch.fx import Graph

__all__ = ["Rewritten", "rewrite"]

aten = torch.ops.aten

_VIEWS_BY_STRIDE = {aten.view.default, aten.as_strided.default, aten.view_as_complex.default}


@dataclass(frozen=True)
class Rewritten:
    """A new program, what was done to make it, and where each key of the old one went."""

    program: ExportedProgram
    fusions: tuple[Fusion, ...]
    skips: tuple[Skip, ...]
    key_map: Mapping[str, str | None]


def rewrite(
    program: ExportedProgram,
    *,
    prove: bool,
    rules: Collection[str] | None = None,
    refuted: dict[tuple[str | None, str], str] | None = None,
    at_example: bool = False,
) -> Rewritten:
    """Return `program` after each exact edit that `rules` (None: all) allow and that costs less.

    It is itself left as it was; if there was nothing to do, it is what is returned. With `prove`,
    the calls that each edit replaced are compared with those that came, on what the program's own
    example inputs give; one that differs is left out and becomes a skip. `refuted` are those of an
    earlier time (rule, value), each with how it differs, and takes up new ones; without a rule, no
    rule may touch what gives that value. What is saved is known where all sizes are, or with
    `at_example` as it is at the sizes of the example.

    Raises:
        InputError: `prove`, there was something to do, and the program has no example inputs.
    """
    refuted = {} if refuted is None else refuted
    chosen = [rule for rule in REWRITES if rules is None or rule.name in rules]
    while True:
        rewriting = _Rewriting(program, chosen, refuted, keep=prove, at_example=at_example)
        if not rewriting.done:
            return Rewritten(program, (), rewriting.skips, {key: key for key in program.state_dict})
        if not prove:
            return rewriting.rewritten({})
        found = replay(program, [done.replay for done in rewriting.done if done.replay is not None])
        wrong: dict[tuple[str | None, str], str] = {
            (done.rule.name, done.value): found[done.value][1]
            for done in rewriting.done
            if done.value in found and found[done.value][1]
        }
        if not wrong:
            return rewriting.rewritten({name: max_rel for name, (max_rel, _) in found.items()})
        refuted |= wrong


@dataclass(frozen=True, eq=False)
class _Done:
    """An edit that was carried out."""

    rule: Rewrite
    value: str  # the name of what it stands for
    fusion: Fusion | None  # None: it only made room
    replay: Replay | None


class _Rewriting(EditedProgram):
    """A program while it is rewritten."""

    def __init__(
        self,
        program: ExportedProgram,
        rules: list[Rewrite],
        refuted: Mapping[tuple[str | None, str], str],
        *,
        keep: bool,
        at_example: bool,
    ) -> None:
        super().__init__(program)
        self.rules, self.refuted, self.keep = rules, refuted, keep
        self.at_example = at_example
        self.names = {node.name for node in self.graph.nodes}
        self.done: list[_Done] = []
        # By the rule and the calls that would go: another pass need not compute them again.
        self.final: dict[tuple[Any, ...], Refusal] = {}
        self.refused: dict[tuple[Any, ...], Refusal] = {}  # of the last pass
        self.taken_in: dict[str, str | None] = {}  # old key → new key of what took it in
        self.named_outside = _named_outside(program)
        for node in list(self.graph.nodes):
            if node.target is aten._assert_tensor_metadata.default:
                self.graph.erase_node(node)  # what it says of a dtype was settled at export
            elif _detaches_a_number(node) and node.name not in self.named_outside:
                node.replace_all_uses_with(node.args[0])  # it writes nothing, for all its schema
                self.stands[node.name] = node.args[0].name
                self.graph.erase_node(node)
        self.reading: Reading
        if rules and _is_plain(self.graph):
            self._rewrite_all()
        skips = dict.fromkeys(
            Skip(_paths(nodes), refusal.reason, refusal.hint, rule)
            for (rule, *nodes), refusal in self.refused.items()
            if refusal.reason
        )
        self.skips: tuple[Skip, ...] = tuple(skips)

    def _rewrite_all(self) -> None:
        number = -1
        self.reading = Reading(self)
        while number < len(self.done):
            number = len(self.done)
            self.refused = {}
            for node in [n for n in self.graph.nodes if n.op == "call_function"]:
                for rule in self.rules:
                    # (what gives several values, or a size, is never a part of a pattern's end)
                    if node._erased or not isinstance(node.meta.get("val"), Tensor):
                        break
                    self._try(rule, node)

    def _try(self, rule: Rewrite, node: Node) -> None:
        for found in rule.find(self.reading, node):
            if isinstance(found, Refusal):
                self.refused[rule.name, node] = found
                continue
            refusal = self._carried_out(rule, found)
            if refusal is None:
                return
            key: tuple[Any, ...] = (rule.name, *found.goes)
            self.refused[key] = refusal

    # One edit

    def _carried_out(self, rule: Rewrite, edit: Edit) -> Refusal | None:
        """Carry `edit` out, or return why not: without a reason, if nobody would ask for one."""
        out, key = edit.goes[-1], (rule.name, *edit.goes)
        if (rule.name, out.name) in self.refuted:
            problem = self.refuted[rule.name, out.name]
            return Refusal(f"The fusion did not pass its proof: {problem}")
        if any((None, node.name) in self.refuted for node in edit.goes):
            return Refusal("")  # said already
        refusal = self._others_read(edit) or self._is_written(edit)
        if refusal is not None or key in self.final:
            return refusal or self.final[key]
        result = edit.result()
        if isinstance(result, Refusal):
            self.final[key] = result
            return result
        refusal = self._moves_memory(edit, result)
        if refusal is not None:
            return refusal
        values = _Values(out, self)
        try:
            made = values.of(result)
        except _NotFiniteError:
            return Refusal(f"Merged, a weight would be too large for {out.meta['val'].dtype}.")
        old = out.meta["val"]
        if made.dtype != old.dtype or not same_shape(made.shape, old.shape):
            return Refusal("Merged, the result would have another size.")
        if _views_by_stride(self.reading, out) and made.stride() != old.stride():
            return Refusal("A view of the result needs it to lie in memory as it does.")
        before = sum((self._cost(node) for node in edit.goes), Cost(0, 0))
        saves = values.cost < before
        if not saves and not rule.makes_room:
            self.final[key] = _costs_more(before, values.cost)
            return self.final[key]
        if edit.keeps_strides and not same_shape(made.stride(), old.stride()):
            return Refusal("Merged, the result would lie in memory in another order.")
        self._replace(rule, edit, result, values, before if saves else None)
        self.reading = Reading(self)
        return None

    def _others_read(self, edit: Edit) -> Refusal | None:
        for node in edit.goes[:-1]:
            for user in node.users:
                if user not in edit.goes:
                    what = (
                        "is also an output of the model"
                        if user.op == "output"
                        else f"is also read by `{_path(user)}`"
                    )
                    return Refusal(f"The output of `{_path(node)}` {what}.")
            if node.name in self.named_outside:
                return Refusal(f"The signature of a module names the output of `{_path(node)}`.")
        return None

    def _is_written(self, edit: Edit) -> Refusal | None:
        """What the calls that go read must be the same where the new ones read it, at the end."""
        memory, going = self.reading.memory, set(edit.goes)
        last = memory.position[edit.goes[-1]]
        for node in edit.goes:
            first = memory.position[node]
            for given in node.all_input_nodes:
                for root in memory.roots[given] - going:
                    writes = [w for w in memory.writes[root] if first <= memory.position[w] <= last]
                    alone = not writes or (
                        going.issuperset(writes) and self._writes_alone(edit, root)
                    )
                    if not alone:
                        return Refusal(f"What `{_path(node)}` reads is changed in place.")
        return None

    def _writes_alone(self, edit: Edit, root: Node) -> bool:
        """Whether nobody would see that memory is no longer changed by what goes.

        As in `y = x.clone(); conv(y.sub_(mean).div_(std))`: what reads `y` afterwards, by whatever
        name, saw the changed values, and so does `conv` if it is given an older name.
        """
        memory, going = self.reading.memory, set(edit.goes)
        position, writes = memory.position, memory.writes[root]
        ours = memory.sharing(edit.goes[-1])
        for reader in memory.readers[root]:
            for given in reader.all_input_nodes:
                if root not in memory.roots[given] or (reader not in going and given in ours):
                    continue
                seen = [w for w in writes if position[given] < position[w] < position[reader]]
                if seen and (reader in going or not going.isdisjoint(seen)):
                    return False
        return root.op == "call_function"

    def _moves_memory(self, edit: Edit, result: NewCall | Node) -> Refusal | None:
        """A later change in place must not reach more, or less, than it did."""
        memory, going, out = self.reading.memory, set(edit.goes), edit.goes[-1]
        last = memory.position[out]
        outside = memory.roots[out] - going
        for node in set(_nodes(result)).difference(_inputs(edit)):  # it was read earlier than now
            first = memory.position[node]
            if any(
                first < memory.position[w] <= last
                for r in memory.roots[node]
                for w in memory.writes[r]
            ):
                return Refusal(f"The output of `{_path(node)}` is changed in place in between.")
        touched = outside
        if isinstance(result, Node):
            if out.name in self.named_outside or any(user.op == "output" for user in out.users):
                return Refusal("")  # it has a name there; that it goes saves nothing
            if memory.roots[result] == memory.roots[out]:
                return None
            touched = memory.roots[result] | memory.roots[out]
        if not any(memory.position[w] > last for root in touched for w in memory.writes[root]):
            return None
        if isinstance(result, Node) and not outside:
            # Whoever changes it may have that memory, if nobody else looks at it.
            ours = {*going, *memory.sharing(out)}
            roots = memory.roots[result]
            later = [r for root in roots for r in memory.readers[root]]
            if all(root.op == "call_function" for root in roots) and all(
                reader in ours or memory.position[reader] <= memory.position[result]
                for reader in later
            ):
                return None
        return Refusal(f"The output of `{_path(out)}` is changed in place afterwards.")

    def _cost(self, node: Node) -> Cost:
        read = [
            given.meta["val"]
            for given in node.all_input_nodes
            if isinstance(given.meta.get("val"), Tensor) and not self.reading.is_constant(given)
        ]
        args = map_arg(node.args, lambda given: given.meta.get("val"))
        return cost(node.target, args, read, node.meta.get("val"), views=is_view(node.target))

    def _replace(
        self,
        rule: Rewrite,
        edit: Edit,
        result: NewCall | Node,
        values: _Values,
        before: Cost | None,
    ) -> None:
        out = edit.goes[-1]
        value, paths, like = out.name, _paths(edit.goes), out.meta["val"]
        constants = [n for n in _inputs(edit) if self.reading.is_constant(n)]
        stored = self.reading.stored(constants)
        replayed = _replayed(edit, result, self.reading) if self.keep else None
        parameters = _parameters(self.state)
        # Those that go free their names for those that come.
        kept, stay = self.state.copy(), set(_nodes(result))
        for node in constants:
            if (
                node.op == "placeholder"
                and node not in stay
                and all(user in edit.goes for user in node.users)
            ):
                target = str(self.specs[node.name].target)
                if len(self.named(target)) == 1:
                    self.state.pop(target, None)
        new_keys: list[str] = []
        if isinstance(result, NewCall):
            beside = self._beside(edit, constants)
            stands = _Building(self, values, edit, beside, kept, new_keys).built(result)
        else:
            stands = result
        out.replace_all_uses_with(stands)
        self._erase(edit.goes)
        if stands is result:
            self.stands[value] = stands.name
        else:
            stands.name = value
            values.names[id(result)] = value
        self.taken_in |= {
            key: new_keys[0] if new_keys else None for key in stored if key not in new_keys
        }
        fusion = None
        if before is not None:
            saved = Cost(
                before.macs - values.cost.macs, before.traffic_bytes - values.cost.traffic_bytes
            )
            known = self.at_example or all(isinstance(size, int) for size in like.shape)
            fusion = Fusion(
                rule.name,
                paths,
                parameters - _parameters(self.state),
                saved.traffic_bytes if known else None,
                saved.macs if known else None,
            )
        if replayed is not None:
            replayed = replace(replayed, made=values.names)
        self.done.append(_Done(rule, value, fusion, replayed))

    def _beside(self, edit: Edit, constants: list[Node]) -> Node:
        """The placeholder whose name and kind the new weight takes over."""
        after = edit.named_after
        weights = [n for n in constants if after is None or n in after.all_input_nodes]
        nodes: list[Node] = [*weights, *constants, *self.graph.nodes]
        for node in nodes:
            if node.op == "placeholder" and self.specs[node.name].target is not None:
                return node
        first: Node = next(node for node in self.graph.nodes if node.op == "placeholder")
        return first

    def unused_name(self, name: str) -> str:
        """Return a name like this one, which no node has or had."""
        number, candidate = 0, name
        while candidate in self.names:
            number += 1
            candidate = f"{name}_{number}"
        self.names.add(candidate)
        return candidate

    def _erase(self, goes: tuple[Node, ...]) -> None:
        """Take out the calls, and what nobody reads after that."""
        candidates: list[Node] = []
        for node in reversed(goes):
            candidates += node.all_input_nodes
            self.graph.erase_node(node)
        while candidates:
            node = candidates.pop()
            if node._erased or node.users:
                continue
            if node.op == "placeholder" and self.specs[node.name].target is not None:
                target = str(self.specs[node.name].target)
                self.drop_unused({node.name})
                if target.endswith(".running_mean"):  # nothing is counted without it
                    counter = target.rpartition(".")[0] + ".num_batches_tracked"
                    self.drop_unused(set(self.named(counter)))
            elif node.op == "call_function" and not _is_impure(node):
                candidates += node.all_input_nodes
                self.graph.erase_node(node)

    # The result

    def rewritten(self, max_rel: Mapping[str, float]) -> Rewritten:
        """Return the new program with what was done."""
        fusions = tuple(
            replace(done.fusion, max_rel=max_rel.get(done.value))
            for done in self.done
            if done.fusion is not None
        )
        key_map = {key: self._went_to(key) for key in self.old.state_dict}
        return Rewritten(self.program(), fusions, self.skips, key_map)

    def _went_to(self, key: str) -> str | None:
        found: str | None = key
        for _ in range(len(self.done) + 1):
            if found is None or found in self.state:
                return found
            found = self.taken_in.get(found)
        return None


class _NotFiniteError(Exception):
    """A constant that the dtype cannot hold."""


class _Values:
    """What new calls would give, as fake tensors, and what they would cost."""

    def __init__(self, out: Node, program: _Rewriting) -> None:
        self.like: Tensor = out.meta["val"]
        self.mode = program.fake_mode
        self.is_constant = program.reading.is_constant
        self.cost = Cost(0, 0)
        self.made: dict[int, Tensor] = {}  # by id of a new call
        self.rounded: dict[int, Tensor] = {}  # by id of a constant
        self.names: dict[int, str] = {}  # of the nodes, once built; by id of a new call

    def of(self, value: Any) -> Any:
        if isinstance(value, Node):
            return value.meta["val"]
        if isinstance(value, (list, tuple)):
            return [self.of(entry) for entry in value]
        if isinstance(value, Constant):
            rounded = value.value.to(self.like.dtype).to(self.like.device)
            if not rounded.isfinite().all():
                raise _NotFiniteError
            self.rounded[id(value)] = rounded
            return self.mode.from_tensor(rounded, static_shapes=True)
        if not isinstance(value, NewCall):
            return value
        args = self.of(value.args)
        # (as torch.export does: without it, some operators take a declared size for the example's)
        with self.mode, torch.no_grad(), enable_python_dispatcher():
            made = value.target(*args, **value.kwargs)
        self.made[id(value)] = made
        read = [
            given
            for argument, given in zip(_flat(value.args), _flat(args), strict=True)
            if isinstance(argument, NewCall)
            or (isinstance(argument, Node) and not self.is_constant(argument))
        ]
        self.cost += cost(value.target, args, read, made, views=is_view(value.target))
        return made


@dataclass(frozen=True, eq=False)
class _Building:
    """New calls while they become nodes."""

    program: _Rewriting
    values: _Values
    edit: Edit
    beside: Node
    old_state: Mapping[str, Tensor]
    new_keys: list[str]

    def built(self, call: NewCall) -> Node:
        """Return the node of a new call."""
        args = tuple(self._filled(argument) for argument in call.args)
        program, out = self.program, self.edit.goes[-1]
        with program.graph.inserting_before(out):
            node = program.graph.call_function(call.target, args, dict(call.kwargs))
        node.name = program.unused_name(node.name)
        like = self.edit.named_after or out
        node.meta = {**like.meta, "val": self.values.made[id(call)]}
        self.values.names[id(call)] = node.name
        return node

    def _filled(self, value: Any) -> Any:
        if isinstance(value, NewCall):
            return self.built(value)
        if isinstance(value, (list, tuple)):
            return [self._filled(entry) for entry in value]
        if not isinstance(value, Constant):
            return value
        tensor = self.values.rounded[id(value)]
        target = self.program.specs[self.beside.name].target
        template = self.old_state.get(str(target))
        if isinstance(template, nn.Parameter) and not value.role.startswith("running_"):
            tensor = nn.Parameter(tensor, requires_grad=template.requires_grad)
        owner = str(target).rpartition(".")[0] if target else _path(self.edit.goes[-1])
        node = self.program.store(
            tensor, f"{owner}.{value.role}" if owner else value.role, self.beside
        )
        self.program.names.add(node.name)
        self.new_keys.append(str(self.program.specs[node.name].target))
        return node


# ── the graph ────────────────────────────────────────────────────────────────────────────────────


def _is_plain(graph: Graph) -> bool:
    """Whether each call is one of tensors: inside torch.vmap, say, they are not what they seem."""
    return all(
        node.op != "call_function"
        or isinstance(node.target, (torch._ops.OpOverload, torch._ops.HigherOrderOperator))
        or getattr(node.target, "__module__", "") in ("_operator", "math", "torch")
        for node in graph.nodes
    )


def _detaches_a_number(node: Node) -> bool:
    """Whether a node is the second of the two that `torch.tensor(…)` in a forward becomes."""
    given = node.args[0] if node.args else None
    return (
        node.target is aten.detach_.default
        and isinstance(given, Node)
        and given.target is aten.lift_fresh_copy.default
    )


def _is_impure(node: Node) -> bool:
    target = node.target
    return not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable


def _named_outside(program: ExportedProgram) -> frozenset[str]:
    """The nodes whose names the signatures of modules hold, for torch.export.unflatten."""
    return frozenset(
        argument.name
        for entry in program.module_call_graph
        if entry.signature is not None and entry.fqn
        for argument in (*entry.signature.inputs, *entry.signature.outputs)
        if isinstance(argument, TensorArgument)
    )


def _inputs(edit: Edit) -> list[Node]:
    """What the calls that go read, of others."""
    given = dict.fromkeys(given for node in edit.goes for given in node.all_input_nodes)
    return [node for node in given if node not in edit.goes]


def _replayed(edit: Edit, result: NewCall | Node, reading: Reading) -> Replay:
    inputs = list(dict.fromkeys([*_inputs(edit), *_nodes(result)]))
    return Replay(
        name=edit.goes[-1].name,
        before=tuple(
            (
                node.name,
                node.target,
                named(node.args),
                {key: named(value) for key, value in node.kwargs.items()},
            )
            for node in edit.goes
        ),
        after=result,
        made={},
        constants={n.name: reading.constant(n) for n in inputs if reading.is_constant(n)},
        inputs=tuple(node.name for node in inputs if not reading.is_constant(node)),
        like=edit.goes[-1].meta["val"],
    )


def _views_by_stride(reading: Reading, out: Node) -> bool:
    shared = reading.memory.sharing(out)
    return any(node.target in _VIEWS_BY_STRIDE for node in shared)


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for entry in value:
            yield from _flat(entry)
    else:
        yield value


def _nodes(value: Any) -> Iterator[Node]:
    """The nodes that new calls read."""
    for entry in _flat(value.args if isinstance(value, NewCall) else value):
        if isinstance(entry, Node):
            yield entry
        elif isinstance(entry, NewCall):
            yield from _nodes(entry)


def _parameters(state: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in state.values() if isinstance(tensor, nn.Parameter))


def _path(node: Node) -> str:
    return module_path(node) or node.name


def _paths(nodes: Iterable[Node]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(map(_path, nodes)))


def _costs_more(before: Cost, after: Cost) -> Refusal:
    if after.macs > before.macs:
        return Refusal(
            f"Merged, it would take {after.macs:,} multiply-adds in place of {before.macs:,}."
        )
    return Refusal("")  # neither more nor less: nothing that anyone would miss
