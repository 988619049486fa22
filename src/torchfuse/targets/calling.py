"""Calling a loaded file as the model that it was made from: nesting, sizes and types."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from torchfuse.cases import Case
from torchfuse.errors import ArtifactError, InputError, first_line
from torchfuse.lowering.capture import ANY_SIZE, plainly_nested, with_default_strides

__all__ = ["ANY_SIZE", "Input", "Model", "cores", "described", "inputs_of_signature"]


class Model(ABC):
    """A loaded file: call it as the model it was made from.

    Results are nested as the model's, of dicts, lists and tuples only; without a `signature` (a
    file that torchfuse did not write), one output comes as a tensor and several as a tuple.
    `preprocessing` says how the input is made, if the file says so.

    Raises:
        ArtifactError: the runtime refuses the file.
    """

    def __init__(
        self,
        inputs: "tuple[Input, ...]",
        signature: Mapping[str, Any] | None = None,
        preprocessing: Mapping[str, Any] | None = None,
    ) -> None:
        signature = signature or {}
        self.preprocessing = preprocessing
        self._in_spec = _read(signature.get("in_spec"))
        self._out_spec = _read(signature.get("out_spec"))
        self._inputs = inputs
        self._takes_tensors = self._in_spec is not None and self._in_spec == pytree.tree_structure(
            ((0,) * len(self._inputs), {})
        )

    def __repr__(self) -> str:
        """What it takes, and how that is made."""
        takes = ", ".join(map(str, self._inputs))
        made = "" if self.preprocessing is None else f"; made by {dict(self.preprocessing)}"
        return f"{type(self).__name__}(takes {takes}{made})"

    @property
    @abstractmethod
    def threads(self) -> int:
        """How many threads the runtime has for it."""

    @abstractmethod
    def set_threads(self, count: int) -> None:
        """Run on so many threads from now on."""

    @abstractmethod
    def _execute(self, inputs: list[Any]) -> Sequence[Any]:
        """Return the outputs, flat, for inputs that were checked."""

    def bound(self, inputs: list[Any]) -> Callable[[], Sequence[Any]]:
        """Return a call on these flat inputs with nothing around it, to be timed."""
        return lambda: self._execute(inputs)

    def largest_ones(self) -> Case | None:
        """Return inputs of ones of the largest sizes that it takes; None: there are none."""
        if any(largest >= ANY_SIZE for given in self._inputs for _, largest in given.sizes):
            return None
        leaves = [
            torch.ones([largest for _, largest in given.sizes], dtype=given.dtype)
            for given in self._inputs
            if given.dtype is not None
        ]
        if len(leaves) < len(self._inputs):
            return None
        if self._in_spec is None:
            return Case(tuple(leaves))
        args, kwargs = pytree.tree_unflatten(leaves, self._in_spec)
        return Case(args, kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model.

        Raises:
            InputError: other inputs than it was made for.
            UnsupportedError: a kernel of the runtime refuses them.
        """
        inputs = self.flat(args, kwargs)
        self._check(inputs)
        outputs = self._execute(inputs)
        if self._out_spec is not None and not self._out_spec.is_leaf():
            return pytree.tree_unflatten(outputs, self._out_spec)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def flat(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        """Return the arguments in the order in which the program itself takes them.

        Raises:
            InputError: other arguments, or other nesting, than it was made for.
        """
        if self._in_spec is None:
            if kwargs:
                raise InputError(
                    f"The program does not say which of its inputs are {', '.join(kwargs)}; give "
                    "all inputs by position."
                )
            flat = pytree.tree_leaves(args)
        elif self._takes_tensors and not kwargs and len(args) == len(self._inputs):
            flat = list(args)  # the common case, without the flattening that costs more than a look
        else:
            names = self._in_spec.child(1).context
            flat, spec = pytree.tree_flatten((args, kwargs))
            spec = plainly_nested(spec)
            if spec != self._in_spec:
                flat, spec = pytree.tree_flatten(_with_keys_in_order((args, kwargs), self._in_spec))
            if spec != self._in_spec:
                raise InputError(
                    f"The program takes {self._in_spec.child(0).num_children} inputs by position "
                    f"and {list(names)} by name; got {len(args)} and {list(kwargs)}, or other "
                    "nesting."
                )
        return [with_default_strides(leaf) for leaf in flat]

    def _check(self, inputs: list[Any]) -> None:
        # Runtimes say little of it, and some run on sizes that were not declared.
        if len(inputs) == len(self._inputs) and all(map(Input.takes, self._inputs, inputs)):
            return
        made = dict(self.preprocessing or {})
        raise InputError(
            f"The program takes {', '.join(map(str, self._inputs))}; got {described(inputs)}."
            f"{'' if self.preprocessing is None else f' Its input is made by {made}.'}"
        )


def _read(spec: str | None) -> pytree.TreeSpec | None:
    """Return a spec of the signature; files of earlier versions hold other types than plain ones.

    Raises:
        ArtifactError: it names a type that this process does not know.
    """
    try:
        return None if spec is None else pytree.treespec_loads(spec)
    except NotImplementedError as error:
        raise ArtifactError(
            f"its results are of a type that this process does not know ({first_line(error)}); "
            "import the library that the model is from, or export it again."
        ) from error


def _with_keys_in_order(value: Any, spec: pytree.TreeSpec) -> Any:
    """Return nested arguments with the keys of their dicts in the order that `spec` has."""
    kind = type(value)
    if kind not in (dict, list, tuple) or kind is not spec.type or len(value) != spec.num_children:
        return value
    if kind is dict and set(value) != set(spec.context):
        return value
    keys = list(spec.context) if kind is dict else range(len(value))
    children = [_with_keys_in_order(value[key], spec.child(i)) for i, key in enumerate(keys)]
    return dict(zip(keys, children, strict=True)) if kind is dict else kind(children)


@dataclass(frozen=True)
class Input:
    """What one of a file's inputs may be."""

    dtype: torch.dtype | None  # None: a number, not a tensor
    sizes: tuple[tuple[int, int], ...] = ()  # smallest and largest

    def takes(self, value: Any) -> bool:
        """Whether the value is of this type and of such sizes."""
        if self.dtype is None or not isinstance(value, torch.Tensor):
            return self.dtype is None and not isinstance(value, torch.Tensor)
        return (
            value.dtype is self.dtype
            and value.dim() == len(self.sizes)
            and all(
                low <= size <= high
                for size, (low, high) in zip(value.shape, self.sizes, strict=True)
            )
        )

    def __str__(self) -> str:
        """As in "1×3×(32…224)×(32…224) float32"."""
        if self.dtype is None:
            return "a number"
        sizes = [
            str(low) if low == high else f"({low}…{'' if high >= ANY_SIZE else high})"
            for low, high in self.sizes
        ]
        return f"{'×'.join(sizes) or 'a scalar'} {str(self.dtype).removeprefix('torch.')}"


def cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def inputs_of_signature(signature: Mapping[str, Any]) -> tuple[Input, ...]:
    """Return the inputs that a file's signature tells of."""
    return tuple(
        Input(None)
        if sizes is None
        else Input(getattr(torch, dtype), tuple((low, high) for low, high in sizes))
        for sizes, dtype in zip(signature["sizes"], signature["types"], strict=True)
    )


def described(inputs: Sequence[Any]) -> str:
    """Return the types and sizes of what was given, for a message."""
    return ", ".join(
        str(Input(leaf.dtype, tuple((size, size) for size in leaf.shape)))
        if isinstance(leaf, torch.Tensor)
        else repr(leaf)
        for leaf in inputs
    )
