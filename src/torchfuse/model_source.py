"""MODEL, --input and --weights of the command line: from text to a model and what to run it on."""

from __future__ import annotations

import ast
import contextlib
import difflib
import importlib
import importlib.util
import logging
import os
import re
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchfuse.errors import InputError, first_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from types import ModuleType

    import torch
    from torch import Tensor, nn
    from torch.export import ExportedProgram

__all__ = [
    "InputSpec",
    "LoadedModel",
    "ModelSource",
    "load",
    "load_function",
    "parse_input",
    "parse_inputs",
    "parse_source",
]

DTYPES = (
    "float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool",
)  # fmt: skip
_INPUT = re.compile(r"(?:(?P<name>[A-Za-z_]\w*)=)?(?P<sizes>\d+(?:x\d+)*)(?::(?P<dtype>\w+))?")
_CALL = re.compile(r"(?P<source>.+:[A-Za-z_][\w.]*)\((?P<arguments>.*)\)", re.DOTALL)
_TIMM = "timm"  # a name after it is first looked for among its models
_PARALLEL = "module."
_WEIGHT_SUFFIXES = (".pt", ".pth", ".safetensors")


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from: a Python file, an importable module, or an exported program."""

    path: Path | None  # of the .py or .pt2 file; None for a module
    module: str | None  # dotted name; None for a file
    attribute: str | None  # "resnet50", or "Nets.small"; None for a .pt2
    args: tuple[Any, ...] = ()  # that it is called with
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class InputSpec:
    """One example input: `1x3x224x224:float32`, with the keyword it is passed as, if any."""

    name: str | None
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode, or an exported program, and the example inputs to run it on."""

    name: str  # as given on the command line
    model: Any  # nn.Module or, if `exported`, torch.export.ExportedProgram
    example_inputs: Any  # as `torchfuse.plan` takes them
    exported: bool = False
    random_inputs: bool = False  # they are noise of the sizes that were given
    random_weights: bool = False  # for certain: no checkpoint was asked for

    @property
    def title(self) -> str | None:
        """What reports call it; None: its class, which is the name that its author gave it."""
        source = parse_source(self.name)
        if self.exported:
            return None if source.path is None else source.path.stem
        return source.attribute if source.module == _TIMM else None

    @property
    def doubt(self) -> str | None:
        """What is to be said of its answers; None: nothing is known against them."""
        if not self.random_weights:
            return None
        return (
            f"the weights of '{self.name}' are random: its times and sizes are the model's, its "
            f"answers are not; give '{self.name.partition('(')[0]}(pretrained=True)', or --weights"
        )

    @property
    def module(self) -> nn.Module:
        """The model, or the exported program as a module, without what guards its sizes.

        Raises:
            InputError: the program does not take the example inputs.
        """
        if self.exported:
            return _module_of(self.name, self.model, self.example_inputs)
        return self.model  # type: ignore[no-any-return]


def parse_source(text: str) -> ModelSource:
    """Return the parts of MODEL; whether they exist is not looked at.

    >>> parse_source("nets.vision:resnet50").attribute
    'resnet50'
    >>> parse_source("nets.py:make(10, width=0.5)").kwargs
    {'width': 0.5}

    Raises:
        InputError: `text` has none of the three forms, or an argument that is no literal.
    """
    if call := _CALL.fullmatch(text):
        args, kwargs = _arguments(text, call["arguments"])
        return replace(parse_source(call["source"]), args=args, kwargs=kwargs)
    place, colon, attribute = text.rpartition(":")
    if not colon and text.endswith(".pt2"):
        return ModelSource(Path(text), None, None)
    if colon and place.endswith(".py") and attribute:
        return ModelSource(Path(place), None, attribute)
    dotted = place.replace(".", "_").isidentifier() and attribute.replace(".", "_").isidentifier()
    if colon and dotted and os.sep not in place:
        return ModelSource(None, place, attribute)
    forms = (
        "path/to/file.py:callable, package.module:callable, timm:NAME, or an exported program "
        "file.pt2"
    )
    if text.endswith(".py"):
        raise InputError(f"'{text}' names a file but no callable in it; write '{text}:callable'.")
    raise InputError(f"'{text}' is not a MODEL: expected {forms}.")


