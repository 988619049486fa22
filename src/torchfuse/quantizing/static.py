"""Static int8 by torchao's PT2E: a float graph, the graph with observers, the graph in int8.

The observers, the annotation and the conversion are torchao's and ExecuTorch's.
"""

import contextlib
import dataclasses
import importlib.util
import inspect
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from torchfuse.cases import Case
from torchfuse.errors import CalibrationError, UnsupportedError, first_line
from torchfuse.isolation.warning_filters import known_warnings_ignored
from torchfuse.lowering.capture import capture
from torchfuse.quantizing.calibration import elements
from torchfuse.quantizing.layerwise import attribute
from torchfuse.quantizing.normalisation import FLOAT, RANGE, fold_normalisation
from torchfuse.quantizing.preprocessing import WithPreprocessing
from torchfuse.verifying.outputs import run

__all__ = [
    "LAYERS",
    "QuantizedLayer",
    "argument_names",
    "as_xnnpack_runs_it",
    "by_argument_name",
    "converted",
    "float_graph",
    "group_count",
    "is_quantized_graph",
    "keep_integers",
    "layers_of",
    "module_path",
    "prepared",
    "require_quantizer",
    "widest",
]

_MODULES = ("executorch", "torchao")
LAYERS = {
    torch.ops.aten.conv1d.default: "conv1d",
    torch.ops.aten.conv2d.default: "conv2d",
    torch.ops.aten.conv3d.default: "conv3d",
    torch.ops.aten.conv_transpose1d.default: "conv_transpose1d",
    torch.ops.aten.conv_transpose2d.input: "conv_transpose2d",
    torch.ops.aten.conv_transpose3d.input: "conv_transpose3d",
    torch.ops.aten.linear.default: "linear",
    torch.ops.aten.matmul.default: "matmul",
    torch.ops.aten.bmm.default: "matmul",
}

# What else multiplies and accumulates, by the operator's name: none of it is ever quantized.
_NEVER_INT8 = {
    "lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell",
    "rnn_relu_cell", "bilinear", "einsum",
}  # fmt: skip

# With `careful`; and how many steps of its scale a bias may be large, of 2³¹.
_LEAST_SCALE = 2.0**-24
_LARGEST_BIAS = 2.0**28

_CLAMPS = {
    torch.ops.aten.hardtanh.default,
    torch.ops.aten.hardtanh_.default,
    torch.ops.aten.relu6.default,
    torch.ops.aten.relu6_.default,
}

_PADS = {torch.ops.aten.pad.default, torch.ops.aten.constant_pad_nd.default}
# Beside views and what ExecuTorch's quantizer knows: nothing new comes out of them but zeros.
_KEEPING_RANGES = {
    *_CLAMPS,
    *_PADS,
    torch.ops.aten.relu_.default,
    torch.ops.aten.clamp.default,
    torch.ops.aten.clamp_.default,
    torch.ops.aten.clamp_min.default,
    torch.ops.aten.clamp_max.default,
    # Gone from the program, so that what is before and after them meets.
    torch.ops.aten.clone.default,
    torch.ops.aten.dropout.default,
    torch.ops.aten.dropout_.default,
}


@dataclass(frozen=True)
class QuantizedLayer:
    """One operator with multiply-accumulates, and the precision it computes in."""

    module: str  # path of the module that called it; "" is the model itself
    operator: str
    int8: bool
    weights: int = dataclasses.field(default=0, compare=False)  # how many numbers; 0: it has none


def float_graph(
    model: nn.Module,
    example: Case,
    data: list[Case],
    dynamic_shapes: Any,
    *,
    for_xnnpack: bool = True,
) -> fx.GraphModule:
    """Return `model` as a graph in which no batch norm is left, that takes all cases of `data`.

    With `for_xnnpack`, operators are in the form in which XNNPACK takes them.

    Raises:
        CalibrationError: the model cannot run on the largest of the cases.
        UnsupportedError: torch.export cannot capture the model.
    """
    traced, dynamic_shapes = widest(model, example, data, dynamic_shapes)
    program = capture(model, traced, dynamic_shapes, for_xnnpack=for_xnnpack)
    with known_warnings_ignored():
        graph: fx.GraphModule = program.module(check_guards=False)
    _own_tensors(graph)
    _read_once(graph)
    keep_integers(graph)
    if isinstance(model, WithPreprocessing):
        fold_normalisation(graph)
    return graph


