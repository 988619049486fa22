"""What quantizing did and what it cost: plain data, no torch, saved as JSON."""

from __future__ import annotations

from dataclasses import dataclass

from torchfuse import serialization

__all__ = [
    "WITHOUT_RANGES",
    "Accuracy",
    "Calibrated",
    "LayerError",
    "MaxDrop",
    "QuantizationReport",
    "RecoveryStep",
    "samples_in_words",
]

WITHOUT_RANGES = ("int8_dynamic", "int4")  # activations are quantized as they come


def samples_in_words(scheme: str, samples: int) -> str:
    """Return the given data as what it was for: on what a model is fitted to, it does best.

    >>> samples_in_words("int8", 16)
    'the 16 calibration samples themselves'
    """
    if scheme in WITHOUT_RANGES:
        return "the given sample" if samples == 1 else f"the {samples} given samples"
    return (
        "the calibration sample itself"
        if samples == 1
        else f"the {samples} calibration samples themselves"
    )


@dataclass(frozen=True)
class Calibrated:
    """The data that the ranges were measured on."""

    source: str  # in words: "16 given cases", "folder of pictures 'photos'"
    samples: int
    settled: bool | None  # whether the last tenth moved no range by more than 5 %; None: unknown
    widest_late_growth: float | None  # largest relative growth of a range in the last tenth


@dataclass(frozen=True)
class LayerError:
    """How far one layer's output in int8 is from the float one's, on the calibration data."""

    module: str  # path of the module that called it
    operator: str
    sqnr_db: float  # signal to noise of what it puts out, everything before it in int8 too
    own_sqnr_db: float | None  # given float inputs: its own share; None: quantized as they come
    cause: str  # in words, with the figure that speaks for it; "" if nothing stands out


@dataclass(frozen=True)
class RecoveryStep:
    """One step of winning accuracy back, and what it gained on data that was held out for that."""

    name: str
    sqnr_db_before: float  # of the model's outputs
    sqnr_db_after: float
    kept: bool  # False: it did not help and was undone
    note: str = ""


@dataclass(frozen=True)
class Accuracy:
    """A measure of the whole model, before and after."""

    measure: str  # "agreement", "top-1" or the name of the user's function
    before: float  # in percent for agreement and top-1
    after: float
    data: str | None = None  # what it is on, in words; None: whatever the user's function takes
    samples: int | None = None  # that the share is of; None: it is the user's own measure
    after_low: float | None = None  # bounds of the 95 % interval of `after`
    after_high: float | None = None


@dataclass(frozen=True)
class MaxDrop:
    """How much of a measure might be lost, and how much was in the end."""

    measure: str  # as in Accuracy
    asked: float  # points of the measure, at most
    reached: float  # points; less than 0: the measure grew
    met: bool


@dataclass(frozen=True)
class QuantizationReport:
    """Everything that quantizing has to say beside the model."""

    scheme: str
    calibrated: Calibrated | None
    sqnr_db: float | None  # of the model's outputs on the calibration data
    layers: tuple[LayerError, ...]  # worst first; empty if not asked for
    recovery: tuple[RecoveryStep, ...]
    accuracy: tuple[Accuracy, ...]
    notes: tuple[str, ...]
    in_float: tuple[str, ...] = ()  # layers with multiply-accumulates that do not compute in int8
    quantized_share: float | None = None  # of the weights of such layers; None: they have none
    max_drop: MaxDrop | None = None  # None: not asked for

    def to_json(self) -> str:
        """The report as JSON text."""
        return serialization.to_json(self)

    def __str__(self) -> str:
        """What `torchfuse quantize` prints."""
        from torchfuse.render.quantization import text

        return text(self)
