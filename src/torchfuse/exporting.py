"""A model to a file and back: `export` writes a file that was run and compared, `load` reads it.

The suffix chooses the target: `.pte` is ExecuTorch, `.pt` TorchScript, `.ptl` the lite interpreter.
"""

import hashlib
import itertools
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from torchfuse.artifacts import (
    Artifact,
    CheckedFile,
    Format,
    Precision,
    artifact_format,
    check,
    check_destination,
    check_options,
    seal_pte,
    seal_zip,
    write_atomically,
)
from torchfuse.checking import Equivalence, run, verify
from torchfuse.copying import copied
from torchfuse.delegation import Delegation, DelegationWarning
from torchfuse.errors import (
    ArtifactError,
    ExportWarning,
    InputError,
    TorchfuseError,
    UnsupportedError,
    first_line,
)
from torchfuse.file_inputs import described
from torchfuse.fusing import fuse
from torchfuse.inputs import Case, cases, require_finite_tensors, require_float32
from torchfuse.quantizing import (
    is_quantized_graph,
    quantize,
    read_calibration,
    require_converted,
    require_eval_mode,
    require_forward,
)
from torchfuse.quantizing.preprocessing import Preprocessing, WithPreprocessing
from torchfuse.quantizing.sensitivity import SignalToNoise
from torchfuse.quantizing.static import argument_names, layers_of
from torchfuse.quantizing.unquantized import mostly_float
from torchfuse.restoring import random_state_kept
from torchfuse.targets import executorch, mobile_optimizer, torchscript

__all__ = ["export", "load", "loaded"]

_FP16_MIN_SQNR_DB = 30.0
_FP16_MIN_SHARE = 0.98  # of the multiply-accumulates, below which it would be slower than fp32
# Kernels round int8 otherwise than torchao's simulation does, and dozens of layers multiply it:
# the program may be as far from the quantized model as that is from the model.
_INT8_MIN_SQNR_DB = 10.0  # against the quantized model
_INT8_LOSS_DB = 3.0  # against the model, compared with the quantized model's
_INT8_NO_LOSS_DB = 40.0  # above this, nobody asks which of the two is closer
_MOST_CASES = 8  # of the calibration data, on which it is judged beside the examples
_INT8_SUSPECT_DB = 12.0  # against the model, below which something is wrong, and likely the ranges


_TRACED = (  # as every note: what comes after "the file was"
    "traced, since scripting fails: {}; control flow that depends on data is frozen as it ran"
)
_SUSPECT = (
    "quantized to {:.1f} dB only (signal to noise against the model), most likely since it was "
    "calibrated on other data than it is meant for; give calibration inputs like the example's"
)

_RANDOM = (
    "calibrated on random inputs, so it is for measuring speed, not for use; calibrate it on real "
    "inputs"
)

_PRECISIONS: dict[torch.dtype, Precision] = {torch.float32: "fp32", torch.float16: "fp16"}


@dataclass(frozen=True)
class _Made:
    """A model in a file's form, before it is written."""

    payload: bytes
    precision: Precision
    metadata: Mapping[str, Any]  # what loading it needs
    run: Callable[..., Any]
    reference: nn.Module  # the model given, or the quantized one made of it
    delegation: Delegation | None = None
    other_cases: tuple[Case, ...] = ()  # at other sizes
    notes: tuple[str, ...] = ()
    known: tuple[str, ...] = ()  # notes that the user was warned of when the model was quantized
    batch_norms: int | None = None  # in the model's graph; None: not counted
    batch_norms_left: int | None = None  # in the file's


