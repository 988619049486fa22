"""What can be fused and what cannot: plain data, no torch, saved as JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from torchfuse import serialization

if TYPE_CHECKING:
    from torchfuse.verifying.equivalence import Equivalence

__all__ = ["Fusion", "FusionPlan", "FusionResult", "Refusal", "Skip", "WholeCost"]

_FORMAT = "torchfuse-plan-1"


@dataclass(frozen=True)
class Refusal:
    """Why a match is skipped, and what the user could change (empty if nothing)."""

    reason: str
    hint: str = ""


@dataclass(frozen=True)
class Fusion:
    """One fusion that is exact within the plan's scope. `None` is unknown, 0 is none."""

    rule: str  # "conv_bn"
    modules: tuple[str, ...]  # dotted paths in running order; the first one keeps the result
    parameters_saved: int  # negative if a bias had to be added and nothing was dropped
    traffic_saved_bytes: int | None  # activations no longer read and written, in the first case
    macs_saved: int | None  # multiply-adds no longer done, in the first case
    max_rel: float | None = None  # proof on recorded activations: max|before − after| / max|before|


@dataclass(frozen=True)
class Skip:
    """One candidate that is skipped."""

    modules: tuple[str, ...]
    reason: str  # a sentence
    hint: str  # what the user could change; empty if nothing
    rule: str | None  # the rule that looked at it; None if no rule applied


@dataclass(frozen=True)
class WholeCost:
    """What the model costs in all before fusing, in the first case."""

    macs: int  # multiply-adds
    traffic_bytes: int  # activations that are read or written
    norms: int  # batch norms that ran
    norms_merged: int  # of them, by the plan's fusions


@dataclass(frozen=True)
class FusionPlan:
    """Everything that was found in one model, and the scope it holds for."""

    model: str  # class name
    scope: tuple[str, ...]  # sentences
    fusions: tuple[Fusion, ...]
    skips: tuple[Skip, ...]
    originals_bytes: int | None = None  # memory that kept originals take, once fused
    whole: WholeCost | None = None  # what the savings are a share of; None: unknown

    @property
    def parameters_saved(self) -> int:
        """Sum over all fusions."""
        return sum(fusion.parameters_saved for fusion in self.fusions)

    @property
    def traffic_saved_bytes(self) -> int:
        """Sum over the fusions where it is known."""
        return sum(fusion.traffic_saved_bytes or 0 for fusion in self.fusions)

    @property
    def macs_saved(self) -> int:
        """Sum over the fusions where it is known."""
        return sum(fusion.macs_saved or 0 for fusion in self.fusions)

    def __str__(self) -> str:
        """What `torchfuse plan` prints: the plan as tables, one line per row."""
        from torchfuse.render.plan_text import text

        return text(self)

    def to_json(self) -> str:
        """The plan as JSON text; `from_json` gives back an equal plan."""
        return serialization.to_json(self, _FORMAT)

    @classmethod
    def from_json(cls, text: str) -> FusionPlan:
        """The plan that `to_json` wrote.

        Raises:
            InputError: it did not write this text.
        """
        return serialization.from_json(cls, text, _FORMAT)


class FusionResult(NamedTuple):
    """What `fuse` gives back."""

    model: Any  # the fused model; for `fuse_exported` an ExportedProgram, or a GraphModule
    plan: FusionPlan
    check: Equivalence | None  # None: not verified
    key_map: dict[str, str | None]  # old state_dict key → new one; None: gone
