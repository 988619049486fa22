"""A model to a file and back: `export` writes a file that was run and compared, `load` reads it.

The suffix chooses the target: `.pte` is ExecuTorch, `.pt` TorchScript, `.ptl` the lite interpreter.
"""

import hashlib
import itertools
import math
import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from torchfuse.artifacts import Artifact, Precision, check_destination, write_all_atomically
from torchfuse.cases import Case, cases, require_finite_tensors, require_float32
from torchfuse.delegation import DelegationWarning
from torchfuse.errors import (
    ArtifactError,
    CalibrationError,
    ExportWarning,
    InputError,
    UnsupportedError,
    first_line,
)
from torchfuse.exporting.file_inputs import described
from torchfuse.exporting.provenance import provenance
from torchfuse.isolation.snapshot import random_state_kept
from torchfuse.quantizing import (
    read_calibration,
    require_converted,
    require_eval_mode,
    require_forward,
)
from torchfuse.quantizing.calibration import CalibrationData, sample_count
from torchfuse.quantizing.preprocessing import Preprocessing, WithPreprocessing
from torchfuse.quantizing.sensitivity import SignalToNoise
from torchfuse.quantizing.static import argument_names
from torchfuse.targets import Target, target_for
from torchfuse.targets.opening import check
from torchfuse.targets.options import check_options
from torchfuse.targets.target import CheckedFile, Made, Request
from torchfuse.units import decibels
from torchfuse.verifying.outputs import Equivalence, OutputDifference, compare_outputs, run, verify

__all__ = ["CALIBRATED_ON_NOISE", "export", "exported", "in_the_shape_of", "load", "loaded"]

_MIN_SQNR_DB = {"fp16": 30.0, "bf16": 30.0}  # against the model
# Kernels round int8 otherwise than torchao's simulation does, and dozens of layers multiply it:
# the program may be as far from the quantized model as that is from the model.
_INT8_MIN_SQNR_DB = 10.0  # against the quantized model
_INT8_LOSS_DB = 3.0  # against the model, compared with the quantized model's
_INT8_NO_LOSS_DB = 40.0  # above this, nobody asks which of the two is closer
_OF_CASE = re.compile(r"^case \d+: ")  # before an output's name, where there are several cases
_MOST_CASES = 8  # of the calibration data, on which it is judged beside the examples
_INT8_SUSPECT_DB = 12.0  # against the model, below which something is wrong, and likely the ranges


_SUSPECT = (
    "quantized to {} only (signal to noise against the model), most likely since it was "
    "calibrated on other data than it is meant for; give calibration inputs like the example's"
)

CALIBRATED_ON_NOISE = (
    "calibrated on random inputs, so it is for measuring speed, not for use; calibrate it on real "
    "inputs"
)


