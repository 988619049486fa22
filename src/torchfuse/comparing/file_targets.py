"""What a model is compared on: this process, and the file formats that can be made here."""

from collections.abc import Sequence
from dataclasses import dataclass

from torchfuse.artifacts import Precision
from torchfuse.errors import InputError
from torchfuse.targets import TARGETS

__all__ = ["IN_PROCESS", "FileTarget", "chosen_targets", "file_targets"]

IN_PROCESS = ("eager", "channels_last")


@dataclass(frozen=True)
class FileTarget:
    """A file format, and which variants of a model are worth a file of it."""

    suffix: str
    precisions: tuple[Precision, ...]
    folds: bool  # batch norms whether the model was fused or not, so there is one variant
    int8_by_stubs: bool = False  # only of a model with QuantStub and DeQuantStub
    most_compact_only: bool = False  # of the precisions that there are, the last
    unasked: bool = True  # compared if no targets are named


# Who quantizes a model with stubs of its own in its source
_BY_STUBS = "torch.ao"


def file_targets() -> tuple[FileTarget, ...]:
    """Return the file formats there are, in the order of the rows.

    Of each, the precisions that a comparison has rows for.
    """
    return tuple(
        FileTarget(
            target.suffix,
            tuple(precision for precision in _PRECISIONS if precision in target.precisions),
            folds=target.quantized_by != _BY_STUBS,
            int8_by_stubs=target.quantized_by == _BY_STUBS,
            most_compact_only=target.most_compact_only,
            unasked=target.for_phones,
        )
        for target in sorted(TARGETS, key=lambda target: target.quantized_by != _BY_STUBS)
    )


_PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8")


def chosen_targets(names: Sequence[str] | None) -> tuple[tuple[str, ...], tuple[FileTarget, ...]]:
    """Return those of IN_PROCESS and of `file_targets` that are named, with or without the dot.

    Eager mode is always among them, since all others are compared with it.

    Raises:
        InputError: a name is none of them.
    """
    files = file_targets()
    if names is None:
        return IN_PROCESS, tuple(target for target in files if target.unasked)
    known = [*IN_PROCESS, *(target.suffix for target in files)]
    wanted = {name if name in IN_PROCESS else f".{name.removeprefix('.')}" for name in names}
    if unknown := sorted(wanted - set(known)):
        raise InputError(
            f"Expected targets among {', '.join(name.removeprefix('.') for name in known)}, got "
            f"'{unknown[0].removeprefix('.')}'."
        )
    in_process = tuple(name for name in IN_PROCESS if name == "eager" or name in wanted)
    return in_process, tuple(target for target in files if target.suffix in wanted)