def export(
    model: nn.Module,
    example_inputs: Any,
    path: str | os.PathLike[str],
    *,
    precision: Precision | None = None,
    calibration: Any = None,
    dynamic_shapes: Any = None,
    optimize: bool = True,
    preprocessing: Preprocessing | Mapping[str, Any] | None = None,
) -> Artifact:
    """Write `model` to `path`, and return what was written.

    The model is converted, loaded back, run and compared with `model`; only then is the
    file written, whole or not at all. `model` itself is unchanged.

    Args:
        model: in eval mode; or what `quantize` returned as `.model`.
        example_inputs: a tensor, a tuple, a dict of keywords, or a list of such cases. The first
            is what the model is exported for; all are compared, and a quantized model is judged
            on some of `calibration` too.
        path: ends in `.pte`, `.pt` or `.ptl`.
        precision: "fp32", "fp16" (arguments and results stay float32) or "int8"; None leaves the
            model as it is.
        calibration: for int8, the inputs on which the ranges of the activations are measured, as
            `quantize` takes them.
        dynamic_shapes: torch.export's, every size with a maximum; the file is run at several
            sizes. For `.pte` only: TorchScript takes any sizes.
        optimize: False leaves what is not fused as it is, to compare with. For `.pt` and `.ptl`
            only: ExecuTorch folds batch norms whenever it lowers a model.
        preprocessing: how the model's input is made, a `Preprocessing` or plain data, kept in the
            file's metadata for whoever calls it; and how pictures become calibration inputs.

    Raises:
        ArtifactError: unknown suffix, or the file cannot be written.
        CalibrationError: int8 without calibration data, or with useless data.
        InputError: the model is in training mode, has weights that are NaN or Inf, or in another
            precision than float32 (float16 is exported as it is if it runs on the inputs), returns
            NaN, or cannot run on its inputs.
        UnsupportedError: the target cannot do it, or its output differs from the model's.
    """
    path = Path(path)
    form = artifact_format(path)
    check_destination(path)
    check_options(
        form,
        precision,
        calibrated=calibration is not None,
        dynamic=dynamic_shapes is not None,
        optimize=optimize,
    )
    require_eval_mode(model)
    require_converted(model)
    if precision is not None or not _is_half(model):
        require_float32(model)
    require_finite_tensors(model)
    examples = cases(example_inputs)
    require_forward(examples)
    for case in examples:
        _require_finite(model, case)
    random = False
    if precision == "int8":
        read = read_calibration(
            calibration,
            examples[0],
            preprocessing if isinstance(preprocessing, Preprocessing) else None,
            as_pixels=isinstance(model, WithPreprocessing),
            names=argument_names(model),
        )
        calibration, random = read.cases, read.random
    with random_state_kept():
        if form == "pte":
            made = _executorch(model, examples[0], precision, calibration, dynamic_shapes)
        else:
            made = _torchscript(model, examples, form, precision, calibration, optimize)
    examples = [*examples, *made.other_cases]
    judging = _like(examples[0], calibration or (), _MOST_CASES)
    equivalence, suspicions = _compared(model, made, form, examples, judging)
    if made.delegation is not None and made.delegation.warning is not None:
        warnings.warn(made.delegation.warning, DelegationWarning, stacklevel=2)
    notes = [*made.notes, *suspicions, *([_RANDOM] if random else [])]
    for note in notes:
        warnings.warn(f"'{path.name}' was {note}.", ExportWarning, stacklevel=2)
    metadata = {
        "format": form,
        "precision": made.precision,
        "torch": torch.__version__,
        "torchfuse": _own_version(),
        **made.metadata,
        **_kept("inputs", described(examples[0])),
        **_kept("preprocessing", _as_plain_data(preprocessing)),
    }
    data = (seal_pte if form == "pte" else seal_zip)(made.payload, metadata)
    write_atomically(path, data)
    return Artifact(
        path=path,
        format=form,
        precision=made.precision,
        size_bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        delegation=made.delegation,
        equivalence=equivalence,
        notes=(*made.known, *notes),
        batch_norms=made.batch_norms,
        batch_norms_left=made.batch_norms_left,
    )


def _kept(name: str, value: Any) -> dict[str, Any]:
    """Return the entry of the file's metadata; nothing where there is nothing."""
    return {} if value is None else {name: value}


def _as_plain_data(preprocessing: Preprocessing | Mapping[str, Any] | None) -> Any:
    if isinstance(preprocessing, Preprocessing):
        return preprocessing.to_dict()
    return None if preprocessing is None else dict(preprocessing)


def load(path: str | os.PathLike[str]) -> Callable[..., Any]:
    """Return the model in the file, ready to be called: tensors in, tensors out.

    Of a `.pte`, `.preprocessing` says how its input is made, if that was kept in the file.

    Raises:
        ArtifactError: the file is missing, damaged, or of a kind that its runtime cannot load.
    """
    return loaded(check(path))


def loaded(file: CheckedFile) -> Callable[..., Any]:
    """Return the model in a file that was checked.

    Raises:
        ArtifactError: its runtime cannot load it.
    """
    metadata = file.metadata or {}
    try:
        if file.format == "pte":
            return executorch.ExecutorchModel(
                file.data, metadata.get("signature"), metadata.get("preprocessing")
            )
        return torchscript.deserialize(file.data, file.format)
    except ArtifactError as error:
        raise ArtifactError(f"'{file.path}' cannot be loaded: {error}") from error


def _own_version() -> str | None:
    try:
        return version("torchfuse")
    except PackageNotFoundError:  # run from its sources, not installed
        return None