def widest(
    model: nn.Module, example: Case, data: list[Case], dynamic_shapes: Any
) -> tuple[Case, Any]:
    """Return the case to trace `model` on, and the dynamic shapes, so that all of `data` fits.

    Raises:
        CalibrationError: the model cannot run on the largest of the cases.
    """
    if dynamic_shapes is not None:
        return example, dynamic_shapes
    # The batch of the largest case, since torch.export takes a size of 1 for a constant.
    traced = max([example, *data], key=elements)
    _require_runs(model, traced)
    return traced, _differing_sizes(model, traced, [example, *data])


def keep_integers(graph: fx.GraphModule) -> None:
    """Write integers plus a number in a form that ExecuTorch's quantizer leaves alone.

    It turns the number of `add.Tensor` and `mul.Tensor` into a float tensor, also where the result
    is an index.
    """
    aten = torch.ops.aten
    scalar = {aten.add.Tensor: aten.add.Scalar, aten.mul.Tensor: aten.mul.Scalar}
    for node in graph.graph.nodes:
        value = node.meta.get("val")
        if node.target in scalar and isinstance(value, torch.Tensor):
            by_number = not isinstance(node.args[1], fx.Node)
            if by_number and not value.is_floating_point() and not value.is_complex():
                node.target = scalar[node.target]
    graph.recompile()


def _own_tensors(graph: fx.GraphModule) -> None:
    """Give the graph copies of the model's tensors, which it would otherwise share."""
    own: dict[int, Any] = {}
    for module in graph.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fresh = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
                module._parameters[name] = own.setdefault(id(parameter), fresh)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = own.setdefault(id(buffer), buffer.detach().clone())


def _read_once(graph: fx.GraphModule) -> None:
    """Give each call of a layer that is called several times a reading of its weights of its own.

    ExecuTorch's quantizer leaves all calls but the first in float.
    """
    for node in graph.graph.find_nodes(op="get_attr"):
        layers = [user for user in node.users if user.target in LAYERS]
        for user in layers[1:]:
            with graph.graph.inserting_after(node):
                again = graph.graph.get_attr(str(node.target))
            again.meta = dict(node.meta)
            user.replace_input_with(node, again)
    graph.recompile()


def prepared(
    graph: fx.GraphModule, keep_float: Collection[str] = (), *, careful: bool = False
) -> fx.GraphModule:
    """Return `graph` with observers where XNNPACK wants int8; `graph` is used up.

    `keep_float` names nodes of the graph that stay in float. With `careful`

    - ranges are as wide as what was seen, where a histogram would cut some off to be finer for the
      rest;
    - channels with small weights get scales as small: ExecuTorch's recipe takes none below 2⁻¹²,
      so that of weights up to 0.003 nothing but the sign is left;
    - a linear layer that makes an output makes it in float (weights in int8, inputs quantized as
      they come): on int8 scores, classes tie.
    """
    with known_warnings_ignored():
        from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
            get_symmetric_quantization_config,
        )
        from torchao.quantization.pt2e import MinMaxObserver, PerChannelMinMaxObserver
        from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e
        from torchao.quantization.pt2e.quantizer import ComposableQuantizer

        config = get_symmetric_quantization_config(is_per_channel=True)
        last: set[str] = set()
        if careful:
            last = {node.name for node in _output_linears(graph)} - set(keep_float)
            spec = dataclasses.replace(
                config.input_activation,
                observer_or_fake_quant_ctr=MinMaxObserver.with_args(eps=_LEAST_SCALE),
            )
            fine = dataclasses.replace(
                config.weight,
                observer_or_fake_quant_ctr=PerChannelMinMaxObserver.with_args(eps=_LEAST_SCALE),
            )
            config = dataclasses.replace(
                config, input_activation=spec, output_activation=spec, weight=fine
            )
        quantizer = _quantizer(
            config, lambda node: node.name not in {*keep_float, *last} and FLOAT not in node.meta
        )
        if last:
            dynamic = dataclasses.replace(
                get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True), weight=fine
            )
            quantizer = ComposableQuantizer(
                [_quantizer(dynamic, lambda node: node.name in last), quantizer]
            )
        with as_xnnpack_runs_it(graph):
            observed: fx.GraphModule = prepare_pt2e(graph, quantizer)
        _give_ranges(observed)
    return observed


def _give_ranges(observed: fx.GraphModule) -> None:
    """Exchange the observers of tensors whose range is known for some that have seen it."""
    from torchao.quantization.pt2e import MinMaxObserver

    for node in observed.graph.nodes:
        for user in node.users if RANGE in node.meta else ():
            if user.op != "call_module":
                continue
            given = observed.get_submodule(str(user.target))
            exact = MinMaxObserver(
                dtype=given.dtype,
                qscheme=torch.per_tensor_affine,
                quant_min=given.quant_min,
                quant_max=given.quant_max,
            )
            low, high = node.meta[RANGE]
            exact.min_val.fill_(low)
            exact.max_val.fill_(high)
            setattr(observed, str(user.target), exact)