def _arguments(text: str, given: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments in the brackets of a callable; only literals are."""
    try:
        call = ast.parse(f"f({given})", mode="eval").body
        assert isinstance(call, ast.Call)
        assert isinstance(call.func, ast.Name)  # and not f(…)(…)
        if any(keyword.arg is None for keyword in call.keywords):
            raise ValueError("** is no literal")
        args = tuple(ast.literal_eval(argument) for argument in call.args)
        kwargs = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except (SyntaxError, ValueError, AssertionError) as error:
        raise InputError(
            f"'{text}' has arguments that cannot be read: expected numbers, strings, True, False, "
            f"None, and lists, tuples and dicts of them, such as (10, width=0.5), got ({given})."
        ) from error
    return args, kwargs


def parse_input(text: str) -> InputSpec:
    """Return what `[name=]SIZExSIZE…[:dtype]` asks for; the dtype is float32 unless given.

    >>> parse_input("tokens=1x128:int64")
    InputSpec(name='tokens', shape=(1, 128), dtype='int64')

    Raises:
        InputError: `text` has another form, or names an unknown dtype.
    """
    match = _INPUT.fullmatch(text)
    if match is None:
        raise InputError(
            f"'{text}' is not an input: expected sizes joined by x, with an optional name before "
            "and an optional dtype after, such as 1x3x224x224, mask=1x77:bool or 1x128:int64."
        )
    dtype = match["dtype"] or "float32"
    if dtype not in DTYPES:
        raise InputError(
            f"'{text}' asks for the dtype '{dtype}', which is none of {', '.join(DTYPES)}"
            f"{_near(dtype, DTYPES)}."
        )
    return InputSpec(match["name"], tuple(map(int, match["sizes"].split("x"))), dtype)


def parse_inputs(texts: Sequence[str]) -> list[InputSpec]:
    """Return what all --input of a command ask for.

    Raises:
        InputError: as `parse_input`, or one keyword twice.
    """
    specs = [parse_input(text) for text in texts]
    _check_unique(specs)
    return specs


def load(
    text: str,
    inputs: Sequence[str] = (),
    weights: Path | None = None,
    otherwise: Sequence[str] = (),
) -> LoadedModel:
    """Return the model that MODEL names, in evaluation mode, with example inputs.

    `inputs` are --input texts; with none, the callable must return `(model, example_inputs)`, or
    the exported program must have been saved with its own. Floating-point inputs are drawn from a
    normal distribution, others are zeros and ones, always the same ones. `otherwise` is what
    `inputs` are where there are none, and no others either. `weights` is a state dict
    (.pt, .pth, .safetensors) and is loaded without unpickling objects.

    Raises:
        InputError: one of them does not exist, does not fit, or cannot be read.
    """
    source = parse_source(text)
    specs = parse_inputs(inputs)
    if source.attribute is None:
        assert source.path is not None
        if weights is not None:
            raise InputError(f"'{text}' holds its own weights; leave out --weights {weights}.")
        program = _load_program(source.path)
        given = _example_inputs(text, specs, _saved_inputs(program))
        return LoadedModel(text, program, given, exported=True, random_inputs=bool(specs))
    if weights is not None:
        _check_weights_file(weights)
    model, given = _build(text, source)
    if weights is not None:
        _load_weights(model, weights)
    if given is None and not specs:
        specs = parse_inputs(otherwise)
    return LoadedModel(
        text,
        model.eval(),
        _example_inputs(text, specs, given),
        random_inputs=bool(specs) or source.module == _TIMM,
        random_weights=source.module == _TIMM and weights is None and not _has_weights(source),
    )


def _has_weights(source: ModelSource) -> bool:
    """Whether timm was asked for a checkpoint."""
    asked = (*source.args[:1], *map(source.kwargs.get, ("pretrained", "checkpoint_path")))
    return any(asked)


def _near(name: str, known: Iterable[str]) -> str:
    matches = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f" (did you mean {' or '.join(repr(match) for match in matches)}?)" if matches else ""


def _missing_file(path: Path, pattern: str) -> InputError:
    if not path.parent.is_dir():
        return InputError(f"The folder '{path.parent}' of '{path}' does not exist.")
    siblings = [other.name for other in path.parent.glob(pattern)]
    return InputError(f"The file '{path}' does not exist{_near(path.name, siblings)}.")


# ── the model ────────────────────────────────────────────────────────────────────────────────────


def _build(text: str, source: ModelSource) -> tuple[nn.Module, Any]:
    """Return the model, and the example inputs that the callable gave with it, or None."""
    from torch import nn

    given = None
    with _same_random_numbers():
        if (made := _of_timm(text, source)) is not None:
            return made
        value = _attribute(text, source)
        if not isinstance(value, nn.Module):
            value = _call(text, value, source)
        elif source.args or source.kwargs:
            raise InputError(f"'{text}' is a module already, which takes no arguments here.")
    if isinstance(value, tuple) and len(value) == 2:
        value, given = value
    if not isinstance(value, nn.Module):
        raise InputError(
            f"'{text}' must return a torch.nn.Module, or (module, example_inputs), "
            f"got {type(value).__name__}."
        )
    return value, given


@contextlib.contextmanager
def _same_random_numbers() -> Iterator[None]:
    """Draw what no checkpoint fills in: the same model each time, so that runs can be compared."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def _attribute(text: str, source: ModelSource) -> Any:
    value: Any = _import(text, source)
    assert source.attribute is not None
    for part in source.attribute.split("."):
        if not hasattr(value, part):
            public = [name for name in dir(value) if callable(getattr(value, name, None))]
            where = f"'{source.path or source.module}' has no '{source.attribute}'"
            raise InputError(f"{where}{_near(part, public)}; name a callable that it defines.")
        value = getattr(value, part)
    return value


def load_function(text: str) -> Callable[..., Any]:
    """Return the function that `path/to/file.py:function` or `package.module:function` names.

    Raises:
        InputError: it does not exist, or is no function.
    """
    source = parse_source(text)
    value = None if source.attribute is None else _attribute(text, source)
    if not callable(value):
        raise InputError(
            f"Expected a function, path/to/file.py:function or package.module:function, got "
            f"'{text}'."
        )
    return value  # type: ignore[no-any-return]


def _of_timm(text: str, source: ModelSource) -> tuple[nn.Module, Any] | None:
    """Return the timm model of that name, and an input of its size; None: it is none."""
    if source.module != _TIMM or source.attribute is None:
        return None
    import torch

    timm = _import_module(text, _TIMM)
    name = source.attribute
    if not timm.is_model(name.partition(".")[0]):
        if hasattr(timm, name):
            return None
        near = _near(name, timm.list_models())
        raise InputError(f"timm {timm.__version__} has no model '{name}'{near}.")
    try:
        model = timm.create_model(name, *source.args, **source.kwargs)
    except Exception as error:
        raise InputError(
            f"timm cannot make '{text}': {type(error).__name__}: {first_line(error)}."
        ) from error
    sizes = model.default_cfg["input_size"]
    generator = torch.Generator().manual_seed(0)
    return model, torch.randn((1, *sizes), generator=generator)


def _call(text: str, function: Any, source: ModelSource) -> Any:
    if not callable(function):
        raise InputError(
            f"'{text}' is {type(function).__name__}, not a callable that returns a model."
        )
    try:
        return function(*source.args, **source.kwargs)
    except Exception as error:
        how = "with these arguments" if source.args or source.kwargs else "without arguments"
        raise InputError(
            f"'{text}' must return a model when called {how}, but it raised "
            f"{type(error).__name__}: {first_line(error)}."
        ) from error


def _import(text: str, source: ModelSource) -> ModuleType:
    if source.path is None:
        assert source.module is not None
        return _import_module(text, source.module)
    path = source.path
    if not path.is_file():
        raise _missing_file(path, "*.py")
    # Registered under a name of its own, as dataclasses and pickling in that file expect.
    name = f"torchfuse_model_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(path.resolve().parent))  # what `python path/to/file.py` does
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise InputError(
            f"Running '{path}' raised {type(error).__name__}: {first_line(error)}."
        ) from error
    finally:
        sys.path.pop(0)
    return module


def _import_module(text: str, name: str) -> ModuleType:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # what `python -m` does, and the installed command does not
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise InputError(
                f"There is no module '{error.name}' to import for '{text}'; install it, or run "
                "from the folder that holds it, or give the path of the file."
            ) from error
        raise InputError(
            f"Importing '{name}' raised {type(error).__name__}: {first_line(error)}."
        ) from error
    except Exception as error:
        raise InputError(
            f"Importing '{name}' raised {type(error).__name__}: {first_line(error)}."
        ) from error


def _load_program(path: Path) -> ExportedProgram:
    import torch

    if not path.is_file():
        raise _missing_file(path, "*.pt2")
    logger, heard = logging.getLogger("torch.export"), _Heard()
    logger.addFilter(heard)
    try:
        return torch.export.load(path)
    except Exception as raised:
        error = heard.error or raised
        raise InputError(
            f"'{path}' is not an exported program that torch {torch.__version__} can load "
            f"({type(error).__name__}: {first_line(error)}): it is damaged, or of another torch; "
            "save it again with torch.export.save."
        ) from raised
    finally:
        logger.removeFilter(heard)


class _Heard(logging.Filter):
    """Takes the error that torch.export only writes to its log, with its traceback, out of it."""

    error: BaseException | None = None

    def filter(self, record: logging.LogRecord) -> bool:
        if not record.exc_info or record.exc_info[1] is None:
            return True
        self.error = record.exc_info[1]
        return False


def _module_of(text: str, program: ExportedProgram, example_inputs: Any) -> nn.Module:
    """Return the program as a module that can be traced, exported and copied again.

    It is run once with its guards, which say what sizes it was exported for: without them it might
    run on others, and be wrong.
    """
    from torchfuse.cases import cases
    from torchfuse.isolation.warning_filters import known_warnings_ignored

    for case in cases(example_inputs):
        try:
            with known_warnings_ignored():
                program.module()(*case.args, **case.kwargs)
        except Exception as error:
            raise InputError(
                f"'{text}' cannot run on {case}: {first_line(error).rstrip('.')}; give --input "
                "with the sizes that it was exported for."
            ) from error
    with known_warnings_ignored():
        module = program.module(check_guards=False)
    for part in module.modules():
        part.training = False  # it has no modes: it computes as it was exported
    return module


# ── example inputs ───────────────────────────────────────────────────────────────────────────────


def _check_unique(specs: list[InputSpec]) -> None:
    names = [spec.name for spec in specs if spec.name is not None]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"--input {name}=… is given twice; each keyword takes one tensor.")


