"""Results as JSON: every field, raw samples included."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

__all__ = ["to_json"]


def to_json(result: Any) -> str:
    """Return a result, or a list of results, as JSON; NaN and Inf become null and "Infinity"."""
    return json.dumps(_plain(result), indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)
        }
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else f"{'-' if value < 0 else ''}Infinity"
    return str(value) if isinstance(value, Path) else value