def _quantizer(config: Any, wanted: Callable[[fx.Node], bool]) -> Any:
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import XNNPACKQuantizer

    quantizer = XNNPACKQuantizer().set_global(config).set_filter_function(wanted)
    # Activations before bare convs and linears, or each pair is quantized in between, over a
    # range of which the activation takes half away. Patterns with a batch norm match nothing
    # here, and exporting them takes seconds.
    quantizer.SUPPORTED_PATTERNS = sorted(
        (pattern for pattern in XNNPACKQuantizer.SUPPORTED_PATTERNS if not pattern.is_qat),
        key=lambda pattern: not pattern.name.endswith("_relu"),
    )
    return quantizer


def _output_linears(graph: fx.GraphModule) -> Iterator[fx.Node]:
    (output,) = (node for node in graph.graph.nodes if node.op == "output")
    for node in output.all_input_nodes:
        if node.target is torch.ops.aten.linear.default:
            yield node


def converted(calibrated: fx.GraphModule) -> fx.GraphModule:
    """Return a calibrated graph in int8; `calibrated` is used up."""
    _leave_room_for_biases(calibrated)
    with known_warnings_ignored():
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

        int8: fx.GraphModule = convert_pt2e(calibrated)
    return int8


def _leave_room_for_biases(calibrated: fx.GraphModule) -> None:
    """Keep the scales of weights so large that the biases, in units of theirs, fit into int32."""
    for node in calibrated.graph.nodes:
        observers: list[Any] = [
            calibrated.get_submodule(str(source.target))
            for source in node.args[:2]
            if isinstance(source, fx.Node) and source.op == "call_module"
        ]
        bias = node.args[2] if len(node.args) > 2 else None
        if node.target not in LAYERS or len(observers) != 2 or not isinstance(bias, fx.Node):
            continue
        inputs, weights = observers
        if bias.op != "get_attr" or not hasattr(inputs, "min_val"):
            continue
        values = attribute(calibrated, bias.target).abs()
        if not hasattr(weights, "ch_axis") or len(values) != len(weights.min_val):
            continue
        scale, _ = inputs.calculate_qparams()
        weights.eps = torch.maximum(weights.eps, values / (scale * _LARGEST_BIAS))


@contextlib.contextmanager
def as_xnnpack_runs_it(graph: fx.GraphModule) -> Iterator[None]:
    """Let ExecuTorch's quantizer annotate `graph` as XNNPACK's partitioner and kernels take it.

    - ReLU6 and Hardtanh after a conv or linear are taken into it; the quantizer only looks for
      `relu`.
    - What moves or clamps values has the range of what it is given, on both sides: XNNPACK refuses
      a slice, and clamps at the wrong values, where they differ. The quantizer's list lacks most.
    """
    from executorch.backends.xnnpack.quantizer import xnnpack_quantizer_utils
    from torchao.quantization.pt2e.quantizer import QuantizationAnnotation
    from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

    is_relu_node = xnnpack_quantizer_utils.is_relu_node
    shares_range = xnnpack_quantizer_utils._is_share_obs_or_fq_op

    def is_activation(node: fx.Node) -> bool:
        source = node.args[0] if node.args else None
        clamps = node.target in _CLAMPS and getattr(source, "target", None) in LAYERS
        return clamps or bool(is_relu_node(node))

    def keeps_range(operator: Any) -> bool:
        return operator in _KEEPING_RANGES or _is_view(operator) or bool(shares_range(operator))

    for node in graph.graph.nodes:
        if node.target in _PADS and not _pads_with_zeros(node):  # the value may be out of range
            node.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(_annotated=True)
    xnnpack_quantizer_utils.is_relu_node = is_activation
    xnnpack_quantizer_utils._is_share_obs_or_fq_op = keeps_range
    try:
        yield
    finally:
        xnnpack_quantizer_utils.is_relu_node = is_relu_node
        xnnpack_quantizer_utils._is_share_obs_or_fq_op = shares_range


def _is_view(operator: Any) -> bool:
    """Whether an operator by its schema returns one tensor that shares memory with its input."""
    schema = getattr(operator, "_schema", None)
    if schema is None or schema.is_mutable or len(schema.returns) != 1:
        return False
    (made,) = schema.returns
    return made.alias_info is not None and str(made.type) == "Tensor"


