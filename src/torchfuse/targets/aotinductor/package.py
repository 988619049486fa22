"""A compiled package, loaded by torch."""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from torchfuse.errors import ArtifactError, UnsupportedError, first_line
from torchfuse.isolation.warning_filters import known_warnings_ignored
from torchfuse.targets.calling import Model, described, inputs_of_signature

__all__ = ["AotiModel", "package"]


def package(data: bytes) -> Any:
    """Return what is in a package.

    Raises:
        ArtifactError: torch refuses it.
    """
    try:
        with known_warnings_ignored():
            return torch._inductor.aoti_load_package(io.BytesIO(data))
    except Exception as error:
        raise ArtifactError(f"torch cannot load it: {first_line(error)}") from error


class AotiModel(Model):
    """A compiled model; its threads are torch's, which are the process's."""

    def __init__(
        self,
        data: bytes,
        signature: Mapping[str, Any] | None = None,
        preprocessing: Mapping[str, Any] | None = None,
        threads: int | None = None,
    ) -> None:
        if signature is None:
            raise ArtifactError(
                "torchfuse did not write it, and such a package does not say what it takes; load "
                "it with torch._inductor.aoti_load_package, or export the model by torchfuse"
            )
        if threads is not None:
            torch.set_num_threads(threads)
        self._loader = package(data).loader
        super().__init__(inputs_of_signature(signature), signature, preprocessing)

    @property
    def threads(self) -> int:
        """How many threads torch has."""
        return torch.get_num_threads()

    def set_threads(self, count: int) -> None:
        """Let torch have so many threads, for the whole process."""
        torch.set_num_threads(count)

    def bound(self, inputs: list[Any]) -> Callable[[], Sequence[Any]]:
        """Return a call on these inputs."""
        tensors = [leaf.detach() for leaf in inputs if isinstance(leaf, torch.Tensor)]
        run = self._loader.boxed_run
        return lambda: run([*tensors])  # which it empties  # type: ignore[no-any-return]

    def _execute(self, inputs: list[Any]) -> Sequence[Any]:
        try:
            with torch.no_grad():
                return self.bound(inputs)()
        except RuntimeError as error:
            raise UnsupportedError(
                f"The compiled model cannot run on {described(inputs)}: {first_line(error)}."
            ) from error
