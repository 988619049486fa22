"""TorchScript modules as a phone runs them best: frozen, folded, with numbers for constants."""

import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.backends.xnnpack
from torch._C import _MobileOptimizerType as MobileOptimizerType
from torch.utils import mobile_optimizer

from torchfuse.errors import InputError, QuantizationWarning, UnsupportedError
from torchfuse.isolation.warning_filters import known_warnings_ignored

__all__ = ["folded", "frozen", "nodes", "optimize_for_mobile", "without_data"]

_OPTIMIZATIONS: Any = MobileOptimizerType  # its stub has no members


def optimize_for_mobile(
    script_module: torch.jit.ScriptModule,
    optimization_blocklist: Collection[MobileOptimizerType] | None = None,
    preserved_methods: Iterable[str] | None = None,
    backend: str = "CPU",
) -> torch.jit.ScriptModule:
    """Return `script_module` as a phone runs it best: in eval mode, frozen, and folded.

    A drop-in for torch.utils.mobile_optimizer.optimize_for_mobile, which raises in a build without
    XNNPACK. Batch norms and constant additions and factors are folded into convs and linears, add
    followed by ReLU becomes one operator, dropout goes, packed int8 weights become constants, and
    what convert left as tensors of one element where the interpreter wants numbers becomes
    numbers. Only the rewriting into XNNPACK's prepacked operators is left to torch's own, which is
    used where the build has XNNPACK. `script_module` itself is unchanged. The result is saved with
    `torch.jit.save` or with its `_save_for_lite_interpreter`.

    Args:
        script_module: what torch.jit.script or torch.jit.trace returned, in any mode.
        optimization_blocklist: what is not to be done, of torch's `MobileOptimizerType`.
            CONV_BN_FUSION leaves all folding out. INSERT_FOLD_PREPACK_OPS needs no mention without
            XNNPACK, and HOIST_CONV_PACKED_PARAMS changes nothing: freezing does that by itself.
        preserved_methods: methods to keep besides `forward` and those of bundled inputs.
        backend: "CPU"; torchfuse optimizes for no other.

    Warns:
        QuantizationWarning: int8 operators have the scale and the zero point of no data.

    Raises:
        InputError: no ScriptModule, a method or an optimization that does not exist, or a backend
            that nobody knows.
        UnsupportedError: the backend is "Vulkan" or "Metal".
    """
    blocked = _checked_blocklist(script_module, optimization_blocklist, backend)
    optimized = folded(script_module, blocked, _preserved(script_module, preserved_methods))
    if note := without_data(optimized):
        warnings.warn(f"The model was {note}.", QuantizationWarning, stacklevel=2)
    return optimized


def folded(
    module: torch.jit.ScriptModule,
    blocked: Collection[MobileOptimizerType] = (),
    preserved: Sequence[str] = (),
) -> torch.jit.ScriptModule:
    """Return what `optimize_for_mobile` returns, of arguments that are known to be right."""
    if torch.backends.xnnpack.enabled:  # type: ignore[attr-defined]  # set when imported
        optimized: torch.jit.ScriptModule = mobile_optimizer.optimize_for_mobile(
            module, set(blocked), list(preserved)
        )
        for graph in _graphs(optimized):
            _make_constants_scalar(graph)
        return optimized
    optimized = frozen(module, preserved)
    numerics = _OPTIMIZATIONS.CONV_BN_FUSION not in blocked
    for graph in _graphs(optimized):
        if _OPTIMIZATIONS.REMOVE_DROPOUT not in blocked:
            torch._C._jit_pass_optimize_frozen_graph(graph, numerics)
        elif numerics:
            while any(fold(graph) for fold in _FOLDS):  # one may make room for another
                pass
        if _OPTIMIZATIONS.FUSE_ADD_RELU not in blocked:
            torch._C._jit_pass_fuse_add_relu(graph)  # type: ignore[attr-defined]  # not in its stub
    # As torch's own does, for whoever asks whether it was done.
    optimized._c._register_attribute("mobile_optimized", torch._C.BoolType.get(), True)
    return optimized


def frozen(module: torch.jit.ScriptModule, preserved: Sequence[str] = ()) -> torch.jit.ScriptModule:
    """Return `module` in eval mode and frozen, with nothing fused or folded."""
    parts: list[Any] = [part._c for part in module.modules()]
    parts = [part for part in parts if part.hasattr("training")]  # what was frozen before has not
    modes = [part.getattr("training") for part in parts]
    try:
        for part in parts:
            part.setattr("training", False)
        with known_warnings_ignored():
            bare = torch._C._freeze_module(module._c, list(preserved))
    finally:  # the branches for training are gone from the copy; the module keeps its mode
        for part, mode in zip(parts, modes, strict=True):
            part.setattr("training", mode)
    result: torch.jit.ScriptModule = torch.jit._recursive.wrap_cpp_module(bare)
    for graph in _graphs(result):
        _make_constants_scalar(graph)
    return result


