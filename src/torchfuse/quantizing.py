"""Static int8 for mobile: calibrated activations, per-channel weights, by torchao's PT2E.

The observers, the annotation and the conversion are torchao's and ExecuTorch's. Here is what they
leave to the caller: a model with nothing left to fold, and calibration data that is fit for it.
"""

import contextlib
import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from torchfuse.checking import copy_tensors, run
from torchfuse.errors import CalibrationError, InputError, first_line
from torchfuse.inputs import Case, cases
from torchfuse.quieting import quiet
from torchfuse.restoring import put_back, random_state_kept
from torchfuse.targets import executorch

__all__ = [
    "QuantizationResult",
    "QuantizedLayer",
    "calibrate",
    "checked_calibration",
    "is_quantized_graph",
    "quantize",
    "require_eval_mode",
    "require_forward",
]

_BACKENDS = ("xnnpack",)

_LAYERS = {
    torch.ops.aten.conv1d.default: "conv1d",
    torch.ops.aten.conv2d.default: "conv2d",
    torch.ops.aten.conv3d.default: "conv3d",
    torch.ops.aten.conv_transpose1d.default: "conv_transpose1d",
    torch.ops.aten.conv_transpose2d.input: "conv_transpose2d",
    torch.ops.aten.conv_transpose3d.input: "conv_transpose3d",
    torch.ops.aten.linear.default: "linear",
    torch.ops.aten.matmul.default: "matmul",
}


_CLAMPS = {
    torch.ops.aten.hardtanh.default,
    torch.ops.aten.hardtanh_.default,
    torch.ops.aten.relu6.default,
    torch.ops.aten.relu6_.default,
}


@dataclass(frozen=True)
class QuantizedLayer:
    """One operator with multiply-accumulates, and the precision it computes in."""

    module: str  # path of the module that called it; "" is the model itself
    operator: str
    int8: bool


class QuantizationResult(NamedTuple):
    """The quantized model, ready for `export`, and what became of each layer."""

    model: nn.Module
    layers: tuple[QuantizedLayer, ...]


def quantize(
    model: nn.Module,
    example_inputs: Any,
    calibration: Any,
    *,
    backend: str = "xnnpack",
    dynamic_shapes: Any = None,
) -> QuantizationResult:
    """Return `model` in static int8, its activation ranges measured on `calibration`.

    `calibration` is like `example_inputs`, or any iterable of such cases: some dozens of inputs
    as the model will see them. Their batch and spatial sizes may differ from the example's.
    `model` itself is unchanged.

    Raises:
        CalibrationError: the calibration data is missing, empty, constant, or holds NaN or Inf, or
            the model cannot run on it.
        UnsupportedError: torch.export cannot capture the model.
    """
    if backend not in _BACKENDS:
        raise InputError(f"Expected backend 'xnnpack', got '{backend}'.")
    require_eval_mode(model)
    example = cases(example_inputs)[0]
    data = checked_calibration(calibration)
    require_forward([example, *data])
    traced = example
    if dynamic_shapes is None:
        # The batch of the largest case, since torch.export takes a size of 1 for a constant.
        traced = max([example, *data], key=_elements)
        _require_runs(model, traced)
        dynamic_shapes = _differing_sizes(model, traced, [example, *data])
    program = executorch.capture(model, traced, dynamic_shapes)
    with quiet(), random_state_kept():
        from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
            XNNPACKQuantizer,
            get_symmetric_quantization_config,
        )
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

        quantizer = XNNPACKQuantizer().set_global(
            get_symmetric_quantization_config(is_per_channel=True)
        )
        # Activations before bare convs and linears, or each pair is quantized in between, over a
        # range of which the activation takes half away. Patterns with a batch norm match nothing
        # here, and exporting them takes seconds.
        quantizer.SUPPORTED_PATTERNS = sorted(
            (pattern for pattern in XNNPACKQuantizer.SUPPORTED_PATTERNS if not pattern.is_qat),
            key=lambda pattern: not pattern.name.endswith("_relu"),
        )
        with _clamps_as_activations():
            prepared = prepare_pt2e(program.module(check_guards=False), quantizer)
        calibrate(prepared, data)
        converted = convert_pt2e(prepared)
    return QuantizationResult(converted, tuple(_layers(converted)))


@contextlib.contextmanager
def _clamps_as_activations() -> Iterator[None]:
    """Let ExecuTorch's quantizer take ReLU6 and Hardtanh after a conv or linear as it takes ReLU.

    XNNPACK's partitioner and kernels do; the quantizer only looks for `relu`.
    """
    from executorch.backends.xnnpack.quantizer import xnnpack_quantizer_utils

    is_relu_node = xnnpack_quantizer_utils.is_relu_node

    def is_activation(node: fx.Node) -> bool:
        source = node.args[0] if node.args else None
        clamps = node.target in _CLAMPS and getattr(source, "target", None) in _LAYERS
        return clamps or bool(is_relu_node(node))

    xnnpack_quantizer_utils.is_relu_node = is_activation
    try:
        yield
    finally:
        xnnpack_quantizer_utils.is_relu_node = is_relu_node


def require_eval_mode(model: nn.Module) -> None:
    """Raise InputError if `model` is no module, or a part of it is in training mode.

    Exported graphs have no modes.
    """
    if not isinstance(model, nn.Module):
        raise InputError(
            f"Expected a model, a torch.nn.Module, got {type(model).__name__}; a function becomes "
            "one as the `forward` of a class, and a result of fuse or quantize holds one as .model."
        )
    if isinstance(model, fx.GraphModule):
        return
    training = [
        name or "the model itself"
        for name, module in model.named_modules()
        if module.training and not isinstance(module, nn.Identity)  # put in place of another, often
    ]
    if training:
        raise InputError(
            f"Expected a model in eval mode, but {training[0]}"
            f"{f' and {len(training) - 1} more modules are' if training[1:] else ' is'} in "
            "training mode; call model.eval() first."
        )


