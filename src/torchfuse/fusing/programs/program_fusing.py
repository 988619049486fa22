"""Fusing in an exported program: batch norms are folded into the calls before them, by rewriting.

There every use of a tensor is an edge of the graph, so "reads it alone" is exact, whatever the
original model's Python did; and each call gets weights of its own, so that a weight which others
use too, or a convolution that is called twice, is no obstacle.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from math import prod
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node
from torch.fx.node import map_aggregate
from torch.utils._pytree import tree_map

from torchfuse.cases import check_finite
from torchfuse.errors import FusionError, InputError
from torchfuse.fusing.programs.costs import program_cost
from torchfuse.fusing.programs.edited_program import EditedProgram, copied_graph
from torchfuse.fusing.programs.program_judging import judge
from torchfuse.fusing.programs.program_proving import (
    ProgramPair,
    pair_differences,
    whole_difference,
)
from torchfuse.fusing.programs.rewrites import REWRITES
from torchfuse.fusing.programs.rewriting import rewrite
from torchfuse.graph.exported_program import module_path
from torchfuse.graph.kinds import kind_of
from torchfuse.planning import Fusion, FusionPlan, FusionResult, WholeCost
from torchfuse.rules import RULES

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from torchfuse.fusing.programs.program_judging import FoldInProgram
    from torchfuse.planning import Skip

__all__ = ["FoldedProgram", "fold", "fuse_all", "fuse_exported"]

aten = torch.ops.aten


@dataclass(frozen=True)
class FoldedProgram:
    """A new program, what was done to make it, and where each key of the old one went."""

    program: ExportedProgram
    plan: FusionPlan
    key_map: dict[str, str | None]  # old state_dict key → new one; None: taken in
    in_float64: Callable[[], tuple[ExportedProgram, ExportedProgram]]  # the old one, and this
    parts: tuple[str, ...]  # the batch norms' nodes, and `_REWRITTEN` if more was done
    refuted: Mapping[str, str]  # batch norm that did not pass its proof → how it differs
    rewrites_refuted: Mapping[tuple[str | None, str], str] = dataclasses.field(default_factory=dict)


def fuse_exported(
    exported_program: ExportedProgram,
    *,
    rules: Collection[str] | None = None,
    verify: bool = True,
) -> FusionResult:
    """Return the program with every exact fusion done, the plan, the proof, and the key map.

    Its scope is what was exported, over the declared dynamic sizes. With `verify`, each fusion is
    compared on the program's own example inputs, then the whole program on them and on others of
    the same sizes; `.check` is None without.

    Raises:
        InputError: a rule that does not exist, `verify` for a program without example inputs, or
            a program that torch.export could not follow, or whose weights are not finite.
        FusionError: the new program differs, in float64 too, although each of its fusions is exact.
    """
    if not isinstance(exported_program, ExportedProgram):
        raise InputError(
            f"Expected a torch.export.ExportedProgram, got {type(exported_program).__name__}; use "
            "torchfuse.fuse for a module."
        )
    for name, constant in exported_program.constants.items():
        if isinstance(constant, Tensor) and is_fake(constant):
            raise InputError(
                f"Expected a program that can run, but its constant '{name}' has no values: "
                "torch.export leaves that behind of derivatives (torch.func.grad, vjp) in a "
                "model's forward; use torchfuse.fuse on the module it was exported from."
            )
    _require_finite(exported_program)
    known = _known(rules)
    folded = fuse_all(exported_program, prove=verify, rules=known)
    if not verify:
        return FusionResult(folded.program, folded.plan, None, folded.key_map)
    parts = folded.parts

    def fused(kept: Sequence[str], of: ExportedProgram = exported_program) -> ExportedProgram:
        if of is exported_program and len(kept) == len(parts):
            return folded.program
        return without(set(parts) - set(kept), of).program

    def without(left: set[str], of: ExportedProgram = exported_program) -> FoldedProgram:
        refuted = {**folded.refuted, **dict.fromkeys(left - {_REWRITTEN}, _WHOLE_DIFFERS)}
        fewer = _Edit(of, refuted, known).folded()
        if _REWRITTEN in left or _REWRITTEN not in parts:
            return fewer
        return _rewritten(fewer, known, dict(folded.rewrites_refuted), prove=False)

    def in_float64() -> tuple[ExportedProgram, Callable[[Sequence[str]], ExportedProgram]]:
        wide = _widened(exported_program)
        return wide, lambda kept: fused(kept, wide)

    whole = whole_difference(exported_program, parts, fused, in_float64)
    if whole.refused:
        folded = without(set(whole.refused))
        if _REWRITTEN in whole.refused:
            scope = (*folded.plan.scope, _REWRITES_DIFFER)
            folded = dataclasses.replace(folded, plan=dataclasses.replace(folded.plan, scope=scope))
    plan = folded.plan
    if not whole.decided:
        plan = dataclasses.replace(plan, scope=(*plan.scope, _NOT_IN_FLOAT64))
    if not whole.check.passed:
        raise FusionError(
            f"The program, unfused, differs from itself ({whole.check.problems[0]}); is it "
            "deterministic?"
        )
    return FusionResult(folded.program, plan, whole.check, folded.key_map)


_WHOLE_DIFFERS = (
    "with it the program's outputs differ, although the pair itself agrees; something that was not "
    "recorded depends on it."
)
# Of what makes up a fused program: all that was done beyond folding batch norms.
_REWRITTEN = "rewritten"
_REWRITES_DIFFER = (
    "What was merged beyond batch norms was taken back: with it the program's outputs differ, "
    "although each edit by itself agrees."
)
_NOT_IN_FLOAT64 = (
    "Each fusion was compared on its own: the whole program differs by more than rounding in one "
    "layer explains, and does not run in float64, which would tell."
)


def _require_finite(program: ExportedProgram) -> None:
    """Raises InputError as `require_finite_tensors` does; which are layers is read in the graph."""
    placeholders = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    for spec in program.graph_signature.input_specs:
        if spec.target in program.state_dict and spec.arg.name in placeholders:
            users = placeholders[spec.arg.name].users
            kinds = {kind_of(getattr(user.target, "overloadpacket", user.target)) for user in users}
            of_layer = not kinds.isdisjoint(_LAYERS)
            if of_layer or spec.kind is InputKind.PARAMETER:
                check_finite(spec.target, program.state_dict[spec.target], infinite=of_layer)


_LAYERS = frozenset(
    {
        *("conv", "conv_transpose", "linear", "addmm"),
        *("batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm"),
    }
)


def _known(rules: Collection[str] | None) -> Collection[str] | None:
    names = [*(rule.name for rule in RULES), *(rule.name for rule in REWRITES)]
    for name in rules or ():
        if name not in names:
            raise InputError(f"There is no rule '{name}'; the rules are {', '.join(names)}.")
    return rules


def fold(
    program: ExportedProgram, *, prove: bool, rules: Collection[str] | None = None
) -> FoldedProgram:
    """Return `program` without the batch norms that `rules` (None: all) can fold.

    It is itself left as it was, and shares no tensor with the new one.
    With `prove`, both are run on the program's own example inputs, what each fusion puts out is
    compared, and a fusion that differs is left out and becomes a skip.

    Raises:
        InputError: `prove`, and the program was saved without example inputs.
    """
    if prove and program.example_inputs is None:
        raise InputError(
            "The exported program holds no example inputs to prove the fusions on; export it with "
            "them, or pass verify=False."
        )
    refuted: dict[str, str] = {}  # batch norm → how it differs
    while True:
        edit = _Edit(program, refuted, rules)
        folded = edit.folded()
        if not prove:
            return folded
        differences = pair_differences(program, folded.program, edit.pairs, folded.in_float64)
        wrong = {name: d.problem for name, d in differences.items() if d.problem is not None}
        if not wrong:
            return folded
        refuted |= wrong


def fuse_all(
    program: ExportedProgram, *, prove: bool, rules: Collection[str] | None = None
) -> FoldedProgram:
    """Return `program` after folding, and after all that the rules of `rewrites/` do beyond it.

    With `prove`, each is proved as `fold` does; `rules` are the names of both kinds.

    Raises:
        InputError: `prove`, and the program was saved without example inputs.
    """
    folded = fold(program, prove=prove, rules=rules)
    refuted: dict[tuple[str | None, str], str]
    refuted = {(None, name): problem for name, problem in folded.refuted.items()}
    return _rewritten(folded, rules, refuted, prove=prove)


def _rewritten(
    folded: FoldedProgram,
    rules: Collection[str] | None,
    refuted: dict[tuple[str | None, str], str],
    *,
    prove: bool,
) -> FoldedProgram:
    """Return what becomes of a folded program by the rules of `rewrites/`.

    Without `prove`, all is done but what is `refuted`, to which proving adds.
    """
    more = rewrite(folded.program, prove=prove, rules=rules, refuted=refuted)

    def in_float64() -> tuple[ExportedProgram, ExportedProgram]:
        wide, wide_folded = folded.in_float64()
        return wide, rewrite(wide_folded, prove=False, rules=rules, refuted=refuted).program

    # A norm that is no longer there was taken in after all.
    left = _norms(more.program)
    norms = {module_path(node) or node.name for node in left}
    whole = folded.plan.whole
    if whole is not None:
        whole = dataclasses.replace(whole, norms_merged=max(0, whole.norms - len(left)))
    skips = [skip for skip in folded.plan.skips if skip.modules[-1] in norms]
    more_is_said = {skip.modules for skip in more.skips}
    skips = [s for s in skips if s.rule is not None or s.modules not in more_is_said]
    said = {skip.modules for skip in skips}
    plan = dataclasses.replace(
        folded.plan,
        fusions=(*folded.plan.fusions, *more.fusions),
        skips=(*skips, *(skip for skip in more.skips if skip.modules not in said)),
        whole=whole,
    )
    key_map = {
        key: None if went is None else more.key_map.get(went)
        for key, went in folded.key_map.items()
    }
    parts = (*folded.parts, _REWRITTEN) if more.fusions else folded.parts
    return FoldedProgram(more.program, plan, key_map, in_float64, parts, folded.refuted, refuted)


def _norms(program: ExportedProgram) -> list[Node]:
    return [node for node in program.graph.nodes if node.target is aten.batch_norm.default]


class _Edit(EditedProgram):
    """A program while batch norms are folded in it."""

    def __init__(
        self,
        program: ExportedProgram,
        refuted: Mapping[str, str],
        rules: Collection[str] | None,
    ) -> None:
        super().__init__(program)
        self.refuted, self.rules = refuted, rules
        self.pairs: dict[str, ProgramPair] = {}  # by the batch norm's name
        self.norms: list[str] = []  # all that were folded
        self.taken_in: dict[str, str] = {}  # old key → new key of what took it in
        self.fusions: list[Fusion] = []
        self.skips: list[Skip] = []
        self._fold_all()

    def _fold_all(self) -> None:
        """Folds until nothing more can be: of two batch norms in a row, the second comes later."""
        while True:
            targets = {name: str(spec.target) for name, spec in self.specs.items() if spec.target}
            found = judge(self.old, self.graph, targets, self.rules, self.refuted)
            self.skips = found.skips
            for fold_ in found.folds:
                self._fold(fold_)
            if not found.folds or not found.skips:
                return

    # The edit

    def _fold(self, found: FoldInProgram) -> None:
        layer, norm = found.layer, found.norm
        _, gamma, beta, mean, variance, _, _, eps, *_ = _args(norm)
        weight, bias = _weight_and_bias(layer)
        values = {
            node: tensor.detach()
            for node in (weight, bias, gamma, beta, mean, variance)
            if node is not None and (tensor := self.tensor(node)) is not None
        }
        transposed = found.rule.pattern[0] == "conv_transpose"
        groups = _args(layer)[6] if transposed and len(_args(layer)) > 6 else 1
        new_weight, new_bias = found.rule.rewrite(
            SimpleNamespace(
                weight=values[weight], bias=values.get(bias), transposed=transposed, groups=groups
            ),
            SimpleNamespace(
                running_mean=values[mean],
                running_var=values[variance],
                eps=eps,
                weight=values.get(gamma),
                bias=values.get(beta),
            ),
        )
        owner = str(self.specs[weight.name].target).rpartition(".")[0]
        before = sum(values[node].numel() for node in (weight, bias, gamma, beta) if node in values)
        layer.args = (
            _args(layer)[0],
            self._stored(new_weight, weight, f"{owner}.weight", layer, weight),
            self._stored(new_bias, bias, f"{owner}.bias", layer, weight),
            *_args(layer)[3:],
        )
        stands = _args(norm)[0].name
        # Two batch norms in a row: what the first put out is no longer there to compare.
        self.pairs = {n: p for n, p in self.pairs.items() if p.layer != layer.name}
        self.pairs[norm.name] = ProgramPair(layer.name, stands)
        self.norms.append(norm.name)
        self.stands = {name: pair.stands for name, pair in self.pairs.items()}
        elements, size = _elements(norm), values[weight].element_size()
        self.fusions.append(
            Fusion(
                found.rule.name,
                found.modules,
                before - new_weight.numel() - new_bias.numel(),
                None if elements is None else 2 * elements * size,
                elements,
            )
        )
        norm.replace_all_uses_with(_args(norm)[0])
        self.graph.erase_node(norm)
        tracked = str(self.specs[mean.name].target).rpartition(".")[0] + ".num_batches_tracked"
        new_weight_key, new_bias_key = (str(self.specs[n.name].target) for n in _args(layer)[1:3])
        self.taken_in |= {
            str(self.specs[node.name].target): key
            for node, key in (
                (gamma, new_weight_key),
                (variance, new_weight_key),
                (beta, new_bias_key),
                (mean, new_bias_key),
            )
            if node is not None
        }
        self.drop_unused({*(node.name for node in values), *self.named(tracked)})

    def _stored(
        self, tensor: Tensor, old: Node | None, target: str, layer: Node, beside: Node
    ) -> Node:
        """Return the placeholder of `tensor`: the old one if nobody else reads it, or a new one."""
        template = self.tensor(beside)
        assert template is not None
        if isinstance(template, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=template.requires_grad)
        if old is not None and list(old.users) == [layer]:
            stored = str(self.specs[old.name].target)
            shared = [spec for spec in self.specs.values() if spec.target == stored]
            if len(shared) == 1 and stored in self.state:
                self.state[stored] = tensor
                return old
        return self.store(tensor, target, beside)

    # The result

    def folded(self) -> FoldedProgram:
        """Return the new program with its plan."""
        old, program = self.old, self.program()
        plan = FusionPlan(
            "ExportedProgram",
            _scope(old),
            tuple(self.fusions),
            tuple(self.skips),
            whole=_whole(old, len(self.norms)),
        )
        key_map = {
            key: key if key in self.state else self.taken_in.get(key) for key in old.state_dict
        }
        norms = tuple(self.norms)
        return FoldedProgram(program, plan, key_map, self._in_float64, norms, self.refuted)

    def _in_float64(self) -> tuple[ExportedProgram, ExportedProgram]:
        wide = _widened(self.old)
        return wide, _Edit(wide, self.refuted, self.rules).folded().program


# ── the graph ────────────────────────────────────────────────────────────────────────────────────


def _widened(program: ExportedProgram) -> ExportedProgram:
    """Return a copy of `program` that computes in float64: tensors, inputs, and casts."""
    graph = copied_graph(program.graph)
    for node in list(graph.nodes):
        node.meta = {**node.meta, "val": tree_map(_wide, node.meta.get("val"))}
        if node.target is aten._assert_tensor_metadata.default:  # it insists on a dtype
            graph.erase_node(node)
        elif node.op == "call_function":
            node.args = map_aggregate(node.args, _wide)
            node.kwargs = map_aggregate(node.kwargs, _wide)
    return ExportedProgram(
        torch.fx.GraphModule(program.graph_module, graph),
        graph,
        copy.deepcopy(program.graph_signature),
        {name: _wide(tensor) for name, tensor in program.state_dict.items()},
        program.range_constraints,
        copy.copy(program.module_call_graph),
        tree_map(_wide, program.example_inputs),
        {name: _wide(constant) for name, constant in program.constants.items()},
        verifiers=program.verifiers,
    )


def _wide(value: Any) -> Any:
    """Return `value` in float64, if it is a tensor of real numbers, or such a dtype."""
    if isinstance(value, torch.dtype):
        return torch.float64 if value.is_floating_point else value
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    wide = value.detach().double()
    return nn.Parameter(wide, value.requires_grad) if isinstance(value, nn.Parameter) else wide


def _args(node: Node) -> tuple[Any, ...]:
    return node.args


def _weight_and_bias(layer: Node) -> tuple[Node, Node | None]:
    _, weight, *rest = _args(layer)
    bias = rest[0] if rest else None
    assert isinstance(weight, Node)
    assert bias is None or isinstance(bias, Node)
    return weight, bias


def _elements(node: Node) -> int | None:
    shape = node.meta["val"].shape
    return prod(shape) if all(isinstance(size, int) for size in shape) else None


def _whole(program: ExportedProgram, merged: int) -> WholeCost:
    found = program_cost(program)
    return WholeCost(found.macs, found.traffic_bytes, len(_norms(program)), merged)


def _scope(program: ExportedProgram) -> tuple[str, ...]:
    sentences = ["The exported method, in the modes it was exported in."]
    for symbol, bounds in program.range_constraints.items():
        upper = "any size" if bounds.upper > 1 << 40 else bounds.upper
        sentences.append(f"{symbol}, a declared dynamic size, from {bounds.lower} to {upper}.")
    return tuple(sentences)
