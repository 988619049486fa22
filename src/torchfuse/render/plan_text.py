"""A fusion plan as text: what is fused, what is not and why, the totals, and the scope."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from torchfuse.render.skips import grouped
from torchfuse.render.tables import as_text
from torchfuse.units import percent, scaled

if TYPE_CHECKING:
    from rich.console import RenderableType

    from torchfuse.planning import Fusion, FusionPlan, Skip

__all__ = ["renderable", "shares", "text"]

_MOST_NAMES = 4  # of modules that are skipped for one reason; --json has all


def text(plan: FusionPlan, width: int | None = None) -> str:
    """Return the plan as plain text, `width` columns wide; None: as wide as its longest row."""
    return as_text(renderable(plan), width)


def renderable(plan: FusionPlan) -> RenderableType:
    """Return the plan as rich prints it."""
    parts: list[RenderableType] = [Text(_headline(plan), style="bold"), Text()]
    if plan.fusions:
        parts.append(_fused(plan))
        if said := shares(plan):
            parts += [Text(said), Text()]
    if plan.skips:
        parts.append(_not_fused(plan.skips))
    parts.append(_scope(plan))
    if plan.originals_bytes:
        parts += [Text(), Text(f"Originals kept for unfuse: {_bytes(plan.originals_bytes)}")]
    return Group(*parts)


def _headline(plan: FusionPlan) -> str:
    fused, skipped = len(plan.fusions), len(plan.skips)
    if not fused and not skipped:
        return f"{plan.model}: nothing to fuse was found"
    return f"{plan.model}: {fused} fused, {skipped} not fused"


def _fused(plan: FusionPlan) -> Table:
    table = _table("Fused, and what each fusion saves", show_footer=True)
    table.add_column("rule", "total", no_wrap=True)
    table.add_column("modules", _fusions(len(plan.fusions)), overflow="fold")
    for heading, total in (
        ("parameters", _count(plan.parameters_saved)),
        ("traffic", _bytes(plan.traffic_saved_bytes)),
        ("MACs", _macs(plan.macs_saved)),
    ):
        table.add_column(heading, total, justify="right")
    for fusion in plan.fusions:
        table.add_row(fusion.rule, _modules(fusion), *_savings(fusion))
    return table


def shares(plan: FusionPlan) -> str:
    """Return what part of the model is merged and saved, in a sentence; "" where it is unknown."""
    if (whole := plan.whole) is None:
        return ""
    said = []
    if whole.norms:
        norms = "batch norm" if whole.norms == 1 else "batch norms"
        said.append(f"{whole.norms_merged} of {whole.norms} {norms} merged")
    saved = [
        f"{percent(part / total, 1)} of the {what}"
        for what, part, total in (
            ("memory traffic", plan.traffic_saved_bytes, whole.traffic_bytes),
            ("MACs", plan.macs_saved, whole.macs),
        )
        if total
    ]
    if saved:
        said.append(f"{' and '.join(saved)} saved")
    return f"Of the whole model: {', '.join(said)}." if said else ""


def _savings(fusion: Fusion) -> tuple[str, str, str]:
    return (
        _count(fusion.parameters_saved),
        _bytes(fusion.traffic_saved_bytes),
        _macs(fusion.macs_saved),
    )


def _not_fused(skips: tuple[Skip, ...]) -> Table:
    table = _table("Not fused")
    table.add_column("modules", overflow="fold", ratio=2)
    table.add_column("reason", ratio=3)
    table.add_column("what you could change", ratio=3)
    for group in grouped(skips):
        names = [_joined(modules) for modules in group.modules]
        if len(names) > _MOST_NAMES:
            names = [*names[:_MOST_NAMES], f"and {len(names) - _MOST_NAMES} more"]
        table.add_row(Text("\n".join(names)), group.reason, group.hint or "–")
    return table


def _scope(plan: FusionPlan) -> RenderableType:
    sentences = [Text(sentence) for sentence in plan.scope]
    return Group(
        Text("Scope", style="italic"),
        *(Padding(sentence, (0, 0, 0, 2)) for sentence in sentences),
    )


def _table(title: str, *, show_footer: bool = False) -> Table:
    return Table(
        title=title,
        title_justify="left",
        title_style="italic",
        box=SIMPLE_HEAD,
        pad_edge=False,
        show_footer=show_footer,
        footer_style="bold",
    )


def _modules(entry: Fusion | Skip) -> Text:
    return Text(_joined(entry.modules))  # Text: a module may be called "[bold]"


def _joined(modules: tuple[str, ...]) -> str:
    return " + ".join(name or "the model itself" for name in modules)


def _fusions(number: int) -> str:
    return "1 fusion" if number == 1 else f"{number} fusions"


def _count(number: int) -> str:
    return f"{number:,}".replace("-", "−")


def _bytes(number: int | None) -> str:
    return "?" if number is None else scaled(number, ("B", "kB", "MB", "GB"))


def _macs(number: int | None) -> str:
    return "?" if number is None else scaled(number, ("", "k", "M", "G"))
