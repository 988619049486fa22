"""An ONNX model in a session of ONNX Runtime."""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from torchfuse.errors import ArtifactError, UnsupportedError, first_line
from torchfuse.targets.calling import (
    ANY_SIZE,
    Input,
    Model,
    cores,
    described,
    inputs_of_signature,
)

__all__ = ["OnnxModel", "session"]

_TYPES = {
    "tensor(float)": torch.float32,
    "tensor(double)": torch.float64,
    "tensor(float16)": torch.float16,
    "tensor(bool)": torch.bool,
    **{f"tensor({name})": getattr(torch, name) for name in ("uint8", "int8", "int16")},
    **{f"tensor({name})": getattr(torch, name) for name in ("int32", "int64")},
}
_ERRORS_ONLY = 3


def session(model: bytes, threads: int) -> Any:
    """Return a session on the CPU that takes so many threads for an operator.

    Raises:
        ArtifactError: ONNX Runtime refuses the model.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = _ERRORS_ONLY
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no class of their own
        raise ArtifactError(_told(error)) from error


class OnnxModel(Model):
    """A model in a session; without `threads`, with one for each core that the process may use."""

    def __init__(
        self,
        model: bytes,
        signature: Mapping[str, Any] | None = None,
        preprocessing: Mapping[str, Any] | None = None,
        threads: int | None = None,
    ) -> None:
        self._bytes = model
        self.set_threads(threads or cores())
        given = self._session.get_inputs()
        inputs = tuple(map(_input, given)) if signature is None else inputs_of_signature(signature)
        self._names = [each.name for each in given]
        self._outputs = [each.name for each in self._session.get_outputs()]
        super().__init__(inputs, signature, preprocessing)

    @property
    def threads(self) -> int:
        """How many threads an operator is given."""
        return self._threads

    def set_threads(self, count: int) -> None:
        """Make the session anew, with so many threads."""
        self._session = session(self._bytes, count)
        self._threads = count

    def bound(self, inputs: list[Any]) -> Callable[[], Sequence[Any]]:
        """Return a call of the session on these inputs, which returns numpy arrays."""
        return functools.partial(self._session.run, self._outputs, self._feed(inputs))

    def _feed(self, inputs: list[Any]) -> dict[str, Any]:
        tensors = [leaf for leaf in inputs if isinstance(leaf, torch.Tensor)]
        return {
            name: tensor.detach().numpy() for name, tensor in zip(self._names, tensors, strict=True)
        }

    def _execute(self, inputs: list[Any]) -> Sequence[Any]:
        try:
            outputs = self._session.run(self._outputs, self._feed(inputs))
        except Exception as error:
            raise UnsupportedError(
                f"ONNX Runtime cannot run the model on {described(inputs)}: {_told(error)}."
            ) from error
        return [torch.from_numpy(output) for output in outputs]


# Its number and name, and where in its sources: the file and the function.
_WHERE = re.compile(r"\[ONNXRuntimeError\] : \d+ : \w+ : (?:/\S+ .*?\) (?=[A-Z]))?")


_OPSET = re.compile(r"Opset (\d+) .* is till opset (\d+)")


def _told(error: Exception) -> str:
    opset = _OPSET.search(str(error))
    if opset is not None:
        return f"it is of ONNX's opset {opset[1]}, and the newest that is known is {opset[2]}"
    return first_line(Exception(_WHERE.sub("", str(error))))


def _input(given: Any) -> Input:
    """Return what an input of someone else's model may be; a named size is any."""
    if given.type not in _TYPES:
        raise ArtifactError(f"its input {given.name} is a {given.type}, which has no torch type")
    sizes = [(size, size) if isinstance(size, int) else (0, ANY_SIZE) for size in given.shape]
    return Input(_TYPES[given.type], tuple(sizes))
