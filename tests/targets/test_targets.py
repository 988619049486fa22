"""The table of targets: a new one is one class, and every command then knows its files."""

import ast
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torchfuse
from torchfuse import targets
from torchfuse.errors import ArtifactError, InputError, UnsupportedError
from torchfuse.lowering.capture import signature_of
from torchfuse.quantizing import static
from torchfuse.targets.calling import Model, inputs_of_signature
from torchfuse.targets.captured import captured, nested_as
from torchfuse.targets.sealing import damaged, digests, seal_pte, unseal_binary
from torchfuse.targets.target import CheckedFile, Files, Made, Request, Target

SOURCES = Path(torchfuse.__file__).parent


class Toy(Target):
    """Linear layers as JSON, their weights beside it."""

    name = "Toy"
    suffix = ".toy"
    beside = (".weights",)
    extra = "toys"
    modules = ("json",)
    distribution = "torchfuse"
    precisions = ("fp32",)
    folds = ()
    always_fused = "Toys have no batch norms."

    def make(self, request: Request) -> Made:
        found = captured(request, suffix=self.suffix, lacking="toys have no kernels")
        if not isinstance(request.model, nn.Linear):
            raise UnsupportedError(f"Toys are Linear, got {type(request.model).__name__}.")
        layer = request.model
        sizes = json.dumps(list(layer.weight.shape)).encode()
        weights = torch.cat([layer.weight.detach().flatten(), layer.bias.detach()])
        files = {".toy": sizes, ".weights": weights.numpy().tobytes()}
        signature = signature_of(found.program)
        loaded = ToyModel(files, signature)
        return Made(
            files=files,
            precision="fp32",
            metadata={"signature": signature},
            run=nested_as(loaded, found.program.call_spec.out_spec),
            reference=found.reference,
        )

    def seal(self, files: Files, metadata: Mapping[str, Any]) -> Files:
        others = {suffix: files[suffix] for suffix in self.beside}
        return {**files, ".toy": seal_pte(files[".toy"], {**metadata, "beside": digests(others)})}

    def unseal(self, path: Path, files: Files) -> Mapping[str, Any] | None:
        metadata = unseal_binary(path, files[self.suffix])
        if metadata is not None and metadata["beside"] != digests({".weights": files[".weights"]}):
            raise damaged(path, "its weights are not those it was written with")
        return metadata

    def check(self, path: Path, files: Files) -> None:
        raise damaged(path, "toys are sealed")

    def first_load(self, path: Path) -> None:
        raise NotImplementedError

    def load(self, file: CheckedFile, *, threads: int | None = None) -> "ToyModel":
        assert file.metadata is not None
        payload = file.data[: file.data.index(b"]") + 1]
        return ToyModel({".toy": payload, **file.beside}, file.metadata["signature"], threads or 1)


class ToyModel(Model):
    def __init__(self, files: Files, signature: Mapping[str, Any], threads: int = 1) -> None:
        rows, columns = json.loads(files[".toy"])
        flat = torch.frombuffer(bytearray(files[".weights"]), dtype=torch.float32)
        self._weight = flat[: rows * columns].view(rows, columns)
        self._bias = flat[rows * columns :]
        self._threads = threads
        super().__init__(inputs_of_signature(signature), signature)

    @property
    def threads(self) -> int:
        return self._threads

    def set_threads(self, count: int) -> None:
        self._threads = count

    def _execute(self, inputs: list[Any]) -> list[Any]:
        return [torch.nn.functional.linear(inputs[0], self._weight, self._bias)]


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Toy:
    target = Toy()
    monkeypatch.setattr(targets, "TARGETS", (*targets.TARGETS, target))
    return target


LAYER = nn.Linear(3, 2).eval()
X = torch.ones(4, 3)


