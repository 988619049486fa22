"""`compare`: one model as fused and non-fused, float and int8, on every target and device."""

import functools
import hashlib
import platform
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.ao.quantization import QuantStub

from torchfuse.artifacts import Artifact, Precision, check_folder
from torchfuse.cases import Case, cases
from torchfuse.comparing.cache import Cache, Folder, digest_of
from torchfuse.comparing.comparison import FOLDED, LOCAL, NOT_FUSED, Comparison, LayerNoise, Row
from torchfuse.comparing.file_targets import FileTarget, chosen_targets
from torchfuse.comparing.jobs import (
    Build,
    Built,
    ComparedModel,
    Evaluate,
    Evaluated,
    Evaluation,
    Measured,
    MeasureTimes,
    Place,
    accuracy_from,
    build,
    check_labels,
    measure,
)
from torchfuse.comparing.jobs import evaluate as evaluated
from torchfuse.comparing.operations import operations
from torchfuse.comparing.profiles import profiles
from torchfuse.comparing.samples import (
    Samples,
    batch_size,
    calibration_cases,
    held_out,
    read_samples,
)
from torchfuse.devices.named import checked_device
from torchfuse.errors import (
    ArtifactError,
    CalibrationError,
    InputError,
    QuantizationWarning,
    TorchfuseError,
)
from torchfuse.fusing.model_fusing import fuse
from torchfuse.measuring.timing import Measurement, check_counts, ratio
from torchfuse.quantizing import (
    layers_of_int8,
    quantize,
    require_eval_mode,
    require_forward,
)
from torchfuse.quantizing.calibration import (
    CalibrationData,
    read_calibration,
    sample_count,
    tensors_of,
)
from torchfuse.quantizing.metrics import name_of
from torchfuse.quantizing.preprocessing import Preprocessing, WithPreprocessing
from torchfuse.quantizing.static import argument_names

__all__ = ["Work", "begin", "check_choices", "compare"]

Progress = Callable[[str], None]

VARIANTS = (NOT_FUSED, "fused", "fp16", "int8")
_MOST_CALIBRATION = 256  # samples, beyond which ranges hardly change and time does
_EXPLAINED = 16  # calibration cases on which the layers' noise is measured
_PACKAGES = ("torchfuse", "torch", "executorch", "torchao")


