"""The cache of a comparison: what is kept is found again, whole or not at all."""

import hashlib
from pathlib import Path

import pytest

from torchfuse.artifacts import Artifact
from torchfuse.comparing.cache import Cache, Folder
from torchfuse.comparing.jobs import Build, Built, Place


def job_in(folder: Path) -> Build:
    return Build(Place("folded", ".xml", "fp32", folder / "fp32_folded.xml"), optimize=True)


def made(job: Build) -> Built:
    path = job.place.path
    assert path is not None
    beside = path.with_suffix(".bin")
    path.write_bytes(b"the graph")
    beside.write_bytes(b"the weights")
    artifact = Artifact(
        path,
        "xml",
        "fp32",
        len(b"the graph") + len(b"the weights"),
        hashlib.sha256(b"the graph").hexdigest(),
        computes_in="f32",
        beside=(beside,),
    )
    return Built(artifact, ("a note",), None, 1.0)


def never(job: Build) -> Built:
    raise AssertionError("it was made again")


def test_an_artifact_of_two_files_is_found_again_with_both(tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    cache = Cache(Folder(tmp_path / "cache"), "digest")
    first = cache.built(job_in(tmp_path / "first"), made)
    second = cache.built(job_in(tmp_path / "second"), never)
    assert first.artifact is not None
    assert second.artifact is not None
    assert second.artifact.beside == (tmp_path / "second" / "fp32_folded.bin",)
    assert second.artifact.beside[0].read_bytes() == b"the weights"
    assert second.artifact.computes_in == first.artifact.computes_in == "f32"
    assert second.notes == first.notes


@pytest.mark.parametrize("damage", ["graph", "weights", "missing"])
def test_what_is_not_whole_any_more_is_made_again(tmp_path: Path, damage: str) -> None:
    cache = Cache(Folder(tmp_path / "cache"), "digest")
    cache.built(job_in(tmp_path), made)
    suffix = ".xml" if damage == "graph" else ".bin"
    (kept,) = (tmp_path / "cache").glob(f"*{suffix}")
    if damage == "missing":
        kept.unlink()
    else:
        kept.write_bytes(b"half")
    again = []
    cache.built(job_in(tmp_path), lambda job: again.append(job) or made(job))
    assert len(again) == 1


def test_a_cache_that_cannot_be_written_makes_no_build_fail(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file, no folder")
    cache = Cache(Folder(tmp_path / "cache"), "digest")
    assert cache.built(job_in(tmp_path), made).artifact is not None
