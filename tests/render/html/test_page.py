"""The report in a real browser: it is whole, quiet, alone, readable, and takes the keyboard."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from render.html.browser import Browser, complaints
from torchfuse.cli import cli
from torchfuse.comparing.comparison import (
    FOLDED,
    NOT_FUSED,
    Answers,
    ChangedAnswer,
    Comparison,
    LayerNoise,
    Operation,
    Row,
)
from torchfuse.devices.facts import DeviceFacts
from torchfuse.errors import InputError, UnsupportedError
from torchfuse.measuring.cautions import Caution
from torchfuse.measuring.timing import Measurement, ratio
from torchfuse.operator_times import OperatorTime, Profile
from torchfuse.planning import Fusion, FusionPlan, Skip
from torchfuse.render import libraries
from torchfuse.render.html.charts import pareto, row_name
from torchfuse.stats import share_of
from torchfuse.units import size
from torchfuse.verifying.equivalence import Equivalence, OutputDifference

MOST_BYTES = 2_500_000


def row(variant: str, target: str, precision: str, median_s: float, **more: object) -> Row:
    def latency(seconds: float) -> Measurement:
        samples = tuple(seconds * (0.9 + 0.01 * i) for i in range(20))
        return Measurement(f"{variant}, {target}, {precision}", samples, 1, True, 1)

    found = {
        "size_bytes": None,
        "difference": Equivalence((OutputDifference("output", 0.0, 0.0, math.inf, True),)),
        "accuracy": share_of(197, 200),
        "delegation": None,
        "answers": Answers(200, math.inf, share_of(200, 200), share_of(197, 200), ()),
        **more,
    }
    return Row(
        variant,
        target,
        precision,
        latency(median_s),
        ratio(latency(4e-3), latency(median_s)),
        **found,
    )


CHANGED = Answers(
    200, 31.0, share_of(198, 200), share_of(195, 200), (ChangedAnswer("cat/3.png", 1, 2, 1),)
)
BLOCKS = 26
BEFORE = tuple(
    Operation(kind, f"layers.{block}.{kind}", (1, 8, 4, 4), (i - 1,) if i else (), 1e-4)
    for i, (block, kind) in enumerate(
        (block, kind) for block in range(BLOCKS) for kind in ("conv", "batch_norm", "relu")
    )
)
AFTER = tuple(
    Operation(kind, f"layers.{block}.{kind}", (1, 8, 4, 4), (i - 1,) if i else (), None)
    for i, (block, kind) in enumerate(
        (block, kind) for block in range(BLOCKS) for kind in ("conv", "relu")
    )
)
COMPARISON = Comparison(
    "Net",
    (
        row(NOT_FUSED, "eager", "fp32", 4e-3),
        row("fused", "eager", "fp32", 3e-3),
        row(FOLDED, ".pte", "fp32", 2e-3, size_bytes=1_200_000),
        row(
            FOLDED, ".pte", "int8", 1e-3, size_bytes=320_000, answers=CHANGED,
            accuracy=share_of(195, 200),
        ),
    ),
    ("int8 is calibrated on 'a.npz', 600 samples <script>alert(1)</script>",),
    "x86_64",
    "forward(1×3×4×4)",
    "200 of the 800 samples of 'a.npz', held out",
    "top-1",
    (DeviceFacts("local", "ready", soc="A processor", cores=2, memory_bytes=8 << 30),),
    {"torch": "2.13.0"},
    "torchfuse compare net.py:net --data a.npz",
    FusionPlan(
        "Net",
        ("forward(1×3×4×4)",),
        tuple(
            Fusion("conv_bn", (f"layers.{i}.conv", f"layers.{i}.batch_norm"), 16, 1, 1)
            for i in range(20)
        ),
        tuple(
            Skip(
                (f"layers.{i}.conv", f"layers.{i}.batch_norm"),
                f"The output of `layers.{i}.conv` is also read by another use: add.",
                "Let the other use read the batch norm's output.",
                "conv_bn",
            )
            for i in range(20, BLOCKS)
        ),
    ),
    tuple(LayerNoise(f"layers.{i}.conv", "conv2d", 20.0 + i, 30.0 + i, "") for i in range(BLOCKS)),
    tuple(f"layers.{i}.conv" for i in range(BLOCKS - 1)),
    BEFORE,
    AFTER,
)  # fmt: skip


def operators(share: float) -> tuple[OperatorTime, ...]:
    kernel = f"Convolution (NHWC, {'QC8' if share > 0.5 else 'F32'}) IGEMM"
    return (
        OperatorTime(kernel, 3, share * 1e-3, share, in_delegate=True),
        OperatorTime("mean.out", 1, (1 - share) * 1e-3, 1 - share),
    )


COMPARISON = replace(
    COMPARISON,
    profiles=(
        Profile(".pte fp32", operators(0.4), 1e-3, 10, "ETDump"),
        Profile(".pte int8", operators(0.7), 1e-3, 10, "ETDump"),
    ),
)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(COMPARISON.to_html())
    return path


def requests(browser: Browser) -> list[str]:
    browser.run("1")
    return [
        event["params"]["request"]["url"]
        for event in browser.events
        if event.get("method") == "Network.requestWillBeSent"
    ]


def test_it_is_one_file_and_small_enough_to_send(report: Path) -> None:
    text = report.read_text()
    assert len(text.encode()) < MOST_BYTES
    assert "<script>alert(1)</script>" not in text
    assert " src=" not in text.split("<script", 1)[0]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [380, 760, 1200])
def test_it_fits_any_width_and_says_nothing_to_the_console(
    browser: Browser, report: Path, width: int, dark: bool, tmp_path: Path
) -> None:
    browser.open(report, width, dark=dark)
    browser.run("document.getElementById('picture').scrollIntoView()")
    browser.wait_for("document.getElementById('picture').dataset.state")
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert complaints(browser) == []
    assert [url for url in requests(browser) if url.startswith("file:")] == [report.as_uri()]
    browser.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 20_000


@pytest.mark.parametrize("width", [360, 760, 864, 1400])
def test_a_quantity_of_all_rows_stands_below_itself(
    browser: Browser, report: Path, width: int
) -> None:
    browser.open(report, width)
    places = browser.run(
        "[...document.querySelectorAll('.rows tbody td')].map(cell => {"
        " const box = cell.getBoundingClientRect(); const right = getComputedStyle(cell).textAlign"
        " === 'right'; return [cell.dataset.label, Math.round(right ? box.right : box.left)]; })"
    )
    assert len(places) == 4 * 7
    assert len({tuple(place) for place in places}) == 7


def test_no_chart_is_cut_on_a_phone(browser: Browser, report: Path) -> None:
    browser.open(report, 360)
    edges = browser.run(
        "[...document.querySelectorAll('.narrow text')].map(e => e.getBoundingClientRect().right)"
    )
    assert max(edges) <= 360


def test_what_makes_the_times_doubtful_stands_above_them(tmp_path: Path, browser: Browser) -> None:
    load = Caution("other-load", "other programs used 87% of the time; close them", fails=True)
    spread = Caution("spread", "the median is known to ±9% only", fails=True, name="a row")
    first, *others = COMPARISON.rows
    doubtful = replace(first, latency=replace(first.latency, cautions=(load, spread)))
    page = tmp_path / "page.html"
    page.write_text(replace(COMPARISON, rows=(doubtful, *others)).to_html())
    browser.open(page)
    shown = browser.run("document.querySelector('header').innerText")
    assert "The times are doubtful. Other programs used 87% of the time; close them." in shown
    assert "known to" not in shown


def test_an_interval_and_the_command_are_not_broken_in_their_words(report: Path) -> None:
    text = report.read_text()
    assert re.search(r"\(\d\.\d\d…\u2060\d\.\d\d\)", text)
    assert "<span>--data</span> <span>a.npz</span>" in text


def test_what_takes_time_waits_until_it_is_wanted(browser: Browser, report: Path) -> None:
    browser.open(report)
    assert browser.run("typeof vegaEmbed") == "undefined"
    assert browser.run("document.getElementById('picture').dataset.state") is None


def test_it_is_whole_without_javascript(browser: Browser, report: Path) -> None:
    browser.open(report, script=False)
    browser.call("Emulation.setScriptExecutionDisabled", value=False)
    shown = browser.run("document.body.innerText")
    assert "Fusing made it 1.33× as fast in eager mode" in shown
    assert browser.run("document.querySelectorAll('.chart .wide svg.static').length") == 5
    assert "Before" not in shown  # what takes JavaScript is not offered
    assert "6× The output of `…` is also read by another use: add." in shown


def test_operators_of_one_kind_stand_side_by_side_whatever_their_type(
    browser: Browser, report: Path
) -> None:
    browser.open(report)
    rows = browser.run(
        "[...document.querySelectorAll('.profile tbody tr')].map(row => row.innerText)"
    )
    assert len(rows) == 3
    assert [word for word in rows[0].replace("\xa0", " ").split("\t") if word] == [
        "Convolution (NHWC) IGEMM (in a delegate)",
        "40.0 % 400.00 µs, 3 calls",
        "70.0 % 700.00 µs, 3 calls",
    ]


def test_the_graph_is_coloured_by_time_and_by_noise_too(browser: Browser, report: Path) -> None:
    browser.open(report)
    browser.run("document.getElementById('picture').scrollIntoView()")
    browser.wait_for("document.getElementById('picture').dataset.state")
    browser.run(
        "(s => { s.value = 'noise'; s.dispatchEvent(new Event('change')); })"
        "(document.getElementById('colour'))"
    )
    shares = browser.run(
        "document.getElementById('picture')._cyreg.cy.nodes().map(node => node.data('share'))"
    )
    assert max(shares) == shares[0] > shares[2] > 0  # the first layer is the noisiest
    assert shares[1] == -1  # of what follows it nothing is known


def test_every_sample_is_a_dot(browser: Browser, report: Path) -> None:
    browser.open(report)
    marks = "#latency-local .wide svg .mark-symbol.role-mark path"
    assert browser.run(f"document.querySelectorAll('{marks}').length") == 4 * 20


def test_of_thousands_of_calls_so_many_are_dots_that_the_page_can_be_sent() -> None:
    def longer(row: Row) -> Row:
        samples = tuple(1e-3 + 1e-6 * i for i in range(5000))
        return replace(row, latency=replace(row.latency, samples_s=samples))

    page = replace(COMPARISON, rows=tuple(map(longer, COMPARISON.rows))).to_html()
    assert len(page.encode()) < MOST_BYTES
    assert "200 of up to 5000 of each form, from the fastest to the slowest" in page
    assert '"ms":1.0,' in page
    assert '"ms":5.999,' in page


def test_charts_answer_to_the_pointer(browser: Browser, report: Path) -> None:
    browser.open(report)
    for chart in ("latency-local", "trade-off", "size", "answers", "layers"):
        at = f"document.querySelector('[data-chart={chart}]')"
        browser.run(f"{at}.dispatchEvent(new PointerEvent('pointerenter'))")
        browser.wait_for(f"{at}.dataset.state === 'live'")
        assert browser.run(f"{at}.querySelector('.vega svg').getBoundingClientRect().width") > 500
    assert complaints(browser) == []


def test_the_graph_is_searched_and_walked_with_the_keyboard(browser: Browser, report: Path) -> None:
    browser.open(report)
    browser.run("document.getElementById('picture').scrollIntoView()")
    browser.wait_for("document.getElementById('picture').dataset.state")
    assert browser.run("document.getElementById('picture').dataset.state") == "drawn after 52"
    browser.run("document.querySelector('[data-which=before]').focus()")
    browser.press("Enter", "\r")
    browser.wait_for("document.getElementById('picture').dataset.state === 'drawn before 78'")
    legend = browser.run("document.querySelector('.legend').innerText")
    assert "merged by a fusion (40)" in legend
    assert "skipped, with a reason (12)" in legend
    browser.run("document.getElementById('search').focus()")
    browser.call("Input.insertText", text="25.conv")
    browser.press("Enter", "\r")
    assert browser.run("document.getElementById('node').innerText").startswith(
        "conv in layers.25.conv · shape: 1×8×4×4 · not fused: The output of `layers.25.conv` is"
    )
    browser.run("document.getElementById('picture').focus()")
    browser.press("n", "n")
    assert "batch_norm in layers.25.batch_norm" in browser.run(
        "document.getElementById('node').innerText"
    )


def test_where_the_time_goes_is_shown_without_the_colours_of_what_was_fused(
    browser: Browser, report: Path
) -> None:
    browser.open(report)
    browser.run("document.getElementById('picture').scrollIntoView()")
    browser.wait_for("document.getElementById('picture').dataset.state")
    browser.run("document.querySelector('[data-which=before]').click()")
    colours = (
        "[...new Set(document.getElementById('picture')._cyreg.cy.nodes()"
        ".map(node => node.style('border-color')))].length"
    )
    assert browser.run(colours) == 3  # merged, skipped, neither
    browser.run(
        "(s => { s.value = 'time'; s.dispatchEvent(new Event('change')); })"
        "(document.getElementById('colour'))"
    )
    assert browser.run(colours) == 1  # every call of this graph has a time


def test_everything_that_is_clicked_can_be_reached_with_tab(browser: Browser, report: Path) -> None:
    browser.open(report)
    wanted = browser.run("document.querySelectorAll('a, button, select, input, summary').length")
    reached = set()
    for _ in range(wanted + 20):
        browser.press("Tab")
        reached.add(
            browser.run(
                "(e => [...document.querySelectorAll('*')].indexOf(e))(document.activeElement)"
            )
        )
    missing = browser.run(
        "[...document.querySelectorAll('a, button, select, input, summary')]"
        f".filter(e => !{json.dumps(sorted(reached))}.includes("
        "[...document.querySelectorAll('*')].indexOf(e))).map(e => e.outerHTML.slice(0, 80))"
    )
    assert missing == []


# Of WCAG 2: (lighter + 0.05) / (darker + 0.05) of the relative luminances; at least 4.5 for text.
CONTRASTS = """
(() => {
  const channel = v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const parts = c => c.match(/[\\d.]+/g).map(Number);
  const light = c => { const [r, g, b] = parts(c).map(channel); return .2126 * r + .7152 * g + .0722 * b; };
  const opaque = c => { const p = parts(c); return p.length < 4 || p[3] === 1; };
  const behind = e => { for (; e; e = e.parentElement) {
    const c = getComputedStyle(e).backgroundColor; if (opaque(c)) return c; } return "rgb(255, 255, 255)"; };
  const low = [];
  for (const e of document.querySelectorAll("body *")) {
    const own = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    if (!own || e.closest("script, style, [hidden]") || !e.getClientRects().length) continue;
    const svg = e.closest("svg");
    const ink = svg ? getComputedStyle(e).fill : getComputedStyle(e).color;
    if (!/^rgb/.test(ink)) { low.push(`${e.tagName} ${ink}`); continue; }
    const [a, b] = [light(ink), light(behind(svg ? svg.parentElement : e))].sort((x, y) => y - x);
    const ratio = (a + .05) / (b + .05);
    if (ratio < 4.5) low.push(`${e.tagName}.${e.className} ${ink} ${ratio.toFixed(2)}: ${e.textContent.slice(0, 30)}`);
  }
  return low;
})()
"""  # noqa: E501


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_all_text_stands_out_from_what_is_behind_it(
    browser: Browser, report: Path, dark: bool
) -> None:
    browser.open(report, dark=dark)
    browser.run("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.run(CONTRASTS) == []


def test_controls_and_pictures_have_names(browser: Browser, report: Path) -> None:
    browser.open(report)
    tree = browser.call("Accessibility.getFullAXTree")["nodes"]
    roles = {"button", "link", "combobox", "searchbox", "img", "application"}
    nameless = [
        node
        for node in tree
        if node.get("role", {}).get("value") in roles
        and not node.get("ignored")
        and not node.get("name", {}).get("value")
    ]
    assert nameless == []
    headings = [n for n in tree if n.get("role", {}).get("value") == "heading"]
    assert headings[0]["name"]["value"] == "Net"


def test_the_pareto_front_is_what_nothing_beats_in_both() -> None:
    assert [row_name(found) for found in pareto(COMPARISON.rows)] == [
        ".pte int8",
        ".pte fp32",
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {"rows": COMPARISON.rows[:1]},
        {"layers": (), "in_int8": (), "before": (), "after": (), "plan": None},
        {"devices": (), "versions": {}, "command": None, "validation": None},
        {"rows": tuple(replace(r, accuracy=None, answers=None) for r in COMPARISON.rows)},
        {"rows": (*COMPARISON.rows, replace(COMPARISON.rows[2], device="ssh:pi"))},
        {"unfinished": "timing on local"},
    ],
    ids=["one row", "no graph", "no device", "no answers", "two devices", "interrupted"],
)
def test_a_report_is_made_of_what_there_is(
    browser: Browser, tmp_path: Path, changes: dict[str, object]
) -> None:
    page = tmp_path / "page.html"
    page.write_text(replace(COMPARISON, **changes).to_html())
    browser.open(page)
    assert complaints(browser) == []
    assert ("Not finished:" in browser.run("document.body.innerText")) == ("unfinished" in changes)


def test_the_command_makes_the_same_page_of_the_json(tmp_path: Path) -> None:
    saved, page = tmp_path / "c.json", tmp_path / "c.html"
    saved.write_text(COMPARISON.to_json())
    result = CliRunner().invoke(cli, ["report", str(saved), "-o", str(page)])
    assert result.exit_code == 0, result.output
    assert result.output == f"Wrote {page} ({size(page.stat().st_size)}).\n"
    assert page.read_text() == COMPARISON.to_html()
    printed = CliRunner().invoke(cli, ["report", "-", "-o", "-"], input=COMPARISON.to_json())
    assert printed.stdout == page.read_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "Expected what 'torchfuse compare --json' saved, but '.*' cannot be read"),
        ("{}", r"Expected what Comparison.to_json\(\) writes"),
        (replace(COMPARISON, rows=()).to_json(), "Expected a comparison with rows, got none"),
    ],
)
def test_what_is_no_comparison_is_one_sentence(
    tmp_path: Path, text: str | None, message: str
) -> None:
    if text is not None:
        (tmp_path / "c.json").write_text(text)
    words = ["report", str(tmp_path / "c.json"), "-o", str(tmp_path / "c.html")]
    result = CliRunner().invoke(cli, words)
    with pytest.raises(InputError, match=message):
        raise AssertionError(result.output) if result.exception is None else result.exception
    assert not (tmp_path / "c.html").exists()


def test_a_missing_library_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libraries, "find_spec", lambda name: None if name == "altair" else name)
    with pytest.raises(UnsupportedError, match=r"takes altair, .*: pip install 'torchfuse\[report"):
        COMPARISON.to_html()


def test_a_notebook_shows_the_table_and_no_script() -> None:
    shown = COMPARISON._repr_html_()
    assert shown.count("<tr>") == 5
    assert "<script" not in shown
    assert "fusing made it 1.33× (1." in shown
