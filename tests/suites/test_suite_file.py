"""suite.toml: what it asks for, and mistakes in it, each with its line and key."""

import re
from pathlib import Path

import pytest

from torchfuse.errors import InputError
from torchfuse.suites.suite_file import Entry, read_suite

WHOLE = """\
targets = ["eager", "pte"]
devices = ["local", "ssh:board"]
runs = 20

[models.resnet]
source = "nets.py:resnet(depth=18)"
variants = ["not-fused", "int8"]
data = ["photos", "noise"]

[models.speech]
source = "speech.nets:small"
inputs = ["1x80x100"]
data = []
runs = 5
time-limit-s = 60

[data.photos]
path = "photos"
mean = [0.5, 0.5, 0.5]
std = [0.2, 0.2, 0.2]
size = "64x48"

[data.noise]
path = "random"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "nets.py").touch()
    (tmp_path / "photos").mkdir()
    return tmp_path


def read(folder: Path, text: str) -> tuple[Entry, ...]:
    (folder / "suite.toml").write_text(text)
    return read_suite(folder / "suite.toml")


def mistakes(folder: Path, text: str) -> list[str]:
    with pytest.raises(InputError) as raised:
        read(folder, text)
    notes = getattr(raised.value, "__notes__", ())
    return [line.replace(f"'{folder}/suite.toml', ", "") for line in (str(raised.value), *notes)]


def test_models_and_data_are_multiplied_and_a_models_own_options_win(folder: Path) -> None:
    photos, noise, speech = read(folder, WHOLE)
    assert [e.name for e in (photos, noise, speech)] == [
        "resnet on photos", "resnet on noise", "speech",
    ]  # fmt: skip
    assert photos.source == f"{folder}/nets.py:resnet(depth=18)"
    assert photos.path == f"{folder}/photos"
    assert (photos.size, photos.mean) == ((64, 48), (0.5, 0.5, 0.5))
    assert photos.variants == ("not fused", "int8")
    assert noise.path == "random"
    assert (speech.source, speech.inputs, speech.path) == ("speech.nets:small", ("1x80x100",), None)
    assert (photos.runs, speech.runs, speech.time_limit_s) == (20, 5, 60)
    assert speech.targets == ("eager", "pte")
    assert speech.devices == ("local", "ssh:board")


@pytest.mark.parametrize(
    ("wrong", "right", "expected"),
    [
        ('"pte"]', '"ptee"]', r"line 1, targets: Expected targets among .*, got 'ptee'\."),
        ('"ssh:board"', '"board"', r"line 2, devices: Expected a device named local, .* 'board'"),
        ("runs = 20", "runs = 1", r"line 3, runs: Expected 2 or more, got 1\."),
        ("runs = 20", 'runs = "20"', r"line 3, runs: Expected `int \| null`, got `str`\."),
        ("runs = 5", "rums = 5", r"line 14, models\.speech\.rums: There is no such key; .* runs, "),
        ("60\n", "-1\n", r"line 15, models\.speech\.time-limit-s: Expected seconds above zero"),
        ("int8", "int9", r"line 7, models\.resnet\.variants: Expected variants among .*'int9'"),
        ("nets.py:r", "net.py:r", r"line 6, models\.resnet\.source: There is no file '.*/net\.py'"),
        ('"nets.py:resnet(depth=18)"', '"nets.py"', r"line 6, models\.resnet\.source: .*callable"),
        ("1x80x100", "1*80", r"line 12, models\.speech\.inputs: '1\*80' is not an input"),
        ('"noise"]', '"nose"]', r"line 8, models\.resnet\.data: Expected names .*'nose'"),
        ('source = "speech.nets:small"\n', "", r"line 10, models\.speech: This table missing requ"),
        ("64x48", "64", r"line 21, data\.photos\.size: Expected HxW, such as 224x224, got '64'"),
        ('path = "photos"', 'path = "fotos"', r"line 18, data\.photos\.path: .*no such file\."),
        ("std = [0.2, 0.2, 0.2]\n", "", r"line 18, data\.photos\.path: 'photos' holds .*"),
        ("std = [0.2, 0.2, 0.2]", "std = [0.2]", r"line 20, data\.photos\.std: Expected `array`"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_its_line_and_key(
    folder: Path, wrong: str, right: str, expected: str
) -> None:
    assert wrong in WHOLE
    first = mistakes(folder, WHOLE.replace(wrong, right, 1))[0]
    assert re.match(expected, first), first


def test_all_mistakes_are_found_at_once(folder: Path) -> None:
    text = WHOLE.replace("runs = 20", "runs = 1").replace("1x80x100", "x").replace("64x48", "y")
    assert [line.split(",")[0] for line in mistakes(folder, text)] == [
        "line 3",
        "line 12",
        "line 21",
    ]


def test_what_is_no_toml_is_said_with_its_line(folder: Path) -> None:
    with pytest.raises(InputError, match=r"cannot be read as TOML: .*\(at line 2, column 8\)"):
        read(folder, "runs = 5\nthreads\n")


def test_a_suite_without_models_is_a_mistake(folder: Path) -> None:
    assert "missing required field `models`" in mistakes(folder, "runs = 5\n")[0]
    assert "Expected a model, such as [models.net]" in mistakes(folder, "models = {}\n")[0]
