"""Programs for ExecuTorch: lowered, run by its runtime, and equal to the model."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import torchfuse
from torchfuse.cases import Case
from torchfuse.errors import ArtifactError, InputError, UnsupportedError
from torchfuse.isolation.warning_filters import known_warnings_ignored
from torchfuse.lowering.capture import capture
from torchfuse.targets.executorch import program
from torchfuse.targets.executorch.program import ExecutorchModel
from torchfuse.targets.executorch.xnnpack import lower


def image(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def settled(norm: nn.Module) -> nn.Module:
    with torch.no_grad():
        norm.running_mean.copy_(image(norm.num_features, seed=1))
        norm.running_var.copy_(image(norm.num_features, seed=2).abs() + 0.5)
        norm.weight.copy_(image(norm.num_features, seed=3))
        norm.bias.copy_(image(norm.num_features, seed=4))
    return norm


def made(model: nn.Module, case: Case, dynamic_shapes: Any = None) -> ExecutorchModel:
    lowered = lower(capture(model.eval(), case, dynamic_shapes))
    return ExecutorchModel(lowered.program, lowered.signature)


class Residual(nn.Module):
    """The conv's output has two users, so its batch norm cannot be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = settled(nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return torch.relu(self.bn(y) + y)


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor, *, scale: Tensor) -> dict[str, Any]:
        y = self.linear(x)
        return {"scaled": y * scale, "all": [y, (y.relu(),)]}


class Largest(nn.Module):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__()
        self.args, self.options = args, options

    def forward(self, x: Tensor) -> Tensor:
        return x.max(*self.args, **self.options).values


class Other(nn.Module):
    """Takes something besides a tensor."""

    def forward(self, x: Tensor, other: Any) -> Tensor:
        return x * 2 if other in (None, 2, "double") else x


RIGHT = {
    # fails in ExecuTorch 1.4.1's ChannelsLastTaggedReshapePass
    "a PReLU after a linear": (nn.Sequential(nn.Linear(4, 3), nn.PReLU(3)), (2, 4)),
    "a PReLU of three dimensions": (nn.Sequential(nn.Conv1d(4, 3, 2), nn.PReLU(3)), (2, 4, 5)),
    # fails in ExecuTorch 1.4.1's FuseBatchNormPass unless the batch norm is gone first
    "a bare Sequential with a batch norm": (
        nn.Sequential(nn.Conv2d(3, 4, 3), settled(nn.BatchNorm2d(4)), nn.ReLU()),
        (1, 3, 8, 8),
    ),
    "a conv output with two users": (Residual(), (1, 3, 8, 8)),
    "grouped transposed conv and a batch norm": (
        nn.Sequential(nn.ConvTranspose2d(4, 6, 2, groups=2), settled(nn.BatchNorm2d(6))),
        (1, 4, 5, 5),
    ),
    # XNNPACK's partitioner reads the stride, which torch leaves out here
    "max-pooling without a stride": (nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)), (1, 3, 8, 8)),
    "max-pooling with padding": (nn.MaxPool2d((2, 3), padding=1), (1, 3, 8, 8)),
    "the largest along a dimension": (Largest(1), (1, 3, 8, 8)),
    "the largest along the last dimension": (Largest(3), (1, 3, 8, 8)),
    "the largest along a dimension that is kept": (Largest(3, keepdim=True), (1, 3, 8, 8)),
    "channels_last weights": (
        nn.Sequential(nn.Conv2d(3, 4, 3)).to(memory_format=torch.channels_last),
        (1, 3, 8, 8),
    ),
}


@pytest.mark.parametrize("name", RIGHT)
def test_computes_what_the_model_computes(name: str) -> None:
    model, shape = RIGHT[name]
    run = made(model, Case((image(*shape),)))
    for seed in (5, 6):
        x = image(*shape, seed=seed)
        torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-5)


def test_the_largest_along_a_dimension_is_delegated_where_xnnpack_can() -> None:
    lowered = lower(capture(Largest(3, keepdim=True).eval(), Case((image(1, 3, 8, 8),))))
    assert lowered.delegation.calls_left == 0


