"""Finds the blocks of a recorded model that can be merged, and merges them in the fused one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from torchfuse.errors import FusionError, UnsupportedError
from torchfuse.fusing.blocks.candidates import candidates, may_be_edited
from torchfuse.fusing.blocks.merged import ELSEWHERE, Merge, merged, merges_at_one_size
from torchfuse.fusing.blocks.replacing import replace_block, take_block_back
from torchfuse.fusing.module_edits import fold_in
from torchfuse.fusing.proving import outputs_of, prove
from torchfuse.fusing.proving.whole import widened
from torchfuse.isolation.model_copy import copied
from torchfuse.isolation.snapshot import restored
from torchfuse.planning import Fusion, Refusal
from torchfuse.verifying.outputs import copy_tensors

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torchfuse.cases import Case
    from torchfuse.fusing.blocks.merged import Exports
    from torchfuse.fusing.finding import Found
    from torchfuse.fusing.module_edits import MergedBlock
    from torchfuse.verifying.equivalence import Equivalence

__all__ = ["Block", "Merging", "find_blocks", "keep_what_agrees", "merge_blocks"]


@dataclass(frozen=True, eq=False)
class Block:
    """A module that is to be merged."""

    path: str
    fusions: tuple[Fusion, ...]
    absorbed: frozenset[str]  # paths of the modules that are taken in
    rules: tuple[str, ...]


def find_blocks(found: Found, rules: Sequence[str]) -> None:
    """Add the blocks that can be merged to `found`, and skips of those that cannot.

    It is tried out on copies, in which what is to be folded is folded.
    """
    subject = found.subject
    paths = candidates(subject.graph)
    given = _arguments(subject.model, subject.cases, paths, values=False)
    exports: Exports = {}
    # The outermost ones are copied, with all that lies in them: a block is merged as it is after
    # its inner ones were.
    for top in (p for p in paths if not any(_is_below(p, other) for other in paths if other)):
        inside = [path for path in paths if path == top or _is_below(path, top)]
        part = _folded_copy(found, top) if top else Refusal("")
        for path in inside if top else ():
            if isinstance(part, Refusal):
                found.skip((path,), part, "branches")
                continue
            below = path[len(top) + 1 :]
            _merge(found, part, below, path, given.get(path), rules, exports, prove=False)
    _finish(found, paths)


def merge_blocks(
    target: nn.Module, found: Found, rules: Sequence[str], given: Sequence[Case], *, verify: bool
) -> Merging:
    """Merge the blocks that can be in `target`, where what is to be folded is folded already.

    They are added to `found`, as are skips of those that cannot. With `verify`, each edit is
    compared on what the blocks are given.
    """
    paths = candidates(found.subject.graph)
    args = _arguments(target, given, paths, values=verify)
    if not verify:
        args = {path: _zeros(values, _device(target)) for path, values in args.items()}
    merging = Merging(target, args, prove=verify)
    try:
        for path in filter(None, paths):
            part = _as_it_is(target.get_submodule(path), path)
            if isinstance(part, Refusal):
                found.skip((path,), part, "branches")
                continue
            done = _merge(
                found, target, path, path, args.get(path), rules, merging.exports, prove=verify
            )
            if done is not None:
                merging.done.append(done)
        merging.asked = list(found.blocks)
    except BaseException:
        merging.undo()
        raise
    _finish(found, paths)
    return merging


def _merge(
    found: Found,
    model: nn.Module,
    below: str,
    path: str,
    given: list[Tensor] | None,
    rules: Sequence[str],
    exports: Exports,
    *,
    prove: bool,
) -> MergedBlock | None:
    """Merge the block that is at `below` in `model`, and at `path` in the user's model."""
    if given is None:
        found.skip((path,), Refusal("It is not called with tensors alone.", ELSEWHERE), "branches")
        return None
    block = model.get_submodule(below)
    args = _zeros(given, _device(block)) if given[0].is_meta else given
    sized = any(
        read.kind == "shape" and _is_below(f"{read.module_path}.", path)
        for read in found.subject.graph.reads
    )
    if sized and not merges_at_one_size(block, args, rules):
        return None
    merge = merged(block, args, rules=rules, prove=prove, exports=exports)
    refusal = merge if isinstance(merge, Refusal) else None
    if isinstance(merge, Merge):
        refusal = may_be_edited(found.subject, path, merge)
    if refusal is not None:
        refusal = refusal if refusal.hint else replace(refusal, hint=ELSEWHERE)
        found.skip((path,), refusal, "branches")
        return None
    if not isinstance(merge, Merge):
        return None
    found.blocks.append(_block(path, merge, rules))
    return replace_block(model, below, merge, args, rules)


def _folded_copy(found: Found, path: str) -> nn.Module | Refusal:
    """A copy of the module at `path`, in which what is to be folded is folded."""
    original = _as_it_is(found.subject.modules[path], path)
    if isinstance(original, Refusal):
        return original
    try:
        made = copied(original)
    except UnsupportedError as error:
        return Refusal(str(error))
    for rule, match in found.matches:
        if all(_is_below(inner, path) for inner in match.modules):
            first, second = (inner[len(path) + 1 :] for inner in match.modules)
            fold_in(made, rule, [first], [second], keep=False)
    return made