def _executorch(
    model: nn.Module,
    case: Case,
    precision: Precision | None,
    calibration: list[Case] | None,
    dynamic_shapes: Any,
) -> _Made:
    if torchscript.is_quantized(model):
        raise UnsupportedError(
            "A model that torch.ao converted is for '.pt' and '.ptl'; for '.pte' give the model "
            "before prepare, with precision='int8' and calibration data."
        )
    reference = model
    if precision == "int8":
        result = quantize(model, case, calibration, dynamic_shapes=dynamic_shapes)
        reference = candidate = result.model
    else:
        candidate = _half_inside(model) if precision == "fp16" else model
    program = executorch.capture(candidate, case, dynamic_shapes)
    made = _precision(program)
    if precision not in (None, made):
        raise InputError(
            f"Expected a model that can be exported in {precision}, got one in {made}; leave "
            "precision out to export it as it is."
        )
    lowered = executorch.lower(program)
    if made == "fp16":
        _require_delegated(lowered.delegation)
    try:
        loaded = executorch.ExecutorchModel(lowered.program, lowered.signature)
    except ArtifactError as error:
        raise UnsupportedError(f"The {made} program does not run here: {error}") from error
    return _Made(
        payload=lowered.program,
        precision=made,
        metadata={
            "signature": dict(lowered.signature),
            "executorch": version("executorch"),
            "operators": lowered.operators,
            "backends": lowered.backends,
        },
        run=_nested_as(loaded, program.call_spec.out_spec),
        reference=reference,
        delegation=lowered.delegation,
        other_cases=tuple(_other_sizes(program, case)),
        known=_in_float(reference) if made == "int8" else (),
    )


def _in_float(model: nn.Module) -> tuple[str, ...]:
    left = mostly_float(tuple(layers_of(model))) if isinstance(model, fx.GraphModule) else None
    return () if left is None else (f"quantized in part: {left}",)


def _nested_as(loaded: Callable[..., Any], spec: pytree.TreeSpec) -> Callable[..., Any]:
    """Let a loaded program return what the model does, in the model's own types, to compare."""

    def run(*args: Any, **kwargs: Any) -> Any:
        return pytree.tree_unflatten(pytree.tree_leaves(loaded(*args, **kwargs)), spec)

    return run


def _torchscript(
    model: nn.Module,
    examples: list[Case],
    form: Format,
    precision: Precision | None,
    calibration: list[Case] | None,
    optimize: bool,
) -> _Made:
    if isinstance(model, fx.GraphModule) and is_quantized_graph(model.graph):
        raise UnsupportedError(
            f"A model that torchfuse.quantize made is for '.pte'; for '.{form}' give the model "
            "itself, with QuantStub and DeQuantStub, and precision='int8' with calibration data."
        )
    if form == "ptl" and (named := [name for case in examples for name in case.kwargs]):
        raise UnsupportedError(
            f"The lite interpreter takes inputs by position only, got {named[0]} by name; give "
            "them in the order of forward's arguments, or use '.pt'."
        )
    # Batch norms are folded by the optimizer for mobile. In int8 they must be fused before, by
    # their owner's choice of modules, since QuantStubs are placed around them by hand too.
    reference = model if calibration is None else torchscript.quantize(model, calibration)
    made: Precision = (
        "int8"
        if torchscript.is_quantized(reference)
        else _weights_precision(reference.parameters(), "the mobile interpreters have few kernels")
    )
    if precision not in (None, made):
        raise InputError(f"Expected a model that can be saved in {precision}, got one in {made}.")
    scripted = torchscript.script(reference, examples[0])
    batch_norms = torchscript.batch_norms(scripted.module)
    prepared = (mobile_optimizer.folded if optimize else mobile_optimizer.frozen)(scripted.module)
    if optimize and made != "int8" and torchscript.batch_norms(prepared):
        scripted, prepared = _fused_before(model, examples, scripted, prepared)
    payload = torchscript.serialize(prepared, form)
    traced = scripted.traced_because
    without_data = mobile_optimizer.without_data(prepared)
    return _Made(
        payload=payload,
        precision=made,
        metadata={},
        run=torchscript.deserialize(payload, form),
        reference=reference,
        notes=(
            *(() if traced is None else (_TRACED.format(traced),)),
            *(() if without_data is None else (without_data,)),
        ),
        batch_norms=batch_norms,
        batch_norms_left=torchscript.batch_norms(prepared),
    )


