"""Graphs that run on all samples side by side, from one layer to the next."""

import gc

import pytest
import torch
from torch import Tensor, fx, nn

from torchfuse.inputs import Case
from torchfuse.quantizing.lockstep import attribute, set_attribute, steps

LAYERS = (torch.ops.aten.conv2d.default, torch.ops.aten.linear.default)
SIDE = 7  # of pictures: no other tensor of a test has this shape


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first(x))
        z = self.second(y).relu_() + y
        return self.head(z.mean((2, 3))) * 2


class ScaledInPlace(nn.Module):
    """A weight that is computed anew in each run, by an operator that writes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.clone()
        weight[0].mul_(2)
        return torch.nn.functional.linear(x, weight)


def graph_of(model: nn.Module, *given: Tensor) -> fx.GraphModule:
    return torch.export.export(model.eval(), given).module()


def pictures(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 3, SIDE, SIDE, generator=generator) for _ in range(count)]


class Recorded(fx.Interpreter):
    """What each node is given and gives, copied before anything writes to it."""

    def run_node(self, n: fx.Node) -> object:
        given = [a.clone() for a in self.fetch_args_kwargs_from_env(n)[0] if isinstance(a, Tensor)]
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.seen = {**getattr(self, "seen", {}), n: (given[:1], result.clone())}
        return result


@pytest.mark.parametrize(
    ("model", "data"),
    [(Net(), pictures(3)), (ScaledInPlace(), [torch.randn(2, 3) for _ in range(3)])],
)
def test_each_layer_is_given_and_gives_what_a_plain_run_makes_of_each_case(
    model: nn.Module, data: list[Tensor]
) -> None:
    graph = graph_of(model, data[0])
    plain = []
    for x in data:
        run = Recorded(graph)
        run.run(x.clone())
        plain.append(run.seen)
    found = 0
    for step in steps(graph, [Case((x,)) for x in data], LAYERS):
        found += 1
        for seen, x, y in zip(plain, step.inputs, step.outputs, strict=True):
            (wanted,), made = seen[step.node]
            torch.testing.assert_close((x, y), (wanted, made), rtol=0, atol=0)
    assert found == sum(node.target in LAYERS for node in graph.graph.nodes) > 0


def test_only_a_layers_own_inputs_and_outputs_are_in_memory() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()) for _ in range(6)])
    data = [Case((x,)) for x in pictures(4)]
    graph = graph_of(model, *data[0].args)

    def pictures_alive() -> int:
        gc.collect()
        shape = (1, 3, SIDE, SIDE)
        tensors = [thing for thing in gc.get_objects() if type(thing) is Tensor]
        return sum(tensor.shape == shape for tensor in tensors)

    before = pictures_alive()
    alive = [pictures_alive() - before for _ in steps(graph, data, LAYERS)]
    assert alive == [2 * len(data)] * 6


def test_a_layer_runs_again_with_parameters_that_were_changed() -> None:
    data = pictures(2)
    graph = graph_of(Net(), data[0])
    for step in steps(graph, [Case((x,)) for x in data], LAYERS):
        weight = step.node.args[1]
        assert torch.equal(step.constant(weight), attribute(graph, weight.target))
        before = [y.clone() for y in step.outputs]
        bias = step.node.args[2].target
        set_attribute(graph, bias, attribute(graph, bias) + 1)
        step.run_again()
        for was, y in zip(before, step.outputs, strict=True):
            torch.testing.assert_close(y, was + 1)
