"""The charts of a report: Vega-Lite specs, each also as static SVG for where no JavaScript runs.

Colours are the page's CSS variables, so that one SVG serves light and dark.
"""

from __future__ import annotations

import math
import random
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torchfuse.comparing.comparison import FOLDED, LOCAL
from torchfuse.units import size_unit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import altair as alt

    from torchfuse.comparing.comparison import Comparison, Row

__all__ = ["Chart", "charts", "pareto", "row_name"]

_WIDE, _NARROW = 700, 330  # pixels: a desktop's column, and a phone's
_PRECISIONS = ("fp32", "fp16", "int8", "int4")
_COLOURS = [f"var(--{precision})" for precision in _PRECISIONS]
_FONT = "Helvetica, Arial, 'Liberation Sans', sans-serif"  # what vl-convert knows the widths of
_CONFIG = {
    "background": "transparent",
    "font": _FONT,
    "view": {"stroke": None},
    "axis": {
        "labelColor": "var(--quiet)",
        "titleColor": "var(--quiet)",
        "gridColor": "var(--line)",
        "domainColor": "var(--line)",
        "tickColor": "var(--line)",
        "labelFontSize": 12,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
        "labelLimit": 230,
        "labelSeparation": 10,
    },
    "legend": {
        "labelColor": "var(--quiet)",
        "titleColor": "var(--quiet)",
        "labelFontSize": 12,
        "columnPadding": 26,
        "orient": "top",
        "title": None,
    },
    "text": {"color": "var(--ink)", "fontSize": 12},
}


@dataclass(frozen=True)
class Chart:
    """One chart, at the two widths."""

    name: str
    title: str
    caption: str
    wide: dict[str, Any]  # Vega-Lite
    narrow: dict[str, Any]
    wide_svg: str
    narrow_svg: str


def row_name(row: Row) -> str:
    """Return a short name of a row, the same in every chart and table."""
    what = f"{row.target} {row.precision}"
    return what if row.variant == FOLDED else f"{what}, {row.variant}"  # there is no other


def charts(comparison: Comparison) -> list[Chart]:
    """Return the charts that there is data for."""
    made = []
    devices = list(dict.fromkeys(row.device for row in comparison.rows))
    for device in devices:
        rows = [row for row in comparison.rows if row.device == device]
        where = "" if devices == [LOCAL] else f" on {device}"
        made.append(_latency(rows, where, device))
    rows = [row for row in comparison.rows if row.device == devices[0]]
    made += [
        chart for chart in (_trade_off(rows), _size(rows), _answers(comparison, rows)) if chart
    ]
    if comparison.layers:
        made.append(_layers(comparison))
    return made


def _chart(
    name: str, title: str, caption: str, draw: Callable[[int], alt.Chart | alt.LayerChart]
) -> Chart:
    import vl_convert

    specs = []
    for width in (_WIDE, _NARROW):
        spec = draw(width).to_dict()
        spec["config"] = _CONFIG
        # The axis and its labels take what is left of the width.
        spec["autosize"] = {"type": "fit-x", "contains": "padding"}
        specs.append(spec)
    svgs = [
        _fluid(vl_convert.vegalite_to_svg({**spec, "width": width}), title, f"{name}-{width}")
        for spec, width in zip(specs, (_WIDE, _NARROW), strict=True)
    ]
    return Chart(name, title, caption, *specs, *svgs)


def _fluid(svg: str, title: str, ids: str) -> str:
    """Return the SVG as wide as the page lets it be, with a name for who cannot see it."""
    numbers: dict[str, int] = {}

    def numbered(match: re.Match[str]) -> str:
        # vl-convert counts on from picture to picture: the same chart would never be the same.
        return f"{ids}-clip{numbers.setdefault(match[0], len(numbers))}"

    svg = re.sub(r"\bclip\d+\b", numbered, svg)
    start, end = svg.index("<svg"), svg.index(">")
    head = svg[start:end].replace('class="marks" ', 'class="static" ')
    return f'{head} role="img" aria-label="{title}">{svg[end + 1 :]}'


def _colour(rows: Sequence[Row]) -> alt.Color:
    import altair as alt

    used = [p for p in _PRECISIONS if any(row.precision == p for row in rows)]
    domain = used or list(_PRECISIONS)
    colours = [_COLOURS[_PRECISIONS.index(p)] for p in domain]
    return alt.Color("precision:N", scale=alt.Scale(domain=domain, range=colours))


