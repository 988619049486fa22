"""What noise in a channel or a weight does at the outputs is predicted right."""

import pytest
import torch
from torch import Tensor, nn

from torchfuse.cases import Case
from torchfuse.quantizing import static
from torchfuse.quantizing.importance import importance

aten = torch.ops.aten


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_a_channels_importance_is_the_squared_weights_that_read_it() -> None:
    model = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 5)).eval()  # as one they would cost more
    cases = [Case((noise(1, 4, seed=seed),)) for seed in range(400)]
    graph = static.float_graph(model, cases[0], cases, None)
    first, _ = (n for n in graph.graph.nodes if n.target is aten.linear.default)
    found = importance(graph, [], cases)
    expected = len(cases) * model[1].weight.double().square().sum(0)
    assert torch.allclose(found.activations[first], expected.detach(), rtol=0.2)


def test_noise_that_is_added_to_a_conv_comes_out_as_predicted() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU6(), nn.Conv2d(4, 3, 3)).eval()
    cases = [Case((noise(1, 2, 9, 9, seed=seed),)) for seed in range(200)]
    graph = static.float_graph(model, cases[0], cases, None)
    activation = next(n for n in graph.graph.nodes if "hardtanh" in n.name or "relu6" in n.name)
    predicted = importance(graph, [], cases).activations[activation].sum() * 1e-4
    came_out = 0.0
    with torch.no_grad():
        for case in cases:
            inner = model[1](model[0](*case.args))
            shaken = inner + 1e-2 * torch.randn_like(inner) * (inner != 0)  # zeros are exact
            came_out += float((model[2](shaken) - model[2](inner)).square().sum())
    assert predicted == pytest.approx(came_out, rel=0.1)


def test_a_weights_importance_leaves_out_what_the_bias_takes_back() -> None:
    layer = nn.Linear(2, 3).eval()
    cases = [
        Case((noise(64, 2, seed=seed) * 0.1 + torch.tensor([0.0, 50.0]),)) for seed in range(20)
    ]
    graph = static.float_graph(layer, cases[0], cases, None)
    (node,) = (n for n in graph.graph.nodes if n.target is aten.linear.default)
    matters = importance(graph, [node], cases).weights[node]
    assert (matters < 64 * 20 * 0.1**2 * 4).all()  # 50² times as much without


def test_the_range_of_each_channel_is_that_of_the_data() -> None:
    cases = [Case((torch.tensor([[[[-1.0, 2.0]], [[0.0, 5.0]]]]) * k,)) for k in (1.0, 3.0)]
    graph = static.float_graph(nn.ReLU().eval(), cases[0], cases, None)
    found = importance(graph, [], cases)
    given = next(n for n in graph.graph.nodes if n.op == "placeholder")
    assert found.low[given].tolist() == [-3.0, 0.0]
    assert found.high[given].tolist() == [6.0, 15.0]
    assert found.largest(given).tolist() == [6.0, 15.0]


def test_operators_that_write_in_place_are_asked_about_as_they_were() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU6(inplace=True)).eval()
    cases = [Case((noise(1, 1, 4, 4, seed=seed),)) for seed in range(3)]
    graph = static.float_graph(model, cases[0], cases, None)
    found = importance(graph, [], cases)
    (conv,) = (n for n in graph.graph.nodes if n.target is aten.conv2d.default)
    assert (found.low[conv] < 0).all()


def test_a_model_that_no_gradient_goes_through_has_ranges_only() -> None:
    class Classes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.argmax(1)

    cases = [Case((noise(2, 3, seed=seed),)) for seed in range(3)]
    graph = static.float_graph(Classes().eval(), cases[0], cases, None)
    found = importance(graph, [], cases)
    assert not found.activations
    assert found.low