def compare(
    model: nn.Module,
    example_inputs: Any,
    *,
    variants: Sequence[str] | None = None,
    targets: Sequence[str] | None = None,
    devices: Sequence[str] = (LOCAL,),
    data: Any = None,
    validation: Any = None,
    fused: Mapping[str, nn.Module] | None = None,
    calibration: Any = None,
    preprocessing: Preprocessing | None = None,
    evaluate: Evaluation | None = None,
    folder: str | Path | None = None,
    threads: int = 1,
    runs: int = 50,
    explain: bool = True,
    cache: str | Path | None = None,
    earlier: Comparison | None = None,
    command: str | None = None,
    name: str | None = None,
    progress: Progress = lambda _: None,
    partial: Callable[[Callable[[], Comparison | None]], object] = lambda _: None,
) -> Comparison:
    """Return how fast, how large, how different and how right each variant of `model` is.

    The variants: eager (as it is, channels_last, fused), TorchScript (`.pt`, `.ptl`; fp32 and,
    where the model has quantization stubs, int8), ExecuTorch (`.pte`; fp32, fp16, int8, one row
    each, since its lowering folds batch norms on its own). All are timed in the same rounds, in
    random order: files in a process each, modules in this one. On another device the files are
    timed in rounds of their own.

    Args:
        model: in eval mode.
        example_inputs: as for `fuse`; the first case is what is timed. `Case`s may name another
            method than `forward`, all the same one: then that is what is compared.
        variants: those to compare out of "not fused", "fused", "fp16" and "int8"; None: all. The
            model as it is, in eager mode, is always the baseline.
        targets: those to compare on out of "eager", "channels_last" and the files' suffixes.
        devices: "local", "adb", "adb:SERIAL", "ssh:HOST".
        data: samples as the model will see them, and their labels where it has any, as for
            `quantize`, or an `.npz` with an array "labels", a folder of pictures in a folder for
            each class, a `.csv` or `.txt` of pictures and labels. Int8 is calibrated on three
            quarters, the answers of all variants are compared on the rest, which is held out.
        validation: samples to compare the answers on; then int8 is calibrated on all of `data`.
        fused: fused models by name, where it is not simply the one that `fuse` returns. In
            TorchScript the last one is optimized for mobile, those before it are saved as they are.
        calibration: in place of `data`, what int8 is calibrated on; no answers are compared on it.
        preprocessing: how pictures become inputs.
        evaluate: takes a callable (inputs to outputs) and returns an accuracy from 0 to 1.
        folder: where the artifacts are left; None: nowhere.
        threads: of torch and of ExecuTorch's runtime.
        runs: timed runs of each variant.
        explain: measure the noise of each layer in int8.
        cache: a folder in which files are kept by their content: what was made before of the same
            model, data and versions is not made again. None: nothing is kept.
        earlier: an interrupted comparison of the same content, whose rounds are not repeated.
        command: what makes this comparison again in a shell, for the report.
        name: what the report calls the model; None: its class.
        progress: called with a description before each long step.
        partial: called once, with a function that returns what there is so far: for whoever is
            interrupted.

    Raises:
        ArtifactError: nothing can be written into the folder.
        CalibrationError: the data is missing, empty, constant, or holds NaN or Inf.
        InputError: the model is in training mode, `evaluate` returns something else, labels do not
            fit, there is no such variant or target, or there is nothing to time.
    """
    check_choices(variants, targets, devices)
    places = list(dict.fromkeys(devices))
    if folder is not None:
        check_folder(folder)
    if not places:
        raise InputError("Expected a device to measure on, got none; 'local' is this machine.")
    with tempfile.TemporaryDirectory() as temporary:
        work = begin(
            model,
            example_inputs,
            folder=Path(folder or temporary),
            variants=variants,
            targets=targets,
            data=data,
            validation=validation,
            fused=fused,
            calibration=calibration,
            preprocessing=preprocessing,
            evaluate=evaluate,
            threads=threads,
            runs=runs,
            cache=None if cache is None else lambda digest: Cache(Folder(Path(cache)), digest),
            command=command,
            name=name,
            progress=progress,
        )
        if earlier is not None:
            work.go_on_with(earlier)
        partial(work.so_far)
        work.build()
        work.draw()
        if explain:
            work.explain()
        work.evaluate()
        for device in places:
            work.measure(device)
        found = work.so_far()
    assert found is not None
    return found


