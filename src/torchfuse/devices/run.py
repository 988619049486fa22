"""The result of measuring models on one device; plain data, no torch."""

from dataclasses import dataclass

from torchfuse.devices.facts import DeviceFacts
from torchfuse.measuring.cautions import Caution
from torchfuse.measuring.timing import Measurement
from torchfuse.operator_times import Profile
from torchfuse.verifying.equivalence import Equivalence

__all__ = ["DeviceRun"]


@dataclass(frozen=True)
class DeviceRun:
    """What was measured on one device, in the same rounds."""

    device: DeviceFacts
    runner: str | None  # what ran the models, and its version; None: it did not come to that
    measurements: tuple[Measurement, ...]
    cautions: tuple[Caution, ...] = ()
    differences: tuple[tuple[str, Equivalence], ...] = ()  # by name, from this machine's outputs
    profiles: tuple[Profile, ...] = ()  # where the time goes, where that was asked for
    error: str | None = None  # what ended it early
