"""Whether fusing is worth it depends on what the target does on its own."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchfuse
from support.as_if_trained import as_if_trained
from torchfuse.fusing.worth import TARGETS, worth
from torchfuse.planning import Fusion, FusionPlan


def plan(*rules: str) -> FusionPlan:
    return FusionPlan("Net", (), tuple(Fusion(rule, ("a", "b"), 0, 0, 0) for rule in rules), ())


@pytest.mark.parametrize("target", ["executorch", "onnxruntime", "openvino"])
def test_a_target_that_folds_batch_norms_itself_gains_nothing(target: str) -> None:
    name = TARGETS[target].name
    assert worth(plan("conv_bn", "conv_bn"), target) == (
        f"Fusing is not worth it for {name}: it does all of this (2 fusions) itself."
    )


@pytest.mark.parametrize("target", ["eager", "torchscript"])
def test_a_target_that_folds_nothing_gains_all(target: str) -> None:
    expected = (
        f"Fusing is worth it for {TARGETS[target].name}: it does none of this (1 fusion) itself."
    )
    assert worth(plan("conv_bn"), target) == expected


def test_what_the_target_leaves_is_counted() -> None:
    sentence = worth(plan("conv_bn", "linear_bn", "conv_bn"), "onnxruntime")
    assert sentence == (
        "Fusing is worth it for ONNX Runtime only for 1 of 3 fusions (linear_bn): it does "
        "the others itself."
    )


def test_what_is_saved_by_what_the_target_leaves_is_said() -> None:
    fusions = (
        Fusion("conv_bn", ("a", "b"), 0, 999, 999),
        Fusion("branches", ("c", "d"), 0, 2_500_000, 1_234_567),
        Fusion("layer_chain", ("e", "f"), 0, None, None),
    )
    assert worth(FusionPlan("Net", (), fusions, ()), "executorch") == (
        "Fusing is worth it for ExecuTorch's XNNPACK lowering only for 2 of 3 fusions (branches, "
        "layer_chain): it does the others itself; that saves 1,234,567 multiply-adds and 2.50 MB "
        "of memory traffic."
    )


def test_no_fusion_is_nothing_to_gain() -> None:
    assert worth(plan(), "eager") == "There is nothing to gain from fusing: no fusion was found."


class _Block(nn.Module):
    def __init__(self, layer: nn.Module, norm: nn.Module):
        super().__init__()
        self.layer, self.norm = layer, norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.layer(x))


BLOCKS = {
    "conv_bn": (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), torch.randn(1, 3, 8, 8)),
    "conv_transpose_bn": (
        nn.ConvTranspose2d(4, 6, 2, groups=2),
        nn.BatchNorm2d(6),
        torch.randn(1, 4, 8, 8),
    ),
    "linear_bn": (nn.Linear(3, 4), nn.BatchNorm1d(4), torch.randn(5, 3)),
}


def _lowered_by_executorch(rule: str) -> str:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    layer, norm, inputs = BLOCKS[rule]
    program = torch.export.export(_Block(layer, norm).eval(), (inputs,))
    edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    return str(edge.exported_program().graph_module.code)


@pytest.mark.filterwarnings("ignore")  # ExecuTorch's own
@pytest.mark.parametrize("rule", ["conv_bn", "linear_bn"])
def test_executorch_folds_by_itself_what_the_table_says(rule: str) -> None:
    assert rule in TARGETS["executorch"].folds
    assert "batch_norm" not in _lowered_by_executorch(rule)


@pytest.mark.filterwarnings("ignore")  # ExecuTorch's own
def test_executorch_fails_on_a_grouped_transposed_conv_which_is_not_in_the_table() -> None:
    assert "conv_transpose_bn" not in TARGETS["executorch"].folds
    with pytest.raises(Exception, match="FuseBatchNormPass"):
        _lowered_by_executorch("conv_transpose_bn")


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated
@pytest.mark.parametrize("rule", BLOCKS)
def test_torchscript_frozen_folds_none_of_them(rule: str) -> None:
    layer, norm, inputs = BLOCKS[rule]
    traced = torch.jit.trace(_Block(layer, norm).eval(), inputs)
    frozen = torch.jit.freeze(traced, optimize_numerics=False)
    assert ("batch_norm" not in str(frozen.inlined_graph)) == (rule in TARGETS["torchscript"].folds)


@pytest.mark.filterwarnings("ignore")  # OpenVINO's own
@pytest.mark.parametrize("rule", BLOCKS)
def test_openvino_folds_by_itself_what_the_table_says(rule: str) -> None:
    openvino = pytest.importorskip("openvino")
    layer, norm, inputs = BLOCKS[rule]
    model = as_if_trained(_Block(layer, norm), lambda m: [m(torch.randn(4, *inputs.shape[1:]))])
    converted = openvino.convert_model(model, example_input=inputs)
    compiled = openvino.Core().compile_model(converted, "CPU")
    run = {
        node.get_rt_info()["layerType"].astype(str)
        for node in compiled.get_runtime_model().get_ordered_ops()
    }
    layers = run & {"Convolution", "Deconvolution", "FullyConnected"}
    assert len(layers) == 1
    rest = run - layers - {"Input", "Output", "Const", "Reorder", "Reshape"}
    assert (not rest) == (rule in TARGETS["openvino"].folds), run


def _onnx_nodes(rule: str) -> tuple[list[object], dict[str, Tensor]]:
    """The nodes of layer and batch norm as an ONNX graph has them, and their constants."""
    from onnx import helper

    layer, norm, _ = BLOCKS[rule]
    values = {"w": layer.weight, "b": layer.bias}
    values |= {"gamma": norm.weight, "beta": norm.bias}
    values |= {"mean": torch.randn(norm.num_features), "var": torch.rand(norm.num_features) + 0.5}
    kind, options = {
        "conv_bn": ("Conv", {}),
        "conv_transpose_bn": ("ConvTranspose", {"group": 2, "strides": [1, 1]}),
        "linear_bn": ("Gemm", {"transB": 1}),
    }[rule]
    return [
        helper.make_node(kind, ["x", "w", "b"], ["h"], **options),
        helper.make_node("BatchNormalization", ["h", "gamma", "beta", "mean", "var"], ["y"]),
    ], values


@pytest.mark.parametrize("rule", BLOCKS)
def test_onnx_runtime_folds_by_itself_what_the_table_says(rule: str, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    from onnx import helper, numpy_helper

    nodes, values = _onnx_nodes(rule)
    inputs = BLOCKS[rule][2]
    tensors = [numpy_helper.from_array(v.detach().numpy(), name) for name, v in values.items()]
    given, made = (
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        for name, shape in (("x", list(inputs.shape)), ("y", None))
    )
    graph = helper.make_graph(nodes, "block", [given], [made], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = runtime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    left = {node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node}
    assert ("BatchNormalization" not in left) == (rule in TARGETS["onnxruntime"].folds), left


class _Calls(nn.Module):
    def __init__(self, body: Callable[["_Calls", Tensor], Tensor], **modules: nn.Module):
        super().__init__()
        self.body = body
        for name, module in modules.items():
            setattr(self, name, module)
        self.register_buffer("c", torch.rand(4, 1, 1) + 0.5)
        self.register_buffer("d", torch.rand(4, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


MERGED = {
    "no_op": lambda: _Calls(lambda m, x: torch.relu(x + 0)),
    "cancelling": lambda: _Calls(lambda m, x: torch.relu(torch.neg(torch.neg(x)))),
    "layer_affine": lambda: _Calls(lambda m, x: m.a(x) * m.c + m.d, a=nn.Conv2d(4, 4, 3)),
    "affine_chain": lambda: _Calls(lambda m, x: torch.relu(x * m.c * m.d)),
    "affine_layer": lambda: _Calls(lambda m, x: m.a((x - m.d) * m.c), a=nn.Conv2d(4, 4, 3)),
    "pad_conv": lambda: _Calls(lambda m, x: m.a(F.pad(x, [1] * 4)), a=nn.Conv2d(4, 4, 3)),
    "layer_chain": lambda: nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4)),
    "branches": lambda: _Calls(
        lambda m, x: m.a(x) + m.b(x), a=nn.Conv2d(4, 4, 3, padding=1), b=nn.Conv2d(4, 4, 1)
    ),
}


def _programs(rule: str) -> list[torch.export.ExportedProgram]:
    """A program in which the rule finds something, and the same after it."""
    program = torch.export.export(MERGED[rule]().eval(), (torch.randn(1, 4, 8, 8),))
    result = torchfuse.fuse_exported(program)
    assert {fusion.rule for fusion in result.plan.fusions} == {rule}
    return [program, result.model]


@pytest.mark.filterwarnings("ignore")  # torch.onnx's own
@pytest.mark.parametrize("rule", MERGED)
def test_onnx_runtime_merges_by_itself_what_the_table_says(rule: str, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    left = []
    for program in _programs(rule):
        file = str(tmp_path / "made.onnx")
        torch.onnx.export(program, f=file, dynamo=True, external_data=False, verbose=False)
        options = runtime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        options.log_severity_level = 3
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        runtime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        nodes = onnx.load(tmp_path / "optimized.onnx").graph.node
        left.append(sum(node.op_type != "Reshape" for node in nodes))
    before, after = left
    assert (before == after) == (rule in TARGETS["onnxruntime"].folds), left


@pytest.mark.filterwarnings("ignore")  # OpenVINO's own
@pytest.mark.parametrize("rule", MERGED)
def test_openvino_merges_by_itself_what_the_table_says(rule: str) -> None:
    openvino = pytest.importorskip("openvino")
    left = []
    for program in _programs(rule):
        compiled = openvino.Core().compile_model(openvino.convert_model(program), "CPU")
        run = [
            node.get_rt_info()["layerType"].astype(str)
            for node in compiled.get_runtime_model().get_ordered_ops()
        ]
        left.append(sum(t not in ("Input", "Output", "Const", "Reorder", "Reshape") for t in run))
    before, after = left
    assert (before == after) == (rule in TARGETS["openvino"].folds), left