def _pads_with_zeros(node: fx.Node) -> bool:
    if node.target is torch.ops.aten.constant_pad_nd.default:
        return not any(node.args[2:])
    mode = node.args[2] if len(node.args) > 2 else "constant"
    return mode == "constant" and not any(node.args[3:])


def require_quantizer() -> None:
    """Raise UnsupportedError if PT2E or XNNPACK's recipe for it is not installed."""
    if missing := [name for name in _MODULES if importlib.util.find_spec(name) is None]:
        raise UnsupportedError(
            f"Quantizing for XNNPACK needs {' and '.join(missing)}, not installed here: "
            "pip install 'torchfuse[executorch]'."
        )


def is_quantized_graph(graph: fx.Graph) -> bool:
    """Return whether torchao has quantized a part of an exported graph."""
    operators = [str(node.target) for node in graph.nodes]
    return any("quantized_decomposed" in name or "torchao." in name for name in operators)


def layers_of(converted: fx.GraphModule) -> Iterable[QuantizedLayer]:
    """Yield the layers of an int8 graph, each with the precision it computes in."""
    for node in converted.graph.nodes:
        if node.target in LAYERS:
            operands = [source for source in node.args[:2] if isinstance(source, fx.Node)]
            yield QuantizedLayer(
                module=module_path(node),
                operator=LAYERS[node.target],
                int8=all("dequantize" in str(operand.target) for operand in operands),
                weights=_weights(converted, node),
            )
        elif (name := _operator(node)) in _NEVER_INT8:
            weights = _weights(converted, node)
            yield QuantizedLayer(module_path(node), name, int8=False, weights=weights)


def _operator(node: fx.Node) -> str:
    """The name of an aten operator, without its overload; "" for any other node."""
    packet = getattr(node.target, "overloadpacket", None)
    return "" if packet is None else str(packet.__name__)


def _weights(graph: fx.GraphModule, node: fx.Node) -> int:
    """How many numbers a layer's matrices hold, quantized or not."""
    count = 0
    for operand in node.all_input_nodes:
        source: Any = operand
        while any(word in str(source.target) for word in ("dequantize", "inner_tensor")):
            source = source.args[0]
        if source.op == "get_attr" and (tensor := attribute(graph, source.target)).dim() > 1:
            count += tensor.numel()
    return count


def group_count(node: fx.Node) -> int:
    """Return the groups of a layer's node: 1 for all but grouped convolutions."""
    return int(node.args[6]) if len(node.args) > 6 else 1  # type: ignore[arg-type]


def module_path(node: fx.Node) -> str:
    """Return the module that a node of an exported graph ran in; "" is the model itself."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return str(stack[-1][0]).removeprefix("L['self']").lstrip(".") if stack else ""


def _require_runs(model: nn.Module, case: Case) -> None:
    try:
        run(model, case)
    except Exception as error:
        raise CalibrationError(
            f"{type(model).__name__} cannot run on {case}, the largest of the calibration data and "
            f"the example: {first_line(error)}."
        ) from error


def _differing_sizes(model: nn.Module, traced: Case, others: list[Case]) -> Any:
    """Return torch.export's `dynamic_shapes` in which the sizes that differ are free, or None."""
    leaves, spec = pytree.tree_flatten((traced.args, dict(traced.kwargs)))
    free: list[dict[int, Any] | None] = [None] * len(leaves)
    for other in others:
        other_leaves, other_spec = pytree.tree_flatten((other.args, dict(other.kwargs)))
        if other_spec != spec:
            continue  # running the case will say what is wrong with it
        for position, (ours, theirs) in enumerate(zip(leaves, other_leaves, strict=True)):
            tensors = isinstance(ours, torch.Tensor) and isinstance(theirs, torch.Tensor)
            if tensors and ours.dim() == theirs.dim():
                for dim, (size, theirs_size) in enumerate(
                    zip(ours.shape, theirs.shape, strict=True)
                ):
                    if size != theirs_size:
                        free[position] = (free[position] or {}) | {dim: torch.export.Dim.AUTO}
    if not any(free):
        return None
    args, kwargs = pytree.tree_unflatten(free, spec)
    return by_argument_name(model, args, kwargs)


def argument_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of forward's arguments, in order; none where they are not to be known."""
    try:
        return tuple(inspect.signature(model.forward).parameters)
    except (TypeError, ValueError):
        return ()


def by_argument_name(model: nn.Module, args: Any, kwargs: Any) -> dict[str, Any]:
    """Return dynamic shapes by the names of forward's arguments, `*args` and `**kwargs` too."""
    return dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments)