def export(
    model: nn.Module,
    example_inputs: Any,
    path: str | os.PathLike[str],
    *,
    precision: Precision | None = None,
    calibration: Any = None,
    data: Any = None,
    random_examples: bool = False,
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
            is what the model is exported for; all are compared.
        path: ends in `.pte`, `.pt` or `.ptl`.
        precision: "fp32", "fp16" (arguments and results stay float32) or "int8"; None leaves the
            model as it is.
        calibration: for int8, the inputs on which the ranges of the activations are measured, as
            `quantize` takes them.
        data: inputs as the model will see them, as `calibration` takes them; the file is compared
            on some of them too. None: on some of the calibration inputs, if there are any.
        random_examples: whether the examples are noise, of which the file and what is printed say
            that nothing else was compared.
        dynamic_shapes: torch.export's, every size with a maximum; the file is run at several
            sizes. For `.pte` only: TorchScript takes any sizes.
        optimize: False leaves what is not fused as it is, to compare with. For `.pt` and `.ptl`
            only: ExecuTorch folds batch norms whenever it lowers a model.
        preprocessing: how the model's input is made, a `Preprocessing` or plain data, kept in the
            file's metadata for whoever calls it; and how pictures become calibration inputs.

    Raises:
        ArtifactError: unknown suffix, or the file cannot be written.
        CalibrationError: int8 without calibration data, or with useless data; data that cannot be
            read, or of which nothing has the example's shape.
        InputError: the model is in training mode, has weights that are NaN or Inf, or in another
            precision than float32 (float16 is exported as it is if it runs on the inputs), returns
            NaN, or cannot run on its inputs.
        UnsupportedError: the target cannot do it, or its output differs from the model's.
    """
    return exported(
        model,
        example_inputs,
        path,
        precision=precision,
        calibration=calibration,
        data=data,
        random_examples=random_examples,
        dynamic_shapes=dynamic_shapes,
        optimize=optimize,
        preprocessing=preprocessing,
    ).artifact


class Exported(NamedTuple):
    """What was written, and what it was made from."""

    artifact: Artifact
    reference: nn.Module  # the model given, or the quantized one made of it


def exported(
    model: nn.Module,
    example_inputs: Any,
    path: str | os.PathLike[str],
    *,
    precision: Precision | None = None,
    calibration: Any = None,
    data: Any = None,
    random_examples: bool = False,
    dynamic_shapes: Any = None,
    optimize: bool = True,
    preprocessing: Preprocessing | Mapping[str, Any] | None = None,
) -> Exported:
    """Do what `export` does, for whoever goes on with the quantized model."""
    path = Path(path)
    target = target_for(path)
    paths = {
        suffix: _with_suffix(path, target, suffix) for suffix in (target.suffix, *target.beside)
    }
    for written in paths.values():
        check_destination(written)
    check_options(
        target,
        precision,
        calibrated=calibration is not None,
        dynamic=dynamic_shapes is not None,
        optimize=optimize,
    )
    target.require()
    require_eval_mode(model)
    require_converted(model)
    if precision is not None or not _is_half(model):
        require_float32(model)
    require_finite_tensors(model)
    examples = cases(example_inputs)
    require_forward(examples)
    for case in examples:
        _require_finite(model, case)
    calibrating: CalibrationData | None = None
    calibrated: str | None = None
    if precision == "int8":
        calibrating = _read(calibration, model, examples[0], preprocessing)
        calibrated = f"{calibrating.source}, {sample_count(calibrating.cases)} samples"
    seen = calibrating if data is None else _read(data, model, examples[0], preprocessing)
    judging = [] if seen is None else in_the_shape_of(examples[0], seen.cases, _MOST_CASES)
    if data is not None and seen is not None and not judging:
        raise CalibrationError(
            f"Expected data in the shape of the example, {examples[0]}, got none in {seen.source}; "
            "give samples of that size."
        )
    with random_state_kept():
        made = target.make(
            Request(
                model,
                examples,
                target.form,
                precision,
                None if calibrating is None else calibrating.cases,
                dynamic_shapes,
                optimize,
            )
        )
    verified_on = _verified_on(examples, seen, judging, random_examples=random_examples)
    examples = [*examples, *made.other_cases]
    equivalence, suspicions = _compared(model, made, target.form, examples, judging)
    if made.delegation is not None and made.delegation.warning is not None:
        warnings.warn(made.delegation.warning, DelegationWarning, stacklevel=3)
    calibrated_on_noise = calibrating is not None and calibrating.random
    notes = [*made.notes, *suspicions, *([CALIBRATED_ON_NOISE] if calibrated_on_noise else [])]
    for note in notes:
        warnings.warn(f"'{path.name}' was {note}.", ExportWarning, stacklevel=3)
    metadata = {
        "format": target.form,
        "precision": made.precision,
        "torch": torch.__version__,
        "torchfuse": _own_version(),
        **made.metadata,
        **provenance(made.reference, model, verified_on, equivalence, calibrated),
        **_kept("inputs", described(examples[0])),
        **_kept("preprocessing", _as_plain_data(preprocessing)),
    }
    files = target.seal(made.files, metadata)
    # The first file last: it holds the checksums of the others.
    write_all_atomically({paths[suffix]: files[suffix] for suffix in reversed(paths)})
    artifact = Artifact(
        path=path,
        format=target.form,
        precision=made.precision,
        size_bytes=sum(map(len, files.values())),
        sha256=hashlib.sha256(files[target.suffix]).hexdigest(),
        delegation=made.delegation,
        equivalence=equivalence,
        notes=(*made.known, *notes),
        batch_norms=made.batch_norms,
        batch_norms_left=made.batch_norms_left,
        computes_in=made.computes_in,
        beside=tuple(paths[suffix] for suffix in target.beside),
        verified_on=verified_on,
    )
    return Exported(artifact, made.reference)


def _read(
    data: Any,
    model: nn.Module,
    example: Case,
    preprocessing: Preprocessing | Mapping[str, Any] | None,
) -> CalibrationData:
    if isinstance(data, CalibrationData):
        return data
    return read_calibration(
        data,
        example,
        preprocessing if isinstance(preprocessing, Preprocessing) else None,
        as_pixels=isinstance(model, WithPreprocessing),
        names=argument_names(model),
    )


def _verified_on(
    examples: Sequence[Case],
    data: CalibrationData | None,
    judging: Sequence[Case],
    *,
    random_examples: bool,
) -> str:
    """Return in words what a file is compared with its model on.

    Noise is no picture: a detector that computes the same on it may find nothing on photos.
    """
    count = len(examples)
    given = "the example" if count == 1 else f"{count} examples"
    if data is None or not judging:
        return "random inputs only" if random_examples else given
    if data.random:
        return "random inputs only" if random_examples else f"{given} and random inputs"
    of_data = f"{len(judging)} input{'' if len(judging) == 1 else 's'} of {data.source}"
    return of_data if random_examples else f"{given} and {of_data}"


def _with_suffix(path: Path, target: Target, suffix: str) -> Path:
    return path.with_name(path.name.removesuffix(target.suffix) + suffix)


def _kept(name: str, value: Any) -> dict[str, Any]:
    """Return the entry of the file's metadata; nothing where there is nothing."""
    return {} if value is None else {name: value}


def _as_plain_data(preprocessing: Preprocessing | Mapping[str, Any] | None) -> Any:
    if isinstance(preprocessing, Preprocessing):
        return preprocessing.to_dict()
    return None if preprocessing is None else dict(preprocessing)


def load(path: str | os.PathLike[str], *, threads: int | None = None) -> Callable[..., Any]:
    """Return the model in the file, ready to be called: tensors in, tensors out.

    `threads` is how many the runtime takes: of ExecuTorch's and torch's, which have one pool of
    threads a process, it is what the whole process has from then on. None leaves it at what the
    runtime takes unasked: most take one for each core, whatever torch was told. But for
    TorchScript, `.threads` of what is returned says how many there are, and `.preprocessing` how
    the input is made, if that was kept in the file.

    Raises:
        ArtifactError: the file is missing, damaged, or of a kind that its runtime cannot load.
        InputError: fewer threads than one.
        UnsupportedError: the runtime is not installed.
    """
    if threads is not None and threads < 1:
        raise InputError(f"threads must be 1 or more, got {threads}.")
    return loaded(check(path), threads=threads)


def loaded(file: CheckedFile, *, threads: int | None = None) -> Callable[..., Any]:
    """Return the model in a file that was checked.

    Raises:
        ArtifactError: its runtime cannot load it.
        UnsupportedError: the runtime is not installed.
    """
    target = target_for(file.path)
    target.require_runtime()
    try:
        return target.load(file, threads=threads)
    except ArtifactError as error:
        other = target.other_version(file.metadata)
        why = "" if other is None else f"; {other}: install that, or export the model again"
        raise ArtifactError(
            f"{target.name} {target.version} cannot load '{file.path}': {error}{why}."
        ) from error


def _own_version() -> str | None:
    try:
        return version("torchfuse")
    except PackageNotFoundError:  # run from its sources, not installed
        return None


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
    model: nn.Module, made: Made, form: str, examples: list[Case], data: list[Case]
) -> tuple[Equivalence, list[str]]:
    """Return how far what was made is from `model`, and what is suspicious about it.

    `data` are more cases to compare on, of which the worst of each output is kept.

    Raises:
        UnsupportedError: it is wrong.
    """
    notes: list[str] = []
    is_quantized = made.precision in ("int8", "int4")
    sqnr = -math.inf if is_quantized else _MIN_SQNR_DB.get(made.precision)
    found = verify(model, made.run, examples, min_sqnr_db=sqnr)
    if data and not is_quantized:
        on_data = verify(model, made.run, data, min_sqnr_db=sqnr)
        found = replace(found, outputs=(*found.outputs, *_worst(on_data.outputs)))
    problems = list(found.problems)
    if is_quantized and not problems:
        problems, notes, asked = _judged(model, made, [*examples, *data])
        over_data = _over(model, made.run, data) if data else []
        found = replace(found, min_sqnr_db=asked, outputs=(*found.outputs, *over_data))
    if problems:
        raise UnsupportedError(
            f"The '.{form}' made from {type(model).__name__} does not compute the same: "
            f"{' '.join(problems)} Nothing was written."
        )
    return found, notes


