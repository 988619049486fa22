"""Which modules of a recorded model add branches of one input, and whether they can be edited."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from torchfuse.conditions.methods import called_by_themselves, reached_apart
from torchfuse.graph.kinds import MOVES
from torchfuse.planning import Refusal
from torchfuse.rules import Match

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torchfuse.fusing.blocks.merged import Merge
    from torchfuse.graph import Call, Graph, Operand
    from torchfuse.rules import Subject

__all__ = ["BLOCK_RULES", "candidates", "may_be_edited"]

# Those whose result is a layer. (Dropout, which `no_op` takes out, is to stay for training.)
BLOCK_RULES = (
    *("layer_affine", "cat_affine", "affine_layer", "pad_conv", "layer_chain", "branches"),
)

_SUMS = frozenset({"add", "sub", "stack", "sum"})
_LAYERS = frozenset({"conv", "linear"})
_PASSED = frozenset({*_LAYERS, *_SUMS, "batch_norm", "mul", "div", "pad", "dropout", *MOVES})
_POOLS = ("avg_pool1d", "avg_pool2d", "avg_pool3d")
# Calls that are gone back through from a sum
_MOST = 60


def candidates(graph: Graph) -> list[str]:
    """The paths of the modules around sums of what layers make of one value, innermost first."""
    found: dict[str, None] = {}
    for call in graph.calls:
        if call.kind in _SUMS and len(call.operands) > 1 and _is_added(graph, call):
            path = _around(graph, call)
            if path is not None:
                found.setdefault(path)
    return sorted(found, key=lambda path: -path.count(".") if path else 1)


def _is_added(graph: Graph, call: Call) -> bool:
    """Whether a call adds what it is given, or stacks it to be added or averaged."""
    if call.kind != "stack":
        return True
    readers = [reader for value in call.outputs for reader in graph.readers(value)]
    return any(reader.kind in ("sum", "mean") for reader in readers)


def _around(graph: Graph, total: Call) -> str | None:
    """The module that holds a sum and the branches that it adds; None: they have no one source."""
    paths = [_back(graph, operand, total) for operand in total.operands.values()]
    first, *others = paths
    for value, calls in first.items():
        for other in others:
            if value in other:
                passed = [*calls, *other[value]]
                apart = not {call.index for call in calls} & {c.index for c in other[value]}
                if apart and any(call.kind in _LAYERS for call in passed):
                    return _common([total, *passed])
    return None


def _back(graph: Graph, operand: Operand, reader: Call) -> dict[int, list[Call]]:
    """The values that an operand is made from by layers, affines and sums, and by which calls."""
    found: dict[int, list[Call]] = {operand.value: []}
    pending: list[tuple[int, int, list[Call]]] = [(operand.value, reader.index, [])]
    steps = 0
    while pending and steps < _MOST:
        steps += 1
        value, before, passed = pending.pop(0)
        makers = [w for w in graph.writers(value) if w.index < before and w.case == reader.case]
        if not makers:
            continue
        maker = makers[-1]
        if maker.kind not in _PASSED and maker.target not in _POOLS:
            continue
        for role, given in maker.operands.items():
            if role in ("weight", "bias", "running_mean", "running_var"):
                continue
            calls = [*passed, maker]
            if given.value == value:  # a view, or a change in place
                pending.append((value, maker.index, passed))
            elif given.value in found:  # by another branch, which may have the layer
                found[given.value] = list(dict.fromkeys([*found[given.value], *calls]))
            else:
                found[given.value] = calls
                pending.append((given.value, maker.index, calls))
    return found


def _common(calls: list[Call]) -> str:
    """The innermost module that all calls ran in; of those that only layers are, the one around."""
    paths = [
        (call.module_path or "").split(".")[: -1 if call.kind in (*_LAYERS, "batch_norm") else None]
        for call in calls
    ]
    common = paths[0]
    for path in paths[1:]:
        same = [a == b for a, b in zip(common, path, strict=False)]
        common = common[: same.index(False) if False in same else len(same)]
    return ".".join(common)


def may_be_edited(subject: Subject, path: str, merge: Merge) -> Refusal | None:
    """None if nothing but the block itself tells its modules from what becomes of them."""
    block = subject.modules[path]
    changed = [*merge.layers, *merge.absorbed]
    paths = [f"{path}.{below}" if below else path for below in changed]
    inner = [
        f"{path}.{below}"
        for below, _ in block.named_modules()
        if below and not any(f"{below}.".startswith(f"{kept}.") for kept in merge.kept)
    ]
    refusal = _is_plain(block, path)
    for inside in inner:
        refusal = refusal or _can_go(subject, inside)
    return (
        refusal
        or _used_elsewhere(subject, path, inner, paths)
        or _shared(subject, paths)
        or _reached(subject, path, merge)
    )


def _is_plain(block: nn.Module, path: str) -> Refusal | None:
    if isinstance(block, torch.jit.ScriptModule):
        return Refusal(f"`{path}` is scripted.")
    if "forward" in vars(block) or type(block).__call__ is not nn.Module.__call__:
        return Refusal(f"`{path}` has a forward or __call__ of its own, beside its class's.")
    return None


def _can_go(subject: Subject, path: str) -> Refusal | None:
    module = subject.modules[path]
    if subject.graph.paths.get(path, (path,)) != (path,):
        return Refusal(f"`{path}` is in the model at several places.")
    if path in subject.holders:
        return Refusal(
            f"`{path}` is also held by the plain attribute `{subject.holders[path]}`.",
            "Hold it only as a submodule.",
        )
    if any(vars(module)[name] for name in _HOOKS):
        return Refusal(f"`{path}` has hooks, which merging would lose.", "Remove the hooks.")
    if parametrize.is_parametrized(module):
        return Refusal(f"`{path}` is parametrized.", "Remove the parametrization first.")
    if type(module).get_extra_state is not nn.Module.get_extra_state:
        return Refusal(f"`{path}` has extra state, which would be lost.")
    for entry in subject.attached:
        if entry.path == path:
            return Refusal(f"The function in `{entry.where}` knows `{path}`.", "Remove it.")
    return None


# All that can be registered on a module
_HOOKS = (
    *("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"),
    *("_state_dict_hooks", "_state_dict_pre_hooks"),
    *("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
)


def _used_elsewhere(
    subject: Subject, path: str, inner: list[str], paths: list[str]
) -> Refusal | None:
    """On no path through the code, a module or tensor of the block is used but by the block."""
    for recorded in (subject, *subject.others, *called_by_themselves(subject, path)):
        graph = recorded.graph
        ranges = [(c.case, c.first, c.last) for c in graph.module_calls_of(path)]
        used = [
            (inside, c.case, c.first, c.last)
            for inside in inner
            for c in graph.module_calls_of(inside)
        ]
        used += [
            (owner, call.case, call.index, call.index + 1)
            for owner in paths
            for value in graph.values_of(owner)
            for call in (*graph.readers(value.index), *graph.writers(value.index))
        ]
        for inside, case, first, last in used:
            if not any(case == c and a <= first and last <= z for c, a, z in ranges):
                return Refusal(f"`{inside}` is also used without `{path}`.")
        for call in graph.module_calls_of(path):
            made = graph.calls[call.first : call.last]
            if any(one.written & set(call.inputs) for one in made):
                return Refusal(f"`{path}` changes what it is given in place.")
    return None


def _shared(subject: Subject, paths: list[str]) -> Refusal | None:
    """The tensors of what changes belong to nothing else."""
    own = {id(tensor): path for path in paths for tensor in _tensors(subject.modules[path])}
    memory = {
        tensor.untyped_storage()._cdata: path
        for path in paths
        for tensor in _tensors(subject.modules[path])
    }
    for path, module in subject.modules.items():
        if path in paths:
            continue
        for tensor in _tensors(module):
            where = own.get(id(tensor)) or memory.get(tensor.untyped_storage()._cdata)
            if where is not None and subject.modules[where] is not module:
                return Refusal(f"A tensor of `{where}` is also one of `{path}`.")
    for path in paths:
        for value in subject.graph.values_of(path):
            if value.attributes:
                return Refusal(f"A tensor of `{path}` is also in `{value.attributes[0]}`.")
    return None


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    for table in (module._parameters, module._buffers):
        tensors: Any = table.values()
        yield from (tensor for tensor in tensors if tensor is not None)


def _reached(subject: Subject, path: str, merge: Merge) -> Refusal | None:
    """No method around the block uses a part of it by itself."""
    first = f"{path}.{next(iter(merge.layers))}"
    for below in (*merge.absorbed, *merge.layers):
        second = f"{path}.{below}" if below else path
        if second in (first, path):
            continue
        refusal = reached_apart(subject, Match(first, second, (), (), ()), outside=path)
        if refusal is not None:
            return refusal
    return None
