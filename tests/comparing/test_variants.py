"""`compare` of one's own model: mistakes are known first, and figures say what they are on."""

import pytest
import torch
from torch import nn

import torchfuse
from torchfuse.cases import Case
from torchfuse.comparing import variants as comparing
from torchfuse.comparing.comparison import FOLDED, Comparison
from torchfuse.comparing.variants import _holds
from torchfuse.errors import ArtifactError, CalibrationError, InputError


class Never(nn.Module):
    """Whatever calls it has begun the work."""

    def forward(self, x):
        raise AssertionError("it was run")


X = torch.rand(1, 3, 8, 8)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"folder": "file/x"}, ArtifactError, "is no folder; choose another name"),
        ({"runs": 0}, InputError, "runs must be 1 or more, got 0"),
        ({"calibration": []}, CalibrationError, "The calibration data is empty"),
        ({"calibration": "nowhere.npy"}, CalibrationError, "'nowhere.npy'"),
        ({"evaluate": lambda _: 77.5}, InputError, "from 0 to 1, got 77.5; divide percentages by"),
        ({"evaluate": lambda _: "good"}, InputError, "a number from 0 to 1, got str"),
        ({"evaluate": lambda run: run(X)}, InputError, "ended in AssertionError: it was run"),
    ],
)
def test_what_is_wrong_is_known_before_anything_is_made(
    options, error, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(error, match=message):
        torchfuse.compare(Never().eval(), X, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_model_in_training_mode_is_an_error_at_once():
    with pytest.raises(InputError, match=r"call model\.eval\(\) first"):
        torchfuse.compare(Never(), X)


def test_a_sample_is_found_among_those_given():
    batch = torch.arange(12.0).reshape(3, 4)
    assert _holds(Case((batch,)), Case((batch[2:],)))
    assert not _holds(Case((batch,)), Case((batch[2:] + 1,)))
    assert not _holds(Case((batch,)), Case((torch.zeros(1, 5),)))
    mask = torch.tensor([[1], [0], [1]])
    assert _holds(Case((batch, mask)), Case((batch[1:2], mask[1:2])))
    assert not _holds(Case((batch, mask)), Case((batch[1:2], mask[:1])))


@pytest.fixture(scope="module")
def comparison():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)
    ).eval()
    data = [torch.rand(1, 3, 8, 8) for _ in range(4)]
    return torchfuse.compare(model, data[0], calibration=data, evaluate=lambda _: 0.5, runs=2)


def test_what_all_files_were_compared_on_is_one_note_with_the_name_of_the_data(comparison):
    told = [note for note in comparison.notes if note.startswith("files were compared")]
    assert told == [
        "files were compared with the model on the example and 4 inputs of 4 given cases"
    ]


def test_a_figure_on_the_calibration_data_is_called_so(comparison):
    assert comparison.notes[0] == (
        "int8 is calibrated on 4 given cases, 4 samples, and its difference is on a calibration "
        "sample itself"
    )
    assert f"Note: {comparison.notes[0]}" in str(comparison).splitlines()


def test_layers_are_looked_into_in_what_the_file_was_made_of(monkeypatch):
    def never(*_, **__):
        raise AssertionError("it was quantized again")

    monkeypatch.setattr(comparing, "quantize", never)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
    data = [torch.rand(1, 3, 8, 8) for _ in range(4)]
    found = torchfuse.compare(
        model, X, variants=["int8"], targets=["pte"], calibration=data, runs=2
    )
    assert {layer.module for layer in found.layers} == {"0", "3"}
    assert set(found.in_int8) == {"0", "3"}


def test_int8_is_judged_as_its_file_was(comparison):
    int8 = comparison.find(FOLDED, ".pte", "int8").difference
    assert int8.passed
    assert int8.verdict.startswith("within the bound: SQNR ")
    assert comparison.find("fused", ".pt", "fp32").difference.verdict == "equivalent"


def test_what_compare_returns_comes_back_from_json(comparison):
    assert Comparison.from_json(comparison.to_json()) == comparison


def test_int8_is_left_out_where_nothing_can_be_quantized():
    model = nn.LayerNorm(8).eval()
    calibration = torch.rand(2, 3, 8, 8)
    found = torchfuse.compare(model, X, calibration=calibration, runs=2)
    assert found.find(FOLDED, ".pte", "int8") is None
    assert any("int8 .pte" in n and "Nothing in this model was quantized" in n for n in found.notes)


@pytest.fixture(scope="module")
def eager():
    """Eager mode only, with data and no int8."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    steps = []
    found = torchfuse.compare(
        model, X, targets=["eager"], data=[torch.rand(1, 3, 8, 8) for _ in range(8)], runs=2,
        name="mine", progress=steps.append,
    )  # fmt: skip
    return found, steps


def test_operators_are_profiled_before_and_after_fusing(eager):
    comparison, _ = eager
    before, after = comparison.profiles
    assert (before.name, after.name) == ("eager fp32, not fused", "eager fp32, fused")
    assert "aten::native_batch_norm" in {row.operator for row in before.operators}
    assert "aten::native_batch_norm" not in {row.operator for row in after.operators}
    assert Comparison.from_json(comparison.to_json()) == comparison


def test_calibration_is_said_of_int8_only(eager):
    comparison, _ = eager
    assert not any("calibrated on" in note for note in comparison.notes)


def test_a_comparison_has_the_name_that_was_asked_for(eager):
    comparison, _ = eager
    assert comparison.model == "mine"


def test_the_samples_of_a_row_are_one_step(eager):
    _, steps = eager
    assert steps.count("getting ready to time on local") == 1
    assert steps.count("comparing fused, eager, fp32") == 1
    assert "comparing fused, eager, fp32, 2 of 2" in steps


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_a_model_with_a_scripted_part_is_compared():
    scripted = torch.jit.script(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()))
    model = nn.Sequential(scripted, nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    found = torchfuse.compare(model, X, targets=["eager", "pte"], runs=2)
    assert found.find("fused", "eager", "fp32").difference.passed
    assert any(operation.time_s is not None for operation in found.before)
