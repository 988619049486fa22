"""The errors a user can cause, each one clear sentence: expected, got, what to do."""

import re

__all__ = [
    "ArtifactError",
    "CalibrationError",
    "CaptureError",
    "DeviceError",
    "ExportWarning",
    "FusionError",
    "FusionWarning",
    "InputError",
    "QuantizationWarning",
    "TorchfuseError",
    "UnsupportedError",
    "first_line",
]


class TorchfuseError(Exception):
    """Base of every error that torchfuse raises on purpose; the command line prints its text."""


class InputError(TorchfuseError):
    """The given model, inputs, option or file name is not what the verb takes."""


class FusionError(TorchfuseError):
    """A fusion that was asked for is not possible, or would change what the model computes."""


class CaptureError(TorchfuseError):
    """The model could not be run and recorded on its example inputs."""


class CalibrationError(TorchfuseError):
    """Calibration data is missing, empty, constant, or holds NaN or Inf."""


class DeviceError(TorchfuseError):
    """A device cannot be reached, or did not do what it was told to the end."""


class ArtifactError(TorchfuseError):
    """A file could not be written, or is not a whole and undamaged model artifact."""


class UnsupportedError(TorchfuseError):
    """The installed torch, ExecuTorch or runtime cannot do what was asked."""


class ExportWarning(UserWarning):
    """A file was written, but not as well or as asked as it might have been; the text says why."""


class FusionWarning(UserWarning):
    """A fusion that was asked for was left out, or took something with it; the text says what."""


class QuantizationWarning(UserWarning):
    """A model was quantized, but not as well as it might have been; the text says why."""


def first_line(error: BaseException) -> str:
    r"""Return the first line that says something of an error's text, else its type's name.

    >>> first_line(RuntimeError("\n  Expected 3 channels.\nException raised from …"))
    'Expected 3 channels'
    """
    lines = (_WHERE.sub("", line).strip(" .") for line in str(error).splitlines())
    line = next(filter(None, lines), type(error).__name__)
    return line if len(line) <= _LONGEST_LINE else line[:_LONGEST_LINE].rsplit(" ", 1)[0] + " …"


_WHERE = re.compile(r"^\[enforce fail at \S+\] *")  # in torch's sources
_LONGEST_LINE = 300  # torch's dispatcher puts all backends that there are on one
