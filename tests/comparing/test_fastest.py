"""The fastest file: of all targets here, at equal precision, and no worse than was allowed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torchfuse
from torchfuse.comparing import fastest as choosing
from torchfuse.errors import InputError, UnsupportedError
from torchfuse.targets import target_of

X = torch.linspace(-1, 1, 3 * 8 * 8).reshape(1, 3, 8, 8)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    ).eval()


def only(monkeypatch: pytest.MonkeyPatch, *forms: str) -> None:
    monkeypatch.setattr(choosing, "TARGETS", tuple(target_of(form) for form in forms))


def test_the_fastest_file_is_written_and_the_others_are_not(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(monkeypatch, "pte", "xml", "pt")
    found = torchfuse.export_fastest(model, X, tmp_path / "net", runs=3)
    medians = [c.latency.median_s for c in found.candidates if c.latency is not None]
    assert medians == sorted(medians)
    assert len(medians) == 3
    written = {found.artifact.path, *found.artifact.beside}
    assert set(tmp_path.iterdir()) == written
    assert found.artifact.path.name == f"net{found.candidates[0].suffix}"
    torch.testing.assert_close(torchfuse.load(found.artifact.path)(X), model(X))
    assert "is the fastest here in fp32" in str(found).splitlines()[-1]


def test_what_cannot_have_the_model_is_listed_with_the_reason(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(monkeypatch, "pte", "pt")
    data = [torch.randn(1, 3, 8, 8) for _ in range(4)]
    found = torchfuse.export_fastest(
        model, X, tmp_path / "net", precision="int8", calibration=data, runs=3, max_drop=100
    )
    assert [c.suffix for c in found.candidates] == [".pte", ".pt"]
    assert "needs a QuantStub" in str(found.candidates[1].reason)
    assert found.candidates[0].drop_points is not None


def test_a_file_that_loses_more_than_was_allowed_is_not_chosen(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(monkeypatch, "pte")

    def reversed_classes(path: Any) -> Any:
        return lambda x: model(x).flip(1)

    monkeypatch.setattr(choosing, "load", reversed_classes)
    with pytest.raises(UnsupportedError, match=r"at most 1.0 points .*: \.pte loses 100; allow"):
        torchfuse.export_fastest(
            model, X, tmp_path / "net", calibration=[X], max_drop=1.0, runs=3, precision="int8"
        )
    assert not list(tmp_path.iterdir())


def test_max_drop_needs_data_and_scores(model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="needs data: give calibration"):
        torchfuse.export_fastest(model, X, tmp_path / "net", max_drop=1)
    with pytest.raises(InputError, match="returns no scores"):
        torchfuse.export_fastest(
            model[:2], X, tmp_path / "net", max_drop=1, calibration=[X], precision="int8"
        )
