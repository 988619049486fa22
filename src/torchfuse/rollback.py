"""Compares the whole model before and after, and keeps of a plan only what does not differ."""

from __future__ import annotations

from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

from torchfuse import proving
from torchfuse.applying import apply, fused_while_called, undo
from torchfuse.copying import copied
from torchfuse.equivalence import Equivalence, OutputDifference

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor, nn

    from torchfuse.inputs import Case
    from torchfuse.judging.finding import Found
    from torchfuse.rules import Match, Rule
    from torchfuse.surgery import Fusions

__all__ = ["fuse_what_agrees"]


def fuse_what_agrees(
    target: nn.Module,
    found: Found,
    tried: Sequence[Case],
    expected: Sequence[dict[str, Any]],
    *,
    keep: bool,
    weights: Mapping[str, tuple[Tensor, Tensor]],
) -> tuple[Equivalence, Fusions]:
    """The comparison of all outputs, and what was done to `target` and does not make them differ.

    The rest becomes skips in `found`. Without `keep` no original is kept, not even meanwhile: the
    comparison folds layer by layer, as they are called.
    """
    graph = found.subject.graph
    if keep:
        done = apply(target, graph, found.matches, keep=True, weights=weights)
        check = _compared(target, tried, expected)
    else:
        with fused_while_called(target, graph, found.matches):
            check = _compared(target, tried, expected)
        done = None
    if found.matches and not (check.passed and not proving.is_blurred(expected)):
        if done is not None:
            undo(target, done)
        trial = _Trial(target, found, keep, weights)
        # In float64 only a wrong fold differs by more than its last digits.
        wide = proving.widened(copied, target, tried)
        exact = check
        if wide is not None:
            exact = _keep_what_agrees(
                _Trial(wide[0], found, keep, {}),
                found,
                *wide[1:],
                noise=cache(lambda: proving.rounding(*wide)),
            )
        elif not check.passed:
            exact = _keep_what_agrees(trial, found, tried, expected)
        with trial.of(found.matches):
            check = _compared(target, tried, expected)
        check = check if check.passed else exact
        done = None
    if done is None:
        done = apply(target, graph, found.matches, keep=keep, weights=weights)
    return check, done


class _Trial:
    """A model that can be fused for a while."""

    def __init__(
        self,
        model: nn.Module,
        found: Found,
        keep: bool,
        weights: Mapping[str, tuple[Tensor, Tensor]],
    ) -> None:
        self.model = model
        self.graph = found.subject.graph
        self.keep = keep
        self.weights = weights

    @contextmanager
    def of(self, matches: Sequence[tuple[Rule, Match]]) -> Iterator[None]:
        """A context in which `matches` are carried out."""
        if not self.keep:
            with fused_while_called(self.model, self.graph, matches):
                yield
            return
        done = apply(self.model, self.graph, matches, keep=True, weights=self.weights)
        try:
            yield
        finally:
            undo(self.model, done)


def _keep_what_agrees(
    trial: _Trial,
    found: Found,
    inputs: Sequence[Case],
    outputs: Sequence[dict[str, Any]],
    noise: Callable[[], Equivalence] | None = None,
) -> Equivalence:
    """Leaves in `found` the matches that agree, by halving; how far the rest of them is.

    Agreeing is to differ by no more than the dtype's rounding, or than `noise` explains.
    """

    def outcome(matches: list[tuple[Rule, Match]]) -> Equivalence:
        with trial.of(matches):
            check = _compared(trial.model, inputs, outputs)
        return check if check.passed or noise is None else proving.within(check, noise())

    everything = found.matches
    kept: list[tuple[Rule, Match]] = []

    def search(group: list[tuple[Rule, Match]]) -> None:
        if not group or outcome(kept + group).passed:
            kept.extend(group)
        elif len(group) > 1:
            search(group[: len(group) // 2])
            search(group[len(group) // 2 :])
        else:
            found.reject(
                group[0],
                "With it the model's outputs differ, although the pair itself agrees; something "
                "that was not recorded depends on it.",
            )

    search([entry for entry in everything if entry[0].merge is None])
    found.matches = kept + [entry for entry in everything if entry[0].merge is not None]
    found.drop_orphans()
    search([entry for entry in found.matches if entry[0].merge is not None])
    found.matches = list(kept)
    return outcome(found.matches)


def _compared(
    model: nn.Module, tried: Sequence[Case], expected: Sequence[dict[str, Any]]
) -> Equivalence:
    try:
        return proving.compare(expected, proving.outputs_of(model, tried))
    except Exception as error:  # noqa: BLE001 - the user's code fails where the original did not
        problem = f"the fused model fails: {type(error).__name__}: {error}"
        return Equivalence((OutputDifference("output", None, None, None, False, problem),))
