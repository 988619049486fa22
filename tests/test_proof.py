"""A fold that is 1 % off is found, rolled back and reported, even if only some inputs show it."""

import copy
import sys
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchfuse
from support.fusing_checks import IMAGE, relative_difference, trained
from torchfuse.algebra.folding import fold_into_weight
from torchfuse.fusing import module_proving
from torchfuse.fusing.module_edits import fold_in

Fold = tuple[Tensor, Tensor]


class Two(nn.Module):
    """Two pairs: the first has 4 output channels, the second 6."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 6, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return trained(Two(), IMAGE)


def plant(monkeypatch: pytest.MonkeyPatch, wrong: Callable[[Tensor, Tensor], Fold]) -> None:
    """Make every fold of torchfuse go through `wrong`, wherever it was imported."""

    def planted(*args: object, **kwargs: object) -> Fold:
        return wrong(*fold_into_weight(*args, **kwargs))

    found = [
        module
        for name, module in sys.modules.items()
        if name.startswith("torchfuse.")
        and getattr(module, "fold_into_weight", None) is fold_into_weight
    ]
    assert found
    for module in found:
        monkeypatch.setattr(module, "fold_into_weight", planted)


PLANTS = {
    "weight 1 % too large": lambda w, b: (w * 1.01, b),
    "bias 1 % too large": lambda w, b: (w, b * 1.01),
    "one channel 1 % too large": lambda w, b: (
        torch.cat([w[:1] * 1.01, w[1:]]),
        b,
    ),
    "bias forgotten": lambda w, b: (w, b * 0),
    "channels in another order": lambda w, b: (w.flip(0), b.flip(0)),
    "not a number": lambda w, b: (w * float("nan"), b),
}


@pytest.mark.parametrize("keep", [True, False], ids=["originals kept", "not kept"])
@pytest.mark.parametrize("name", PLANTS)
def test_a_wrong_fold_is_rolled_back_and_reported(
    name: str, keep: bool, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(torchfuse.fuse(model, IMAGE).plan.fusions) == 2
    plant(monkeypatch, PLANTS[name])
    result = torchfuse.fuse(model, IMAGE, keep_originals=keep)
    assert result.plan.fusions == ()
    assert {skip.modules for skip in result.plan.skips} == {("conv1", "bn1"), ("conv2", "bn2")}
    assert torch.equal(result.model(IMAGE), model(IMAGE))
    assert type(result.model.bn1) is nn.BatchNorm2d
    assert result.check.passed


def test_only_the_wrong_one_is_rolled_back(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, lambda w, b: (w * 1.01 if len(w) == 4 else w, b))
    result = torchfuse.fuse(model, IMAGE)
    assert [fusion.modules for fusion in result.plan.fusions] == [("conv2", "bn2")]
    (skip,) = result.plan.skips
    assert skip.modules == ("conv1", "bn1")
    assert "did not pass its proof" in skip.reason
    assert relative_difference(model(IMAGE), result.model(IMAGE)) < 1e-5


def test_in_place_a_wrong_fold_leaves_the_model_as_it_was(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plant(monkeypatch, PLANTS["weight 1 % too large"])
    torchfuse.fuse(model, IMAGE, inplace=True)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_percent_is_seen_in_half_precision_too(
    dtype: torch.dtype, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.to(dtype)
    assert len(torchfuse.fuse(model, IMAGE.to(dtype)).plan.fusions) == 2
    plant(monkeypatch, lambda w, b: (w * 1.01, b))
    plan = torchfuse.fuse(model, IMAGE.to(dtype)).plan
    assert plan.fusions == ()
    assert len(plan.skips) == 2
    assert all("did not pass its proof" in skip.reason for skip in plan.skips)  # each by itself


def test_inputs_that_hide_the_error_are_not_the_only_ones_tried(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, PLANTS["weight 1 % too large"])
    result = torchfuse.fuse(model, torch.zeros_like(IMAGE))
    assert ("conv1", "bn1") in {skip.modules for skip in result.plan.skips}
    assert relative_difference(model(IMAGE), result.model(IMAGE)) < 1e-5


def test_without_verifying_nothing_is_found(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, PLANTS["weight 1 % too large"])
    result = torchfuse.fuse(model, IMAGE, verify=False)
    assert len(result.plan.fusions) == 2
    assert relative_difference(model(IMAGE), result.model(IMAGE)) > 1e-3


class Hidden(Two):
    def forward(self, x: Tensor) -> Tensor:
        # Depends on what folding changes, where no recording sees it.
        shift = float(self.conv1.weight.detach().double().numpy().sum())
        return super().forward(x) * (1 + 0.003 * shift)


class AsksLate(Two):
    def forward(self, x: Tensor) -> Tensor:
        output = super().forward(x)
        return output if hasattr(vars(self)["_modules"]["bn2"], "eps") else output * 1.01


@pytest.mark.parametrize("keep", [True, False], ids=["originals kept", "not kept"])
def test_what_only_the_whole_model_shows_is_rolled_back(keep: bool) -> None:
    torch.manual_seed(0)
    model = trained(AsksLate(), IMAGE)
    before = copy.deepcopy(model.state_dict())
    result = torchfuse.fuse(model, IMAGE, inplace=True, keep_originals=keep)
    assert {fusion.modules for fusion in result.plan.fusions} <= {("conv1", "bn1")}
    assert type(model.bn2) is nn.BatchNorm2d
    assert torch.equal(model.conv2.weight, before["conv2.weight"])
    assert result.check.passed


def test_without_originals_one_layer_at_a_time_is_in_memory_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = trained(
        nn.Sequential(*(layer for _ in range(3) for layer in (Two(), nn.Conv2d(6, 4, 1)))), IMAGE
    )
    folded: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def counted(weight: Tensor, bias: Tensor) -> Fold:
        alive.append(sum(ref() is not None for ref in folded))
        folded.append(weakref.ref(weight))
        return weight, bias

    checks: list[int] = []
    original = module_proving.apply

    def applying(*args: object, **kwargs: object) -> object:
        checks.append(max(alive))  # before anything is folded for good
        return original(*args, **kwargs)

    plant(monkeypatch, counted)
    monkeypatch.setattr(module_proving, "apply", applying)
    result = torchfuse.fuse(model, IMAGE, inplace=True, keep_originals=False)
    assert len(result.plan.fusions) == 6
    assert checks[0] <= 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_small_error_that_only_the_whole_model_shows_is_seen_in_half_precision(
    dtype: torch.dtype,
) -> None:

    torch.manual_seed(0)
    model = trained(Hidden(), IMAGE).to(dtype)
    result = torchfuse.fuse(model, IMAGE.to(dtype))
    assert ("conv1", "bn1") not in {fusion.modules for fusion in result.plan.fusions}
    assert torch.equal(result.model(IMAGE.to(dtype)), model(IMAGE.to(dtype))) or (
        len(result.plan.fusions) == 1
    )


@pytest.mark.parametrize(
    ("dtype", "off", "right"),
    [
        (torch.float32, 0.9e-5, True),
        (torch.float32, 1.1e-5, False),
        (torch.float64, 0.9e-12, True),
        (torch.float64, 1.1e-12, False),
    ],
)
def test_a_layer_may_round_by_1e_5_in_float32_and_by_1e_12_in_float64(
    dtype: torch.dtype,
    off: float,
    right: bool,
    model: nn.Module,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plant(monkeypatch, lambda w, b: (w * (1 + off), b * (1 + off)))
    plan = torchfuse.fuse(model.to(dtype), IMAGE.to(dtype)).plan
    by_itself = [skip for skip in plan.skips if "did not pass its proof" in skip.reason]
    assert len(by_itself) == (0 if right else 2)


class Logarithmic(Two):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.log())


def test_other_inputs_of_which_the_model_makes_nan_say_nothing_of_its_pairs() -> None:
    torch.manual_seed(0)
    positive = IMAGE.abs() + 0.01  # others like them are negative in places
    result = torchfuse.fuse(Logarithmic().eval(), positive)
    assert [fusion.modules for fusion in result.plan.fusions] == [
        ("conv1", "bn1"),
        ("conv2", "bn2"),
    ]
    assert len(result.check.outputs) == 1  # the given one


def test_a_model_that_agrees_is_folded_once(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    times: list[int] = []
    original = module_proving.apply

    def applying(*args: object, **options: object) -> object:
        times.append(1)
        return original(*args, **options)

    monkeypatch.setattr(module_proving, "apply", applying)
    assert len(torchfuse.fuse(model, IMAGE).plan.fusions) == 2
    assert len(times) == 1


def test_interrupted_while_it_is_compared_a_model_is_left_as_it_was(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = copy.deepcopy(model.state_dict())
    fused: list[bool] = []

    def interrupted(fused_model: nn.Module, *_: object, **__: object) -> None:
        fused.append(type(fused_model.bn2) is not nn.BatchNorm2d)
        raise KeyboardInterrupt

    monkeypatch.setattr(module_proving, "outputs_of", interrupted)
    with pytest.raises(KeyboardInterrupt):
        torchfuse.fuse(model, IMAGE, inplace=True)
    assert fused == [True]
    assert type(model.bn1) is type(model.bn2) is nn.BatchNorm2d
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("in_float64", [True, False])
def test_where_float64_would_have_to_tell_and_cannot_the_scope_says_so(in_float64: bool) -> None:
    class Chaotic(Two):
        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x)
            if not in_float64 and x.dtype is not torch.float32:
                raise RuntimeError("expected scalar type Float")
            x = torch.sin(x) ** 2
            for _ in range(12):
                x = 4 * x * (1 - x)
            return x

    torch.manual_seed(0)
    plan = torchfuse.fuse(trained(Chaotic(), IMAGE), IMAGE).plan
    assert len(plan.fusions) == 2
    said = [text for text in plan.scope if "does not run in float64" in text]
    assert len(said) == (0 if in_float64 else 1)


@pytest.mark.parametrize("times", [12, 40], ids=["in float32", "in float64 too"])
def test_a_model_that_amplifies_rounding_is_fused(times: int) -> None:
    class Chaotic(Two):
        def forward(self, x: Tensor) -> Tensor:
            x = torch.sin(super().forward(x)) ** 2
            for _ in range(times):  # each doubles what rounding did
                x = 4 * x * (1 - x)
            return x

    torch.manual_seed(0)
    result = torchfuse.fuse(trained(Chaotic(), IMAGE), IMAGE)
    assert len(result.plan.fusions) == 2
    assert result.check.passed


def test_masked_scores_do_not_stop_a_fold() -> None:
    class Masked(Two):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).masked_fill(x[:, :1] > 0, float("-inf"))

    torch.manual_seed(0)
    model = Masked().eval()
    result = torchfuse.fuse(model, IMAGE)
    assert len(result.plan.fusions) == 2, str(result.plan)
    assert result.check.passed


def test_nan_in_the_output_of_one_side_alone_does_not_pass(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, lambda w, b: (w, torch.where(torch.arange(len(b)) == 0, torch.nan, b)))
    result = torchfuse.fuse(model, IMAGE)
    assert result.plan.fusions == ()


@pytest.mark.parametrize("verify", [False, True])
def test_without_originals_a_replaced_weight_is_free_before_the_next_layer_is_folded(
    verify: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = [layer for _ in range(3) for layer in (nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))]
    model = nn.Sequential(*layers).eval()
    originals = [weakref.ref(layer.weight) for layer in layers[::2]]
    del layers
    free_after: list[int] = []

    def folded(*args: object, **options: object) -> object:
        done = fold_in(*args, **options)
        free_after.append(sum(original() is None for original in originals))
        return done

    monkeypatch.setattr("torchfuse.fusing.module_host.fold_in", folded)
    torchfuse.fuse(
        model, torch.randn(1, 2, 4, 4), inplace=True, verify=verify, keep_originals=False
    )
    assert free_after == [1, 2, 3]
