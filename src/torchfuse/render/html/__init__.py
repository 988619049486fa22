"""A comparison as one HTML file that needs no network, and as a fragment for notebooks."""

from __future__ import annotations

import functools
import html
import json
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torchfuse.operator_times import OperatorTime
from torchfuse.render.comparison_text import (
    answer_lines,
    caution_lines,
    cells,
    closing_sentence,
    delegation_lines,
    headings,
    lead,
)
from torchfuse.render.comparison_text import (
    legend as table_legend,
)
from torchfuse.render.html.charts import charts, pareto, row_name
from torchfuse.render.html.figures import figures
from torchfuse.render.html.picture import legend, picture
from torchfuse.render.html.templates import environment_of_pages, text
from torchfuse.render.libraries import require_libraries
from torchfuse.render.plan_text import shares
from torchfuse.render.profile import lines
from torchfuse.render.skips import grouped
from torchfuse.units import duration, size

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torchfuse.comparing.comparison import Comparison
    from torchfuse.operator_times import Profile

__all__ = ["fragment", "page"]

_VEGA = "window.vegaEmbed = vegaEmbed;"
_MOST_OPERATORS = 12
_UNIT = re.compile(r"(?<=\d) (?=(%|[mµn]?s|[kMG]?B|bytes|dB)(?!\w))")
_RANGE = re.compile(r"…(?=\d)")
_TYPES = re.compile(r", [A-Z]{1,3}\d+[A-Z]*(?=[,)])")  # ", QS8, QC8W" of an XNNPACK kernel
_MOST_MODULES = 12  # of a group of skips, shown without opening it


def page(comparison: Comparison) -> str:
    """Return the report: charts, the graph before and after, every skip, how to make it again.

    Raises:
        UnsupportedError: what draws the charts is not installed.
    """
    require_libraries()
    made = charts(comparison)
    environment = environment_of_pages()
    environment.filters["unbroken"] = _unbroken
    plan = comparison.plan
    rows = [
        {"cells": cells(row, row is comparison.baseline), "precision": row.precision}
        for row in comparison.rows
    ]
    return environment.get_template("page.html.jinja").render(
        comparison=comparison,
        lead=lead(comparison),
        figures=figures(comparison),
        headings=headings(),
        rows=rows,
        charts=made,
        specs=_json({chart.name: [chart.wide, chart.narrow] for chart in made}),
        pareto=[row_name(row) for row in pareto(comparison.rows)],
        answers=answer_lines(comparison),
        delegation=delegation_lines(comparison),
        profiles=_side_by_side(comparison.profiles),
        cautions=caution_lines([comparison]),
        doubts=_doubts(comparison),
        plan=plan,
        shares="" if plan is None else shares(plan),
        skips=[] if plan is None else grouped(plan.skips),
        most_modules=_MOST_MODULES,
        graph=_json(picture(comparison)) if comparison.before else None,
        legend=legend(comparison),
        table_legend=table_legend([comparison]),
        css=text("page.css"),
        script=text("page.js"),
        cytoscape=_script(text("vendor/cytoscape.min.js")),
        dagre=_script(text("vendor/dagre.min.js")),
        vega=_vega(),
        duration=duration,
        size=size,
    )


def _unbroken(text: str) -> str:
    """Return the text with no line break between a number and its unit, or inside an interval."""
    return _RANGE.sub("…\u2060", _UNIT.sub("\u00a0", text))


def _doubts(comparison: Comparison) -> list[str]:
    """Return what makes all times doubtful, to stand above them: what else the machine did."""
    found = [c.text for c in comparison.cautions if c.fails and c.name is None]
    return [f"{text[0].upper()}{text[1:]}." for text in dict.fromkeys(found)]


def _side_by_side(profiles: Iterable[Profile]) -> list[dict[str, Any]]:
    """Return a table for each profiler: operators of one have other names than those of another."""
    found = []
    titles = {"torch.profiler": "In eager mode", "ETDump": "In ExecuTorch"}
    for source, title in titles.items():
        of_source = [_without_types(profile) for profile in profiles if profile.source == source]
        if of_source:
            rows = lines(of_source, _MOST_OPERATORS)
            found.append({"title": title, "profiles": of_source, "rows": rows})
    return found


def _without_types(profile: Profile) -> Profile:
    """Return the profile by kind of kernel, so that fp32 and int8 stand in one line."""
    kinds: dict[tuple[str, bool], OperatorTime] = {}
    for row in profile.operators:
        key = _TYPES.sub("", row.operator), row.in_delegate
        known = kinds.get(key)
        kinds[key] = OperatorTime(
            key[0],
            row.calls + (known.calls if known else 0),
            row.self_s + (known.self_s if known else 0),
            row.share + (known.share if known else 0),
            row.in_delegate,
            row.delegate,
        )
    return replace(profile, operators=tuple(kinds.values()))


def fragment(comparison: Comparison) -> str:
    """Return the table and what was bought, for a notebook's output."""
    head = "".join(f"<th style='text-align:left'>{html.escape(h)}</th>" for h in headings())
    body = "".join(
        "<tr>"
        + "".join(
            f"<td style='text-align:left'>{html.escape(cell)}</td>"
            for cell in cells(row, row is comparison.baseline)
        )
        + "</tr>"
        for row in comparison.rows
    )
    return (
        f"<p><strong>{html.escape(closing_sentence(comparison))}</strong></p>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        "<p><code>.to_html()</code> is the whole report, with charts and the graph.</p>"
    )


def _json(value: Any) -> str:
    """Return JSON as it may stand in a script element."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


@functools.cache
def _vega() -> str:
    import vl_convert

    return _script(vl_convert.javascript_bundle(_VEGA))


def _script(text: str) -> str:
    """Return a library as it may stand in a script element."""
    return text.replace("</script", "<\\/script")
