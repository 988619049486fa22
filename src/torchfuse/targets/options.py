"""What may be asked of a target, found out before there is a model."""

from typing import get_args

from torchfuse.artifacts import Precision
from torchfuse.errors import InputError, UnsupportedError
from torchfuse.targets import TARGETS, Target

__all__ = ["check_options"]


def check_options(
    target: Target,
    precision: Precision | None,
    *,
    calibrated: bool = False,
    dynamic: bool = False,
    optimize: bool = True,
) -> None:
    """Find out whether a file of this target can be what is asked for.

    Raises:
        InputError: the options contradict each other, or what the target is.
        UnsupportedError: the target has no such precision.
    """
    if precision == "int4":
        raise InputError(
            "int4 is a scheme of torchfuse.quantize: export what quantize(scheme='int4') returns."
        )
    if precision is not None and precision not in get_args(Precision):
        known = ", ".join(name for name in get_args(Precision) if name != "int4")
        raise InputError(f"Expected a precision of {known}, got {precision!r}.")
    if precision is not None and precision not in target.precisions:
        others = [f"'{other.suffix}'" for other in TARGETS if precision in other.precisions]
        raise UnsupportedError(
            f"'{target.suffix}' has no {precision}; use {' or '.join(others)}, or another "
            f"precision ({', '.join(target.precisions)})."
        )
    if calibrated and precision != "int8":
        raise InputError(
            f"Calibration data is for int8, but the precision is {precision}; ask for int8, or "
            "give it as data, on which the file is compared."
        )
    if target.always_fused is not None and not optimize:
        raise InputError(target.always_fused)
    if dynamic and not target.takes_dynamic_shapes:
        raise InputError(
            f"'{target.suffix}' takes inputs of any size; leave the dynamic sizes out."
            if target.takes_any_size
            else f"'{target.suffix}' takes the example's sizes only; leave the dynamic sizes out."
        )
