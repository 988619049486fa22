"""Proves what is to be done to a module: its pairs where they run, and then the whole of it."""

from __future__ import annotations

import contextlib
import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from torchfuse.fusing.module_edits import folded_layer, plain_layer
from torchfuse.fusing.module_host import apply, fused_while_called, undo
from torchfuse.fusing.proving.pairs import PairDifference, decided, normed, worse
from torchfuse.fusing.proving.variations import variations
from torchfuse.fusing.proving.whole import outputs_of, prove, widened
from torchfuse.isolation.model_copy import copied
from torchfuse.isolation.snapshot import Snapshot, restored
from torchfuse.verifying.outputs import copied_leaves, copy_tensors, is_finite, run

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torchfuse.cases import Case
    from torchfuse.fusing.finding import Found
    from torchfuse.fusing.module_edits import Fusions
    from torchfuse.graph import Graph
    from torchfuse.rules import Match, Rule
    from torchfuse.verifying.equivalence import Equivalence

    _Entry = tuple[Rule, Match]
    _Rewrite = Callable[[nn.Module, nn.Module], tuple[Tensor, Tensor]]

__all__ = ["PairProof", "fuse_what_agrees"]

# What rounding may do to one layer, as max|a − b| / max|a|; beyond it, float64 decides.
_ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5}