def test_a_target_of_ones_own_is_exported_to_loaded_and_measured(toy: Toy, tmp_path: Path) -> None:
    artifact = torchfuse.export(LAYER, X, tmp_path / "net.toy")
    assert artifact.beside == (tmp_path / "net.weights",)
    assert artifact.size_bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    run = torchfuse.load(artifact.path, threads=3)
    assert torch.equal(run(X), LAYER(X))
    assert run.threads == 3
    with pytest.raises(InputError, match="takes 4×3 float32; got 4×5 float32"):
        run(torch.ones(4, 5))
    assert torchfuse.measure(run, X, runs=3, warmup=1).runs == 3


@pytest.mark.parametrize("suffix", [".toy", ".weights"])
@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: b"\0" + data[1:]])
def test_damage_in_any_of_several_files_is_found(
    toy: Toy, suffix: str, damage: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    path = torchfuse.export(LAYER, X, tmp_path / "net.toy").path
    damaged_one = path.with_suffix(suffix)
    damaged_one.write_bytes(damage(damaged_one.read_bytes()))
    with pytest.raises(ArtifactError, match="damaged or of another kind"):
        torchfuse.load(path)


def test_a_file_that_is_missing_beside_the_first_is_named(toy: Toy, tmp_path: Path) -> None:
    path = torchfuse.export(LAYER, X, tmp_path / "net.toy").path
    path.with_suffix(".weights").unlink()
    with pytest.raises(ArtifactError, match=r"'net.weights' beside '.*net.toy', which is of two"):
        torchfuse.load(path)


def test_of_several_files_none_is_written_if_one_cannot_be(toy: Toy, tmp_path: Path) -> None:
    (tmp_path / "net.weights").mkdir()
    with pytest.raises(ArtifactError, match=r"net\.weights': it is a folder"):
        torchfuse.export(LAYER, X, tmp_path / "net.toy")
    assert [path.name for path in tmp_path.iterdir()] == ["net.weights"]


def test_a_target_that_is_not_installed_says_the_line_that_installs_it(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toy, "modules", ("no_such_toys",))
    message = r"'\.toy' needs no_such_toys, not installed here: pip install 'torchfuse\[toys\]'\."
    with pytest.raises(UnsupportedError, match=message):
        torchfuse.export(LAYER, X, tmp_path / "net.toy")


def test_quantizing_without_its_extra_says_the_line_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(static, "_MODULES", ("executorch", "no_such_package"))
    message = r"needs no_such_package, not installed here: pip install 'torchfuse\[executorch\]'\."
    with pytest.raises(UnsupportedError, match=message):
        torchfuse.quantize(LAYER, X, [X])


def test_no_two_targets_have_one_suffix_and_each_says_what_it_is() -> None:
    suffixes = [suffix for target in targets.TARGETS for suffix in (target.suffix, *target.beside)]
    assert len(set(suffixes)) == len(suffixes)
    for target in targets.TARGETS:
        assert target.precisions
        assert targets.target_for(f"folder.of/model{target.suffix}") is target


def test_every_target_has_a_test_file() -> None:
    kinds = {type(target).__module__.rpartition(".")[2] for target in targets.TARGETS}
    have = {path.stem.removeprefix("test_") for path in Path(__file__).parent.glob("test_*.py")}
    assert not kinds - have


# What is pushed to devices cannot import the targets; one picture pairs files by their runtime.
KNOWS_FORMATS = {"render/comparison_text.py"}


def test_nothing_outside_the_targets_compares_with_a_suffix() -> None:
    known = {name for t in targets.TARGETS for name in (t.suffix, t.form)} - {".pt"}
    found = []
    for path in SOURCES.rglob("*.py"):
        name = path.relative_to(SOURCES).as_posix()
        if name.startswith(("targets/", "runner/")) or name in KNOWS_FORMATS:
            continue
        nodes = ast.walk(ast.parse(path.read_text()))
        constants = [node for node in nodes if isinstance(node, ast.Constant)]
        found += [f"{name}:{node.lineno}" for node in constants if node.value in known]
    assert not found
