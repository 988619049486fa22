"""One fold by itself: rounding passes, and beyond it float64 decides."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfuse.fusing.proving import PairDifference, decided
from torchfuse.fusing.proving.pairs import normed, worse

EXACT = torch.tensor([2.0, -4.0, 1.0], dtype=torch.float64)
RIGHT = EXACT.float()


def not_asked() -> tuple[Tensor, Tensor]:
    raise AssertionError("float64 was asked for")


def test_within_rounding_float64_is_not_asked() -> None:
    found = decided(RIGHT, RIGHT + torch.tensor([0.0, 0.0, 2.0**-15]), 2.0**-17, not_asked)
    assert found == PairDifference(2.0**-17, None)
    with pytest.raises(AssertionError, match="was asked for"):
        decided(RIGHT, RIGHT + torch.tensor([0.0, 0.0, 2.0**-14]), 2.0**-17, not_asked)


def test_the_largest_difference_counts_whatever_its_sign() -> None:
    for sign in (1, -1):
        fused = RIGHT + torch.tensor([0.0, sign * 0.4, -sign * 0.1])
        found = decided(RIGHT, fused, 0.0, lambda: (EXACT, EXACT + 1))
        assert found.max_rel == pytest.approx(0.1)
        assert found.problem == "the folded layer is off by 0.1 (relative)."


@pytest.mark.parametrize(("off", "right"), [(0.9e-9, True), (1.1e-9, False)])
def test_in_float64_only_the_last_digits_may_differ(off: float, right: bool) -> None:
    wide = EXACT + torch.tensor([0.0, 4 * off, 0.0])
    found = decided(RIGHT, RIGHT + 1e-6, 0.0, lambda: (EXACT, wide))
    assert (found.problem is None) is right


@pytest.mark.parametrize(("times", "right"), [(3.9, True), (5.2, False)])
def test_a_fold_may_round_four_times_as_badly_as_the_original(times: float, right: bool) -> None:
    original = RIGHT + torch.tensor([0.0, 1e-3, 0.0])
    fused = RIGHT - torch.tensor([0.0, times * 1e-3, 0.0])
    found = decided(original, fused, 0.0, lambda: (EXACT, EXACT))
    assert (found.problem is None) is right
    if not right:
        assert (
            found.problem
            == "in torch.float32 the folded layer is off by 0.0052, the original by 0.001."
        )


@pytest.mark.parametrize(("steps", "right"), [(4, True), (5, False)])
def test_an_original_without_error_leaves_a_fold_four_steps_of_the_dtype(
    steps: int, right: bool
) -> None:
    fused = RIGHT + torch.tensor([0.0, 4 * steps * 2.0**-23, 0.0])
    found = decided(RIGHT, fused, 0.0, lambda: (EXACT, EXACT))
    assert found.problem == (
        None if right else "in torch.float32 the folded layer is off by 2.4e-06, the original by 0."
    )


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_show_nothing(odd: float) -> None:
    spoilt = torch.tensor([2.0, odd, 1.0])
    for expected, fused in ((RIGHT, spoilt), (spoilt, RIGHT), (spoilt, spoilt)):
        found = decided(expected, fused, 1.0, not_asked)
        assert found.problem == "its output is NaN or Inf, so nothing can be shown."


@pytest.mark.parametrize("side", [0, 1])
def test_nan_in_float64_alone_does_not_pass(side: int) -> None:
    both = [EXACT, EXACT]
    both[side] = EXACT * torch.nan
    assert decided(RIGHT, RIGHT + 1e-3, 0.0, lambda: (both[0], both[1])).problem is not None


def test_outputs_that_are_all_zero_may_not_become_others() -> None:
    zero = torch.zeros(3)
    assert decided(zero, zero, 0.0, not_asked).problem is None
    found = decided(zero, zero + 1e-6, 1e-7, lambda: (zero.double(), zero.double() + 1e-6))
    assert found.max_rel == pytest.approx(1e-6)
    assert found.problem is not None


def test_of_no_values_nothing_differs() -> None:
    assert decided(torch.zeros(0), torch.zeros(0), 0.0, not_asked) == PairDifference(0.0, None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_compared_without_rounding_the_difference(dtype: torch.dtype) -> None:
    a, b = torch.tensor([60000.0]).to(dtype), torch.tensor([-60000.0]).to(dtype)
    found = decided(a, b, 3.0, not_asked)  # (in float16 the difference would be Inf)
    assert found.max_rel == pytest.approx(2.0)


def test_of_two_a_problem_is_worse_and_else_the_larger_difference() -> None:
    small, large = PairDifference(1e-7, None), PairDifference(1e-6, None)
    wrong, wronger = PairDifference(1e-8, "wrong"), PairDifference(1.0, "wronger")
    assert worse(None, small) is small
    assert worse(small, large) is worse(large, small) is large
    assert worse(large, wrong) is worse(wrong, large) is wrong
    assert worse(wrong, wronger) is wrong  # the first that was found


@pytest.mark.parametrize(
    ("layer", "norm", "shape"),
    [
        (nn.Linear(3, 5), nn.BatchNorm1d(5), (4, 5)),
        (nn.Linear(3, 5), nn.BatchNorm1d(5), (4, 2, 5)),
        (nn.Linear(3, 5), nn.BatchNorm1d(5), (5,)),
        (nn.Conv1d(3, 5, 1), nn.BatchNorm1d(5), (4, 5, 2)),
        (nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5), (4, 5, 2, 3)),
        (nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5), (5, 2, 3)),
    ],
)
def test_the_norm_is_over_the_layers_channels(
    layer: nn.Module, norm: nn.modules.batchnorm._BatchNorm, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            tensor.normal_()
        norm.running_var.uniform_(0.5, 2)
        norm.eps = 0.1
        output = torch.randn(shape)
        channels = shape.index(5)
        flat = output.movedim(channels, -1).reshape(-1, 5)
        expected = F.batch_norm(
            flat, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=0.1
        )
        expected = expected.reshape(output.movedim(channels, -1).shape).movedim(-1, channels)
        torch.testing.assert_close(normed(layer, norm, output), expected)


class Frozen(nn.Module):
    """A batch norm of a class of its own, as vision backbones have."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.tensor([1.0, -2.0]))
        self.register_buffer("running_var", torch.tensor([4.0, 0.25]))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.running_mean) * self.running_var.rsqrt()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_norm_of_a_class_of_its_own_is_asked_in_the_dtype_of_the_output(
    dtype: torch.dtype,
) -> None:
    found = normed(nn.Linear(3, 2), Frozen(), torch.tensor([[3.0, 0.0]], dtype=dtype))
    torch.testing.assert_close(found, torch.tensor([[1.0, 4.0]], dtype=dtype))


def test_a_norm_without_weights_and_in_a_dtype_of_its_own_is_torchs() -> None:
    norm = nn.BatchNorm1d(2, affine=False, eps=0.0).eval()
    norm.running_mean.fill_(1 + 2.0**-10)  # 1 in bfloat16
    found = normed(nn.Linear(3, 2), norm, torch.tensor([[3.0, 1.0]], dtype=torch.bfloat16))
    torch.testing.assert_close(found, torch.tensor([[2.0, -(2.0**-10)]]).bfloat16())