def without_data(module: torch.jit.ScriptModule) -> str | None:
    """Return what is wrong if operators have a scale of 1 and a zero point of 0, else None.

    That is what torch.ao's convert gives where an observer has seen no data. The input's own may
    be right: those of pixels from 0 to 255.
    """
    pairs = [pair for graph in _graphs(module) for pair in _quantization_parameters(graph)]
    bare = [operator for operator, scale, zero_point in pairs if (scale, zero_point) == (1.0, 0)]
    if not bare or (set(bare) == {"quantize_per_tensor"} and len(bare) < len(pairs)):
        return None
    return (
        f"converted without data: {len(bare)} of {len(pairs)} int8 operators "
        f"({', '.join(dict.fromkeys(bare))}) have a scale of 1 and a zero point of 0, so that it "
        "computes something else than the model in float, and only its latency can be measured; "
        "between prepare and convert, call model.eval() and run the model on a hundred or so of "
        "its inputs (for x in inputs: model(x))"
    )


_FOLDS = (
    torch._C._jit_pass_fold_frozen_conv_bn,
    torch._C._jit_pass_fold_frozen_conv_add_or_sub,
    torch._C._jit_pass_fold_frozen_conv_mul_or_div,
    torch._C._jit_pass_fold_frozen_linear_bn,  # type: ignore[attr-defined]  # not in its stub
)


def _checked_blocklist(
    module: Any, blocklist: Collection[MobileOptimizerType] | None, backend: str
) -> Collection[MobileOptimizerType]:
    if not isinstance(module, torch.jit.ScriptModule):
        raise InputError(
            f"Expected a ScriptModule, got {type(module).__name__}; make one of the model first, "
            "with torch.jit.script(model)."
        )
    name = str(backend).lower()
    if name in ("vulkan", "metal"):
        raise UnsupportedError(
            f"torchfuse optimizes TorchScript for backend='CPU', not for {backend!r}, which "
            "torch.utils.mobile_optimizer does in a build of torch with that backend."
        )
    if name != "cpu":
        raise InputError(f"Expected the backend 'CPU', got {backend!r}.")
    wrong = [item for item in blocklist or () if not isinstance(item, MobileOptimizerType)]
    if wrong:
        raise InputError(
            "Expected a set of torch.utils.mobile_optimizer.MobileOptimizerType as "
            f"optimization_blocklist, got {wrong[0]!r} in it."
        )
    return blocklist or ()


def _preserved(module: torch.jit.ScriptModule, methods: Iterable[str] | None) -> list[str]:
    """Return the methods to keep, with those of bundled inputs if they are complete."""
    names = [str(method) for method in methods or ()]
    missing = [name for name in names if not hasattr(module, name)]
    if missing:
        have = ", ".join(module._c._method_names()) or "none"
        raise InputError(f"The module has no method {missing[0]!r} to preserve; it has {have}.")
    bundled = mobile_optimizer._get_bundled_inputs_preserved_attributes(module, names)
    if all(hasattr(module, name) for name in bundled):
        names += [name for name in bundled if name not in names]
    if not (names or module._c._has_method("forward")):
        raise InputError(
            "The module has no forward; name the methods to keep with preserved_methods."
        )
    return names


def _graphs(module: torch.jit.ScriptModule) -> Iterator[Any]:
    for name in module._c._method_names():
        yield module._c._get_method(name).graph


def nodes(block: Any) -> Iterator[Any]:
    """Yield the nodes of a graph or a block, nested blocks included."""
    for node in block.nodes():
        yield node
        for inner in node.blocks():
            yield from nodes(inner)


def _make_constants_scalar(graph: Any) -> None:
    """Turn constant tensors of one element into numbers where an operator takes a number.

    torch.ao's convert gives quantized batch norms a scale and a zero point of one dimension, which
    eager takes and the interpreter refuses once it runs: "Cannot input a tensor of dimension other
    than 0 as a scalar argument".
    """
    for kind in ("aten::FloatImplicit", "aten::IntImplicit"):
        for node in graph.findAllNodes(kind):
            value = node.input().toIValue()
            if isinstance(value, torch.Tensor) and value.numel() == 1:
                with graph.insert_point_guard(node):
                    number = graph.insertConstant(value.item())
                node.output().replaceAllUsesWith(number)
                node.destroy()


def _quantization_parameters(graph: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield each operator that makes a quantized tensor, with its scale and zero point."""
    for node in nodes(graph):
        namespace, _, operator = node.kind().partition("::")
        if namespace != "quantized" and operator != "quantize_per_tensor":
            continue
        names = [argument.name for argument in torch._C.parse_schema(node.schema()).arguments]
        at = next((i for i, name in enumerate(names) if "zero_point" in name), None)
        if at is not None:  # the scale is the argument before
            yield operator, node.inputsAt(at - 1).toIValue(), node.inputsAt(at).toIValue()