def _saved_inputs(program: ExportedProgram) -> Any:
    from torchfuse.cases import Case

    if program.example_inputs is None:
        return None
    args, kwargs = program.example_inputs
    return Case(tuple(args), dict(kwargs))


def _example_inputs(text: str, specs: list[InputSpec], given: Any) -> Any:
    from torchfuse.cases import Case

    if specs:
        args = tuple(_tensor(spec, i) for i, spec in enumerate(specs) if spec.name is None)
        kwargs = {spec.name: _tensor(spec, i) for i, spec in enumerate(specs) if spec.name}
        return Case(args, kwargs)
    if given is None:
        raise InputError(
            f"'{text}' comes without example inputs; add --input with its sizes, such as "
            "--input 1x3x224x224, or return (model, example_inputs)."
        )
    return given


def _tensor(spec: InputSpec, index: int) -> Tensor:
    import torch

    generator = torch.Generator().manual_seed(index)
    dtype: torch.dtype = getattr(torch, spec.dtype)
    if dtype.is_floating_point:
        return torch.randn(spec.shape, generator=generator).to(dtype)
    # Zeros and ones are valid token ids, masks, pixels and class labels alike.
    return torch.randint(0, 2, spec.shape, generator=generator).to(dtype)


# ── weights ──────────────────────────────────────────────────────────────────────────────────────