def require_forward(given: list[Case]) -> None:
    """Raise InputError if a case calls another method than `forward`, the one that is exported."""
    for case in given:
        if case.method != "forward":
            raise InputError(
                f"Expected inputs of `forward`, the method that a file holds, got {case}; export a "
                f"module whose forward calls `{case.method}`."
            )


def is_quantized_graph(graph: fx.Graph) -> bool:
    """Return whether torchao has quantized a part of an exported graph."""
    return any("quantized_decomposed" in str(node.target) for node in graph.nodes)


def checked_calibration(calibration: Any) -> list[Case]:
    """Return the calibration data as cases, or raise CalibrationError if it is unfit."""
    if calibration is None:
        raise CalibrationError(
            "Expected calibration data, got None: static int8 needs the ranges of the activations, "
            "so give some dozens of inputs as the model will see them."
        )
    if isinstance(calibration, Iterable) and not isinstance(
        calibration, torch.Tensor | tuple | Mapping | list
    ):
        calibration = list(calibration)
    if isinstance(calibration, list) and not calibration:
        raise CalibrationError("The calibration data is empty; give at least one input.")
    data = cases(calibration)
    lowest: dict[int, float] = {}
    highest: dict[int, float] = {}
    for number, case in enumerate(data):
        for position, tensor in enumerate(_tensors(case)):
            if not tensor.numel():
                raise CalibrationError(
                    f"Calibration case {number}, {case}, has a tensor without elements."
                )
            if not tensor.isfinite().all():
                raise CalibrationError(
                    f"Calibration case {number}, {case}, holds NaN or Inf; leave such inputs out."
                )
            low, high = (float(extreme) for extreme in tensor.aminmax())
            lowest[position] = min(low, lowest.get(position, low))
            highest[position] = max(high, highest.get(position, high))
    if lowest == highest:
        raise CalibrationError(
            f"The calibration data is constant (every value is {lowest.get(0, 'missing')}), so it "
            "says nothing about the ranges of the activations; give real inputs."
        )
    return data


def _require_runs(model: nn.Module, case: Case) -> None:
    try:
        run(model, case)
    except Exception as error:
        raise CalibrationError(
            f"{type(model).__name__} cannot run on {case}, the largest of the calibration data and "
            f"the example: {first_line(error)}."
        ) from error


def calibrate(
    prepared: nn.Module, data: list[Case], *, buffers: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Run a model with observers in it on the calibration data.

    Every case is run on copies, with the `buffers` of the model itself (by name) as they are given.

    Raises:
        CalibrationError: the model cannot run on a case, or returns NaN or Inf.
    """
    for number, case in enumerate(data):
        try:
            args, kwargs = copy_tensors((case.args, dict(case.kwargs)))  # `forward` may write to it
            with torch.no_grad():
                outputs = prepared(*args, **kwargs)
                put_back(prepared, buffers or {})
        except Exception as error:
            raise CalibrationError(
                f"The model cannot run on calibration case {number}, {case}: {first_line(error)}."
            ) from error
        for output in pytree.tree_leaves(outputs):
            if isinstance(output, torch.Tensor) and not output.isfinite().all():
                raise CalibrationError(
                    f"The model returns NaN or Inf for calibration case {number}, {case}."
                )


def _tensors(case: Case) -> list[torch.Tensor]:
    leaves = pytree.tree_leaves((case.args, dict(case.kwargs)))
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def _elements(case: Case) -> int:
    return sum(tensor.numel() for tensor in _tensors(case))


def _differing_sizes(model: nn.Module, traced: Case, others: list[Case]) -> Any:
    """Return torch.export's `dynamic_shapes` in which the sizes that differ are free, or None."""
    leaves, spec = pytree.tree_flatten((traced.args, dict(traced.kwargs)))
    free: list[dict[int, Any] | None] = [None] * len(leaves)
    for other in others:
        other_leaves, other_spec = pytree.tree_flatten((other.args, dict(other.kwargs)))
        if other_spec != spec:
            continue  # running the case will say what is wrong with it
        for position, (ours, theirs) in enumerate(zip(leaves, other_leaves, strict=True)):
            if isinstance(ours, torch.Tensor) and isinstance(theirs, torch.Tensor):
                for dim, (size, theirs_size) in enumerate(
                    zip(ours.shape, theirs.shape, strict=False)
                ):
                    if size != theirs_size:
                        free[position] = (free[position] or {}) | {dim: torch.export.Dim.AUTO}
    if not any(free):
        return None
    args, kwargs = pytree.tree_unflatten(free, spec)
    # torch.export wants them by the names of forward's arguments, `*args` and `**kwargs` included.
    return dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments)


def _layers(converted: fx.GraphModule) -> Iterable[QuantizedLayer]:
    for node in converted.graph.nodes:
        if node.target in _LAYERS:
            operands = [source for source in node.args[:2] if isinstance(source, fx.Node)]
            yield QuantizedLayer(
                module=_module_path(node),
                operator=_LAYERS[node.target],
                int8=all("dequantize" in str(operand.target) for operand in operands),
            )


def _module_path(node: fx.Node) -> str:
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return str(stack[-1][0]).removeprefix("L['self']").lstrip(".") if stack else ""