def begin(
    model: nn.Module,
    example_inputs: Any,
    *,
    folder: Path,
    variants: Sequence[str] | None = None,
    targets: Sequence[str] | None = None,
    data: Any = None,
    validation: Any = None,
    fused: Mapping[str, nn.Module] | None = None,
    calibration: Any = None,
    preprocessing: Preprocessing | None = None,
    evaluate: Evaluation | None = None,
    threads: int = 1,
    runs: int = 50,
    cache: Callable[[str], Cache] | None = None,
    command: str | None = None,
    name: str | None = None,
    progress: Progress = lambda _: None,
) -> "Work":
    """Return the work of a comparison, of which nothing is done but what all of it needs.

    The arguments are those of `compare`, and raise what they do there; `folder` is where the files
    are made, and `cache` makes a cache of what is known by a digest.
    """
    chosen = VARIANTS if variants is None else tuple(variants)
    in_process, files = chosen_targets(targets)
    check_counts(runs, threads, None, {NOT_FUSED: model})
    if data is not None and calibration is not None:
        raise InputError("Expected data or calibration, got both; data is split, or give both "
                         "data and validation.")  # fmt: skip
    require_eval_mode(model)
    examples = cases(example_inputs)
    name = name or type(model).__name__
    if (method := _only_method(examples)) != "forward":
        model, name = _Method(model, method), f"{name}.{method}"
        examples = [Case(case.args, case.kwargs) for case in examples]
    require_forward(examples)
    notes: list[str] = []
    always: list[str] = []
    calibrating, samples, described = _data(
        model, examples, data, validation, calibration, preprocessing, notes
    )
    if samples is not None:
        try:
            check_labels(model, samples, examples[0])
        except InputError as error:
            if samples.classes is None:
                raise
            # Folders may be no classes of the model's: answers are compared all the same.
            always.append(f"accuracy is not measured: {error}")
            samples = replace(samples, labels=None, classes=None)
    if evaluate is not None:
        progress("evaluating the model")
        accuracy_from(evaluate, model)  # what is wrong with it is known before the long work
    progress("fusing")
    plan = None
    if fused is None:
        is_graph = _is_graph(model)
        result = fuse(model, examples[:1] if is_graph else examples, graph=is_graph)
        fused, plan = {"fused": result.model}, result.plan
    inside = isinstance(model, WithPreprocessing)  # then nobody who calls it has to do it
    kept = None if inside else preprocessing
    subject = ComparedModel(model, fused, examples, calibrating, samples, evaluate, kept)
    progress("looking for what was made before")
    digest = digest_of(subject)
    settings = None if digest is None else _digest_with(digest, runs, threads, chosen, targets)
    return Work(
        subject,
        None if cache is None or digest is None else cache(digest),
        _make(folder),
        Comparison(
            model=name,
            rows=(),
            notes=tuple(notes),
            architecture=platform.machine(),
            inputs=str(examples[0]),
            validation=described,
            accuracy_of=_accuracy_of(evaluate, samples),
            versions=_versions(),
            command=command,
            plan=plan,
            digest=settings,
        ),
        progress,
        chosen,
        in_process,
        files,
        runs,
        threads,
        digest,
        tuple(always),
    )


def _is_graph(model: nn.Module) -> bool:
    """Whether it is an exported program's module, which calls no modules that could be fused."""
    inner = model.model if isinstance(model, WithPreprocessing) else model
    if not isinstance(inner, fx.GraphModule):
        return False
    return not any(node.op == "call_module" for node in inner.graph.nodes)


class _Method(nn.Module):
    """A method of a model as the forward of a module."""

    def __init__(self, model: nn.Module, method: str) -> None:
        super().__init__()
        self.model, self.method = model, method
        self.train(model.training)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.model, self.method)(*args, **kwargs)


def _only_method(examples: Sequence[Case]) -> str:
    methods = {case.method for case in examples}
    if len(methods) > 1:
        raise InputError(
            f"Expected examples of one method, got {' and '.join(sorted(methods))}; compare each "
            "on its own."
        )
    return methods.pop()


@dataclass(frozen=True)
class _Noise:
    layers: tuple[LayerNoise, ...]
    in_int8: tuple[str, ...]