def _as_it_is(block: nn.Module, path: str) -> nn.Module | Refusal:
    """The block, if it can be looked at."""
    if any(isinstance(module, torch.jit.ScriptModule) for module in block.modules()):
        return Refusal(f"`{path}` is scripted.", ELSEWHERE)
    # Whether branches merge depends on values too: an affine may be the identity, a tap zero.
    if any(tensor.is_meta for tensor in (*block.parameters(), *block.buffers())):
        return Refusal("There are no values on the meta device, and they decide.", ELSEWHERE)
    if any(module.training for module in block.modules()):
        return Refusal("It is in training mode.", "Call model.eval() first.")
    return block


def _finish(found: Found, paths: Sequence[str]) -> None:
    if "" in paths:
        refusal = Refusal(
            "Branches are added in the model's own forward, and its class is to stay.",
            "fuse(…, graph=True) and fuse_exported merge them if they can be merged.",
        )
        found.skip(("",), refusal, "branches")
    # A norm that no rule could fold is no skip once its whole block was merged.
    gone = {path for block in found.blocks for path in block.absorbed}
    found.skips = [skip for skip in found.skips if skip.modules[-1] not in gone]


def _zeros(given: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    return [torch.zeros(t.shape, dtype=t.dtype, device=device) for t in given]


def _block(path: str, merge: Merge, rules: Sequence[str]) -> Block:
    fusions = tuple(
        replace(fusion, modules=tuple(f"{path}.{name}" for name in fusion.modules))
        for fusion in merge.fusions
    )
    absorbed = frozenset(f"{path}.{below}" if below else path for below in merge.absorbed)
    return Block(path, fusions, absorbed, tuple(rules))


def _is_below(path: str, other: str) -> bool:
    return path.startswith(f"{other}.")


def _device(block: nn.Module) -> torch.device:
    return next((tensor.device for tensor in block.parameters()), torch.device("cpu"))


def _arguments(
    model: nn.Module, cases: Sequence[Case], paths: Sequence[str], *, values: bool
) -> dict[str, list[Tensor]]:
    """What each module is called with first, if these are tensors; on meta without `values`."""
    found: dict[str, list[Tensor] | None] = {}

    def note(path: str, args: Any, kwargs: Any) -> None:
        if path in found:
            return
        if kwargs or not args or not all(isinstance(arg, Tensor) for arg in args):
            found[path] = None
            return
        with torch.utils._python_dispatch._disable_current_modes():
            found[path] = [arg.detach().clone() if values else arg.to("meta") for arg in args]

    for case in cases:
        args, kwargs = copy_tensors((case.args, dict(case.kwargs)))
        with restored(model):  # takes the hooks off
            for path in paths:
                model.get_submodule(path).register_forward_pre_hook(
                    lambda _, given, named, path=path: note(path, given, named), with_kwargs=True
                )
            case.method_of(model)(*args, **kwargs)
    return {path: args for path, args in found.items() if args is not None}


# ── in the fused model ───────────────────────────────────────────────────────────────────────────


def keep_what_agrees(
    merging: Merging,
    found: Found,
    tried: Sequence[Case],
    expected: Sequence[dict[str, Any]],
    *,
    watch: bool,
) -> tuple[Equivalence, bool]:
    """Compare the whole model, its blocks merged; return how far it is off, and if float64 decided.

    Blocks that make the outputs differ are put back, and become skips in `found`.
    """
    merging.watch = watch

    def in_float64() -> Merging:
        merging.undo()
        return Merging(copied(merging.model).double(), widened(merging.args), prove=False)

    try:
        whole = prove(merging, found.blocks, tried, expected, in_float64)
        merging.merge(whole.kept)
    except BaseException:
        merging.undo()
        raise
    found.blocks = whole.kept
    for block in whole.refused:
        refusal = Refusal(
            "With its branches merged the model's outputs differ, although each edit by itself "
            "agrees; something that was not recorded depends on it.",
            "Please report it.",
        )
        found.skip((block.path,), refusal, "branches")
    return whole.check, whole.decided


class Merging:
    """A model in which blocks stay merged as they were last asked for."""

    def __init__(self, model: nn.Module, args: dict[str, list[Tensor]], *, prove: bool) -> None:
        self.model, self.args, self.prove = model, args, prove
        self.watch = True
        self.exports: Exports = {}
        self.asked: list[Block] | None = None
        self.done: list[MergedBlock] = []

    def outputs(self, matches: Sequence[Block], cases: Sequence[Case]) -> list[dict[str, Any]]:
        """What the model returns on each case, these blocks merged."""
        self.merge(matches)
        return outputs_of(self.model, cases, watch=self.watch)

    def merge(self, blocks: Sequence[Block]) -> None:
        """Merge these blocks and no others.

        Raises:
            FusionError: without the others, one of them cannot be.
        """
        if self.asked == list(blocks):
            return
        self.undo()
        self.asked = list(blocks)
        for block in blocks:
            args = self.args[block.path]
            found = self.model.get_submodule(block.path)
            merge = merged(found, args, rules=block.rules, prove=self.prove, exports=self.exports)
            if not isinstance(merge, Merge):
                raise FusionError(f"`{block.path}` can be merged only with what is inside of it.")
            self.done.append(replace_block(self.model, block.path, merge, args, block.rules))

    def undo(self) -> None:
        """Put the model back as it was given."""
        for done in reversed(self.done):
            take_block_back(self.model, done)
        self.asked, self.done = None, []