def _check_weights_file(path: Path) -> None:
    if path.suffix not in _WEIGHT_SUFFIXES:
        raise InputError(
            f"--weights takes a state dict in a {', '.join(_WEIGHT_SUFFIXES[:-1])} or "
            f"{_WEIGHT_SUFFIXES[-1]} file, got '{path}'."
        )
    if not path.is_file():
        raise _missing_file(path, "*.*")


def _load_weights(model: nn.Module, path: Path) -> None:
    read = _read_safetensors if path.suffix == ".safetensors" else _read_checkpoint
    _check_keys(model, state := read(path), path)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        mismatches = [line.strip() for line in str(error).splitlines()[1:]]
        raise InputError(
            f"'{path}' does not fit the model: {mismatches[0] if mismatches else error}"
        ) from error


def _read_checkpoint(path: Path) -> Mapping[str, Any]:
    import torch

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(
            f"'{path}' is not a checkpoint of tensors alone ({type(error).__name__}); save it "
            "as torch.save(model.state_dict(), path)."
        ) from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]  # the usual wrapping of training frameworks
    if isinstance(state, dict) and state and all(str(k).startswith(_PARALLEL) for k in state):
        # DistributedDataParallel's and DataParallel's, whose only child is the model.
        state = {str(key).removeprefix(_PARALLEL): value for key, value in state.items()}
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise InputError(
            f"'{path}' must hold a state dict, got {type(state).__name__}; save it as "
            "torch.save(model.state_dict(), path)."
        )
    return state


def _read_safetensors(path: Path) -> Mapping[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state: Mapping[str, Any] = load_file(path)
        return state
    except SafetensorError as error:
        raise InputError(f"'{path}' is not a whole .safetensors file ({error}).") from error


def _check_keys(model: nn.Module, state: Mapping[str, Any], path: Path) -> None:
    expected = model.state_dict().keys()
    missing = [key for key in expected if key not in state]
    unknown = [key for key in state if key not in expected]
    if not missing and not unknown:
        return
    found = []
    if missing:
        found.append(f"{len(missing)} of the model's keys are missing, first '{missing[0]}'")
    if unknown:
        near = _near(unknown[0], missing or expected)
        found.append(f"{len(unknown)} of its keys are not the model's, first '{unknown[0]}'{near}")
    raise InputError(f"'{path}' does not fit the model: {' and '.join(found)}.")
