"""What the delegate took is counted right, and what it left is said loudly, with the reason."""

import json
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from torchfuse.cases import Case
from torchfuse.delegation import Conversion, Delegation, OperatorDelegation
from torchfuse.lowering.capture import capture
from torchfuse.quantizing import quantize
from torchfuse.targets.executorch.xnnpack import lower


def operator(
    name: str, *, delegated: int = 0, left: int = 0, macs: int = 0, elements_left: int = 0
) -> OperatorDelegation:
    return OperatorDelegation(
        operator=name,
        delegated=delegated,
        left=left,
        macs_delegated=macs if delegated else 0,
        macs_left=macs if left else 0,
        elements_left=elements_left,
        reasons=(f"{name}: no kernel",) if left else (),
    )


def delegation(*operators: OperatorDelegation, elements: int = 1000) -> Delegation:
    return Delegation("XNNPACK", 1, operators, elements, ())


@pytest.mark.parametrize(
    ("model", "shape", "macs"),
    [
        (nn.Conv2d(3, 8, 3, padding=1), (1, 3, 10, 10), 8 * 10 * 10 * 3 * 9),
        (nn.Conv2d(4, 8, 3, groups=4), (2, 4, 10, 10), 2 * 8 * 8 * 8 * 1 * 9),
        (nn.ConvTranspose2d(4, 6, 2, stride=2), (1, 4, 5, 5), 4 * 25 * 6 * 4),
        (nn.Linear(5, 7), (3, 5), 3 * 5 * 7),
        (nn.Linear(5, 7, bias=False), (2, 3, 5), 2 * 3 * 5 * 7),
    ],
)
def test_multiply_accumulates_are_counted(
    model: nn.Module, shape: tuple[int, ...], macs: int
) -> None:
    found = lower(capture(model.eval(), Case((torch.randn(shape),)))).delegation
    assert found.macs == macs
    assert found.macs_share == 1
    assert found.warning is None


def test_a_dynamic_size_counts_as_in_the_example() -> None:
    sizes = ({0: torch.export.Dim("n", max=16)},)
    found = lower(capture(nn.Linear(5, 7).eval(), Case((torch.randn(3, 5),)), sizes)).delegation
    assert found.macs == 3 * 5 * 7


class Conv3dInTheMiddle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.conv = nn.Conv3d(2, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(self.linear(x)))


def test_what_is_left_is_reported_with_the_partitioners_reason_and_warned_about() -> None:
    program = capture(Conv3dInTheMiddle().eval(), Case((torch.randn(1, 2, 6, 6, 6),)))
    found = lower(program).delegation
    assert found.warning is not None
    assert found.warning.startswith("XNNPACK does not run 1× convolution (84% of the multiply-acc")
    assert found.macs_share is not None
    assert found.macs_share < 0.2
    (conv,) = found.left
    assert (conv.operator, conv.left, conv.delegated) == ("convolution", 1, 0)
    assert conv.macs_left == 4 * 4 * 4 * 4 * 2 * 27
    assert conv.reasons == ("convolution: Only support 1D + 2D Conv",)


def test_an_operator_without_a_rule_says_so() -> None:
    class Sine(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.asinh(torch.relu(x))

    found = lower(capture(Sine(), Case((torch.randn(4, 4),)))).delegation
    assert found.warning is not None
    assert "asinh: its partitioner has no rule for this operator" in found.warning
    assert {op.operator for op in found.left} == {"asinh"}
    assert found.macs_share is None


def test_a_quantized_model_leaves_no_dequantization_outside() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)).eval()
    x = torch.randn(1, 3, 8, 8)
    quantized = quantize(model, x, torch.randn(4, 3, 8, 8)).model
    found = lower(capture(quantized, Case((x,)))).delegation
    assert found.conversions == ()
    assert found.calls_left == 0
    assert found.partitions == 1


class LeavesInt8(nn.Module):
    """Two convs with an operator in between that XNNPACK does not have."""

    def __init__(self, between: nn.Module) -> None:
        super().__init__()
        self.before = nn.Conv2d(3, 4, 3, padding=1)
        self.between = between
        self.after = nn.Conv2d(4, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(torch.asinh(self.between(self.before(x))))


def lowered_int8(model: nn.Module) -> Delegation:
    x = torch.randn(1, 3, 6, 6)
    quantized = quantize(model.eval(), x, torch.randn(4, 3, 6, 6)).model
    return lower(capture(quantized, Case((x,)))).delegation


def test_where_int8_is_left_and_entered_again_is_counted_and_named() -> None:
    found = lowered_int8(LeavesInt8(nn.Upsample(scale_factor=1.5)))
    (conversion,) = found.conversions
    assert conversion.around == ("upsample_nearest2d (between)", "asinh")
    assert conversion.elements == 4 * 6 * 6 + 4 * 9 * 9
    assert str(found).endswith(
        "Between pieces int8 becomes float and int8 again once, around:\n"
        "  upsample_nearest2d (between), asinh, 468 values"
    )


def test_leaving_int8_at_the_end_is_no_conversion_back() -> None:
    found = lowered_int8(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Upsample(scale_factor=1.5)))
    assert found.calls_left
    assert found.conversions == ()


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (delegation(operator("convolution", delegated=1, macs=9)), None),
        (delegation(operator("relu", delegated=1)), None),
        (
            delegation(operator("sin", left=1, elements_left=10), operator("relu", delegated=1)),
            None,
        ),
        (
            delegation(operator("sin", left=2, elements_left=100), operator("relu", delegated=1)),
            "XNNPACK does not run 2× sin (10% of the elements written), which go to slow portable "
            "kernels: sin: no kernel.",
        ),
        (
            delegation(
                operator("convolution", delegated=1, macs=90),
                operator("bmm", left=1, macs=10, elements_left=10),
            ),
            "XNNPACK does not run 1× bmm (10% of the multiply-accumulates and 1% of the elements "
            "written), which go to slow portable kernels: bmm: no kernel.",
        ),
        (
            delegation(operator("sin", left=1, elements_left=1)),
            "XNNPACK does not run 1× sin (0% of the elements written), which go to slow portable "
            "kernels: sin: no kernel.",
        ),
    ],
)
def test_warns_if_it_matters(found: Delegation, expected: str | None) -> None:
    assert found.warning == expected


def test_reads_as_a_table_with_the_operators_left_on_top() -> None:
    found = delegation(
        operator("convolution", delegated=3, macs=3_000_000),
        operator("bmm", left=1, macs=1_000_000, elements_left=10),
    )
    assert str(found) == (
        "operator     delegated  left  MMACs left  values left  reason\n"
        "bmm                  0     1         1.0         1.0%  bmm: no kernel\n"
        "convolution          3\n"
        "XNNPACK runs 3 of 4 operator calls, 75.0% of the MACs, in 1 piece."
    )


def test_survives_json() -> None:
    found = Delegation(
        "XNNPACK", 2, (operator("sin", left=1, elements_left=1),), 9, (Conversion(("sin",), 2),)
    )
    assert Delegation.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_is_read_without_torch() -> None:
    code = "import torchfuse.delegation, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