def _fused_before(
    model: nn.Module,
    examples: list[Case],
    scripted: torchscript.Scripted,
    optimized: torch.jit.ScriptModule,
) -> tuple[torchscript.Scripted, torch.jit.ScriptModule]:
    """Return the model scripted and optimized, fused before that if this leaves fewer batch norms.

    The optimizer does not fold them into transposed convs, nor a second one in a row.
    """
    try:
        again = torchscript.script(fuse(model, examples, keep_originals=False).model, examples[0])
    except TorchfuseError:  # it cannot be recorded, copied or proved: then nothing is to be gained
        return scripted, optimized
    fused = mobile_optimizer.folded(again.module)
    is_scripted = again.traced_because is None or scripted.traced_because is not None
    if is_scripted and torchscript.batch_norms(fused) < torchscript.batch_norms(optimized):
        return again, fused
    return scripted, optimized


def _require_finite(model: nn.Module, case: Case) -> None:
    try:
        outputs = run(model, case)
    except Exception as error:
        require_float32(model)
        raise InputError(
            f"{type(model).__name__} cannot run on its example inputs, {case}: {first_line(error)}"
        ) from error
    tensors = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]
    for number, tensor in enumerate(tensors):
        if not tensor.isfinite().all():
            which = f"output {number}" if len(tensors) > 1 else "its output"
            raise InputError(
                f"{type(model).__name__} returns NaN or Inf ({which}) for {case}, so no artifact "
                "of it can be checked; look for an overflow, or for untrained statistics."
            )


def _compared(
    model: nn.Module, made: _Made, form: Format, examples: list[Case], data: list[Case]
) -> tuple[Equivalence, list[str]]:
    """Return how far what was made is from `model`, and what is suspicious about it.

    `data` are more cases for what is quantized to be judged by.

    Raises:
        UnsupportedError: it is wrong.
    """
    notes: list[str] = []
    if made.precision in ("int8", "int4"):
        found = verify(model, made.run, examples, min_sqnr_db=-math.inf)
        problems = list(found.problems)
        if not problems:
            problems, notes, asked = _judged(model, made, [*examples, *data])
            found = replace(found, min_sqnr_db=asked)
    else:
        sqnr = {"fp16": _FP16_MIN_SQNR_DB}.get(made.precision)
        found = verify(model, made.run, examples, min_sqnr_db=sqnr)
        problems = list(found.problems)
    if problems:
        raise UnsupportedError(
            f"The '.{form}' made from {type(model).__name__} does not compute the same: "
            f"{' '.join(problems)} Nothing was written."
        )
    return found, notes


def _judged(model: nn.Module, made: _Made, data: list[Case]) -> tuple[list[str], list[str], float]:
    """What is wrong with a quantized program over all of `data`, and what is suspicious about it.

    And the SQNR, in dB, that was asked for against `model`: of several outputs, the least.

    One case alone says little: its outputs may be hardly larger than a step of int8. Over all,
    the program may be off by a step of its output, on average, whatever that is in dB.
    """
    problems, notes, asked = [], [], [_INT8_NO_LOSS_DB]
    programs = [run(made.run, case) for case in data]
    quantized = [run(made.reference, case) for case in data]
    given = quantized if made.reference is model else [run(model, case) for case in data]
    steps = _output_steps(made.reference)
    names = [name for name, leaf in given[0].items() if isinstance(leaf, torch.Tensor)]
    for index, name in enumerate(names):
        step = steps[index] if len(steps) == len(names) else 0.0
        to_quantized = _difference(quantized, programs, name)
        to_model = _difference(given, programs, name)
        loss = _difference(given, quantized, name)
        least_to_model = _INT8_MIN_SQNR_DB
        wanted = {"the quantized model": (to_quantized, _INT8_MIN_SQNR_DB)}
        if made.reference is not model:
            least_to_model = min(loss.sqnr_db, _INT8_NO_LOSS_DB) - _INT8_LOSS_DB
            wanted["the model"] = (to_model, least_to_model)
        asked.append(least_to_model)
        problems += [
            f"{name}: has an SQNR of {found.sqnr_db:.1f} dB against {what}; at least "
            f"{least:.1f} dB was asked for."
            for what, (found, least) in wanted.items()
            if found.sqnr_db < least and to_quantized.rms_noise > step
        ]
        if made.reference is not model and to_model.sqnr_db < _INT8_SUSPECT_DB:
            notes.append(_SUSPECT.format(to_model.sqnr_db))
    return problems, notes[:1], min(asked)


def _difference(
    expected: list[dict[str, Any]], got: list[dict[str, Any]], name: str
) -> SignalToNoise:
    found = SignalToNoise()
    for a, b in zip(expected, got, strict=True):
        found.take(a[name], b[name])
    return found


