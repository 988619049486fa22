"""Model files are written whole or not at all, and a damaged one is an error, never an abort."""

import errno
import io
import os
import random
import resource
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.jit.mobile import _load_for_lite_interpreter

from torchfuse.artifacts import write_atomically
from torchfuse.errors import ArtifactError
from torchfuse.isolation.warning_filters import known_warnings_ignored
from torchfuse.lowering.capture import capture
from torchfuse.targets import target_for
from torchfuse.targets.executorch.xnnpack import lower
from torchfuse.targets.opening import check
from torchfuse.targets.sealing import seal_pte, seal_zip
from torchfuse.targets.torchscript import scripting

METADATA = {"precision": "fp32", "torchfuse": "0.1.0"}
FORMATS = ("pte", "pt", "ptl")


class ConvNet(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.conv(x))


@pytest.fixture(scope="module")
def example() -> torch.Tensor:
    return torch.linspace(-1, 1, 3 * 8 * 8).reshape(1, 3, 8, 8)


@pytest.fixture(scope="module")
def expected(example: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(0)
    return ConvNet().eval()(example).detach()


@pytest.fixture(scope="module")
def payloads(example: torch.Tensor) -> dict[str, bytes]:
    """Files without a seal, as PyTorch and ExecuTorch write them."""
    from torchfuse.cases import Case

    torch.manual_seed(0)
    model = ConvNet().eval()
    case = Case((example,))
    scripted = scripting.script(model, case).module
    return {
        "pte": lower(capture(model, case)).program,
        "pt": scripting.serialize(scripted, "pt"),
        "ptl": scripting.serialize(scripted, "ptl"),
    }


def seal(form: str, payload: bytes) -> bytes:
    return (seal_pte if form == "pte" else seal_zip)(payload, METADATA)


def run_stock(form: str, path: Path, x: torch.Tensor) -> torch.Tensor:
    """Load the path with PyTorch's own loader, and nothing of ours, and run it."""
    with known_warnings_ignored():
        if form == "pte":
            from executorch.runtime import Runtime

            program = Runtime.get().load_program(path)
            return program.load_method("forward").execute([x])[0]
        with scripting.known_warnings_ignored():
            load = torch.jit.load if form == "pt" else _load_for_lite_interpreter
            return load(str(path))(x)


@pytest.mark.parametrize("form", FORMATS)
def test_stock_loaders_take_a_sealed_file(
    form: str,
    payloads: dict[str, bytes],
    example: torch.Tensor,
    expected: torch.Tensor,
    tmp_path: Path,
) -> None:
    path = tmp_path / f"model.{form}"
    path.write_bytes(seal(form, payloads[form]))
    torch.testing.assert_close(run_stock(form, path, example), expected)


@pytest.mark.parametrize("form", FORMATS)
def test_a_sealed_file_gives_back_its_bytes_and_metadata(
    form: str, payloads: dict[str, bytes], tmp_path: Path
) -> None:
    path = tmp_path / f"model.{form}"
    sealed = seal(form, payloads[form])
    path.write_bytes(sealed)
    checked = check(path)
    assert checked.metadata == METADATA
    assert checked.data == sealed
    assert checked.format == form


@pytest.mark.parametrize("form", FORMATS)
def test_a_whole_file_of_someone_else_is_loaded_in_a_child_and_accepted(
    form: str, payloads: dict[str, bytes], tmp_path: Path
) -> None:
    path = tmp_path / f"model.{form}"
    path.write_bytes(payloads[form])
    checked = check(path)
    assert checked.metadata is None
    assert checked.data == payloads[form]


def test_a_sealed_zip_is_still_a_whole_zip(payloads: dict[str, bytes]) -> None:
    with zipfile.ZipFile(io.BytesIO(seal("pt", payloads["pt"]))) as archive:
        assert archive.testzip() is None


@pytest.mark.parametrize("form", FORMATS)
def test_every_single_changed_byte_of_a_sealed_file_is_found(
    form: str, payloads: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whatever passes as "not sealed" would go to a child process; here that counts as found only
    # if it never gets there.
    monkeypatch.setattr(
        "torchfuse.targets.opening._first_load", lambda *_: pytest.fail("not found")
    )
    path = tmp_path / f"model.{form}"
    sealed = seal(form, payloads[form])
    positions = [*range(0, len(sealed), 97), *range(len(sealed) - 300, len(sealed))]
    for position in positions:
        damaged = bytearray(sealed)
        damaged[position] ^= 0x10
        path.write_bytes(damaged)
        with pytest.raises(ArtifactError, match="damaged"):
            check(path)


def truncated(data: bytes) -> bytes:
    return data[: len(data) * 2 // 3]


def without_its_last_byte(data: bytes) -> bytes:
    return data[:-1]


def half_zeroed(data: bytes) -> bytes:
    return data[: len(data) // 2] + bytes(len(data) - len(data) // 2)


def first_half_zeroed(data: bytes) -> bytes:
    return bytes(len(data) // 2) + data[len(data) // 2 :]


def zeros(data: bytes) -> bytes:
    return bytes(len(data))


def random_bytes(data: bytes) -> bytes:
    return random.Random(0).randbytes(len(data))


def random_bytes_after_the_header(data: bytes) -> bytes:
    return data[:64] + random.Random(0).randbytes(len(data) - 64)


def short(data: bytes) -> bytes:
    return data[:11]


def empty(data: bytes) -> bytes:
    return b""


DAMAGES = (
    truncated,
    without_its_last_byte,
    half_zeroed,
    first_half_zeroed,
    zeros,
    random_bytes,
    short,
    empty,
)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("form", FORMATS)
def test_a_damaged_file_that_was_sealed_is_an_error(
    form: str, damage: Callable[[bytes], bytes], payloads: dict[str, bytes], tmp_path: Path
) -> None:
    path = tmp_path / f"model.{form}"
    path.write_bytes(damage(seal(form, payloads[form])))
    with pytest.raises(ArtifactError, match=r"damaged or of another kind: .*; export the model"):
        check(path)


# A half-zeroed .pte of someone else is not in this table: it may load, run, and be wrong, which
# only a checksum can tell.
@pytest.mark.parametrize(
    ("form", "damage"),
    [
        *(("pte", damage) for damage in DAMAGES if damage is not half_zeroed),
        *(("pt", damage) for damage in DAMAGES),
        ("pt", random_bytes_after_the_header),
        ("ptl", truncated),
        ("ptl", zeros),
    ],
)
def test_a_damaged_file_of_someone_else_is_an_error(
    form: str, damage: Callable[[bytes], bytes], payloads: dict[str, bytes], tmp_path: Path
) -> None:
    path = tmp_path / f"model.{form}"
    path.write_bytes(damage(payloads[form]))
    with pytest.raises(ArtifactError, match="damaged"):
        check(path)


def test_a_file_that_kills_the_runtime_is_an_error_and_this_process_lives(
    payloads: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # ExecuTorch 1.4 aborts on a wrong identifier. The header check, which would catch this one, is
    # off, so that the runtime gets to see it.
    monkeypatch.setattr("torchfuse.targets.executorch.check_header", lambda *_: None)
    path = tmp_path / "model.pte"
    path.write_bytes(payloads["pte"][:4] + b"\xff\xfe\xfd\xfc" + payloads["pte"][8:])
    with pytest.raises(ArtifactError, match=r"the runtime dies loading it \(signal 6\)"):
        check(path)


def test_a_state_dict_is_not_a_model(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save(ConvNet().state_dict(), path)
    with pytest.raises(ArtifactError, match=r"state dict, .* holds weights and no model: load"):
        check(path)


def test_a_file_with_another_formats_suffix_is_an_error(
    payloads: dict[str, bytes], tmp_path: Path
) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(seal_zip(payloads["ptl"], {**METADATA, "format": "ptl"}))
    with pytest.raises(ArtifactError, match=r"it was written as a '\.ptl' one"):
        check(path)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="does not exist"):
        check(tmp_path / "model.pte")


def test_a_folder_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "model.pte").mkdir()
    with pytest.raises(ArtifactError, match="cannot be read: Is a directory"):
        check(tmp_path / "model.pte")


@pytest.mark.parametrize(
    ("name", "got"),
    [("model.tflite", "suffix '.tflite'"), ("model", "no suffix"), (".pte", "no suff")],
)
def test_an_unknown_suffix_is_an_error_that_lists_the_known(name: str, got: str) -> None:
    with pytest.raises(
        ArtifactError, match=rf"'\.pte', .*'\.pt', '\.ptl', got '{name}' with {got}"
    ):
        target_for(name)


def test_writing_replaces_a_file_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "model.pte"
    path.write_bytes(b"old")
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_written_file_has_the_users_permissions(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "model.pte", b"data")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "model.pte").stat().st_mode) == 0o640


def test_a_symbolic_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "latest.pte").symlink_to("model.pte")
    write_atomically(tmp_path / "latest.pte", b"data")
    assert (tmp_path / "latest.pte").is_symlink()
    assert (tmp_path / "model.pte").read_bytes() == b"data"


def write_beyond_the_file_size_limit(path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        write_atomically(path, bytes(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_fails_half_way_keeps_the_old_file_and_leaves_no_other(tmp_path: Path) -> None:
    path = tmp_path / "model.pte"
    path.write_bytes(b"old")
    with pytest.raises(ArtifactError, match="larger than allowed here; raise the limit"):
        write_beyond_the_file_size_limit(path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_an_error_that_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(ArtifactError, match=r"no room for its 4 bytes; free .*nothing was changed"):
        write_atomically(tmp_path / "model.pte", b"data")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"the folder '.*/none' does not exist; create it"):
        write_atomically(tmp_path / "none" / "model.pte", b"data")


def test_a_folder_in_place_of_the_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="it is a folder; add a file name"):
        write_atomically(tmp_path, b"data")


@pytest.fixture
def as_nobody() -> Callable[[Callable[[], None]], None]:
    """Run something without the superuser's rights, which no permission stops."""

    def run(action: Callable[[], None]) -> None:
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        try:
            action()
        finally:
            if user == 0:
                os.seteuid(0)

    return run


def test_no_permission_to_write_in_the_folder_is_an_error(
    tmp_path: Path, as_nobody: Callable[[Callable[[], None]], None]
) -> None:
    for folder in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        folder.chmod(0o755)
    tmp_path.chmod(0o555)
    with pytest.raises(ArtifactError, match="no permission to write in"):
        as_nobody(lambda: write_atomically(tmp_path / "model.pte", b"data"))
    tmp_path.chmod(0o755)
    assert list(tmp_path.iterdir()) == []


def test_a_read_only_file_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.pte"
    path.write_bytes(b"old")
    path.chmod(0o444)
    if os.geteuid() == 0:  # the superuser may write read-only files, and says so
        monkeypatch.setattr("torchfuse.artifacts._is_writable", lambda _: False)
    with pytest.raises(ArtifactError, match="the file is read-only; choose another name"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"


def test_a_file_that_is_replaced_keeps_its_permissions(tmp_path: Path) -> None:
    path = tmp_path / "secret.pt"
    path.write_bytes(b"before")
    path.chmod(0o600)
    write_atomically(path, b"after")
    assert path.read_bytes() == b"after"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_pipe_or_a_device_is_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.json"
    os.mkfifo(pipe)
    with pytest.raises(ArtifactError, match="it is a device or a pipe; give the name of a file"):
        write_atomically(pipe, b"")
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert [path.name for path in tmp_path.iterdir()] == ["pipe.json"]


@pytest.mark.parametrize(
    ("name", "reason"), [("x" * 300 + ".pt", "File name too long"), ("a\0.pt", "null")]
)
def test_a_name_that_no_file_can_have_is_an_error(name: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=f"Cannot write .*{reason}.*; choose another name"):
        write_atomically(tmp_path / name, b"")
    with pytest.raises(ArtifactError, match=f"cannot be read: .*{reason}"):
        check(tmp_path / name)


@pytest.mark.parametrize("form", ["pt", "ptl"])
def test_a_seal_cut_off_anywhere_is_found_without_a_child(
    form: str, payloads: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "torchfuse.targets.opening._first_load", lambda *_: pytest.fail("not found")
    )
    path = tmp_path / f"model.{form}"
    sealed = seal_zip(payloads[form], METADATA)
    for length in range(len(payloads[form]), len(sealed)):
        path.write_bytes(sealed[:length])
        with pytest.raises(ArtifactError, match="the seal after the archive is cut off"):
            check(path)


@pytest.mark.parametrize("form", FORMATS)
def test_no_code_beside_a_foreign_file_is_run(
    form: str, payloads: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("json", "torch", "torchfuse", "contextlib", "sitecustomize"):
        (tmp_path / f"{name}.py").write_text("open('ran', 'w')")
    path = tmp_path / f"model.{form}"
    path.write_bytes(payloads[form])
    monkeypatch.chdir(tmp_path)
    check(path.name)
    assert not (tmp_path / "ran").exists()