class Split(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, b = x.chunk(2, 1)
        c, d = x.split([1, 3], dim=1)
        *_, e = x.tensor_split(3, -1)
        return a * b, c * d, e + 1.0


def test_the_parts_of_a_split_are_delegated() -> None:
    model, x = Split().eval(), image(2, 4, 3, 7)
    lowered = lower(capture(model, Case((x,))))
    assert lowered.delegation.calls_left == 0
    run = ExecutorchModel(lowered.program, lowered.signature)
    torch.testing.assert_close(run(x), model(x))


def test_a_split_beside_a_dynamic_size_computes_what_the_model_computes() -> None:
    run = made(Split(), Case((image(2, 4, 3, 7),)), ({0: torch.export.Dim("n", max=4)},))
    for count in (1, 4):
        x = image(count, 4, 3, 7)
        torch.testing.assert_close(run(x), Split()(x))


@pytest.mark.parametrize("other", [None, 2, 3.5, True])
def test_arguments_may_be_other_things_than_tensors(
    other: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    x = image(2, 3)
    run = made(Other(), Case((x, other)))
    assert torch.equal(run(x, other), Other()(x, other))
    with pytest.raises(InputError, match=r"takes 2×3 float32, a number; got 2×3 float32, 2×3"):
        run(x, x)
    assert capfd.readouterr() == ("", "")


def test_a_string_among_the_arguments_is_an_error() -> None:
    x = image(2, 3)
    with pytest.raises(UnsupportedError, match="on 2×3 float32, 'double': Unsupported python type"):
        made(Other(), Case((x, "double")))(x, "double")


@pytest.mark.parametrize(
    "x",
    [
        image(5, 8, 8)[:1, None],
        image(5, 8, 8)[:, None],
        image(1, 3, 8, 8)[:, 1:2],
        image(1, 8, 8, 1).permute(0, 3, 1, 2),
        torch.from_numpy(np.asfortranarray(image(2, 1, 8, 8).numpy())),
        torch.empty_strided((1, 1, 8, 8), (1, 1, 8, 1)).copy_(image(1, 1, 8, 8)),
    ],
    ids=["one of five", "five", "one channel", "channels last", "Fortran's order", "ones"],
)
def test_takes_inputs_of_any_strides(x: Tensor) -> None:
    # `contiguous()` leaves the strides of sizes of 1, from which ExecuTorch guesses the layout.
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.MaxPool2d(2), nn.Conv2d(4, 2, 2), nn.Flatten(), nn.Linear(8, 3)
    ).eval()
    torch.testing.assert_close(made(model, Case((x,)))(x), model(x))


def test_a_kernel_that_refuses_after_a_good_call_is_an_error_of_ours() -> None:
    lowered = lower(capture(nn.Linear(4, 3).eval(), Case((image(2, 4),))))
    run = ExecutorchModel(lowered.program)  # without the signature, any smaller size may be right
    run(image(2, 4))
    with pytest.raises(UnsupportedError, match="on 1×4 float32: Attempted to resize a static"):
        run(image(1, 4))


def test_takes_inputs_in_channels_last() -> None:
    model = nn.Conv2d(3, 4, 3).eval()
    x = image(1, 3, 8, 8)
    run = made(model, Case((x,)))
    torch.testing.assert_close(run(x.to(memory_format=torch.channels_last)), model(x))


def test_results_and_keywords_are_nested_as_the_models() -> None:
    model = Nested().eval()
    x, scale = image(2, 4), torch.tensor(3.0)
    run = made(model, Case((x,), {"scale": scale}))
    torch.testing.assert_close(run(x, scale=scale), model(x, scale=scale))


@dataclasses.dataclass
class Boxes:
    where: Tensor
    scores: Tensor | None = None
    labels: Tensor | None = None


class Detector(nn.Module):
    """Returns and takes what only this process knows the types of."""

    def forward(self, x: Boxes) -> dict[str, Any]:
        from transformers.modeling_outputs import ImageClassifierOutput

        assert x.scores is not None
        return {
            "output": ImageClassifierOutput(
                logits=x.where * 2.0, hidden_states=(x.scores, x.where)
            ),
            "boxes": Boxes(x.where + 1.0, labels=x.scores * 3.0),
            "split": Halves(x.where * 4.0, x.where * 5.0),
        }


class Halves(NamedTuple):
    first: Tensor
    second: Tensor


def test_a_file_loads_where_the_types_of_its_results_are_unknown(tmp_path: Path) -> None:
    if Boxes not in pytree.SUPPORTED_NODES:
        torch.export.register_dataclass(Boxes, serialized_type_name="Boxes")
        pytree._register_namedtuple(Halves, serialized_type_name="Halves")
    model, x = Detector().eval(), Boxes(image(2, 3), image(2))
    artifact = torchfuse.export(model, (x,), tmp_path / "model.pte")
    assert artifact.equivalence is not None
    assert [output.name for output in artifact.equivalence.outputs][:2] == [
        "output['output']['logits']",
        "output['output']['hidden_states'][0]",
    ]
    assert torchfuse.load(artifact.path)(x).keys() == {"output", "boxes", "split"}
    script = f"""
import sys, torch, torchfuse
where, scores = torch.ones(2, 3), torch.ones(2)
run = torchfuse.load({str(artifact.path)!r})
found = run({{"where": where, "scores": scores}})
assert torch.equal(found["output"]["logits"], where * 2)
assert torch.equal(found["output"]["hidden_states"][1], where)
assert list(found["boxes"]) == ["where", "labels"], found["boxes"]
assert torch.equal(found["split"][1], where * 5)
assert type(found["output"]) is type(found["boxes"]) is dict
assert type(found["split"]) is tuple
assert "transformers" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_type_of_results_that_is_unknown_in_an_older_file_is_named() -> None:
    lowered = lower(capture(nn.Linear(4, 3).eval(), Case((image(2, 4),))))
    spec = '[1, {"type": "somewhere.Output", "context": "[]", "children_spec": []}]'
    with pytest.raises(ArtifactError, match=r"Deserializing somewhere.Output .* export it again"):
        ExecutorchModel(lowered.program, {**lowered.signature, "out_spec": spec})


def test_without_a_signature_results_come_as_a_tuple() -> None:
    model = Nested().eval()
    x, scale = image(2, 4), torch.tensor(3.0)
    lowered = lower(capture(model, Case((x,), {"scale": scale})))
    run = ExecutorchModel(lowered.program)
    results = run(x, scale)
    assert isinstance(results, tuple)
    torch.testing.assert_close(results[0], model(x, scale=scale)["scaled"])
    with pytest.raises(InputError, match="give all inputs by position"):
        run(x, scale=scale)


@pytest.fixture(scope="module")
def of_any_size() -> ExecutorchModel:
    sizes = {0: torch.export.Dim("n", max=4), 2: torch.export.Dim("h", min=4, max=16)}
    return made(nn.Conv2d(3, 4, 3), Case((image(2, 3, 8, 8),)), (sizes,))


@pytest.mark.parametrize(
    ("inputs", "got"),
    [
        ((image(5, 3, 8, 8),), "got 5×3×8×8 float32"),
        ((image(3, 8, 8),), "got 3×8×8 float32"),
        ((image(2, 3, 8, 8).double(),), "got 2×3×8×8 float64"),
        ((image(2, 3, 8, 6),), "got 2×3×8×6 float32"),
        ((image(2, 3, 3, 8),), "got 2×3×3×8 float32"),
        ((4,), "got 4"),
    ],
)
def test_other_inputs_are_an_error_that_says_what_is_expected(
    of_any_size: ExecutorchModel, inputs: tuple[Any, ...], got: str
) -> None:
    with pytest.raises(InputError, match=rf"takes \(1…4\)×3×\(4…16\)×8 float32; {got}\."):
        of_any_size(*inputs)


def test_another_number_of_inputs_is_an_error(of_any_size: ExecutorchModel) -> None:
    with pytest.raises(InputError, match=r"takes 1 inputs by position .* got 2 and \[\]"):
        of_any_size(image(2, 3, 8, 8), image(1))


def test_without_a_signature_sizes_are_checked_against_the_programs_largest() -> None:
    sizes = ({0: torch.export.Dim("n", max=4)},)
    lowered = lower(capture(nn.Conv2d(3, 4, 3).eval(), Case((image(2, 3, 8, 8),)), sizes))
    run = ExecutorchModel(lowered.program)
    assert run(image(1, 3, 8, 8)).shape == (1, 4, 6, 6)
    with pytest.raises(InputError, match=r"takes \(0…4\)×\(0…3\)×\(0…8\)×\(0…8\) float32"):
        run(image(5, 3, 8, 8))


def test_a_kernel_that_refuses_is_an_error_with_the_runtimes_reason(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(UnsupportedError, match=r"on 1×2×6×6×6 .*: Expect input .* 3-D or 4-D"):
        made(nn.Conv3d(2, 4, 3), Case((image(1, 2, 6, 6, 6),)))(image(1, 2, 6, 6, 6))
    assert capfd.readouterr() == ("", "")


def test_a_model_loaded_before_the_threads_change_still_runs() -> None:
    # The method points at the thread pool it was loaded with, which set_threads frees.
    model = nn.Conv2d(3, 8, 3).eval()
    x = image(1, 3, 32, 32)
    before = program.threads()
    run = made(model, Case((x,)))
    try:
        for count in (1, 2, 1):
            program.set_threads(count)
            assert program.threads() == count
            torch.testing.assert_close(run(x), model(x))
    finally:
        program.set_threads(before)


def test_an_operator_that_no_kernel_has_is_an_error_with_its_name() -> None:
    class Unsupported(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.svdvals(x)

    with pytest.raises(UnsupportedError, match=r"svd"):
        lower(capture(Unsupported(), Case((image(3, 3),))))


def test_what_torch_export_cannot_capture_is_an_error() -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(UnsupportedError, match=r"cannot capture Branch for forward\(2×2\): \w+"):
        capture(Branch(), Case((image(2, 2),)))


def test_a_program_that_the_runtime_refuses_is_an_error() -> None:
    with pytest.raises(ArtifactError, match=r"Program identifier .* != expected 'ET12'"):
        ExecutorchModel(bytes(1000))


def test_nothing_is_written_to_the_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    made(nn.Conv2d(3, 4, 3), Case((image(1, 3, 8, 8),)))(image(1, 3, 8, 8))
    assert capfd.readouterr() == ("", "")


def test_a_program_needs_nothing_of_ours(tmp_path: Path) -> None:
    with known_warnings_ignored():
        from executorch.runtime import Runtime

    model = nn.Sequential(nn.Conv2d(3, 4, 3), settled(nn.BatchNorm2d(4))).eval()
    x = image(1, 3, 8, 8)
    (tmp_path / "model.pte").write_bytes(lower(capture(model, Case((x,)))).program)
    program = Runtime.get().load_program(tmp_path / "model.pte")
    torch.testing.assert_close(program.load_method("forward").execute([x])[0], model(x))
