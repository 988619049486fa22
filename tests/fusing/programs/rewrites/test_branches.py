"""Branches of one input that are added become one convolution."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

import torchfuse
from support.rewriting_checks import Model, calls, fused, reasons, rules

pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")

X = torch.randn(2, 8, 9, 7, generator=torch.Generator().manual_seed(0))
ROW = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


def layers() -> dict[str, nn.Module]:
    return {
        "a": nn.Conv2d(8, 8, 3, padding=1),
        "b": nn.Conv2d(8, 8, 1, bias=False),
        "c": nn.Conv2d(8, 8, (1, 3), padding=(0, 1)),
        "d": nn.Conv2d(8, 8, (3, 1), padding=(1, 0)),
        "e": nn.Conv2d(8, 8, 5, padding=2, bias=False),
        "dw": nn.Conv2d(8, 8, 3, padding=1, groups=8),
        "dw1": nn.Conv2d(8, 8, 1, groups=8),
        "grouped": nn.Conv2d(8, 8, 3, padding=1, groups=2),
        "s3": nn.Conv2d(8, 12, 3, 2, 1),
        "s1": nn.Conv2d(8, 12, 1, 2),
        "bn": nn.BatchNorm2d(8),
        "bn2": nn.BatchNorm2d(8),
        "pool": nn.AvgPool2d(3, 1, 1),
        "open": nn.Conv2d(8, 8, 3),
        "k1": nn.Conv1d(8, 8, 1),
        "k2": nn.Conv1d(8, 8, 2, bias=False),
        "k2b": nn.Conv1d(8, 8, 2),
        "k3": nn.Conv1d(8, 8, 3),
        "k3b": nn.Conv1d(8, 8, 3, padding=1),
        "k3d": nn.Conv1d(8, 8, 3, dilation=2),
        "k5": nn.Conv1d(8, 8, 5),
        "line": nn.Linear(8, 8),
        "down": nn.Linear(8, 2, bias=False),
        "up": nn.Linear(2, 8, bias=False),
    }


def acnet(m: Model, x: Tensor) -> Tensor:
    return m.bn(m.a(x)) + m.c(x) + m.bn2(m.d(x))


def in_place(m: Model, x: Tensor) -> Tensor:
    y = m.a(x)
    y += m.b(x)
    y.add_(m.bn(x))
    return y.relu_()


MERGES: dict[str, Callable[[Model, Tensor], object]] = {
    "two convolutions": lambda m, x: m.a(x) + m.b(x),
    "RepVGG": lambda m, x: m.bn(m.a(x)) + m.b(x) + m.bn2(x),
    "ACNet": acnet,
    "an identity": lambda m, x: x + m.a(x),
    "two identities": lambda m, x: x + m.a(x) + x,
    "a depthwise one and an identity": lambda m, x: m.dw(x) + x,
    "depthwise ones of other kernels": lambda m, x: m.dw(x) + m.dw1(x) + m.bn(x),
    "a grouped one": lambda m, x: m.grouped(x) + m.dw(x),
    "a difference": lambda m, x: m.a(x) - m.bn(x),
    "a negated branch": lambda m, x: x - m.a(x),
    "sum of a list": lambda m, x: sum([m.a(x), m.b(x), x]),
    "a stack": lambda m, x: torch.stack([m.a(x), m.b(x), x]).sum(0),
    "a stack of the last axis": lambda m, x: torch.stack([m.a(x), m.b(x)], -1).sum(dim=-1),
    "a mean of a stack": lambda m, x: torch.stack([m.a(x), m.b(x), x]).mean(0),
    "a mean of the last axis": lambda m, x: torch.mean(torch.stack([m.a(x), x], -1), dim=-1),
    "a sum divided": lambda m, x: sum([m.a(x), m.b(x), x]) / 3,
    "a stack's sum divided": lambda m, x: torch.stack([m.a(x), m.b(x), x]).sum(0) / 3,
    "an alpha": lambda m, x: torch.add(m.a(x), m.b(x), alpha=0.3),
    "an alpha of a difference": lambda m, x: torch.sub(m.bn(x), m.a(x), alpha=2),
    "an alpha of the identity": lambda m, x: torch.add(m.a(x), x, alpha=0.1),
    "an alpha of a sum": lambda m, x: torch.sub(m.b(x), torch.add(m.a(x), x, alpha=3), alpha=0.1),
    "an alpha in place": lambda m, x: m.a(x).sub_(m.b(x), alpha=0.3),
    "in place": in_place,
    "an average pool": lambda m, x: m.a(x) + m.pool(x),
    "an average pool of a convolution": lambda m, x: m.a(x) + m.pool(m.b(x)),
    "a larger kernel": lambda m, x: m.e(x) + m.a(x) + m.b(x),
    "scaled branches": lambda m, x: 0.5 * m.a(x) + m.bn(x) * 2,
    "FastViT's mixer": lambda m, x: x + 0.1 * (m.dw(x) + m.dw1(x) + m.bn(x) - m.bn2(x)),
    "layers in a branch": lambda m, x: m.a(x) + m.b(m.b(x)),
    "strides": lambda m, x: m.s3(x) + m.s1(x),
    "functional ones": lambda m, x: F.conv2d(x, m.a.weight, padding=1) + F.conv2d(x, m.b.weight),
    "weights that are computed": lambda m, x: F.conv2d(x, m.a.weight * 2, padding=1) + m.b(x),
    "one layer twice": lambda m, x: m.a(x) + m.a(x),
    "padding by name": lambda m, x: F.conv2d(x, m.a.weight, padding="same") + m.b(x),
}


@pytest.mark.parametrize("name", MERGES)
def test_branches_become_one_convolution(name: str) -> None:
    result = fused(MERGES[name], X, **layers())
    left = calls(result)
    assert left.pop("conv2d") == 1, result.plan
    assert set(left) <= {"relu_"}
    assert "branches" in rules(result)


def test_linear_layers_are_branches_too() -> None:
    result = fused(lambda m, x: m.line(x) + m.up(m.down(x)) * 0.5 + x, ROW, **layers())
    assert calls(result) == {"linear": 1}  # a low-rank adapter is merged into its layer


def test_a_change_in_place_that_only_the_branches_see_is_merged_too() -> None:
    def body(m: Model, x: Tensor) -> Tensor:
        y = F.relu(x)
        a = m.a(y)
        y.mul_(2)
        return a + m.b(y)

    assert calls(fused(body, X, **layers())) == {"relu": 1, "conv2d": 1}


def test_what_is_no_branch_of_that_input_stays_in_the_sum() -> None:
    result = fused(lambda m, x: m.a(x) + F.relu(x) + m.b(x) - F.gelu(x), X, **layers())
    assert calls(result) == {"relu": 1, "gelu": 1, "conv2d": 1, "add": 1, "sub": 1}


def test_branches_of_two_inputs_are_merged_by_input() -> None:
    def body(m: Model, x: Tensor) -> Tensor:
        y = F.relu(x)
        return m.a(x) + m.a(y) + m.b(x) + m.b(y)

    assert calls(fused(body, X, **layers())) == {"relu": 1, "conv2d": 2, "add": 1}


def test_other_sizes_that_were_declared_are_kept() -> None:
    sizes = ({0: Dim("batch", max=8), 2: Dim("height", min=3, max=64)},)
    result = fused(MERGES["RepVGG"], X, dynamic=sizes, **layers())
    assert calls(result) == {"conv2d": 1}
    assert result.model.module()(torch.randn(5, 8, 33, 7)).shape == (5, 8, 33, 7)


def test_it_says_what_was_saved() -> None:
    (fusion,) = fused(lambda m, x: m.a(x) + m.b(x), X, **layers()).plan.fusions
    assert fusion.rule == "branches"
    places = 2 * 9 * 7
    assert fusion.macs_saved == places * (8 * 8 + 8)  # the 1×1 convolution and the sum
    assert fusion.traffic_saved_bytes == 4 * places * (2 * 8 + 3 * 8)
    assert fusion.parameters_saved == 8 * 8
    assert set(fusion.modules) == {"a", "b", "add"}


def test_groups_are_not_expanded_where_that_costs_more() -> None:
    result = fused(lambda m, x: m.dw(x) + m.b(x), X, **layers())
    assert calls(result) == {"conv2d": 2, "add": 1}
    assert "Merged, it would take" in reasons(result)
    merged = fused(lambda m, x: m.dw(x) + m.b(x) + m.dw1(x), X, **layers())
    assert calls(merged) == {"conv2d": 2, "add": 1}  # those that are grouped alike
    whole = fused(lambda m, x: m.dw(x) + m.b(x) + m.a(x), X, **layers())
    assert calls(whole) == {"conv2d": 1}


def test_crosswise_kernels_alone_are_not_made_square() -> None:
    assert calls(fused(lambda m, x: m.c(x) + m.d(x), X, **layers()))["conv2d"] == 2


def test_what_stays_in_a_scaled_sum_keeps_its_factor() -> None:
    def body(m: Model, x: Tensor) -> Tensor:
        return torch.sub(m.b(x), torch.add(m.a(x), F.relu(x), alpha=2), alpha=0.3)

    result = fused(body, X, **layers())
    assert calls(result) == {"relu": 1, "conv2d": 1, "add": 1}
    mean = fused(lambda m, x: torch.stack([m.a(x), F.relu(x), x]).mean(0), X, **layers())
    assert calls(mean) == {"relu": 1, "conv2d": 1, "add": 1}


def test_an_entry_of_a_stack_that_is_widened_stays_as_it_is() -> None:
    def wider(m: Model, x: Tensor) -> Tensor:
        return torch.stack([m.a(x), m.b(x), x.double()]).mean(0)

    def wrapping(m: Model, x: Tensor) -> Tensor:
        large = (x > 0).to(torch.uint8) * 200
        return torch.stack([m.a(x), m.b(x), large + large]).sum(0)

    for body, left in ((wider, 2), (wrapping, 1)):
        program = torch.export.export(Model(body, **layers()).eval(), (X,))
        result = torchfuse.fuse_exported(program, rules=["branches"])
        assert calls(result)["conv2d"] == left
        torch.testing.assert_close(result.model.module()(-X), program.module()(-X))


def test_a_factor_that_is_computed_is_said_to_be() -> None:
    result = fused(
        lambda m, x: torch.add(m.a(x), m.b(x), alpha=x.shape[2]),
        X,
        dynamic=({2: Dim("height", min=3, max=64)},),
        **layers(),
    )
    assert calls(result)["conv2d"] == 2
    assert "branches: The factor of its second branch, alpha, is computed" in reasons(result)


LINE = torch.randn(2, 8, 11, generator=torch.Generator().manual_seed(0))
# What is left, and the padding (before, after, its own) and kernel of the one convolution
PADDED: dict[str, tuple[list[int], int, int, Callable[[Model, Tensor], object]]] = {
    "causal ones": (
        [4, 0], 0, 5, lambda m, x: m.k5(F.pad(x, (4, 0))) + m.k3(F.pad(x, (2, 0))) + m.k1(x) + x,
    ),
    "a causal one, dilated": ([4, 0], 0, 3, lambda m, x: m.k3d(F.pad(x, (4, 0))) + m.k1(x)),
    "one side each": ([], 1, 3, lambda m, x: m.k2(F.pad(x, (1, 0))) + m.k2b(F.pad(x, (0, 1)))),
    "one within a larger kernel": ([], 1, 3, lambda m, x: m.k3b(x) + m.k2(F.pad(x, (0, 1)))),
    "one that pads itself too": ([0, 1], 1, 4, lambda m, x: m.k3b(x) + m.k3(F.pad(x, (0, 2)))),
    "far from each other": ([], 2, 5, lambda m, x: m.k3(F.pad(x, (2, 0))) + m.k3(F.pad(x, (0, 2)))),
    "after a scale": ([2, 0], 0, 3, lambda m, x: m.k3(F.pad(x * 3, (2, 0))) + m.k1(x)),
}  # fmt: skip


@pytest.mark.parametrize("name", PADDED)
def test_branches_that_pad_one_side_become_one_convolution(name: str) -> None:
    sides, own, kernel, body = PADDED[name]
    result = fused(body, LINE, **layers())
    pads, convs = (
        [node for node in result.model.graph.nodes if node.target is target]
        for target in (torch.ops.aten.constant_pad_nd.default, torch.ops.aten.conv1d.default)
    )
    assert calls(result) == {"conv1d": 1} | ({"constant_pad_nd": 1} if sides else {})
    assert [pad.args[1] for pad in pads] == ([sides] if sides else [])
    assert convs[0].args[4] == [own]
    assert convs[0].args[1].meta["val"].shape == (8, 8, kernel)


OFF_THE_GRID: dict[str, tuple[int, Callable[[Model, Tensor], object]]] = {
    "one that is padded": (2, lambda m, x: m.k3b(x) + m.k3d(F.pad(x, (3, 1))) + m.k1(x) + x),
    "two that are padded alike": (
        2,
        lambda m, x: m.k3d(F.pad(x, (3, 1))) + m.k3b(x) - m.k3d(F.pad(x, (3, 1))) + m.k1(x),
    ),
}


@pytest.mark.parametrize("name", OFF_THE_GRID)
def test_a_padded_branch_that_does_not_fit_keeps_no_others_apart(name: str) -> None:
    left, body = OFF_THE_GRID[name]
    assert calls(fused(body, LINE, **layers()))["conv1d"] == left


def test_sides_of_two_axes_are_not_mistaken() -> None:
    result = fused(lambda m, x: m.open(F.pad(x, (0, 2, 2, 0))) + m.b(x) + x, X, **layers())
    assert calls(result) == {"constant_pad_nd": 1, "conv2d": 1}
    pads = [node.args[1] for node in result.model.graph.nodes if "pad_nd" in str(node.target)]
    assert pads == [[0, 2, 2, 0]]


def test_other_lengths_are_kept_where_one_side_is_padded() -> None:
    sizes = ({2: Dim("length", min=3, max=64)},)
    result = fused(PADDED["causal ones"][-1], LINE, dynamic=sizes, **layers())
    assert calls(result) == {"constant_pad_nd": 1, "conv1d": 1}
    assert result.model.module()(torch.randn(2, 8, 33)).shape == (2, 8, 33)


def read_again(m: Model, x: Tensor) -> object:
    y = m.a(x)
    return y + m.b(x), y


def written_to(m: Model, x: Tensor) -> object:
    y = F.relu(x)
    seen = y[:, 1:]
    a = m.a(y)
    y.mul_(2)
    return a + m.b(y), seen


STAYS: dict[str, tuple[str, Callable[[Model, Tensor], object]]] = {
    "a branch that is read again": ("", read_again),
    "an input that is changed between, which others see": ("is changed in place", written_to),
    "a pool that counts no padding": (
        "",
        lambda m, x: m.a(x) + F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
    ),
    "another stride": ("", lambda m, x: m.s3(x)[:, :8, :4, :3] + m.a(x)[:, :, :4, :3]),
    "sides that need a larger kernel": (
        "Merged, it would take",
        lambda m, x: m.open(F.pad(x, (2, 0, 2, 0))) + m.open(F.pad(x, (0, 2, 0, 2))),
    ),
    "a padding off the grid": (
        "do not lie on one grid",
        lambda m, x: m.k3d(F.pad(y := x[:, :, 0], (3, 1))) + m.k1(y),
    ),
    "a padding of ones": (
        "",
        lambda m, x: m.k3(F.pad(y := x[:, :, 0], (2, 0), value=1.0)) + m.k1(y),
    ),
    "a norm before a padding": (
        "The zeros of its padding are not shifted",
        lambda m, x: m.open(F.pad(m.bn(x), (0, 2, 0, 2))) + m.a(x),
    ),
    "broadcasting": ("", lambda m, x: m.a(x) + m.b(x).mean((2, 3), keepdim=True)),
}


@pytest.mark.parametrize("name", STAYS)
def test_it_stays(name: str) -> None:
    reason, body = STAYS[name]
    result = fused(body, X, "branches", **layers())
    assert "branches" not in rules(result)
    assert reason in reasons(result)
