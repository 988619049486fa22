"""Graphs that run on all samples side by side, from one layer to the next."""

import gc

import pytest
import torch
from torch import Tensor, fx, nn

from torchfuse.cases import Case
from torchfuse.quantizing.layerwise import attribute, set_attribute, steps

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # torch.cond's

aten = torch.ops.aten
LAYERS = (aten.conv2d.default, aten.linear.default, aten.matmul.default)
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


class TwoLinears(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.known = nn.Parameter(torch.randn(8, 4))


class OfConstantsOnly(TwoLinears):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(x + self.first(self.known[0]))


class ConstantFirst(TwoLinears):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.matmul(self.known, self.first(x).T).T[:, :4])


class WritesToWhatIsComputedFromAParameter(TwoLinears):
    def forward(self, x: Tensor) -> Tensor:
        known = self.known.clone()
        known[0].mul_(2)
        known[: x.shape[0]] += x
        torch._foreach_add_([known], [self.first(known)])
        return self.second(known)


class TakesOneOfTwoWays(TwoLinears):
    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.second(torch.cond(y.sum() > 0, lambda y: y + 1, lambda y: y - 1, (y,)))


def graph_of(model: nn.Module, *given: Tensor, dynamic: bool = False) -> fx.GraphModule:
    shapes = tuple({0: torch.export.Dim.AUTO} for _ in given) if dynamic else None
    return torch.export.export(model.eval(), given, dynamic_shapes=shapes).module()


def rows(*counts: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(count, 4, generator=generator) for count in counts]


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
    [
        (Net(), pictures(3)),
        (OfConstantsOnly(), rows(2, 2)),
        (ConstantFirst(), rows(4, 4)),
        (WritesToWhatIsComputedFromAParameter(), rows(5, 3, 6)),
        (TakesOneOfTwoWays(), rows(2, 2, 2, 2)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_each_layer_is_given_and_gives_what_a_plain_run_makes_of_each_case(
    model: nn.Module, data: list[Tensor]
) -> None:
    graph = graph_of(model, data[0], dynamic=len({x.shape for x in data}) > 1)
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
        before = [y.clone() for y in step.outputs]
        bias = step.node.args[2].target
        set_attribute(graph, bias, attribute(graph, bias) + 1)
        step.run_again()
        for was, y in zip(before, step.outputs, strict=True):
            torch.testing.assert_close(y, was + 1)


def test_a_layer_can_be_given_something_else() -> None:
    data = pictures(2)
    model = Net()
    first = next(steps(graph_of(model, data[0]), [Case((x,)) for x in data], LAYERS))
    for y, x in zip(first.called_on([2 * x for x in data]), data, strict=True):
        torch.testing.assert_close(y, model.first(2 * x))
