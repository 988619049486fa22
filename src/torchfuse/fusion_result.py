"""What fusing gives back, of a module or of an exported program."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torchfuse.equivalence import Equivalence
    from torchfuse.planning import FusionPlan

__all__ = ["FusionResult"]


class FusionResult(NamedTuple):
    """What `fuse` gives back."""

    model: Any  # the fused model; for `fuse_exported` an ExportedProgram, or a GraphModule
    plan: FusionPlan
    check: Equivalence | None  # None: not verified
    key_map: dict[str, str | None]  # old state_dict key → new one; None: gone
