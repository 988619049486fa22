"""The jobs of a suite, as a worker does them: what went wrong, and what may help."""

import errno
from dataclasses import replace
from pathlib import Path

import pytest

from torchfuse.comparing.cache import Folder
from torchfuse.comparing.comparison import Comparison
from torchfuse.suites.suite_file import Entry, read_suite
from torchfuse.suites.worker_jobs import Job, MadeFiles, Outcome, perform

NET = """
import torch
from torch import nn


def net():
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
    return nn.Sequential(*layers), torch.zeros(1, 3, 8, 8)
"""
SUITE = """
runs = 6
targets = ["eager", "pt"]
variants = ["fused"]

[models.net]
source = "net.py:net"
"""


@pytest.fixture
def entry(tmp_path: Path) -> Entry:
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "suite.toml").write_text(SUITE)
    return read_suite(tmp_path / "suite.toml")[0]


def job(entry: Entry, run: str = "run", **more: object) -> Job:
    store = str(Path(entry.source).parent / "store")
    return Job(run=run, entry=entry, store=store, salt=None, **more)  # type: ignore[arg-type]


def done(job: Job) -> Outcome:
    return perform(job, lambda _: None, lambda: None)


def made_of(entry: Entry, **more: object) -> MadeFiles:
    outcome = done(job(entry, **more))
    assert isinstance(outcome.value, MadeFiles), outcome.error
    return outcome.value


def test_files_go_by_the_cache_to_whoever_times_them(entry: Entry) -> None:
    made = made_of(entry)
    outcome = done(job(entry, "another process", device="local", made=made))
    assert isinstance(outcome.value, Comparison), outcome.error
    assert [row.target for row in outcome.value.rows] == ["eager", "eager", ".pt"]
    assert outcome.value.digest == made.base.digest


def test_shares_of_the_files_are_all_of_them_in_the_rows_order(entry: Entry) -> None:
    entry = replace(entry, targets=("eager", "pt", "ptl"), variants=("not fused", "fused"))
    whole = made_of(entry)
    first, second = (made_of(entry, part=part, parts=2) for part in range(2))
    joined = first.joined(second)
    assert [str(p) for p in joined.places] == [str(p) for p in whole.places]
    assert [a.sha256 for a in joined.artifacts.values()] == [
        a.sha256 for a in whole.artifacts.values()
    ]
    assert {str(p) for p in joined.evaluated} == {str(p) for p in whole.evaluated}


def test_a_full_disk_is_said_and_may_be_free_again(
    entry: Entry, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Folder, name: str, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Folder, "put", full)
    outcome = done(job(entry))
    assert outcome.value is None
    assert outcome.may_help == "again"
    assert outcome.error is not None
    assert "A file cannot be kept in the cache: [Errno 28] No space left on device" in outcome.error


def test_a_file_that_is_gone_from_the_cache_is_to_be_made_again(entry: Entry) -> None:
    made = made_of(entry)
    for path in (Path(entry.source).parent / "store").glob("*.pt"):
        path.write_bytes(b"another")
    outcome = done(job(entry, device="local", made=made))
    assert (outcome.value, outcome.may_help) == (None, "remake")


def test_a_model_that_is_another_where_it_is_timed_is_refused(entry: Entry) -> None:
    made = made_of(entry)
    Path(entry.source.partition(":")[0]).write_text(NET.replace("ReLU()", "ReLU6()"))
    outcome = done(job(entry, "another machine", device="local", made=made))
    assert outcome.error is not None
    assert outcome.error.startswith("The model is another on ")
    assert outcome.may_help is None


def test_what_is_known_to_be_the_same_is_not_made_again(entry: Entry) -> None:
    known = made_of(entry).base.digest
    again = made_of(entry, known=known)
    assert again.is_same
    assert not again.places
    assert not made_of(entry, known="another").is_same


def test_two_models_may_have_a_module_of_the_same_name_beside_them(tmp_path: Path) -> None:
    for name, width in (("a", 4), ("b", 8)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "layers.py").write_text(f"WIDTH = {width}\n")
        text = NET.replace("import torch\n", "import torch\nfrom layers import WIDTH\n", 1)
        (folder / "net.py").write_text(
            text.replace("3, 4, 3", "3, WIDTH, 3").replace("(4)", "(WIDTH)")
        )
        (folder / "suite.toml").write_text(SUITE.replace('"pt"', '"channels_last"'))
    for name, width in (("a", 4), ("b", 8)):
        made = made_of(read_suite(tmp_path / name / "suite.toml")[0], run=name)
        assert made.known["after"][0].sizes[1] == width


def test_a_job_that_takes_too_long_is_told_so(entry: Entry) -> None:
    told: list[str] = []
    perform(job(replace(entry, time_limit_s=0.01)), lambda _: None, lambda: told.append("outran"))
    assert told == ["outran"]
