"""The exported program that a target is given: as the model is, with half inside, or quantized."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from torchfuse.artifacts import Precision
from torchfuse.cases import Case
from torchfuse.errors import InputError, UnsupportedError
from torchfuse.isolation.model_copy import copied
from torchfuse.lowering.capture import ANY_SIZE, capture, input_shapes
from torchfuse.quantizing import is_quantized_graph, quantize
from torchfuse.quantizing.preconditions import has_quantized_modules
from torchfuse.quantizing.static import layers_of
from torchfuse.quantizing.unquantized import mostly_float
from torchfuse.targets.target import Request

__all__ = ["Captured", "captured", "in_float", "nested_as", "other_sizes", "weights_precision"]

_PRECISIONS: dict[torch.dtype, Precision] = {torch.float32: "fp32", torch.float16: "fp16"}


@dataclass(frozen=True)
class Captured:
    """A model as an exported program, and what the file made of it is to be compared with."""

    program: torch.export.ExportedProgram
    reference: nn.Module  # the model given, or the quantized one made of it
    precision: Precision
    other_cases: tuple[Case, ...]  # at other sizes
    known: tuple[str, ...]  # notes that the user was warned of when the model was quantized


def captured(
    request: Request,
    *,
    suffix: str,
    lacking: str,
    precisions: Collection[str] = ("fp32", "fp16", "int8", "int4"),
    for_xnnpack: bool = True,
) -> Captured:
    """Return the model of the request as an exported program in the precision asked for.

    int8 is XNNPACK's PT2E recipe. `lacking` says why other types of weights are refused. Without
    `for_xnnpack`, operators stay as they are that XNNPACK takes only in another form.

    Raises:
        InputError: the model is in another precision than was asked for.
        UnsupportedError: it cannot be captured, or was quantized by torch.ao.
    """
    model, case = request.model, request.examples[0]
    if has_quantized_modules(model):
        raise UnsupportedError(
            f"A model that torch.ao converted is for '.pt' and '.ptl'; for '{suffix}' give the "
            "model before prepare, with precision='int8' and calibration data."
        )
    reference = model
    if request.precision == "int8":
        result = quantize(model, case, request.calibration, dynamic_shapes=request.dynamic_shapes)
        reference = candidate = result.model
    else:
        candidate = _half_inside(model) if request.precision == "fp16" else model
    program = capture(
        candidate,
        case,
        request.dynamic_shapes,
        fold_batch_norms=request.optimize,
        for_xnnpack=for_xnnpack,
    )
    precision = _precision(program, lacking)
    if request.precision not in (None, precision):
        raise InputError(
            f"Expected a model that can be exported in {request.precision}, got one in "
            f"{precision}; leave precision out to export it as it is."
        )
    if precision not in precisions:
        raise UnsupportedError(
            f"Expected a model in {' or '.join(precisions)} for '{suffix}', got one in "
            f"{precision}; use '.pte'."
        )
    return Captured(
        program,
        reference,
        precision,
        tuple(other_sizes(program, case)),
        in_float(reference) if precision == "int8" else (),
    )


def in_float(model: nn.Module) -> tuple[str, ...]:
    """Return a note on what of a quantized model is in float, if that is most of it."""
    left = mostly_float(tuple(layers_of(model))) if isinstance(model, fx.GraphModule) else None
    return () if left is None else (f"quantized in part: {left}",)


def nested_as(loaded: Callable[..., Any], spec: pytree.TreeSpec) -> Callable[..., Any]:
    """Let a loaded file return what the model does, in the model's own types, to compare."""

    def run(*args: Any, **kwargs: Any) -> Any:
        return pytree.tree_unflatten(pytree.tree_leaves(loaded(*args, **kwargs)), spec)

    return run


