"""Lowering without waste gives the same bytes, and leaves torch and ExecuTorch as they were."""

import hashlib
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.traceback import NodeSource

from torchfuse.cases import Case
from torchfuse.isolation.warning_filters import known_warnings_ignored
from torchfuse.lowering.capture import capture
from torchfuse.quantizing import quantize
from torchfuse.targets.executorch import fast_lowering


class Attention(nn.Module):
    def forward(self, q: Tensor, mask: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask)


class Network(nn.Module):
    """Branches, a batch norm that stays, an activation, a concatenation, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.hardtanh(self.first(x), 0.0, 6.0)
        z = torch.cat([self.bn(y) + y, self.depthwise(y)], dim=1)
        return self.head(z.mean((2, 3)))


def plainly(program: torch.export.ExportedProgram) -> bytes:
    """Lower as ExecuTorch's documentation does."""
    with known_warnings_ignored():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
        return bytes(edge.to_executorch().buffer)


def dynamic() -> tuple[nn.Module, Case, Any]:
    return Network().eval(), Case((torch.randn(2, 3, 8, 8),)), ({0: torch.export.Dim("n", max=4)},)


def int8() -> tuple[nn.Module, Case, Any]:
    x = torch.randn(1, 3, 8, 8)
    return quantize(Network().eval(), x, torch.randn(4, 3, 8, 8)).model, Case((x,)), None


def interpolation() -> tuple[nn.Module, Case, Any]:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Upsample(scale_factor=2, mode="bilinear")).eval()
    return model, Case((torch.randn(1, 3, 6, 6),)), None


def attention() -> tuple[nn.Module, Case, Any]:
    return Attention(), Case((torch.randn(1, 2, 8, 4), torch.zeros(8, 8))), None


class Decomposed(nn.Module):
    """Operators that decompose into one call, into several, into views, and of several outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding="same")
        self.groups = nn.GroupNorm(2, 8)
        self.layer = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.groups(self.conv(x)).chunk(2, dim=1)[0]
        z = nn.functional.adaptive_avg_pool2d(nn.functional.pixel_shuffle(y, 2), 4).flatten(1)
        return nn.functional.glu(z), self.conv(x), self.layer(x.var(dim=1))


def decomposed() -> tuple[nn.Module, Case, Any]:
    return Decomposed().eval(), Case((torch.randn(1, 3, 8, 8),)), None


@pytest.mark.parametrize("build", [dynamic, int8, interpolation, attention, decomposed])
def test_the_bytes_are_those_of_the_plain_calls(build: Any) -> None:
    torch.manual_seed(0)
    program = capture(*build())
    with fast_lowering.without_waste():
        fast = plainly(program)
    assert hashlib.sha256(fast).hexdigest() == hashlib.sha256(plainly(program)).hexdigest()


def test_a_program_whose_convolutions_decompose_is_not_traced_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = import_module("torch.export.exported_program")
    trace, traces = module._decompose_exported_program, []

    def counted(*args: Any, **kwargs: Any) -> Any:
        traces.append(args)
        return trace(*args, **kwargs)

    monkeypatch.setattr(module, "_decompose_exported_program", counted)
    program = capture(nn.Conv2d(3, 4, 3).eval(), Case((torch.randn(1, 3, 6, 6),)))
    plainly(program)
    assert len(traces) == 3  # to functionalize, and twice for the convolution
    traces.clear()
    with fast_lowering.without_waste():
        plainly(program)
    assert len(traces) == 1


def test_everything_is_as_before_afterwards_and_after_an_error() -> None:
    with known_warnings_ignored():
        from executorch.backends.xnnpack._passes import XNNPACKPassManager
        from executorch.exir.pass_base import _ExportPassBase
        from executorch.exir.verification import verifier

    def replaceable() -> list[Any]:
        return [
            fx.GraphModule.recompile,
            torch.export.ExportedProgram.run_decompositions,
            XNNPACKPassManager.transform,
            _ExportPassBase.call,
            verifier._check_tensor_args_matching_op_allowed_dtype,
            hasattr(NodeSource, "__deepcopy__"),
        ]

    before = replaceable()
    with fast_lowering.without_waste(), fast_lowering.without_waste():
        assert all(ours != theirs for ours, theirs in zip(replaceable(), before, strict=True))
    assert replaceable() == before

    def fail() -> None:
        with fast_lowering.without_waste():
            raise ValueError

    with pytest.raises(ValueError, match=r"^$"):
        fail()
    assert replaceable() == before


def test_a_graph_that_was_not_compiled_is_when_someone_looks() -> None:
    graph = fx.Graph()
    graph.output(graph.call_function(torch.relu, (graph.placeholder("x"),)))
    with fast_lowering.without_waste():
        module = fx.GraphModule(nn.Module(), graph)
        module.graph.output_node().replace_input_with(
            module.graph.output_node().args[0], next(iter(module.graph.nodes))
        )
        module.recompile()
    assert "forward" not in vars(type(module)) or "return x" in module.code
    torch.testing.assert_close(module(torch.tensor([-1.0])), torch.tensor([-1.0]))
    assert "return x" in module.code


def handed_on(_: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
    return given


def another_operator(_: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
    return (torch.ops.aten.sigmoid.default, *given[1:])


def another_keyword(_: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
    return (*given[:2], {**given[2], "alpha": 1}, given[3])


def other_metadata(_: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
    given[3]["seen"] = True
    return given


def needs_a_trace(pass_: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
    pass_.tracer.create_proxy("call_function", *given[:3])
    return given


@pytest.mark.parametrize(
    ("change", "is_handed_on"),
    [
        (handed_on, True),
        (another_operator, False),
        (another_keyword, False),
        (other_metadata, False),
        (needs_a_trace, False),
    ],
)
def test_only_a_pass_that_hands_every_call_on_as_it_is_traces_nothing(
    change: Any, is_handed_on: bool
) -> None:
    with known_warnings_ignored():
        from executorch.exir.pass_base import ExportPass

    class Pass(ExportPass):
        def call_operator(self, *given: Any) -> Any:
            return super().call_operator(*change(self, given))

    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU()).eval()
    graph_module = torch.export.export(model, (torch.ones(1, 3),)).graph_module
    assert fast_lowering._hands_on_every_call(Pass(), graph_module) is is_handed_on


def test_a_graph_that_was_changed_is_verified_again() -> None:
    with known_warnings_ignored():
        from executorch.exir.verification import verifier

    checked: list[fx.GraphModule] = []
    graph = fx.Graph()
    relu = graph.call_function(torch.relu, (graph.placeholder("x"),))
    graph.output(relu)
    module = fx.GraphModule(nn.Module(), graph)
    with pytest.MonkeyPatch.context() as patch:
        name = "_check_tensor_args_matching_op_allowed_dtype"
        patch.setattr(verifier, name, checked.append)
        with fast_lowering.without_waste():
            for target in (torch.relu, torch.relu, torch.sigmoid):
                relu.target = target
                getattr(verifier, name)(module)
    assert len(checked) == 2


@pytest.mark.parametrize("patterns", fast_lowering._PATTERNS, ids=lambda p: p.function)
def test_a_pattern_that_is_left_out_needs_an_operator_that_is_looked_for(patterns: Any) -> None:
    with known_warnings_ignored():
        made = getattr(import_module(patterns.module), patterns.function)()
    assert made
    for pattern in made:
        assert not fast_lowering.operators(pattern.graph).isdisjoint(patterns.operators)