def _worst(found: Iterable[OutputDifference]) -> list[OutputDifference]:
    """Return of each output the case that is furthest off, over all of the data."""
    by_name: dict[str, list[OutputDifference]] = {}
    for output in found:
        name = _OF_CASE.sub("", output.name)
        by_name.setdefault(name, []).append(output)
    worst = []
    for name, outputs in by_name.items():
        furthest = min(outputs, key=lambda o: -math.inf if o.sqnr_db is None else o.sqnr_db)
        failed = next((output for output in outputs if not output.passed), furthest)
        worst.append(replace(failed, name=f"data, {name}"))
    return worst


def _over(
    model: nn.Module, program: Callable[..., Any], data: list[Case]
) -> list[OutputDifference]:
    """Return how far each output of what is quantized is off, its noise taken over all of the data.

    One case alone says little, as in `_judged`.
    """
    given, got = ([run(each, case) for case in data] for each in (model, program))
    found = [
        output
        for expected, actual in zip(given, got, strict=True)
        for output in compare_outputs(expected, actual, min_sqnr_db=-math.inf)
    ]
    return [
        replace(output, sqnr_db=_difference(given, got, name).sqnr_db)
        if isinstance(given[0][name], torch.Tensor)
        else output
        for output in _worst(found)
        for name in [output.name.removeprefix("data, ")]
    ]


def _judged(model: nn.Module, made: Made, data: list[Case]) -> tuple[list[str], list[str], float]:
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
            f"{name}: has an SQNR of {decibels(found.sqnr_db)} against {what}; at least "
            f"{decibels(least)} was asked for."
            for what, (found, least) in wanted.items()
            if found.sqnr_db < least and to_quantized.rms_noise > step
        ]
        if made.reference is not model and to_model.sqnr_db < _INT8_SUSPECT_DB:
            notes.append(_SUSPECT.format(decibels(to_model.sqnr_db)))
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


def in_the_shape_of(example: Case, data: Iterable[Case], most: int) -> list[Case]:
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
