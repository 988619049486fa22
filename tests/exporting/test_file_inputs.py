"""What a model file keeps of the inputs that it was made for, and what is made of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torchfuse
from torchfuse.cases import Case
from torchfuse.errors import InputError
from torchfuse.exporting.file_inputs import described, inputs_of, ones_like
from torchfuse.exporting.model_files import loaded
from torchfuse.targets.executorch.program import ExecutorchModel
from torchfuse.targets.opening import check

NESTED = Case(
    (torch.rand(1, 2), [torch.zeros(3, dtype=torch.int64), (True, None)]),
    {"pair": {"a": torch.zeros((), dtype=torch.bfloat16)}, "scale": 0.5, "mode": "fast"},
)


def test_shapes_types_and_nesting_come_back_with_ones() -> None:
    kept = described(NESTED)
    assert kept is not None
    made = ones_like(kept)
    assert described(made) == kept
    x, (tokens, rest) = made.args
    assert torch.equal(x, torch.ones(1, 2))
    assert torch.equal(tokens, torch.ones(3, dtype=torch.int64))
    assert rest == (True, None)
    assert made.kwargs["pair"]["a"].dtype is torch.bfloat16
    assert (made.kwargs["scale"], made.kwargs["mode"]) == (0.5, "fast")


@pytest.mark.parametrize(
    "arg",
    [torch.eye(2).to_sparse(), torch.ones(1, dtype=torch.complex64), object(), {1: 2}, "x" * 20000],
    ids=["sparse", "complex", "an object", "a number as key", "a long text"],
)
def test_what_cannot_be_kept_is_left_out(arg: Any) -> None:
    assert described(Case((arg,))) is None


@pytest.mark.parametrize("suffix", ["pt", "ptl", "pte"])
def test_export_keeps_the_inputs_in_every_format(tmp_path: Path, suffix: str) -> None:
    x = torch.rand(2, 3)
    path = torchfuse.export(nn.Linear(3, 2).eval(), x, tmp_path / f"m.{suffix}").path
    file = check(path)
    assert file.metadata is not None
    assert file.metadata["inputs"] == {"args": [{"ones": [2, 3], "dtype": "float32"}], "kwargs": {}}
    assert torch.equal(inputs_of(file, loaded(file)).args[0], torch.ones(2, 3))


def test_a_dynamic_size_is_the_examples(tmp_path: Path) -> None:
    sizes = ({0: torch.export.Dim("n", max=8)},)
    path = torchfuse.export(
        nn.Linear(3, 2).eval(), torch.rand(2, 3), tmp_path / "m.pte", dynamic_shapes=sizes
    ).path
    file = check(path)
    model = loaded(file)
    assert inputs_of(file, model).args[0].shape == (2, 3)
    assert isinstance(model, ExecutorchModel)
    case = model.largest_ones()
    assert case is not None
    assert case.args[0].shape == (8, 3)


@pytest.mark.filterwarnings("ignore::torchfuse.DelegationWarning")
def test_a_program_without_the_entry_takes_what_memory_is_planned_for(tmp_path: Path) -> None:
    class Add(nn.Module):
        def forward(self, x: torch.Tensor, *, mask: torch.Tensor) -> torch.Tensor:
            return x + mask

    given = Case((torch.rand(2),), {"mask": torch.ones(2, dtype=torch.int64)})
    file = check(torchfuse.export(Add().eval(), given, tmp_path / "m.pte").path)
    model = loaded(file)
    assert isinstance(model, ExecutorchModel)
    case = model.largest_ones()
    assert case is not None
    assert torch.equal(model(*case.args, **case.kwargs), torch.full((2,), 2.0))


@pytest.mark.filterwarnings("ignore::torchfuse.DelegationWarning")
def test_a_file_that_does_not_say_is_an_error(tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def forward(self, x: torch.Tensor, scale: float) -> torch.Tensor:
            return x * 2

    path = torchfuse.export(Scaled().eval(), (torch.rand(2), 2.0), tmp_path / "m.pte").path
    model = loaded(check(path))
    assert isinstance(model, ExecutorchModel)
    assert model.largest_ones() is None  # a number
    foreign = check(path).__class__(path, "pte", b"", None)
    with pytest.raises(InputError, match=r"m\.pte' does not say what inputs .* --input 1x3x224"):
        inputs_of(foreign, model)
