"""What the variants of a model answer on validation data, beside the model itself."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

import torchfuse
from torchfuse.cases import Case
from torchfuse.comparing import jobs
from torchfuse.comparing.comparison import FOLDED, NOT_FUSED, ChangedAnswer
from torchfuse.comparing.jobs import (
    Build,
    ComparedModel,
    Evaluate,
    MeasureTimes,
    Place,
    build,
    evaluate,
)
from torchfuse.comparing.samples import read_samples
from torchfuse.devices.facts import DeviceFacts
from torchfuse.devices.run import DeviceRun
from torchfuse.errors import InputError, TorchfuseError
from torchfuse.measuring.timing import Measurement
from torchfuse.quantizing.preprocessing import Preprocessing

X = torch.eye(4)


class Scores(nn.Module):
    """The class of a sample is where its largest number is, but for those that are swapped."""

    def __init__(self, swapped: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(4)[[1, 0, 2, 3]] if swapped else torch.eye(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


def subject(labels: list[int] | None = None, **changes: object) -> ComparedModel:
    loader = X if labels is None else list(zip(X.split(1), labels, strict=True))
    example = Case((X[:1],))
    given = {
        "model": Scores().eval(),
        "variants": {"fused": Scores(swapped=True).eval()},
        "examples": [example],
        "calibration": None,
        "validation": read_samples(loader, example),
        "evaluate": None,
        "preprocessing": None,
        **changes,
    }
    return ComparedModel(**given)


OTHER = Evaluate(Place("fused", "eager", "fp32", None), None)


def test_samples_whose_answer_changed_are_named() -> None:
    answers = evaluate(OTHER, subject()).answers
    assert answers.changed == (
        ChangedAnswer("sample 0", 0, 1, None),
        ChangedAnswer("sample 1", 1, 0, None),
    )
    assert (answers.agreement.value, answers.agreement.samples) == (0.5, 4)
    assert answers.agreement.low < 0.5 < answers.agreement.high
    assert answers.accuracy is None


def test_accuracy_is_top_1_with_its_interval_where_there_are_labels() -> None:
    found = evaluate(OTHER, subject([1, 0, 2, 0]))
    assert found.accuracy.value == 0.75
    assert 0.3 < found.accuracy.low < 0.75 < found.accuracy.high < 0.96
    assert found.answers.changed[0].label == 1


def test_what_the_user_evaluates_goes_before_the_labels() -> None:
    found = evaluate(OTHER, subject([0, 1, 2, 3], evaluate=lambda _: 0.125))
    assert (found.accuracy.value, found.accuracy.low) == (0.125, None)


@pytest.mark.parametrize("label", [-1, 4])
def test_labels_beyond_the_models_classes_are_known_before_anything_is_made(label: int) -> None:
    steps = []
    data = list(zip(X.split(1), [0, 1, 2, label], strict=True))
    with pytest.raises(InputError, match="Expected labels of 0 to 3, since the model tells 4"):
        torchfuse.compare(Scores().eval(), X[:1], validation=data, progress=steps.append)
    assert steps == []


def test_folders_that_are_no_classes_of_the_model_are_data_without_labels_and_a_note(
    tmp_path: Path,
) -> None:
    for name in ("cats", "dogs"):
        (tmp_path / name).mkdir()
        for number in range(4):
            Image.new("RGB", (4, 4), (60 * number, 90, 20)).save(tmp_path / name / f"{number}.png")
    model = nn.Sequential(nn.Conv2d(3, 5, 4), nn.Flatten()).eval()
    found = torchfuse.compare(
        model, torch.rand(1, 3, 4, 4), targets=["eager"], validation=tmp_path, runs=2,
        preprocessing=Preprocessing((4, 4)),
    )  # fmt: skip
    assert "accuracy is not measured: Expected labels of the 5 classes" in found.notes[0]
    assert (found.accuracy_of, found.rows[0].accuracy) == (None, None)
    assert found.rows[1].answers.agreement.value == 1


def test_classes_by_name_must_be_as_many_as_the_models(tmp_path) -> None:
    samples = replace(subject([0, 1, 1, 0]).validation, classes=2)
    with pytest.raises(
        InputError, match="of the 4 classes that the model tells apart, got the names of 2"
    ):
        jobs.check_labels(Scores().eval(), samples, Case((X[:1],)))


def test_outputs_that_are_no_scores_are_compared_by_their_noise() -> None:
    class Picture(Scores):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x)[:, None]

    found = evaluate(
        OTHER, subject(model=Picture().eval(), variants={"fused": Picture(swapped=True).eval()})
    )
    assert found.answers.agreement is None
    assert found.answers.sqnr_db == pytest.approx(0.0)


def test_what_a_target_cannot_do_is_left_out_with_its_reason(tmp_path) -> None:
    class Calls(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    job = Build(Place(FOLDED, ".pte", "fp32", tmp_path / "a.pte"), optimize=True)
    built = build(job, subject(model=Calls().eval(), variants={}))
    assert built.artifact is None
    assert "torch.export" in built.left_out


def test_files_are_timed_on_another_device_and_modules_are_not(tmp_path, monkeypatch) -> None:
    on = subject()
    place = Place(FOLDED, ".pte", "fp32", tmp_path / "a.pte")
    assert build(Build(place, optimize=True), on).left_out is None

    def bench(tasks, devices, settings, **_):
        times = tuple(Measurement(name, (0.1, 0.2), 1, True, 1) for name in tasks)
        return [DeviceRun(DeviceFacts(devices[0], "ready"), "r", times)]

    monkeypatch.setattr(jobs, "bench_devices", bench)
    measured = jobs.measure(MeasureTimes("ssh:pi", (place,), 2, 1), on)
    assert measured.device.name == "ssh:pi"
    assert [latency.name for latency in measured.latencies] == [str(place)]


def test_int8_is_calibrated_on_what_answers_are_not_compared_on() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
    data = [(torch.rand(1, 3, 8, 8), i % 3) for i in range(12)]
    before = copy.deepcopy(model.state_dict())
    steps = []
    found = torchfuse.compare(
        model,
        data[0][0],
        data=data,
        variants=["int8"],
        targets=["pte"],
        runs=2,
        explain=True,
        progress=steps.append,
    )
    assert [(row.variant, row.target, row.precision) for row in found.rows] == [
        (NOT_FUSED, "eager", "fp32"),
        (FOLDED, ".pte", "int8"),
    ]
    assert found.validation == "3 of the 12 samples of 12 given cases, held out"
    assert found.notes[0].startswith("int8 is calibrated on 12 given cases, 9 samples")
    assert found.accuracy_of == "top-1"
    assert all(row.answers.samples == 3 for row in found.rows)
    assert {layer.module for layer in found.layers} == {"0", "3"}
    assert set(found.in_int8) == {"0", "3"}
    assert [op.kind for op in found.before] == ["conv", "relu", "flatten", "linear"]
    assert found.before[1].inputs == (0,)
    assert found.before[0].time_s > 0
    assert found.devices[0].name == "local"
    assert "Answers are compared on 3 of the 12 samples of 12 given cases, held out" in str(found)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert "measuring the noise of each layer" in steps


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variants": ["int9"]}, "Expected variants among not fused, fused, fp16, int8, got"),
        ({"targets": ["onnyx"]}, "Expected targets among eager, .*, got 'onnyx'"),
        ({"devices": ["phone"]}, "Expected a device named local, adb, adb:SERIAL or ssh:HOST"),
        ({"devices": []}, "Expected a device to measure on, got none"),
        ({"variants": "int8"}, "Expected a list of variants, got the text 'int8'"),
        ({"data": X, "calibration": X}, "Expected data or calibration, got both"),
        ({"validation": X[:3]}, "Expected at least 4 validation samples, as many as the example"),
    ],
)
def test_a_choice_that_there_is_not_is_known_before_the_model_runs(
    options: dict[str, object], message: str
) -> None:
    class Never(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise AssertionError("it was run")

    with pytest.raises(TorchfuseError, match=message):
        torchfuse.compare(Never().eval(), X, **options)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.conv(x))


def test_another_method_than_forward_can_be_compared() -> None:
    case = Case((torch.rand(1, 3, 8, 8),), method="encode")
    model = Encoder().eval()
    found = torchfuse.compare(model, case, targets=["pt"], variants=["fused"], runs=2)
    assert found.model == "Encoder.encode"
    assert len(found.plan.fusions) == 1
    assert [row.target for row in found.rows] == ["eager", "eager", ".pt"]
    assert all(row.difference.passed for row in found.rows)
    with pytest.raises(InputError, match="Expected examples of one method, got encode and forward"):
        torchfuse.compare(model, [case, Case(case.args)])
