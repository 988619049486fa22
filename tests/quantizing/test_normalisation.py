"""The normalisation of pixels is folded exactly, also where a convolution pads."""

import pytest
import torch
from torch import Tensor, nn

from torchfuse import Preprocessing, WithPreprocessing
from torchfuse.inputs import Case
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
    assert not graph.graph.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor)
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


def test_int8_holds_every_pixel_as_it_is() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
    whole = WithPreprocessing(model.eval(), EIGHT)
    data = [pixels(seed) // 2 for seed in range(12)]  # no bright ones among them
    result = quantize(whole, data[0], data, recovery=["careful_ranges"])
    first = next(n for n in result.model.graph.nodes if n.name == "quantize_per_tensor_default")
    assert first.args[1:3] == (1.0, -128)  # scale, zero point
