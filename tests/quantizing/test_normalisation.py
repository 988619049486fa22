"""The normalisation of pixels is folded exactly, also where a convolution pads."""

import pytest
import torch
from torch import Tensor, nn

from torchfuse import Preprocessing, WithPreprocessing
from torchfuse.cases import Case
from torchfuse.quantizing import quantize, static
from torchfuse.quantizing.normalisation import FLOAT

EIGHT = Preprocessing(size=(8, 8), mean=(0.485, 0.2, 0.7), std=(0.229, 0.1, 0.4))


def pixels(seed: int, size: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (1, size, size, 3), dtype=torch.uint8, generator=generator)


def graph_of(model: nn.Module, data: list[Tensor]) -> torch.fx.GraphModule:
    cases = [Case((x,)) for x in data]
    return static.float_graph(model.eval(), cases[0], cases, None)


class TwoReaders(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.padding = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.narrow = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.padding(x) + self.narrow(x)


@pytest.mark.parametrize(
    "model",
    [
        nn.Conv2d(3, 4, 3, padding=2),
        nn.Conv2d(3, 4, 3, stride=2),
        nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)),
        TwoReaders(),
    ],
    ids=["padding", "no padding", "no bias", "two readers"],
)
def test_what_is_folded_computes_the_same_up_to_the_border(model: nn.Module) -> None:
    torch.manual_seed(0)
    whole = WithPreprocessing(model.eval(), EIGHT)
    graph = graph_of(whole, [pixels(0)])
    assert graph.graph.find_nodes(op="call_function", target=torch.ops.aten.constant_pad_nd.default)
    for seed in range(3):
        assert torch.allclose(graph(pixels(seed)), whole(pixels(seed)), atol=2e-5)


def test_sizes_may_still_differ() -> None:
    whole = WithPreprocessing(nn.Conv2d(3, 4, 3, padding=1).eval(), EIGHT)
    graph = graph_of(whole, [pixels(0), pixels(1, size=12)])
    assert torch.allclose(graph(pixels(2, 12)), whole(pixels(2, 12)), atol=2e-5)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_what_cannot_be_folded_stays_in_float(layout: str) -> None:
    class Halving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.head = nn.Linear(192, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x.flatten(1))

    preprocessing = Preprocessing(size=(8, 8), layout=layout)
    whole = WithPreprocessing(Halving().eval(), preprocessing)
    graph = graph_of(whole, [pixels(0)])
    assert [node.name for node in graph.graph.nodes if FLOAT in node.meta] == ["mul", "add"]
    result = quantize(whole, pixels(0), [pixels(seed) for seed in range(12)])
    for node in result.model.graph.nodes:
        if node.target in (torch.ops.aten.mul.Tensor, torch.ops.aten.add.Tensor):
            assert not any("dequantize" in source.name for source in node.all_input_nodes)


@pytest.mark.parametrize("recovery", [(), ("careful_ranges",)])
def test_int8_holds_every_pixel_as_it_is(recovery: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
    whole = WithPreprocessing(model.eval(), EIGHT)
    data = [pixels(seed, 16) // 2 for seed in range(12)]  # no bright ones among them
    result = quantize(whole, data[0], data, recovery=recovery)
    graph = result.model.graph
    first = next(n for n in graph.nodes if n.name.startswith("quantize_per_tensor"))
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).expand(-1, -1, -1, 3)
    seen = {}
    interpreter = torch.fx.Interpreter(result.model)
    run_node = interpreter.run_node
    interpreter.run_node = lambda n: seen.setdefault(n.name, run_node(n))  # type: ignore[method-assign]
    interpreter.run(levels.contiguous())
    steps = seen[first.name][0, :3].flatten(1).sort().values.diff(dim=1)
    assert (steps == 1).all()


def test_the_weights_rounding_does_not_meet_the_mean() -> None:
    """Pixels as they are, around 116, would be multiplied by it."""
    torch.manual_seed(0)
    model = nn.Conv2d(3, 16, 3, padding=1).eval()
    whole = WithPreprocessing(model, Preprocessing(size=(8, 8)))
    data = [pixels(seed) for seed in range(20)]
    result = quantize(whole, data[0], data)
    plain = [Preprocessing(size=(8, 8)).normalised(x) for x in data]
    outside = quantize(model, plain[0], plain)
    with torch.no_grad():
        expected = torch.cat([model(x) for x in plain])
        inside_noise = torch.cat([result.model(x) for x in data]) - expected
        outside_noise = torch.cat([outside.model(x) for x in plain]) - expected
    assert inside_noise.square().sum() < outside_noise.square().sum()
