"""Progress where stderr is no terminal: a line per step, and one for all of its rounds."""

import time

import click
from click.testing import CliRunner

from torchfuse.render.progress import progress, quiet_option


def test_a_piped_step_is_a_line_and_its_rounds_are_one(capsys):
    with progress() as step:
        for text in ("saving fp32.pte", "saving fp16.pte", "round 1 of 2", "round 2 of 2"):
            step(text)
    assert capsys.readouterr().err == "saving fp32.pte\nsaving fp16.pte\nround 1 of 2\n"


def test_a_step_that_took_long_is_followed_by_its_time(capsys, monkeypatch):
    now = iter([0.0, 0.0, 0.0, 12.34, 12.34, 12.5])
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    with progress() as step:
        step("quantizing")
        step("writing")
    assert capsys.readouterr().err == "quantizing\n  quantizing: 12.3 s\nwriting\n"


def test_a_quiet_command_says_nothing_of_its_steps(capsys):
    @click.command()
    @quiet_option
    def command():
        with progress() as step:
            step("quantizing")

    assert CliRunner().invoke(command, ["--quiet"]).stderr == ""
    assert CliRunner().invoke(command, []).stderr == "quantizing\n"
