"""What verbs are given is looked at first: weights that are no numbers are named."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import torchfuse
from support.fusing_checks import IMAGE, ConvBn, trained
from torchfuse.cases import require_finite_tensors
from torchfuse.errors import CaptureError, InputError

VERBS: dict[str, Callable[[nn.Module], object]] = {
    "plan": lambda model: torchfuse.plan(model, IMAGE),
    "fuse": lambda model: torchfuse.fuse(model, IMAGE),
    "fuse, not verified": lambda model: torchfuse.fuse(model, IMAGE, verify=False),
    "fuse in place": lambda model: torchfuse.fuse(model, IMAGE, inplace=True),
    "fuse_exported": lambda model: torchfuse.fuse_exported(torch.export.export(model, (IMAGE,))),
    "fuse_modules": lambda model: torchfuse.fuse_modules(
        model, ["conv", "bn"], example_inputs=IMAGE
    ),
    "fuse_modules_qat": lambda model: torchfuse.fuse_modules_qat(
        model.train(), ["conv", "bn"], example_inputs=IMAGE
    ),
    "verify": lambda model: torchfuse.verify(model, model, IMAGE),
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_weight_that_is_not_a_number_is_named(verb: str) -> None:
    model = trained(ConvBn(), IMAGE)
    model.conv.weight.data[1, 2, 0, 0] = float("nan")
    with pytest.raises(InputError) as error:
        VERBS[verb](model)
    assert str(error.value) == (
        "Expected finite weights, but 'conv.weight' has NaN in 1 of its 144 values; load a "
        "checkpoint without NaN, or look for an overflow in training."
    )


@pytest.mark.parametrize("verb", VERBS)
def test_infinite_statistics_are_named(verb: str) -> None:
    model = trained(ConvBn(), IMAGE)
    model.bn.running_mean[:2] = float("inf")
    with pytest.raises(InputError, match=r"'bn\.running_mean' has Inf in 2 of its 4 values; load"):
        VERBS[verb](model)


CALLS = {**VERBS, "measure": lambda model: torchfuse.measure(model, IMAGE, runs=1, warmup=0)}
del CALLS["fuse_exported"]  # takes what ran already


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("verb", CALLS)
def test_a_model_in_half_precision_that_does_not_run_on_the_inputs_is_an_error(
    verb: str, dtype: torch.dtype
) -> None:
    model = trained(ConvBn(), IMAGE).to(dtype)
    with pytest.raises(InputError) as error:
        CALLS[verb](model)
    assert str(error.value) == (
        f"Expected a model in float32, got {dtype} ('conv.weight'); call model.float() first, or "
        f"give inputs in {dtype}."
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_works_on_inputs_in_half_precision(dtype: torch.dtype) -> None:
    model, image = trained(ConvBn(), IMAGE).to(dtype), IMAGE.to(dtype)
    assert len(torchfuse.plan(model, image).fusions) == 1
    fused = torchfuse.fuse(model, image)
    by_name = torchfuse.fuse_modules(model, ["conv", "bn"], example_inputs=image)
    program = torchfuse.fuse_exported(torch.export.export(model, (image,)))
    for check in (fused.check, program.check, torchfuse.verify(model, by_name, image)):
        assert check.passed
    assert len(fused.plan.fusions) == len(program.plan.fusions) == 1
    assert fused.model.conv.weight.dtype == dtype
    assert torchfuse.measure(fused.model, image, runs=1, warmup=0).runs == 1


def test_what_has_no_kernel_in_half_precision_says_what_to_do() -> None:
    class Inverse(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.inv(super().forward(x))

    with pytest.raises(InputError, match=r"got torch.float16 \('weight'\); call model.float\(\)"):
        torchfuse.plan(Inverse(4, 4).half(), torch.randn(4, 4).half())


def test_another_error_of_a_model_in_half_precision_stays_what_it_is() -> None:
    model, image = trained(ConvBn(), IMAGE).half(), IMAGE.half()
    with pytest.raises(CaptureError, match="to have 4 channels, but got 3 channels"):
        torchfuse.fuse(model, image[:, :3])
    with pytest.raises(RuntimeError, match="to have 4 channels, but got 3 channels"):
        torchfuse.verify(model, model, image[:, :3])


class Masked(nn.Module):
    """Scores of which an infinite mask leaves the first two, and a value that is not set yet."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = ConvBn()
        self.mask = nn.Parameter(torch.tensor([0, 0] + [-float("inf")] * 6), requires_grad=False)
        self.register_buffer("also", self.mask.detach().clone())
        self.register_buffer("unset", torch.tensor(float("nan")))

    def forward(self, x: Tensor) -> Tensor:
        return (self.pair(x) + self.mask + self.also).softmax(-1)


@pytest.mark.parametrize("verb", ["plan", "fuse", "fuse_exported", "verify"])
def test_what_may_be_infinite_or_unset_is_no_obstacle(verb: str) -> None:
    result = VERBS[verb](trained(Masked(), IMAGE))
    if verb.startswith("fuse"):
        assert len(result.plan.fusions) == 1
        assert result.check.passed


def test_large_weights_are_finite_although_their_sum_is_not() -> None:
    model = nn.Linear(4, 4).half()
    model.weight.data.fill_(6e4)
    require_finite_tensors(model)


def test_tensors_without_values_are_not_looked_at() -> None:
    with torch.device("meta"):
        model = ConvBn()
    model.conv.weight.data = model.conv.weight.data.to(torch.float8_e4m3fn)
    require_finite_tensors(model)


def test_a_nan_in_what_verify_does_not_use_is_no_obstacle() -> None:
    model = trained(ConvBn(), IMAGE)
    model.unused = nn.Linear(1, 1)
    model.unused.weight.data.fill_(float("nan"))
    assert torchfuse.verify(model, model, IMAGE).passed


def test_another_error_of_a_model_in_half_precision_is_not_blamed_on_it() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4).bfloat16()).eval()
    with pytest.raises(CaptureError, match="shapes cannot be multiplied"):
        torchfuse.plan(model, torch.randn(2, 3))
