"""Any inputs and outputs: keywords, nested, integer, changed in place."""

from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn

import torchfuse
from support.fusing_checks import IMAGE, ConvBn, trained
from torchfuse.errors import CaptureError


def test_keyword_inputs_and_nested_outputs_are_compared() -> None:
    class Model(ConvBn):
        def forward(self, image: Tensor, *, options: dict[str, Tensor]) -> dict[str, object]:
            y = self.bn(self.conv(image * options["scale"]))
            return {"logits": y, "more": [{"mean": y.mean()}, None, "text"]}

    model = ConvBn.eval(Model())
    inputs = {"image": IMAGE, "options": {"scale": torch.tensor(2.0)}}
    result = torchfuse.fuse(model, inputs)
    assert len(result.plan.fusions) == 1
    expected, got = model(**inputs), result.model(**inputs)
    torch.testing.assert_close(got["logits"], expected["logits"])


class Output(OrderedDict):
    """What transformers' models return: a dictionary with attributes."""


def test_outputs_in_an_object_are_compared_as_they_are() -> None:
    class Model(ConvBn):
        def forward(self, x: Tensor) -> Output:
            y = self.bn(self.conv(x))
            return Output(logits=y, hidden=(y * 2,))

    model = Model().eval()
    for _ in range(5):
        result = torchfuse.fuse(model, IMAGE)
        assert len(result.plan.fusions) == 1, str(result.plan)
        assert result.check.max_rel < 1e-5


def test_integer_inputs_stay_integers() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(10, 4)
            self.conv = nn.Conv1d(4, 6, 3)
            self.bn = nn.BatchNorm1d(6)

        def forward(self, ids: Tensor) -> Tensor:
            return self.bn(self.conv(self.embed(ids).transpose(1, 2)))

    ids = torch.randint(0, 10, (2, 12))
    model = Model().eval()
    result = torchfuse.fuse(model, ids)
    assert len(result.plan.fusions) == 1
    other = torch.randint(0, 10, (5, 9))
    torch.testing.assert_close(result.model(other), model(other))


def test_inputs_are_not_changed_by_a_model_that_works_in_place() -> None:
    class Model(ConvBn):
        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(x.mul_(2)))

    inputs = IMAGE.clone()
    torchfuse.fuse(Model().eval(), inputs)
    assert torch.equal(inputs, IMAGE)


def test_a_model_that_cannot_run_is_an_error_that_says_so() -> None:
    with pytest.raises(CaptureError, match=r"(?s)5.*4|4.*5"):
        torchfuse.plan(ConvBn().eval(), torch.randn(2, 5, 8, 8))


def test_every_case_is_tried_at_other_sizes_which_the_scope_names() -> None:
    model = trained(ConvBn(), IMAGE)
    result = torchfuse.fuse(model, [IMAGE, torch.randn(3, 4, 12, 12)])
    (sizes,) = [sentence for sentence in result.plan.scope if sentence.startswith("Compared")]
    tried = ["2×4×8×8", "3×4×12×12", "1×4×4×4", "1×4×8×8", "2×4×6×6", "2×4×12×12"]
    assert sizes == (
        "Compared, before and after, on " + ", ".join(f"forward({size})" for size in tried) + "."
    )
    assert len(result.check.outputs) == 8  # both cases with other values, too


def test_without_verifying_the_scope_names_no_sizes_that_were_compared() -> None:
    result = torchfuse.fuse(trained(ConvBn(), IMAGE), IMAGE, verify=False)
    assert not any("Compared" in sentence for sentence in result.plan.scope)