def _half_inside(model: nn.Module) -> nn.Module:
    """Return a copy that computes in half precision, with arguments and results in float32."""
    half = copied(model).half()
    if isinstance(half, fx.GraphModule):
        half = _Calling(half)

    def to(source: torch.dtype, target: torch.dtype) -> Callable[[Any], Any]:
        def convert(value: Any) -> Any:
            is_source = isinstance(value, torch.Tensor) and value.dtype is source
            return value.to(target) if is_source else value

        return convert

    narrow, widen = to(torch.float32, torch.float16), to(torch.float16, torch.float32)
    # Hooks and not a wrapper, so that the names of the arguments stay those of forward.
    half.register_forward_pre_hook(
        lambda _, args, kwargs: pytree.tree_map(narrow, (args, kwargs)), with_kwargs=True
    )
    half.register_forward_hook(lambda _, __, output: pytree.tree_map(widen, output))
    return half


class _Calling(nn.Module):
    """A module that calls a graph: torch.export interprets a graph, and runs no hooks of it."""

    def __init__(self, model: fx.GraphModule) -> None:
        super().__init__()
        self.model = model
        self.training = model.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


def _precision(program: torch.export.ExportedProgram, lacking: str) -> Precision:
    if is_quantized_graph(program.graph):
        grouped = any("torchao." in str(node.target) for node in program.graph.nodes)
        return "int4" if grouped else "int8"
    return weights_precision(program.state_dict.values(), lacking)


def weights_precision(tensors: Iterable[torch.Tensor], lacking: str) -> Precision:
    """Return the precision that weights of these types make; `lacking` says why others do not."""
    dtypes = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
    for dtype in dtypes - set(_PRECISIONS):
        raise UnsupportedError(
            f"Expected weights in float32 or float16, got {dtype}, for which {lacking}; call "
            "model.float() first."
        )
    return "fp16" if dtypes == {torch.float16} else "fp32"


def other_sizes(program: torch.export.ExportedProgram, case: Case) -> Iterator[Case]:
    """Yield the case at the smallest, a middle and the largest of the declared sizes."""
    shapes = input_shapes(program)
    leaves, spec = pytree.tree_flatten((case.args, dict(case.kwargs)))
    ranges = {
        symbol: _range(allowed, _example_size(symbol, shapes, leaves))
        for symbol, allowed in program.range_constraints.items()
        if symbol.is_Symbol  # and not a size made of one, such as `4*s`
    }
    if not ranges:
        return
    for share in (0.0, 0.4, 1.0):
        sizes = {s: low + round(share * (high - low)) for s, (low, high) in ranges.items()}
        resized = [_resized(leaf, shape, sizes) for leaf, shape in zip(leaves, shapes, strict=True)]
        args, kwargs = pytree.tree_unflatten(resized, spec)
        yield Case(args, kwargs)


def _range(allowed: Any, example_size: int) -> tuple[int, int]:
    """Return the smallest and the largest size to try; of an endless range some around the example.

    `allowed` is what torch.export says of a size.
    """
    low = max(int(allowed.lower), 1)
    endless = not allowed.upper.is_finite or allowed.upper >= ANY_SIZE
    if not endless:
        return low, int(allowed.upper)
    return max(low, example_size), max(low, 2 * example_size)


def _example_size(symbol: Any, shapes: Iterable[Any], leaves: Iterable[Any]) -> int:
    """Return the size that the example has where the program has the symbol; 1: nowhere."""
    for shape, leaf in zip(shapes, leaves, strict=True):
        for size, actual in zip(shape or (), getattr(leaf, "shape", ()), strict=True):
            if not isinstance(size, int) and size.node.expr == symbol:
                return int(actual)
    return 1


def _resized(leaf: Any, shape: Any, sizes: Mapping[Any, int]) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    target = [size if isinstance(size, int) else int(size.node.expr.subs(sizes)) for size in shape]
    # The example's own values, repeated: in the range that the model expects, whatever that is.
    repeats = [-(-wanted // had) for wanted, had in zip(target, leaf.shape, strict=True)]
    return leaf.repeat(repeats)[tuple(slice(wanted) for wanted in target)].contiguous()
