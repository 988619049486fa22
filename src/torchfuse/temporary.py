"""A temporary folder, or one sentence on why there is none."""

import tempfile

from torchfuse.errors import ArtifactError

__all__ = ["temporary_folder"]


def temporary_folder() -> "tempfile.TemporaryDirectory[str]":
    """Return a new temporary folder, which goes with the block that it is used in.

    Raises:
        ArtifactError: none can be made.
    """
    try:
        return tempfile.TemporaryDirectory()
    except OSError as error:
        raise ArtifactError(
            f"No temporary folder can be made: {error.strerror}; set TMPDIR to a folder that can "
            "be written to."
        ) from error