@dataclass
class Work:
    """What is to be done for a comparison, and what has been so far."""

    subject: ComparedModel
    cache: Cache | None
    folder: Path
    base: Comparison  # what is known without rows; its notes are of int8
    progress: Progress
    chosen: Sequence[str]  # variants
    in_process: Sequence[str]  # targets
    files: Sequence[FileTarget]
    runs: int
    threads: int
    digest: str | None  # of the content alone
    always: tuple[str, ...] = ()  # notes, whatever becomes of the rows
    earlier: Mapping[str, Measurement] = field(default_factory=dict)  # of this machine, by row
    places: list[Place] = field(default_factory=list)
    artifacts: dict[Place, Artifact] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    measured: dict[str, Measured] = field(default_factory=dict)
    timed: dict[str, list[Place]] = field(default_factory=dict)  # by device
    evaluated: dict[Place, Evaluated] = field(default_factory=dict)
    known: dict[str, Any] = field(default_factory=dict)  # more fields of the result
    unfinished: str | None = None
    int8: fx.GraphModule | None = None  # what a file was made from here, until it is explained

    def go_on_with(self, earlier: Comparison) -> None:
        """Take over the rounds of an interrupted comparison.

        Raises:
            InputError: it was of something else.
        """
        if self.base.digest is None or earlier.digest != self.base.digest:
            raise InputError(
                "The earlier comparison cannot be gone on with: its model, data, example, options "
                "or versions are not these; leave it out to measure anew."
            )
        self.earlier = _latencies(earlier)

    def build(self, part: int = 0, parts: int = 1) -> None:
        """Make the files, one job each; or one of `parts` shares of them, in the rows' order."""
        if part == 0:
            self.places.append(Place(NOT_FUSED, "eager", "fp32", None))
            if "channels_last" in self.in_process:
                self.places.append(Place(NOT_FUSED, "channels_last", "fp32", None))
            if "fused" in self.chosen:
                self.places += [Place(n, "eager", "fp32", None) for n in self.subject.variants]
        jobs = list(self.jobs())
        for job in jobs[part * len(jobs) // parts : (part + 1) * len(jobs) // parts]:
            assert job.place.path is not None
            self.progress(f"saving {job.place.path.name}")
            self._take(job.place, self._built(job))

    def _built(self, job: Build) -> Built:
        if self.cache is None:
            return build(job, self.subject)
        return self.cache.built(job, lambda job: build(job, self.subject))

    def _take(self, place: Place, built: Built) -> None:
        if built.left_out is not None:
            self.notes.append(
                f"left out: {place.precision} {place.target}, {place.variant}: {built.left_out}"
            )
            return
        assert built.artifact is not None
        self.notes.extend(built.notes)
        verified = f"files were compared with the model on {built.artifact.verified_on}"
        if verified not in self.notes:
            self.notes.append(verified)
        self.int8 = built.int8 or self.int8
        self.artifacts[place] = built.artifact
        self.places.append(place)

    def jobs(self) -> Iterator[Build]:
        """Yield all files that can be made; what cannot is noted."""
        chosen, files = self.chosen, self.files
        variants = {NOT_FUSED: self.subject.model, **self.subject.variants}
        has_stubs = any(isinstance(module, QuantStub) for module in self.subject.model.modules())
        if self.subject.calibration is None and "int8" in chosen:
            self.notes.append("left out: int8, since there is no calibration data")
        elif not has_stubs and "int8" in chosen and any(target.int8_by_stubs for target in files):
            self.notes.append(
                "left out: int8 in TorchScript, since the model has no QuantStub and DeQuantStub"
            )
        last = list(variants)[-1]
        for target in files:
            made = [
                precision
                for precision in target.precisions
                if precision == "fp32" or self._can_be(precision, target, chosen, has_stubs)
            ]
            for precision in made[-1:] if target.most_compact_only else made:
                for name in [FOLDED] if target.folds else variants:
                    if precision == "fp32" and not _is_chosen(name, chosen):
                        continue
                    file = f"{precision}_{name.replace(' ', '_')}{target.suffix}"
                    place = Place(name, target.suffix, precision, self.folder / file)
                    yield Build(place, optimize=name in (FOLDED, last) and name != NOT_FUSED)

    def _can_be(
        self, precision: Precision, target: FileTarget, chosen: Sequence[str], has_stubs: bool
    ) -> bool:
        if precision not in chosen:
            return False
        if precision != "int8":
            return True
        return self.subject.calibration is not None and (has_stubs or not target.int8_by_stubs)

    def draw(self) -> None:
        """Record the graph before and after fusing."""
        self.progress("recording the graph")
        case = self.subject.examples[0]
        last = list(self.subject.variants.values())[-1]
        self.known["before"] = operations(self.subject.model, case)
        self.known["after"] = operations(last, case)

    def explain(self) -> None:
        """Measure the noise of each layer in int8, where there is a row in int8."""
        if self.subject.calibration is None or all(p.precision != "int8" for p in self.places):
            return
        self.progress("measuring the noise of each layer")
        find = functools.partial(self._noise, self.int8)
        self.int8 = None  # it is as large as the model
        try:
            noise = find() if self.cache is None else self.cache.result("noise", _Noise, find)
        except TorchfuseError as error:  # the row is there all the same
            self.notes.append(f"the noise of each layer is not known: {error}")
            return
        self.known["layers"], self.known["in_int8"] = noise.layers, noise.in_int8

    def _noise(self, int8: fx.GraphModule | None) -> "_Noise":
        assert self.subject.calibration is not None
        model, example = self.subject.model, self.subject.examples[0]
        given = self.subject.calibration.cases
        if int8 is None:  # the file was found in the cache, or is not of torchao's int8
            given = given[:: -(-len(given) // _EXPLAINED)]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", QuantizationWarning)  # the file's notes say it
                made = quantize(model, example, given).model
            assert isinstance(made, fx.GraphModule)
            int8 = made
        errors, layers = layers_of_int8(model, example, given, int8, look=_EXPLAINED)
        return _Noise(
            tuple(
                LayerNoise(e.module, e.operator, e.sqnr_db, e.own_sqnr_db, e.cause) for e in errors
            ),
            tuple(layer.module for layer in layers if layer.int8),
        )

    def measure(self, device: str) -> None:
        """Time everything that can run on a device."""
        places = [p for p in self.places if device == LOCAL or p.path is not None]
        if not places:
            self.notes.append(f"left out: {device}, since there is no file to run there")
            return
        self.timed[device] = places
        self.progress(f"getting ready to time on {device}")

        def take(found: Measured) -> None:
            self.measured[device] = found

        job = MeasureTimes(device, tuple(places), self.runs, self.threads)
        self.unfinished = f"timing on {device}"
        take(measure(job, self.subject, self.progress, take, self.earlier))
        self.unfinished = None
        if (error := self.measured[device].error) is not None:
            self.notes.append(f"left out: {device}: {error}")
        if device == LOCAL:
            self.unfinished = "profiling"
            self.known["profiles"], missing = profiles(
                places, self.subject, self.threads, self.progress
            )
            self.notes += missing
            self.unfinished = None

    def evaluate(self) -> None:
        """Compare what each row returns with what the model does."""
        for place in self.places:
            self.progress(f"comparing {place}")
            job = Evaluate(place, _bound(self.artifacts.get(place)))
            self.evaluated[place] = evaluated(
                job, self.subject, functools.partial(self._validating, place)
            )

    def _validating(self, place: Place, step: str) -> None:
        # The same step with the sample that it is at, and not another one: a line for each row.
        self.progress(f"comparing {place}, {step.removeprefix('validating, ')}")

    def so_far(self) -> Comparison | None:
        """Return what there is; None: no row is known by its times and its outputs."""
        rows = []
        for device, found in self.measured.items():
            for place, latency in zip(self.timed[device], found.latencies, strict=False):
                seen = self.evaluated.get(place)
                if seen is None:
                    continue
                artifact = self.artifacts.get(place)
                rows.append(
                    Row(
                        variant=place.variant,
                        target=place.target,
                        precision=place.precision,
                        latency=latency,
                        speedup=ratio(found.latencies[0], latency),
                        size_bytes=None if artifact is None else artifact.size_bytes,
                        difference=seen.difference,
                        accuracy=seen.accuracy,
                        delegation=None if artifact is None else artifact.delegation,
                        answers=seen.answers,
                        device=device,
                    )
                )
        if not rows:
            return None
        return replace(
            self.base,
            rows=tuple(rows),
            notes=(*self.always, *self._of_the_data(), *self.notes),
            devices=tuple(found.device for found in self.measured.values()),
            unfinished=self.unfinished,
            **self.known,
        )

    def _of_the_data(self) -> tuple[str, ...]:
        """Return what int8 is calibrated on, where there is int8."""
        return self.base.notes if any(p.precision == "int8" for p in self.places) else ()


def check_choices(
    variants: Sequence[str] | None, targets: Sequence[str] | None, devices: Sequence[str]
) -> None:
    """Find out, before there is a model, whether there are such variants, targets and devices.

    Raises:
        InputError: there is none of that name.
    """
    for kind, names in (("variants", variants), ("targets", targets), ("devices", devices)):
        if isinstance(names, str):
            raise InputError(f"Expected a list of {kind}, got the text '{names}'.")
    for name in variants or ():
        if name not in VARIANTS:
            raise InputError(f"Expected variants among {', '.join(VARIANTS)}, got '{name}'.")
    chosen_targets(targets)
    for name in devices:
        checked_device(name)


def _digest_with(digest: str, *settings: object) -> str:
    return hashlib.sha256(repr((digest, settings)).encode()).hexdigest()[:40]


def _latencies(earlier: Comparison) -> dict[str, Measurement]:
    return {row.latency.name: row.latency for row in earlier.rows if row.device == LOCAL}


def _is_chosen(name: str, chosen: Sequence[str]) -> bool:
    """Whether a file in fp32 is asked for; what a target folds itself is the fused one."""
    return name in chosen or (name != NOT_FUSED and "fused" in chosen)


def _data(
    model: nn.Module,
    examples: list[Case],
    data: Any,
    validation: Any,
    calibration: Any,
    preprocessing: Preprocessing | None,
    notes: list[str],
) -> tuple[CalibrationData | None, Samples | None, str | None]:
    """Return calibration data, validation samples and what the latter are; say so in `notes`."""
    case = examples[0]
    as_pixels = isinstance(model, WithPreprocessing)
    names = argument_names(model)

    def read(given: Any) -> Samples:
        return read_samples(given, case, preprocessing, as_pixels=as_pixels, names=names)

    validating = None if validation is None else read(validation)
    found: CalibrationData | None = None
    if calibration is not None or (isinstance(data, str) and data == "random"):
        given = calibration if calibration is not None else data
        found = read_calibration(given, case, preprocessing, as_pixels=as_pixels, names=names)
        notes.append(_calibrated(found, examples))
    elif data is not None:
        calibrating = read(data)
        if validating is None:
            calibrating, validating = held_out(calibrating)
        cases_ = calibration_cases(calibrating, case, _MOST_CALIBRATION)
        found = CalibrationData(cases_, calibrating.source)
        notes.append(_calibrated(found, examples))
    if validating is None:
        return found, None, None
    if len(validating) < (size := batch_size(case)):
        raise CalibrationError(
            f"Expected at least {size} validation samples, as many as the example's batch, got "
            f"{len(validating)}, {validating.source}; give more data, or a smaller example."
        )
    return found, validating, validating.source


def _calibrated(data: CalibrationData, examples: list[Case]) -> str:
    """Return what int8 is calibrated on, and whether it is compared on the same."""
    if data.random:
        return (
            f"int8 is calibrated on {data.source}: its time and size are those of any calibration, "
            "its outputs are not"
        )
    count = sample_count(data.cases)
    described = f"int8 is calibrated on {data.source}, {count} sample{'' if count == 1 else 's'}"
    if not all(any(_holds(given, example) for given in data.cases) for example in examples):
        return described
    return f"{described}, and its difference is on a calibration sample itself"


def _holds(given: Case, example: Case) -> bool:
    """Whether the example's first sample is one of those given."""
    same = []
    for ours, theirs in zip(tensors_of(given), tensors_of(example), strict=False):
        if not ours.dim() or ours.shape[1:] != theirs.shape[1:]:
            return False
        same.append((ours == theirs[:1]).reshape(len(ours), -1).all(1))
    return len({len(rows) for rows in same}) == 1 and bool(torch.stack(same).all(0).any())


def _accuracy_of(evaluate: Evaluation | None, samples: Samples | None) -> str | None:
    if evaluate is not None:
        return name_of(evaluate)
    return "top-1" if samples is not None and samples.labels is not None else None


def _bound(artifact: Artifact | None) -> float | None:
    """What a file's precision lets its outputs be judged by; None: equality within rounding."""
    if artifact is None or artifact.equivalence is None:
        return None
    asked, found = artifact.equivalence.min_sqnr_db, artifact.equivalence.sqnr_db
    return asked if asked is None or found is None else min(asked, found)


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return {"Python": platform.python_version(), **found}


def _make(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtifactError(
            f"the folder '{folder}' cannot be made: {error.strerror}; give another one"
        ) from error
    return folder
