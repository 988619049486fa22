"""suite.toml: which models are compared in which forms, on which devices and on which data."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import msgspec

from torchfuse.errors import InputError
from torchfuse.suites.toml_lines import line_of, lines

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

__all__ = ["Entry", "read_suite"]

_T = TypeVar("_T")
_RANDOM = "random"
_LISTS = (".csv", ".txt")  # of pictures and their labels
_SIZE = re.compile(r"(\d+)x(\d+)")
_AT = re.compile(r"(?P<what>.*?)(?: - at `\$(?P<path>.*)`)?", re.DOTALL)
_FIELD = re.compile(r"Object contains unknown field `(?P<name>.*)`")

Three = tuple[float, float, float]


class _Table(msgspec.Struct, forbid_unknown_fields=True, rename="kebab", kw_only=True):
    """A table of the file."""


class _Choices(_Table, kw_only=True):
    variants: list[str] | None = None
    targets: list[str] | None = None
    devices: list[str] | None = None
    threads: int | None = None
    runs: int | None = None
    time_limit_s: float | None = None


class _Whole(_Choices, kw_only=True):
    models: dict[str, Any]
    data: dict[str, Any] = {}


class _Model(_Choices, kw_only=True):
    source: str
    inputs: list[str] = []
    weights: str | None = None
    evaluate: str | None = None
    data: list[str] | None = None


class _Data(_Table, kw_only=True):
    path: str | None = None
    validation: str | None = None
    size: str | None = None
    mean: Three | None = None
    std: Three | None = None
    layout: Literal["NCHW", "NHWC"] = "NCHW"
    preprocess_inside: bool = False


@dataclass(frozen=True)
class Entry:
    """One comparison of a suite: a model on one kind of data. Plain, as it goes to a worker."""

    name: str  # of the model, and of the data where it is compared on several
    model: str
    source: str  # as MODEL of the command line; paths in it are absolute, here and below
    inputs: tuple[str, ...]
    weights: str | None
    evaluate: str | None
    data: str | None  # its name in the file
    path: str | None  # of the data
    validation: str | None
    size: tuple[int, int] | None  # height, width, in pixels
    mean: Three | None
    std: Three | None
    layout: Literal["NCHW", "NHWC"]
    preprocess_inside: bool
    variants: tuple[str, ...] | None  # None: all
    targets: tuple[str, ...] | None
    devices: tuple[str, ...]
    threads: int
    runs: int
    time_limit_s: float  # for making the files, and for each device's times


_RUNS, _THREADS, _TIME_LIMIT_S = 50, 1, 3600.0


class _Errors:
    """What is wrong with the file, each with its line and key."""

    def __init__(self, path: Path, text: str) -> None:
        self.path, self.lines = path, lines(text)
        self.found: dict[tuple[int, str], None] = {}

    def add(self, key: Sequence[str], what: str) -> None:
        line = line_of(self.lines, key)
        place = f"'{self.path}', line {line}" + (f", {'.'.join(key)}" if key else "")
        self.found[line, f"{place}: {what.rstrip('.')}."] = None

    def taken(self, key: Sequence[str], read: Callable[[], _T], otherwise: _T) -> _T:
        try:
            return read()
        except InputError as error:
            self.add(key, str(error))
        return otherwise

    def end(self) -> None:
        """Raise all that was found, in the order of the lines."""
        if not self.found:
            return
        first, *others = (text for _, text in sorted(self.found))
        error = InputError(first)
        error.__dict__["__notes__"] = others  # add_note is younger than Python 3.10
        raise error


def read_suite(path: Path) -> tuple[Entry, ...]:
    """Return the comparisons that a suite file asks for.

    Paths in it are relative to the folder that it lies in.

    Raises:
        InputError: it cannot be read, or something in it is not as expected; the first sentence
            names line and key, and the error's notes are the others.
    """
    try:
        text = path.read_text(encoding="utf-8")
        plain = tomllib.loads(text)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"'{path}' cannot be read as TOML: {error}.") from error
    errors = _Errors(path, text)
    whole = _converted(_Whole, plain, (), errors)
    if whole is None:
        errors.end()
    assert whole is not None
    if not whole.models:
        errors.add(("models",), "Expected a model, such as [models.net] with its source, got none")
    folder = path.resolve().parent
    data = {
        name: _converted(_Data, table, ("data", name), errors) for name, table in whole.data.items()
    }
    models = {
        name: _converted(_Model, table, ("models", name), errors)
        for name, table in whole.models.items()
    }
    _check_choices(whole, (), errors)
    sized = {
        name: _checked_data(table, ("data", name), folder, errors)
        for name, table in data.items()
        if table is not None
    }
    entries = []
    for name, model in models.items():
        if model is None:
            continue
        key = ("models", name)
        _check_choices(model, key, errors)
        source = errors.taken((*key, "source"), partial(_source, model.source, folder), "")
        _check_model(model, key, folder, errors)
        chosen = list(data) if model.data is None else model.data
        for unknown in [each for each in chosen if each not in data]:
            known = f"; there is {', '.join(data)}" if data else "; there is no [data.NAME]"
            errors.add((*key, "data"), f"Expected names of data, got '{unknown}'{known}")
        ones: list[str | None] = [each for each in chosen if each in sized]
        several = len(ones) > 1
        for one in ones or [None]:
            size, table = (None, None) if one is None else (sized[one], data[one])
            named = f"{name} on {one}" if several else name
            entry = _entry(named, name, source, model, whole, one, table or _Data(), size, folder)
            entries.append(entry)
    errors.end()
    return tuple(entries)


def _converted(kind: type[_T], plain: object, key: tuple[str, ...], errors: _Errors) -> _T | None:
    try:
        return msgspec.convert(plain, kind)
    except msgspec.ValidationError as error:
        match = _AT.fullmatch(str(error))
        assert match is not None
        inner = [part for part in re.split(r"[.\[\]]+", match["path"] or "") if part.isidentifier()
                 or "-" in part]  # fmt: skip
        what = match["what"]
        if unknown := _FIELD.fullmatch(what):
            name = unknown["name"]
            known = ", ".join(field.encode_name for field in msgspec.structs.fields(kind))  # type: ignore[arg-type]  # all are Structs
            errors.add((*key, *inner, name), f"There is no such key; those are {known}")
        else:
            errors.add((*key, *inner), what.replace("Object", "This table"))
    return None


def _check_choices(table: _Choices, key: tuple[str, ...], errors: _Errors) -> None:
    from torchfuse.comparing.variants import check_choices

    def check(name: str, variants: Any, targets: Any, devices: Any) -> None:
        errors.taken((*key, name), lambda: check_choices(variants, targets, devices), None)

    if table.variants is not None:
        check("variants", _variants(table.variants), None, ())
    if table.targets is not None:
        check("targets", None, table.targets, ())
    if table.devices is not None:
        check("devices", None, None, table.devices)
    for name, least in (("variants", 1), ("targets", 1), ("devices", 1)):
        if (given := getattr(table, name)) is not None and len(given) < least:
            errors.add((*key, name), "Expected at least one, got none; leave it out for all")
    for name, fewest in (("threads", 1), ("runs", 2)):
        if (number := getattr(table, name)) is not None and number < fewest:
            errors.add((*key, name), f"Expected {fewest} or more, got {number}")
    if table.time_limit_s is not None and not table.time_limit_s > 0:
        errors.add(
            (*key, "time-limit-s"), f"Expected seconds above zero, got {table.time_limit_s:g}"
        )


def _variants(names: Sequence[str]) -> list[str]:
    return [name.replace("-", " ") for name in names]


def _check_model(model: _Model, key: tuple[str, ...], folder: Path, errors: _Errors) -> None:
    from torchfuse.model_source import parse_inputs

    errors.taken((*key, "inputs"), lambda: parse_inputs(model.inputs), None)
    if model.weights is not None and not (folder / model.weights).is_file():
        errors.add((*key, "weights"), f"There is no file '{folder / model.weights}'")
    if model.evaluate is not None:
        errors.taken((*key, "evaluate"), lambda: _source(str(model.evaluate), folder), None)


def _source(text: str, folder: Path) -> str:
    """Return MODEL with an absolute path; it is not loaded, which may take long.

    Raises:
        InputError: it has no form that a model can have here, or there is no such file.
    """
    from torchfuse.model_source import parse_source

    source = parse_source(text)
    if source.attribute is None:
        raise InputError(
            "Expected a model, got an exported program, which has no other forms; give "
            "path/to/file.py:callable"
        )
    if source.path is None:
        return text
    place, colon, rest = text.partition(".py:")
    path = folder / f"{place}.py"
    if not path.is_file():
        raise InputError(f"There is no file '{path}'")
    return f"{path}{colon.removeprefix('.py')}{rest}"


def _checked_data(
    data: _Data, key: tuple[str, ...], folder: Path, errors: _Errors
) -> tuple[int, int] | None:
    """Find out whether data is there and it is said what pictures mean; return their size."""
    for name, given in (("path", data.path), ("validation", data.validation)):
        if given is None or given == _RANDOM:
            continue
        path = folder / given
        if not path.exists():
            errors.add(
                (*key, name),
                f"Expected an .npy or .npz file, a folder of pictures, or '{_RANDOM}', got "
                f"'{path}', which is no such file",
            )
        elif (path.is_dir() or path.suffix in _LISTS) and (data.mean is None or data.std is None):
            errors.add(
                (*key, name),
                f"'{given}' holds or lists pictures, so it must be said how one becomes the "
                "model's input: give mean and std, and size unless it is the example's",
            )
    if data.path is None and data.validation is None:
        errors.add(key, f"Expected a path, or '{_RANDOM}', got none")
    if (data.mean is None) != (data.std is None):
        errors.add((*key, "std" if data.mean is None else "mean"), "Expected mean and std together")
    for name, needed in (("size", data.size), ("preprocess-inside", data.preprocess_inside)):
        if needed and data.mean is None:
            errors.add((*key, name), "It needs mean and std")
    if data.size is None:
        return None
    match = _SIZE.fullmatch(data.size)
    if match is None:
        errors.add((*key, "size"), f"Expected HxW, such as 224x224, got '{data.size}'")
        return None
    return int(match[1]), int(match[2])


def _entry(
    name: str,
    model_name: str,
    source: str,
    model: _Model,
    whole: _Whole,
    data_name: str | None,
    data: _Data,
    size: tuple[int, int] | None,
    folder: Path,
) -> Entry:
    def chosen(key: str, otherwise: Any) -> Any:
        for table in (model, whole):
            if (given := getattr(table, key)) is not None:
                return given
        return otherwise

    def placed(path: str | None) -> str | None:
        return path if path in (None, _RANDOM) else str(folder / str(path))

    evaluate = None
    if model.evaluate is not None:
        try:
            evaluate = _source(model.evaluate, folder)
        except InputError:  # it is among the errors already
            evaluate = model.evaluate
    variants, targets = chosen("variants", None), chosen("targets", None)
    return Entry(
        name=name,
        model=model_name,
        source=source,
        inputs=tuple(model.inputs),
        weights=placed(model.weights),
        evaluate=evaluate,
        data=data_name,
        path=placed(data.path),
        validation=placed(data.validation),
        size=size,
        mean=data.mean,
        std=data.std,
        layout=data.layout,
        preprocess_inside=data.preprocess_inside,
        variants=None if variants is None else tuple(_variants(variants)),
        targets=None if targets is None else tuple(targets),
        devices=tuple(dict.fromkeys(chosen("devices", ["local"]))),
        threads=chosen("threads", _THREADS),
        runs=chosen("runs", _RUNS),
        time_limit_s=chosen("time_limit_s", _TIME_LIMIT_S),
    )
