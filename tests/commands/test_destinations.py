"""No command begins its work if what it is to write cannot be written."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from torchfuse import recipe
from torchfuse.artifacts import check_destination, check_destinations, check_folder
from torchfuse.cli import cli
from torchfuse.errors import ArtifactError, InputError, TorchfuseError

# Each leaves a mark when any of its code is run.
NET = """
from pathlib import Path
(Path(__file__).parent / "was_run").touch()
"""
OUTPUTS = {  # {} is the destination
    "plan --json": ["plan", "net.py:net", "--json", "{}"],
    "fuse -o": ["fuse", "net.py:net", "-o", "{}.pt2"],
    "quantize -o": ["quantize", "net.py:net", "--data", "random", "-o", "{}.pte"],
    "quantize --json": ["quantize", "net.py:net", "-o", "q.pte", "--json", "{}"],
    "export -o": ["export", "net.py:net", "-o", "{}.pt"],
    "bench --json": ["bench", "model.pte", "--json", "{}"],
    "bench --csv": ["bench", "model.pte", "--csv", "{}"],
    "bench --markdown": ["bench", "model.pte", "--markdown", "{}"],
    "bench --model --json": ["bench", "--model", "model.pte", "--json", "{}"],
    "bench --read --json": ["bench", "--read", "run.txt", "--json", "{}"],
    "devices --json": ["devices", "nowhere", "--json", "{}"],
    "recipe --out": ["recipe", "--out", "{}"],
}
FILES = [name for name in OUTPUTS if name != "recipe --out"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    def began(*_: object, **__: object) -> None:
        (tmp_path / "was_run").touch()

    monkeypatch.setattr(recipe, "run", began)
    monkeypatch.setattr("torchfuse.devices.listing.listed", began)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NET)
    yield tmp_path
    assert not (tmp_path / "was_run").exists()


def run(name: str, destination: object) -> Result:
    return CliRunner().invoke(cli, [word.format(destination) for word in OUTPUTS[name]])


def complaint(result: Result) -> str:
    """The one sentence that a command ended with."""
    assert isinstance(result.exception, TorchfuseError), result.output
    assert "\n" not in str(result.exception)
    return str(result.exception)


@pytest.mark.parametrize("name", FILES)
def test_a_folder_that_is_missing_is_known_before_any_work(folder: Path, name: str) -> None:
    assert f"the folder '{folder / 'missing'}' does not exist; create it first" in complaint(
        run(name, folder / "missing" / "out")
    )


@pytest.mark.parametrize("name", FILES)
def test_a_folder_of_the_files_name_is_known_before_any_work(folder: Path, name: str) -> None:
    for suffix in ("", ".pt2", ".pte", ".pt"):
        (folder / f"out{suffix}").mkdir()
    assert "it is a folder; add a file name" in complaint(run(name, folder / "out"))


@pytest.mark.parametrize("name", FILES)
def test_a_read_only_file_is_known_before_any_work(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for suffix in ("", ".pt2", ".pte", ".pt"):
        (folder / f"out{suffix}").touch()
    # The superuser, as whom tests may run, can write to any.
    monkeypatch.setattr("torchfuse.artifacts._is_writable", lambda path: not path.is_file())
    assert "the file is read-only; choose another name" in complaint(run(name, folder / "out"))


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_folder_of_somebody_else_is_known_before_any_work(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torchfuse.artifacts._is_writable", lambda path: path.name == "net.py")
    assert f"no permission to write in '{folder}'; choose a folder that is yours" in complaint(
        run(name, folder / "out")
    )


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("fuse net.py:net -o out.onnx", r"out\.onnx' has no suffix that says what to write"),
        ("export net.py:net -o out.tflite", r"in one of '\.pte', .* got 'out\.tflite'"),
        (
            "quantize net.py:net -o out.pt",
            r"ends in \.pte or \.onnx or \.xml for xnnpack, got 'out",
        ),
    ],
)
def test_a_suffix_that_is_unknown_is_known_before_any_work(
    folder: Path, command: str, message: str
) -> None:
    result = CliRunner().invoke(cli, command.split())
    with pytest.raises(TorchfuseError, match=message):
        raise AssertionError(result.output) if result.exception is None else result.exception


def test_one_file_for_the_model_and_the_report_is_known_before_any_work(folder: Path) -> None:
    words = ["quantize", "net.py:net", "-o", "out.pte", "--json", "./out.pte"]
    assert complaint(CliRunner().invoke(cli, words)) == (
        "Expected a file for each of -o out.pte, --json ./out.pte, got one twice."
    )


@pytest.mark.parametrize("out", ["net.py", "net.py/out"])
def test_the_recipes_folder_cannot_be_a_file_or_lie_in_one(folder: Path, out: str) -> None:
    assert f"'{folder / 'net.py'}' is no folder; choose another name" in complaint(
        run("recipe --out", out)
    )


def test_the_recipes_report_cannot_be_a_folder(folder: Path) -> None:
    (folder / "out" / "comparison.json").mkdir(parents=True)
    assert "comparison.json': it is a folder; add a file name" in complaint(
        run("recipe --out", "out")
    )


def test_folders_that_can_be_made_need_not_be_there(folder: Path) -> None:
    check_folder("new/and/newer")
    check_folder(folder)
    assert [path.name for path in folder.iterdir()] == ["net.py"]


def test_what_is_not_asked_for_is_not_looked_at(folder: Path) -> None:
    check_destinations({"-o": "out.pte", "--json": None})
    with pytest.raises(InputError, match=r"a file for each of -o out, --json \./out, got one"):
        check_destinations({"-o": "out", "--json": "./out"})


@pytest.mark.skipif(os.geteuid() != 0, reason="takes the superuser to be somebody else")
@pytest.mark.parametrize("check", [check_destination, check_folder])
def test_a_folder_that_may_not_be_looked_into_is_an_error_of_ours(
    folder: Path, check: Callable[[Path], None]
) -> None:
    (folder / "private").mkdir(mode=0o700)
    for parent in (folder, folder.parent, folder.parent.parent):
        parent.chmod(0o755)
    os.seteuid(65534)
    try:
        with pytest.raises(ArtifactError, match="no permission to look into its folder; choose"):
            check(folder / "private" / "out.pt")
    finally:
        os.seteuid(0)
