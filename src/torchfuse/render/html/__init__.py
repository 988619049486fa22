"""A comparison as one HTML file that needs no network, and as a fragment for notebooks."""

from __future__ import annotations

import functools
import html
import json
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from torchfuse.render.comparison import (
    answer_lines,
    caution_lines,
    cells,
    closing_sentence,
    delegation_lines,
    headings,
    lead,
)
from torchfuse.render.html.charts import charts, pareto, row_name
from torchfuse.render.html.figures import figures
from torchfuse.render.html.picture import legend, picture
from torchfuse.render.libraries import require_libraries
from torchfuse.render.skips import grouped
from torchfuse.render.units import duration, size

if TYPE_CHECKING:
    from torchfuse.comparison import Comparison

__all__ = ["fragment", "page"]

_VEGA = "window.vegaEmbed = vegaEmbed;"
_MOST_MODULES = 12  # of a group of skips, shown without opening it


def page(comparison: Comparison) -> str:
    """Return the report: charts, the graph before and after, every skip, how to make it again.

    Raises:
        UnsupportedError: what draws the charts is not installed.
    """
    require_libraries()
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    made = charts(comparison)
    here = files("torchfuse.render.html")

    def text(name: str) -> str:
        return here.joinpath(name).read_text(encoding="utf-8")

    environment = Environment(
        loader=FunctionLoader(text), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
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
        cautions=caution_lines([comparison]),
        plan=plan,
        skips=[] if plan is None else grouped(plan.skips),
        most_modules=_MOST_MODULES,
        graph=_json(picture(comparison)) if comparison.before else None,
        legend=legend(comparison),
        css=text("page.css"),
        script=text("page.js"),
        cytoscape=_script(text("vendor/cytoscape.min.js")),
        dagre=_script(text("vendor/dagre.min.js")),
        vega=_vega(),
        duration=duration,
        size=size,
    )


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
