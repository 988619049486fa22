"""--dynamic of the command line: which sizes of the inputs may differ from the example's."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torchfuse.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

__all__ = ["DynamicSize", "dynamic_shapes", "parse_sizes"]

_SIZE = re.compile(r"(?P<places>[^=]*)=(?P<low>\d+)\.\.(?P<high>\d+)")
_PLACE = re.compile(r"(?:(?P<name>[A-Za-z_]\w*):)?(?P<axis>\d+)")


@dataclass(frozen=True)
class DynamicSize:
    """One size that may differ, with its bounds, and all places where it is that size."""

    text: str  # as it was given
    places: tuple[tuple[str | None, int], ...]  # input and axis; None: every input
    low: int
    high: int


def parse_sizes(texts: Sequence[str]) -> list[DynamicSize]:
    """Return what each `[NAME:]AXIS[,…]=MIN..MAX` asks for.

    >>> parse_sizes(["0=1..8", "x:2,mask:1=64..512"])[1].places
    (('x', 2), ('mask', 1))

    Raises:
        InputError: one of them has another form, or bounds that leave no choice.
    """
    return [_parsed(text) for text in texts]


def _parsed(text: str) -> DynamicSize:
    match = _SIZE.fullmatch(text)
    places = [_PLACE.fullmatch(place) for place in match["places"].split(",")] if match else [None]
    if match is None or not all(places):
        raise InputError(
            f"'{text}' is not a dynamic size: expected axes and the smallest and largest size, "
            "such as 0=1..8 for axis 0 of every input, x:2=64..512, or a:1,b:1=1..77 for two that "
            "are always the same."
        )
    low, high = int(match["low"]), int(match["high"])
    if not 1 <= low < high:
        raise InputError(
            f"'{text}' is not a dynamic size: expected a smallest size of 1 or more and a larger "
            f"one after it, got {low} and {high}."
        )
    named = tuple((place["name"], int(place["axis"])) for place in places if place)
    return DynamicSize(text, named, low, high)


def dynamic_shapes(sizes: Sequence[DynamicSize], model: Any, example: Any) -> Any:
    """Return the sizes as torch.export takes them, for a model's arguments; None: there are none.

    Raises:
        InputError: the model has no such input or axis, or a size is given twice.
    """
    if not sizes:
        return None
    import torch

    from torchfuse.cases import cases
    from torchfuse.quantizing.static import by_argument_name

    case = cases(example)[0]
    try:
        arguments = by_argument_name(model, case.args, dict(case.kwargs))
    except TypeError as error:
        raise InputError(
            f"{type(model).__name__} does not take its example inputs, {case}: {error}."
        ) from error
    axes = {
        name: value.dim() for name, value in arguments.items() if isinstance(value, torch.Tensor)
    }
    shapes: dict[str, dict[int, Any] | None] = dict.fromkeys(arguments)
    for size in sizes:
        places = list(_placed(size, axes, arguments))
        name, axis = places[0]
        dim = torch.export.Dim(f"{name}_{axis}", min=size.low, max=size.high)
        for name, axis in places:
            here = shapes[name] or {}
            if axis in here:
                raise InputError(f"--dynamic {size.text}: axis {axis} of '{name}' is given twice.")
            shapes[name] = {**here, axis: dim}
    return shapes


def _placed(
    size: DynamicSize, axes: Mapping[str, int], arguments: Mapping[str, Any]
) -> Iterator[tuple[str, int]]:
    """Yield the inputs and axes that a size is of, all of which there are."""
    known = ", ".join(f"{name} with {count}" for name, count in axes.items()) or "none"
    for given, axis in size.places:
        for name in axes if given is None else [given]:
            if axis >= axes.get(name, 0):
                raise InputError(
                    f"--dynamic {size.text} is about axis {axis} of '{name}', which is not there; "
                    f"the tensors that forward takes, with the number of their axes, are {known}."
                )
            yield name, axis
        nested = [name for name in arguments if name not in axes and _holds(arguments[name])]
        if given is None and (nested or not axes):
            raise InputError(
                f"--dynamic {size.text} is about every input, which takes tensors as arguments of "
                f"their own, got {', '.join(nested) or 'none'}; name those that are, or give "
                "torchfuse.export its dynamic_shapes."
            )


def _holds(value: Any) -> bool:
    """Return whether there is a tensor in it."""
    import torch
    from torch.utils import _pytree as pytree

    return any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(value))
