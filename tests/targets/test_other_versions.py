"""Whole files that the installed runtime cannot take: for another version, with other parts."""

import io
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

import torchfuse
from torchfuse.errors import ArtifactError
from torchfuse.targets import target_for
from torchfuse.targets.opening import check

MODEL = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
X = torch.linspace(-1, 1, 3 * 8 * 8).reshape(1, 3, 8, 8)

Files = Mapping[str, bytes]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("whole")

    def export(suffix: str) -> Path:
        path = folder / f"net{suffix}"
        return path if path.exists() else torchfuse.export(MODEL, X, path).path

    return export


def bare(path: Path) -> dict[str, bytes]:
    """The files as the runtime's own makers write them."""
    file = check(path)
    data = file.data
    if path.suffix == ".onnx":
        model = onnx.load_model_from_string(data)
        del model.metadata_props[:]
        data = model.SerializeToString()
    elif path.suffix == ".xml":
        data = data[: data.index(b"<!-- torchfuse")]
    else:
        data = data[: data.index(b"torchfuse-seal-1")]
    if path.suffix in (".pt", ".ptl"):
        data = data[:-2] + b"\0\0"  # the length of the comment that the seal was
    return {path.suffix: data, **file.beside}


def with_bytes(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        assert old in data
        return data.replace(old, new, 1)

    return change


def of_opset(version: int) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        model = onnx.load_model_from_string(data)
        model.opset_import[0].version = version
        return model.SerializeToString()

    return change


def of_ir(version: int) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        model = onnx.load_model_from_string(data)
        model.ir_version = version
        return model.SerializeToString()

    return change


def in_the_archive(name: str, old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    """Replace bytes of the entries of that name."""

    def change(data: bytes) -> bytes:
        changed = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(changed, "w") as made:
            for entry in source.namelist():
                content = source.read(entry)
                if entry.endswith(name):
                    content = with_bytes(old, new)(content)
                made.writestr(entry, content)
        return changed.getvalue()

    return change


# suffix, change, what is said
NEWER = [
    (".pte", with_bytes(b"ET12", b"ET99"), "Program identifier 'ET99' != expected 'ET12'"),
    (".pte", with_bytes(b"XN01", b"XN99"), "version identifier 'XN99' != expected"),
    (
        ".pte",
        with_bytes(b"XnnpackBackend", b"NewestBackend\0"),
        "Backend NewestBackend is not registered",
    ),
    (".onnx", of_opset(99), "of ONNX's opset 99, and the newest that is known is"),
    (".xml", with_bytes(b'version="11"', b'version="99"'), "Unable to read the model"),
    (".xml", with_bytes(b'version="opset1"', b'version="opset99"'), "unsupported opset: opset99"),
    (".pt", in_the_archive("/version", b"3", b"99"), "read a PyTorch file with version 99"),
    (".pt", in_the_archive(".py", b"relu", b"rleu"), "Unknown builtin op: aten::rleu"),
    (".ptl", in_the_archive("/version", b"3", b"99"), "read a PyTorch file with version 99"),
]


@pytest.mark.parametrize(("suffix", "change", "said"), NEWER)
def test_a_file_of_a_newer_version_is_refused_in_the_runtimes_words(
    written: Callable[[str], Path],
    suffix: str,
    change: Callable[[bytes], bytes],
    said: str,
    tmp_path: Path,
) -> None:
    for name, data in bare(written(suffix)).items():
        (tmp_path / f"net{name}").write_bytes(change(data) if name == suffix else data)
    target = target_for(f"net{suffix}")
    with pytest.raises(ArtifactError) as raised:
        torchfuse.load(tmp_path / f"net{suffix}")
    message = str(raised.value)
    assert f"{target.name} {target.version} refuses it (" in message
    assert said in message
    assert "as it may what was made for another version; export the model again" in message
    assert message.count("\n") == 0


@pytest.mark.parametrize(("suffix", "change", "said"), [NEWER[0], NEWER[2], NEWER[3], NEWER[5]])
def test_a_sealed_file_says_the_version_that_it_was_made_with(
    written: Callable[[str], Path],
    suffix: str,
    change: Callable[[bytes], bytes],
    said: str,
    tmp_path: Path,
) -> None:
    target, files = target_for(f"net{suffix}"), bare(written(suffix))
    metadata = {**(check(written(suffix)).metadata or {}), target.distribution: "99.1"}
    for name, data in target.seal({**files, suffix: change(files[suffix])}, metadata).items():
        (tmp_path / f"net{name}").write_bytes(data)
    message = (
        rf"{target.name} \S+ cannot load '.*net\{suffix}': .*{said}.*; it was made with "
        rf"{target.distribution} 99\.1, and this is {target.version}: install that, or export"
    )
    with pytest.raises(ArtifactError, match=message):
        torchfuse.load(tmp_path / f"net{suffix}")


def test_an_ir_that_is_newer_than_onnx_is_said(
    written: Callable[[str], Path], tmp_path: Path
) -> None:
    (tmp_path / "net.onnx").write_bytes(of_ir(99)(bare(written(".onnx"))[".onnx"]))
    with pytest.raises(ArtifactError, match="ir_version 99 is higher than the checker's"):
        torchfuse.load(tmp_path / "net.onnx")


@pytest.mark.parametrize("is_missing", [False, True])
def test_weights_outside_of_an_onnx_model_are_named(
    written: Callable[[str], Path], is_missing: bool, tmp_path: Path
) -> None:
    model = onnx.load_model_from_string(bare(written(".onnx"))[".onnx"])
    path = tmp_path / "net.onnx"
    onnx.save(model, path, save_as_external_data=True, location="net.data", size_threshold=0)
    if is_missing:
        (tmp_path / "net.data").unlink()
    named = r"'net\.data', which is missing, " if is_missing else r"'net\.data' "
    with pytest.raises(ArtifactError, match=rf"in one file, but .* has its weights in {named}besi"):
        torchfuse.load(path)
