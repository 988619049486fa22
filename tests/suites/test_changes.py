"""Two suites beside each other: what surely became another, and what cannot be compared."""

from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from torchfuse.cli import cli
from torchfuse.comparing.comparison import Comparison, Row
from torchfuse.devices.facts import DeviceFacts
from torchfuse.errors import InputError
from torchfuse.measuring.timing import Measurement
from torchfuse.render.changes_text import markdown, text
from torchfuse.stats import Ratio, Share, share_of
from torchfuse.suites.changes import changes
from torchfuse.suites.results import Failure, Result, SuiteResult
from torchfuse.verifying.equivalence import Equivalence, OutputDifference


def row(
    time_s: float = 1e-3,
    size_bytes: int | None = 1000,
    accuracy: Share | None = None,
    target: str = ".pte",
    runs: int = 20,
) -> Row:
    return Row(
        "fused",
        target,
        "int8",
        Measurement("m", (time_s,) * runs, 1, True, 1),
        Ratio(1.0, 1.0, 1.0),
        size_bytes,
        Equivalence((OutputDifference("output", 0.0, 0.0, float("inf"), True),)),
        accuracy,
        None,
    )


def suite(*rows: Row, machine: str = "host", soc: str = "cpu", name: str = "net") -> SuiteResult:
    facts = DeviceFacts("local", "ready", soc=soc)
    comparison = Comparison("Net", rows, (), devices=(facts,))
    result = Result(name, name, "net.py:net", None, "", ("local",), comparison, {"local": machine})
    return SuiteResult((result,))


def kinds(old: SuiteResult, new: SuiteResult) -> list[str]:
    return [change.kind for change in changes(old, new).changes]


def test_what_is_surely_slower_larger_or_less_accurate_is_named() -> None:
    old = suite(row(1e-3, 1000, share_of(95, 100)))
    new = suite(row(2e-3, 1500, share_of(50, 100)))
    assert kinds(old, new) == ["less accurate", "slower", "larger"]
    assert kinds(new, old) == ["more accurate", "faster", "smaller"]
    assert text(changes(old, new)).splitlines()[1:4] == [
        "less accurate net   fused, .pte int8 95.00 % 50.00 % -45.00 points",
        "slower        net   fused, .pte int8 1.00 ms 2.00 ms 2.00 (2.00 … 2.00)",
        "larger        net   fused, .pte int8 1.00 kB 1.50 kB 1.500",
    ]
    assert "| slower | net | fused, .pte int8 |" in markdown(changes(old, new))


def test_what_may_be_chance_is_no_change() -> None:
    noisy = Measurement("m", (1e-3, 3e-3) * 10, 1, True, 1)
    old = suite(replace(row(accuracy=share_of(95, 100)), latency=noisy))
    new = suite(row(1.01e-3, 1000, share_of(93, 100)))
    assert kinds(old, new) == []
    assert text(changes(old, new)) == "Of 1 row that both have, none surely changed."


def test_too_few_runs_say_nothing() -> None:
    found = changes(suite(row(1e-3, runs=3)), suite(row(9e-3, runs=3)))
    assert not found.changes
    assert found.notes == ("net: fused, .pte int8 has too few runs for its times to be compared.",)


def test_times_of_another_machine_or_processor_are_not_compared() -> None:
    old, elsewhere = suite(row(1e-3)), suite(row(9e-3), machine="other")
    assert kinds(old, elsewhere) == []
    (note,) = changes(old, elsewhere).notes
    assert note.endswith("which were measured on host then and on other now.")
    changed = suite(row(9e-3, 2000), soc="new cpu")
    assert kinds(old, changed) == ["larger"]
    assert "which was cpu then and is new cpu now" in changes(old, changed).notes[0]


def test_what_is_gone_new_or_failed_is_said() -> None:
    failed = Result("c", "c", "s", None, "", ("local",), failures=(Failure("making", "no"),))
    old = SuiteResult((*suite(row(), row(target=".pt")).results, failed))
    new = SuiteResult((*suite(row(), row(target=".onnx")).results, replace(failed, name="d")))
    assert changes(old, new).notes == (
        "net: fused, .onnx int8 is new.",
        "net: fused, .pt int8 is not there any more.",
        "d is new.",
        "c is not there any more.",
    )
    with pytest.raises(InputError, match="The two have no row in common"):
        changes(suite(row()), suite(row(), name="other"))


def test_two_files_are_compared_in_the_shell(tmp_path: Path) -> None:
    old, new = suite(row(1e-3)), suite(row(2e-3))
    (tmp_path / "old.json").write_text(old.to_json())
    (tmp_path / "new.json").write_text(new.to_json())
    words = ["report", str(tmp_path / "old.json"), str(tmp_path / "new.json")]
    assert "slower net   fused, .pte int8 1.00 ms 2.00 ms" in CliRunner().invoke(cli, words).output
    one = old.results[0].comparison
    assert one is not None
    (tmp_path / "one.json").write_text(one.to_json())
    mixed = CliRunner().invoke(cli, [*words[:2], str(tmp_path / "one.json")])
    assert "Expected two suites or two comparisons, got one of each." in str(mixed.exception)
    both = CliRunner().invoke(cli, ["report", *[str(tmp_path / "one.json")] * 2])
    assert both.output == "Of 1 row that both have, none surely changed.\n"


def test_one_model_of_a_suite_has_a_report_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text(suite(row()).to_json())
    words = ["report", str(tmp_path / "s.json"), "-o", "-"]
    whole = CliRunner().invoke(cli, words)
    assert "torchfuse suite" in whole.stdout
    assert 'data-by="0.001"' in whole.stdout
    assert "torchfuse comparison" in CliRunner().invoke(cli, [*words, "--model", "net"]).stdout
    unknown = CliRunner().invoke(cli, [*words, "--model", "nets"])
    assert "has no 'nets'; there is net." in str(unknown.exception)
