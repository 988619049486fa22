"""Finds the blocks of a recorded model that can be merged, and merges them in the fused one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from torchfuse.blocks.candidates import candidates, may_be_edited
from torchfuse.blocks.merged import ELSEWHERE, Merge, merged
from torchfuse.blocks.replacing import replace_block, take_block_back
from torchfuse.checking import copy_tensors
from torchfuse.copying import copied
from torchfuse.errors import UnsupportedError
from torchfuse.planning import Fusion, Refusal, Skip
from torchfuse.proving import outputs_of, prove
from torchfuse.proving.whole import widened
from torchfuse.restoring import restored
from torchfuse.surgery import fold_in

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torchfuse.equivalence import Equivalence
    from torchfuse.inputs import Case
    from torchfuse.judging.finding import Found
    from torchfuse.surgery import MergedBlock

__all__ = ["Block", "find_blocks", "merge_all", "merge_what_agrees"]


@dataclass(frozen=True, eq=False)
class Block:
    """A module that is to be merged."""

    path: str
    fusions: tuple[Fusion, ...]
    absorbed: frozenset[str]  # paths of the modules that are taken in
    rules: tuple[str, ...]


def find_blocks(found: Found, rules: Sequence[str]) -> None:
    """Add the blocks that can be merged to `found`, and skips of those that cannot.

    It is tried out on copies, one at a time, in which what is to be folded is folded.
    """
    subject = found.subject
    paths = candidates(subject.graph)
    given = _arguments(subject.model, subject.cases, paths, values=False) if paths else {}
    tops = [p for p in paths if p and not any(_is_below(p, other) for other in paths if other)]
    for top in tops:
        trial = _Trial(found, top)
        for path in paths:
            if path == top or _is_below(path, top):
                result = trial.merged(path, given.get(path), rules)
                if isinstance(result, Refusal):
                    found.skip((path,), result, "branches")
                elif result is not None:
                    found.blocks.append(result)
    if "" in paths:
        refusal = Refusal(
            "Branches are added in the model's own forward, and its class is to stay.", ELSEWHERE
        )
        found.skip(("",), refusal, "branches")
    gone = {path for block in found.blocks for path in block.absorbed}
    found.skips = [skip for skip in found.skips if skip.modules[-1] not in gone]


class _Trial:
    """A copy of a part of the model."""

    def __init__(self, found: Found, top: str) -> None:
        self.subject, self.top = found.subject, top
        self.copy: nn.Module | Refusal
        original = self.subject.modules[top]
        if isinstance(original, torch.jit.ScriptModule):
            self.copy = Refusal(f"`{top}` is scripted.")
            return
        if any(tensor.is_meta for tensor in (*original.parameters(), *original.buffers())):
            self.copy = Refusal("There are no values on the meta device, and they decide.")
            return
        try:
            self.copy = copied(original)
        except UnsupportedError as error:
            self.copy = Refusal(str(error))
            return
        for rule, match in found.matches:
            if rule.merge is None and all(_is_below(path, top) for path in match.modules):
                first, second = (path[len(top) + 1 :] for path in match.modules)
                fold_in(self.copy, rule, [first], [second], keep=False)

    def merged(
        self, path: str, given: list[Tensor] | None, rules: Sequence[str]
    ) -> Block | Refusal | None:
        """What the module at `path` becomes, which is then done to the copy."""
        if isinstance(self.copy, Refusal):
            return self.copy
        if given is None:
            return Refusal("It is not called with tensors alone.", ELSEWHERE)
        below = path[len(self.top) + 1 :]
        block = self.copy.get_submodule(below)
        if any(module.training for module in block.modules()):
            return Refusal("It is in training mode.", "Call model.eval() first.")
        args = [torch.zeros(t.shape, dtype=t.dtype, device=_device(block)) for t in given]
        merge = merged(block, args, rules=rules, prove=False)
        if not isinstance(merge, Merge):
            return merge
        refusal = may_be_edited(self.subject, path, merge)
        if refusal is not None:
            return refusal if refusal.hint else replace(refusal, hint=ELSEWHERE)
        replace_block(self.copy, below, merge, args, rules)
        return _block(path, merge, rules)


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
            called = model if case.method == "forward" else getattr(model, case.method)
            called(*args, **kwargs)
    return {path: args for path, args in found.items() if args is not None}


# ── in the fused model ───────────────────────────────────────────────────────────────────────────


def merge_all(target: nn.Module, found: Found, cases: Sequence[Case]) -> tuple[MergedBlock, ...]:
    """Merge the blocks of `found` in `target`, without a proof."""
    args = _arguments(target, cases, [block.path for block in found.blocks], values=False)
    zeros = {
        path: [torch.zeros(t.shape, dtype=t.dtype, device=_device(target)) for t in given]
        for path, given in args.items()
    }
    trial = _BlockTrial(target, zeros, prove=False, watch=True)
    return trial.settled(found, found.blocks)


def merge_what_agrees(
    target: nn.Module,
    found: Found,
    given: Sequence[Case],
    tried: Sequence[Case],
    expected: Sequence[dict[str, Any]],
    *,
    watch: bool,
) -> tuple[Equivalence, tuple[MergedBlock, ...], bool]:
    """Merge the blocks of `found` in `target`: the comparison, what was done, if float64 told.

    What makes the outputs differ becomes skips.
    """
    args = _arguments(target, given, [block.path for block in found.blocks], values=True)
    trial = _BlockTrial(target, args, prove=True, watch=watch)

    def in_float64() -> _BlockTrial:
        trial.undo()
        return _BlockTrial(copied(target).double(), widened(args), prove=False, watch=watch)

    try:
        whole = prove(trial, found.blocks, tried, expected, in_float64)
        done = trial.settled(found, whole.kept)
    except BaseException:
        trial.undo()
        raise
    for block in whole.refused:
        found.skips.append(
            Skip(
                (block.path,),
                "With its branches merged the model's outputs differ, although each edit by itself "
                "agrees; something that was not recorded depends on it.",
                "Please report it.",
                "branches",
            )
        )
    return whole.check, done, whole.decided


class _BlockTrial:
    """A module in which blocks stay merged as they were last asked for."""

    def __init__(
        self, model: nn.Module, args: dict[str, list[Tensor]], *, prove: bool, watch: bool
    ) -> None:
        self.model, self.args, self.prove, self.watch = model, args, prove, watch
        self._asked: list[Block] | None = None
        self._done: list[MergedBlock] = []
        self._blocks: list[Block] = []  # what came of those asked for
        self._failed: dict[str, Refusal] = {}

    def outputs(self, matches: Sequence[Block], cases: Sequence[Case]) -> list[dict[str, Any]]:
        """What the model returns on each case, these blocks merged."""
        self.merge(matches)
        return outputs_of(self.model, cases, watch=self.watch)

    def merge(self, blocks: Sequence[Block]) -> None:
        """Merge these blocks and no others."""
        if self._asked == list(blocks):
            return
        self.undo()
        self._asked = list(blocks)
        for block in blocks:
            module, args = self.model.get_submodule(block.path), self.args[block.path]
            merge = merged(module, args, rules=block.rules, prove=self.prove)
            if isinstance(merge, Merge):
                done = replace_block(self.model, block.path, merge, args, block.rules)
                self._done.append(done)
                self._blocks.append(_block(block.path, merge, block.rules))
            else:
                self._failed[block.path] = merge or Refusal("Nothing is left to merge in it.")

    def settled(self, found: Found, blocks: Sequence[Block]) -> tuple[MergedBlock, ...]:
        """Merge these blocks for good: what was done. `found` then has what came of it."""
        self.merge(blocks)
        found.blocks = self._blocks
        for path, refusal in self._failed.items():
            found.skip((path,), refusal, "branches")
        return tuple(self._done)

    def undo(self) -> None:
        """Put the model back as it was given."""
        for done in reversed(self._done):
            take_block_back(self.model, done)
        self._asked, self._done, self._blocks, self._failed = None, [], [], {}
