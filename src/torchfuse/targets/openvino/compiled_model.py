"""An OpenVINO model compiled for this machine's CPU."""

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

__all__ = ["HINTS", "OpenVinoModel"]

# What OpenVINO is told to compute in. Left to itself it takes bf16 for fp32 where the CPU has it.
HINTS = {"fp32": "f32", "fp16": "f16", "bf16": "bf16", "int8": "f32"}
_PRECISIONS = {"f32": "fp32", "f16": "fp16", "bf16": "bf16"}


class OpenVinoModel(Model):
    """A compiled model; without `threads`, with one for each core that the process may use."""

    def __init__(
        self,
        xml: bytes,
        weights: bytes,
        signature: Mapping[str, Any] | None = None,
        preprocessing: Mapping[str, Any] | None = None,
        *,
        precision: str = "fp32",
        threads: int | None = None,
    ) -> None:
        import openvino

        self._core = openvino.Core()
        try:
            self._model = self._core.read_model(xml, weights)
        except Exception as error:  # its exceptions have no class of their own
            raise ArtifactError(_told(error)) from error
        self._hint = HINTS[precision]
        self.set_threads(threads or cores())
        inputs = (
            tuple(map(_input, self._model.inputs))
            if signature is None
            else inputs_of_signature(signature)
        )
        super().__init__(inputs, signature, preprocessing)

    @property
    def threads(self) -> int:
        """How many threads the compiled model has."""
        return self._threads

    @property
    def precision(self) -> str:
        """What it computes in on this CPU where it is not in int8: fp32, fp16 or bf16."""
        kind: str = self._compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        return _PRECISIONS.get(kind, kind)

    def set_threads(self, count: int) -> None:
        """Compile the model anew, with so many threads."""
        configuration = {
            "INFERENCE_PRECISION_HINT": self._hint,
            "INFERENCE_NUM_THREADS": count,
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
        }
        try:
            self._compiled = self._core.compile_model(self._model, "CPU", configuration)
        except Exception as error:
            raise ArtifactError(f"it cannot compile it: {_told(error)}") from error
        self._threads = count

    def bound(self, inputs: list[Any]) -> Callable[[], Sequence[Any]]:
        """Return a call on these inputs, which returns arrays that the next call writes to."""
        request = self._request(inputs)
        outputs = [request.get_output_tensor(i) for i in range(len(self._compiled.outputs))]

        def call() -> Sequence[Any]:
            request.infer()
            return [output.data for output in outputs]

        return call

    def _request(self, inputs: list[Any]) -> Any:
        import openvino

        request = self._compiled.create_infer_request()
        tensors = [leaf for leaf in inputs if isinstance(leaf, torch.Tensor)]
        for index, tensor in enumerate(tensors):
            array = tensor.detach().numpy()
            # A view of a scalar cannot be shared.
            given = openvino.Tensor(array, shared_memory=array.ndim > 0)
            request.set_input_tensor(index, given)
        return request

    def _execute(self, inputs: list[Any]) -> Sequence[Any]:
        try:
            request = self._request(inputs)
            request.infer()
        except Exception as error:
            raise UnsupportedError(
                f"OpenVINO cannot run the model on {described(inputs)}: {_told(error)}."
            ) from error
        count = len(self._compiled.outputs)
        return [torch.from_numpy(request.get_output_tensor(i).data.copy()) for i in range(count)]


def _told(error: Exception) -> str:
    """Return the line that says what is wrong; the first ones say where in OpenVINO's sources."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].rstrip(".") if lines else first_line(error)


def _input(given: Any) -> Input:
    """Return what an input of someone else's model may be."""
    dtype = getattr(torch, given.get_element_type().to_dtype().name)
    sizes = []
    for size in given.get_partial_shape():
        longest = size.get_max_length()
        sizes.append((size.get_min_length(), ANY_SIZE if longest < 0 else longest))
    return Input(dtype, tuple(sizes))