def _output_steps(quantized: nn.Module) -> list[float]:
    """The step of each output of a quantized graph in int8; 0 for one in float."""
    steps: list[float] = []
    if not isinstance(quantized, fx.GraphModule):
        return steps
    (output,) = quantized.graph.find_nodes(op="output")
    for leaf in pytree.tree_leaves(output.args[0]):
        step: Any = 0.0
        if isinstance(leaf, fx.Node) and "dequantize_per_tensor" in str(leaf.target):
            step = leaf.args[1]
        steps.append(step if isinstance(step, float) else 0.0)
    return steps


def _like(example: Case, data: Iterable[Case], most: int) -> list[Case]:
    """At most so many cases of `data`, spread over it, in the shapes of `example`."""
    leaves, spec = pytree.tree_flatten((example.args, dict(example.kwargs)))
    found = []
    for case in data:
        given, given_spec = pytree.tree_flatten((case.args, dict(case.kwargs)))
        if given_spec != spec:
            continue
        parts = [_parts(leaf, like) for leaf, like in zip(given, leaves, strict=True)]
        for part in zip(*parts, strict=False):
            args, kwargs = pytree.tree_unflatten(part, spec)
            found.append(Case(args, kwargs))
    return found[:: -(-len(found) // most)] if found else []


def _parts(value: Any, like: Any) -> Iterable[Any]:
    """`value` in pieces of as many samples as `like` has; nothing if its shape is another."""
    if not isinstance(value, torch.Tensor) or not isinstance(like, torch.Tensor):
        return itertools.repeat(value)
    if value.shape == like.shape:
        return [value]
    if not like.dim() or value.shape[1:] != like.shape[1:] or not len(like):
        return []
    return [part for part in value.split(len(like)) if len(part) == len(like)]


def _is_half(model: nn.Module) -> bool:
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    return dtypes <= {torch.float16, torch.float32}


def _half_inside(model: nn.Module) -> nn.Module:
    """Return a copy that computes in half precision, with arguments and results in float32."""
    half = copied(model).half()

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


def _require_delegated(delegation: Delegation) -> None:
    # Converting the arguments and results is never delegated; what counts is where the work is.
    share = delegation.macs_share
    if not delegation.calls_delegated or (share is not None and share < _FP16_MIN_SHARE):
        raise UnsupportedError(f"XNNPACK does not run this model in fp16: {delegation.warning}")


def _precision(program: torch.export.ExportedProgram) -> Precision:
    if is_quantized_graph(program.graph):
        grouped = any("torchao." in str(node.target) for node in program.graph.nodes)
        return "int4" if grouped else "int8"
    return _weights_precision(program.state_dict.values(), "XNNPACK has no kernels")


def _weights_precision(tensors: Iterable[torch.Tensor], lacking: str) -> Precision:
    dtypes = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
    for dtype in dtypes - set(_PRECISIONS):
        raise UnsupportedError(
            f"Expected weights in float32 or float16, got {dtype}, for which {lacking}; call "
            "model.float() first."
        )
    return "fp16" if dtypes == {torch.float16} else "fp32"


def _other_sizes(program: torch.export.ExportedProgram, case: Case) -> Iterator[Case]:
    """Yield the case at the smallest, a middle and the largest of the declared sizes."""
    ranges = {
        symbol: (max(int(allowed.lower), 1), int(allowed.upper))
        for symbol, allowed in program.range_constraints.items()
        if symbol.is_Symbol  # and not a size made of one, such as `4*s`
    }
    if not ranges:
        return
    shapes = executorch.input_shapes(program)
    leaves, spec = pytree.tree_flatten((case.args, dict(case.kwargs)))
    for share in (0.0, 0.4, 1.0):
        sizes = {s: low + round(share * (high - low)) for s, (low, high) in ranges.items()}
        resized = [_resized(leaf, shape, sizes) for leaf, shape in zip(leaves, shapes, strict=True)]
        args, kwargs = pytree.tree_unflatten(resized, spec)
        yield Case(args, kwargs)


def _resized(leaf: Any, shape: Any, sizes: Mapping[Any, int]) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    target = [size if isinstance(size, int) else int(size.node.expr.subs(sizes)) for size in shape]
    # The example's own values, repeated: in the range that the model expects, whatever that is.
    repeats = [-(-wanted // had) for wanted, had in zip(target, leaf.shape, strict=True)]
    return leaf.repeat(repeats)[tuple(slice(wanted) for wanted in target)].contiguous()