def _y(rows: Sequence[Row], width: int, field: str = "name") -> alt.Y:
    import altair as alt

    limit = 230 if width == _WIDE else 128
    return alt.Y(
        f"{field}:N",
        sort=[row_name(row) for row in rows],
        title=None,
        axis=alt.Axis(labelLimit=limit, domain=False, ticks=False, labelPadding=8),
    )


def _latency(rows: Sequence[Row], where: str, device: str) -> Chart:
    import altair as alt

    most = max(row.latency.runs for row in rows)
    dots = min(most, max(_FEWEST_DOTS, _MOST_DOTS // len(rows)))  # of each row
    values = [
        {
            "name": row_name(row),
            "precision": row.precision,
            "ms": round(sample * 1e3, 5),
            "jitter": round(shift, 2),
        }
        for row in rows
        for sample, shift in zip(
            _evenly(row.latency.samples_s, dots), _jitter(min(dots, row.latency.runs)), strict=True
        )
    ]
    medians = [
        {"name": row_name(row), "precision": row.precision, "ms": row.latency.median_s * 1e3}
        for row in rows
    ]
    spread = _spread([sample for row in rows for sample in row.latency.samples_s])
    scale = _times_scale([sample for row in rows for sample in row.latency.samples_s])

    def draw(width: int) -> alt.LayerChart:
        x = alt.X(
            "ms:Q",
            scale=scale,
            title=f"ms for one call{', logarithmic' if spread else ''}",
            axis=alt.Axis(tickCount=6 if width == _WIDE else 4, grid=True),
        )
        dots = (
            alt.Chart(alt.Data(values=values))
            .mark_circle(size=22, opacity=0.45)
            .encode(
                x=x,
                y=_y(rows, width),
                yOffset=alt.YOffset("jitter:Q", scale=alt.Scale(domain=[-1, 1])),
                color=_colour(rows),
                tooltip=[alt.Tooltip("name:N"), alt.Tooltip("ms:Q", format=".4g")],
            )
        )
        centre = (
            alt.Chart(alt.Data(values=medians))
            .mark_tick(thickness=2.5, size=24, color="var(--ink)")
            .encode(
                x=x,
                y=_y(rows, width),
                tooltip=[
                    alt.Tooltip("name:N"),
                    alt.Tooltip("ms:Q", title="median, ms", format=".4g"),
                ],
            )
        )
        return alt.layer(dots, centre).properties(height=30 * len(rows))

    caption = "Each dot is one timed call; the line is the median."
    if dots < most:
        caption = (
            f"Each dot is one timed call, {dots} of up to {most} of each form, from the fastest to "
            "the slowest; the line is the median of all."
        )
    slug = "".join(c if c.isalnum() else "-" for c in device)
    return _chart(
        f"latency-{slug}",
        f"Time of every single call{where}",
        caption,
        draw,
    )


_MOST_DOTS, _FEWEST_DOTS = 800, 50  # a dot takes 800 bytes: a page has to be small enough to send


def _evenly(samples: Sequence[float], count: int) -> Sequence[float]:
    """Return all samples, or so many of them: evenly by rank, from the least to the largest."""
    if len(samples) <= count:
        return samples
    ranked = sorted(samples)
    return [ranked[round(i * (len(ranked) - 1) / (count - 1))] for i in range(count)]


def _spread(times_s: Sequence[float]) -> bool:
    """Return whether fast ones would be a line at the left end of a linear axis."""
    return max(times_s) / min(times_s) > _LINEAR


_LINEAR = 8.0


def _times_scale(times_s: Sequence[float]) -> alt.Scale:
    """Return an axis in ms from zero; a logarithmic one, as far as the times go, if they spread."""
    import altair as alt

    if not _spread(times_s):
        return alt.Scale(zero=True)
    domain = [min(times_s) * 1e3 / _ROOM, max(times_s) * 1e3 * _ROOM]
    return alt.Scale(type="log", nice=False, domain=domain)


_ROOM = 1.15


def _jitter(count: int) -> Iterable[float]:
    # Drawn the same in every report: it means nothing, it only keeps dots apart.
    generator = random.Random(0)  # noqa: S311
    return [generator.uniform(-0.8, 0.8) for _ in range(count)]


def _trade_off(rows: Sequence[Row]) -> Chart | None:
    """Speed against accuracy, or against agreement or noise where nothing better is known."""
    import altair as alt

    measure = _measure(rows)
    if measure is None:
        return None
    title, of = measure
    best = [row_name(row) for row in pareto(rows)]
    shown = [row for row in rows if of(row) is not None]
    values = [
        {
            "name": row_name(row),
            "precision": row.precision,
            "ms": row.latency.median_s * 1e3,
            "good": of(row),
            "front": row_name(row) in best,
        }
        for row in shown
    ]
    front = [value for name in best for value in values if value["name"] == name]
    spread = _spread([row.latency.median_s for row in shown])
    good = [value for row in shown if (value := of(row)) is not None]
    margin = 0.15 * (max(good) - min(good)) or 1.0
    domain = [min(good) - margin, max(good) + margin]

    def draw(width: int) -> alt.LayerChart:
        x = alt.X(
            "ms:Q",
            scale=_times_scale([row.latency.median_s for row in shown]),
            title=f"median, ms{', logarithmic' if spread else ''} (left is faster)",
            axis=alt.Axis(tickCount=6 if width == _WIDE else 4),
        )
        y = alt.Y("good:Q", title=title, scale=alt.Scale(domain=domain, nice=False))
        line = (
            alt.Chart(alt.Data(values=front))
            .mark_line(color="var(--quiet)", strokeDash=[4, 4], interpolate="step-after")
            .encode(x=x, y=y)
        )
        points = (
            alt.Chart(alt.Data(values=values))
            .mark_point(filled=True, size=90, opacity=0.9)
            .encode(
                x=x,
                y=y,
                color=_colour(shown),
                shape=alt.Shape("front:N", legend=None,
                                scale=alt.Scale(domain=[True, False], range=["diamond", "circle"])),
                tooltip=["name:N", alt.Tooltip("ms:Q", format=".4g"),
                         alt.Tooltip("good:Q", title=title, format=".4g")],
            )
        )  # fmt: skip
        names = (
            alt.Chart(alt.Data(values=front))
            # Below its point, since the line to the next one goes up.
            .mark_text(align="left", dx=9, dy=13, fontSize=11, limit=170, color="var(--ink)")
            .encode(x=x, y=y, text="name:N")
        )
        return alt.layer(line, points, names).properties(height=300)

    return _chart(
        "trade-off",
        f"Speed against {title.split(',')[0]}",
        "Diamonds are the Pareto front: nothing else is both faster and better.",
        draw,
    )


def _measure(rows: Sequence[Row]) -> tuple[str, Callable[[Row], float | None]] | None:
    """Return the best measure of how right rows are that is known of several, and its title."""

    def accuracy(row: Row) -> float | None:
        return None if row.accuracy is None else 100 * row.accuracy.value

    def agreement(row: Row) -> float | None:
        found = None if row.answers is None else row.answers.agreement
        return None if found is None else 100 * found.value

    def noise(row: Row) -> float | None:
        found = row.difference.sqnr_db if row.answers is None else row.answers.sqnr_db
        return None if found is None else min(found, _EXACT_DB)

    measures: list[tuple[str, Callable[[Row], float | None]]] = [
        ("accuracy, %", accuracy),
        ("agreement with the model, %", agreement),
        (f"signal to noise of the outputs, dB ({_EXACT_DB:g}: rounding)", noise),
    ]
    known = [
        (title, of)
        for title, of in measures
        if len([row for row in rows if of(row) is not None]) > 1
    ]
    # Where all are equally right by one measure there is nothing to weigh; a finer one may tell.
    telling = [(title, of) for title, of in known if len({of(row) for row in rows} - {None}) > 1]
    return next(iter(telling), None)


_EXACT_DB = 100.0  # above, two computations in float32 differ by their rounding only


def pareto(rows: Sequence[Row]) -> list[Row]:
    """Return the rows than which none is both faster and better, the fastest first."""
    measure = _measure(rows)
    if measure is None:
        return []
    _, of = measure
    known = [(row, row.latency.median_s, value) for row in rows if (value := of(row)) is not None]
    found = [
        (row, time_s)
        for row, time_s, value in known
        if not any(
            other_s <= time_s and other >= value and (other_s, other) != (time_s, value)
            for _, other_s, other in known
        )
    ]
    return [row for row, _ in sorted(found, key=lambda entry: entry[1])]


def _size(rows: Sequence[Row]) -> Chart | None:
    import altair as alt

    sized = [row for row in rows if row.size_bytes is not None]
    if not sized:
        return None
    most = max(row.size_bytes or 0 for row in sized)
    scale, unit = size_unit(most)
    values = [
        {
            "name": row_name(row),
            "precision": row.precision,
            "size": (row.size_bytes or 0) / scale,
            "label": f"{(row.size_bytes or 0) / scale:.2f} {unit}",
        }
        for row in sized
    ]

    def draw(width: int) -> alt.LayerChart:
        x = alt.X(
            "size:Q",
            title=unit,
            axis=alt.Axis(tickCount=6 if width == _WIDE else 3),
            scale=alt.Scale(domainMax=(1.18 if width == _WIDE else 1.4) * most / scale),
        )
        base = alt.Chart(alt.Data(values=values)).encode(x=x, y=_y(sized, width))
        bars = base.mark_bar(height=14, cornerRadiusEnd=3).encode(
            color=_colour(sized), tooltip=["name:N", "label:N"]
        )
        labels = base.mark_text(align="left", dx=5, fontSize=11).encode(text="label:N")
        return alt.layer(bars, labels).properties(height=26 * len(sized))

    return _chart("size", "Size of the files", "As they lie on the disk, seal included.", draw)


def _answers(comparison: Comparison, rows: Sequence[Row]) -> Chart | None:
    import altair as alt

    of = "accuracy"
    shares = [(row, row.accuracy) for row in rows if row.accuracy is not None]
    if not shares:
        of = "agreement with the model"
        shares = [
            (row, row.answers.agreement) for row in rows if row.answers and row.answers.agreement
        ]
    if not shares:
        return None
    values = [
        {
            "name": row_name(row),
            "precision": row.precision,
            "share": 100 * share.value,
            "low": None if share.low is None else 100 * share.low,
            "high": None if share.high is None else 100 * share.high,
        }
        for row, share in shares
        if share is not None
    ]
    shown = [row for row, _ in shares]
    known = any(value["low"] is not None for value in values)

    def draw(width: int) -> alt.LayerChart:
        y = _y(shown, width)
        scale = alt.Scale(zero=False, nice=True)
        ticks = alt.Axis(tickCount=5 if width == _WIDE else 3)
        x = alt.X("share:Q", title=f"{of}, %", scale=scale, axis=ticks)
        base = alt.Chart(alt.Data(values=values)).encode(y=y)
        layers = [
            base.mark_point(filled=True, size=80).encode(
                x=x,
                color=_colour(shown),
                tooltip=["name:N", alt.Tooltip("share:Q", title=f"{of}, %", format=".2f")],
            )
        ]
        if known:
            rule = base.mark_rule(strokeWidth=2, opacity=0.55).encode(
                x=alt.X("low:Q", scale=scale, title=f"{of}, %", axis=ticks),
                x2="high:Q",
                color=_colour(shown),
            )
            layers.insert(0, rule)
        return alt.layer(*layers).properties(height=26 * len(shown))

    on = f", on {comparison.validation}" if comparison.validation and known else ""
    interval = "The line is the 95 % interval" if known else "As your function gave it"
    title = f"{of[0].upper()}{of[1:]}"
    return _chart("answers", title, f"{interval}{on}.", draw)


_MOST_LAYERS = 24


def _layers(comparison: Comparison) -> Chart:
    import altair as alt

    worst = comparison.layers[:_MOST_LAYERS]
    modules = [layer.module or "the model itself" for layer in worst]
    names = [
        module if modules.count(module) == 1 else f"{module} ({layer.operator})"
        for module, layer in zip(modules, worst, strict=True)
    ]
    values = [
        {"name": name, "what": what, "db": min(value, _EXACT_DB)}
        for name, layer in zip(names, worst, strict=True)
        for what, value in (
            ("with all before it in int8", layer.sqnr_db),
            ("its own share", layer.own_sqnr_db),
        )
        if value is not None and not math.isnan(value)
    ]

    def draw(width: int) -> alt.LayerChart:
        y = alt.Y(
            "name:N",
            sort=names,
            title=None,
            axis=alt.Axis(labelLimit=230 if width == _WIDE else 128, ticks=False, domain=False),
        )
        colour = alt.Color(
            "what:N",
            scale=alt.Scale(
                domain=["with all before it in int8", "its own share"],
                range=["var(--int8)", "var(--fp32)"],
            ),
            # Beside each other they are wider than a phone.
            legend=alt.Legend(columns=2 if width == _WIDE else 1),
        )
        base = alt.Chart(alt.Data(values=values)).encode(
            x=alt.X(
                "db:Q", title="signal to noise, dB (right is better)", scale=alt.Scale(zero=True)
            ),
            y=y,
        )
        lines = base.mark_line(color="var(--line)", strokeWidth=2).encode(detail="name:N")
        points = base.mark_point(filled=True, size=70, opacity=1).encode(
            color=colour, tooltip=["name:N", "what:N", alt.Tooltip("db:Q", format=".1f")]
        )
        return alt.layer(lines, points).properties(height=22 * len(worst))

    count = len(comparison.layers)
    which = f"The {len(worst)} furthest from float, of {count}." if count > len(worst) else ""
    return _chart("layers", "Noise of each layer in int8", which, draw)
