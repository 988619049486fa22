"""Progress where stderr is no terminal: a line per step, and one for all of its rounds."""

from torchfuse.render.progress import progress


def test_a_piped_step_is_a_line_and_its_rounds_are_one(capsys):
    with progress() as step:
        for text in ("saving fp32.pte", "saving fp16.pte", "round 1 of 2", "round 2 of 2"):
            step(text)
    assert capsys.readouterr().err == "saving fp32.pte\nsaving fp16.pte\nround 1 of 2\n"