class PairProof:
    """Runs the original model, and compares each match where it runs: layer and norm, and folded.

    Where a layer runs, the folded layer runs beside it on the same input, and is compared with the
    layer's output after the batch norm. With `keep`, folded weights are computed once, and stay in
    `weights` to be used; otherwise one pair is in memory at a time.
    """

    def __init__(
        self, model: nn.Module, matches: Sequence[tuple[Rule, Match]], *, keep: bool
    ) -> None:
        self.model = model
        self.matches = matches
        self.keep = keep
        self.found: dict[str, PairDifference] = {}  # by the batch norm's path, the largest
        self.weights: dict[str, tuple[Tensor, Tensor]] = {}  # likewise
        self.wrote = False  # whether a run wrote to memory that was there before

    def _run(
        self, case: Case, snapshot: Snapshot, *, if_finite: bool = False
    ) -> dict[str, Any] | None:
        """What the model returns on `case`; with `if_finite` None, and nothing found, if it is not.

        Nothing is left changed.
        """
        found: dict[str, PairDifference] = {}
        args, kwargs = copy_tensors((case.args, dict(case.kwargs)))
        with restored(self.model, snapshot=snapshot):
            for rule, match in self.matches:
                self._watch(rule.rewrite, match, found)  # `restored` takes the hooks off
            output = copied_leaves(case.method_of(self.model)(*args, **kwargs))
        if if_finite and not is_finite(output):
            return None
        for path, difference in found.items():
            self.found[path] = worse(self.found.get(path), difference)
        return output

    def reference(self, given: Sequence[Case]) -> tuple[list[Case], list[dict[str, Any]]]:
        """The cases to compare on (given ones first), and what the original returns on them.

        On the given ones, and on other values, each pair is compared as well.
        """
        snapshot = Snapshot(self.model)  # not kept: it holds the original weights
        tried, expected = list(given), [self._run(case, snapshot) for case in given]
        for one in given:
            for case in variations(one):
                output = None
                with contextlib.suppress(Exception):  # it does not take such inputs, and need not
                    if len(tried) == len(given):
                        output = self._run(case, snapshot, if_finite=True)
                    else:
                        output = run(self.model, case, snapshot)
                if output is not None and is_finite(output):
                    tried.append(case)
                    expected.append(output)
        self.wrote = snapshot.wrote
        return tried, [output for output in expected if output is not None]

    def _watch(self, rewrite: _Rewrite, match: Match, found: dict[str, PairDifference]) -> None:
        layer = self.model.get_submodule(match.first)
        norm = self.model.get_submodule(match.second)
        child = match.child
        busy: list[bool] = []

        def after_layer(_: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            if busy:
                return
            busy.append(True)
            try:
                # What is done here writes to nothing; only the layer's own code is to be watched.
                with _disable_current_modes():
                    plain = plain_layer(layer)
                    weights = self.weights.get(match.second)
                    if weights is None:
                        weights = rewrite(plain, norm)
                        if self.keep:
                            self.weights[match.second] = weights
                    folded = folded_layer(plain, *weights, child)
                fused = folded(*args, **kwargs)
                with _disable_current_modes():
                    judged = _judged(plain, norm, child, rewrite, args, kwargs, output, fused)
            finally:
                busy.clear()
            found[match.second] = worse(found.get(match.second), judged)

        layer.register_forward_hook(after_layer, with_kwargs=True)


def _judged(
    layer: nn.Module,
    norm: nn.Module,
    child: str | None,
    rewrite: _Rewrite,
    args: Any,
    kwargs: Any,
    output: Tensor,
    fused: Tensor,
) -> PairDifference:
    # A layer that calls its batch norm itself gives what that makes of it.
    return decided(
        normed(layer, norm, output) if child is None else output,
        fused,
        _ROUNDING.get(output.dtype, 0.0),
        lambda: _in_float64(layer, norm, child, rewrite, args, kwargs),
    )


def _in_float64(
    layer: nn.Module,
    norm: nn.Module,
    child: str | None,
    rewrite: _Rewrite,
    args: Any,
    kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """What the layer and the norm give, and what the folded layer gives."""
    wide_layer, wide_norm = copy.deepcopy(layer).double(), copy.deepcopy(norm).double()
    wide_args, wide_kwargs = widened(args), widened(kwargs)
    exact = wide_layer(*wide_args, **wide_kwargs)
    if child is None:
        exact = normed(wide_layer, wide_norm, exact)
    folded = folded_layer(wide_layer, *rewrite(wide_layer, wide_norm), child)
    return exact, folded(*wide_args, **wide_kwargs)


_NOT_IN_FLOAT64 = (
    "Each fusion was compared on its own: the whole model differs by more than rounding in one "
    "layer explains, and does not run in float64, which would tell."
)


def fuse_what_agrees(
    target: nn.Module,
    found: Found,
    tried: Sequence[Case],
    expected: Sequence[dict[str, Any]],
    *,
    keep: bool,
    weights: Mapping[str, tuple[Tensor, Tensor]],
    watch: bool,
) -> tuple[Equivalence, Fusions, tuple[str, ...]]:
    """The comparison of all outputs, what was done to `target`, and what the scope says of it.

    What makes the outputs differ becomes skips in `found`. Without `keep` no original is kept, not
    even meanwhile: the comparison folds layer by layer, as they are called.
    """
    graph = found.subject.graph
    trial = _ModuleTrial(target, graph, keep, weights, watch)

    def in_float64() -> _ModuleTrial:
        trial.undo()
        return _ModuleTrial(copied(target).double(), graph, keep, {}, watch)

    try:
        whole = prove(trial, found.matches, tried, expected, in_float64)
        done = trial.done(whole.kept)
    except BaseException:
        trial.undo()
        raise
    found.matches = whole.kept
    for entry in whole.refused:
        found.reject(
            entry,
            "With it the model's outputs differ, although the pair itself agrees; something "
            "that was not recorded depends on it.",
        )
    return whole.check, done, () if whole.decided else (_NOT_IN_FLOAT64,)


class _ModuleTrial:
    """A module that stays fused as it was last asked for, as it is asked for the same again."""

    def __init__(
        self,
        model: nn.Module,
        graph: Graph,
        keep: bool,
        weights: Mapping[str, tuple[Tensor, Tensor]],
        watch: bool,
    ) -> None:
        self.model, self.graph, self.keep, self.weights = model, graph, keep, weights
        self.watch = watch
        self._matches: list[_Entry] = []
        self._done: Fusions | None = None

    def outputs(self, matches: Sequence[_Entry], cases: Sequence[Case]) -> list[dict[str, Any]]:
        """What it returns on each case, fused by `matches`."""
        if self.keep:
            self.done(matches)
            return outputs_of(self.model, cases, watch=self.watch)
        with fused_while_called(self.model, self.graph, matches):
            return outputs_of(self.model, cases, watch=self.watch)

    def done(self, matches: Sequence[_Entry]) -> Fusions:
        """Fuse it by `matches` and by no others."""
        if self._done is None or self._matches != list(matches):
            self.undo()
            self._matches = list(matches)
            self._done = apply(
                self.model, self.graph, matches, keep=self.keep, weights=self.weights
            )
        return self._done

    def undo(self) -> None:
        """Put it back as it was given."""
        if self._done is not None:
            undo(self.model, self._done)
            self._done = None
