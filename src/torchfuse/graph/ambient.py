"""What code may go by that no tensor tells: errors, whether gradients are computed, the time."""

from __future__ import annotations

import dis
import sys
import threading
import time
from contextlib import contextmanager
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import CodeType

__all__ = ["MODES", "asked_beside_tensors", "catches"]

MODES = frozenset({"is_grad_enabled", "is_inference_mode_enabled", "is_autocast_enabled"})
_ASKED = (
    *((torch, name) for name in sorted(MODES)),
    *((time, name) for name in ("time", "time_ns", "monotonic", "perf_counter", "process_time")),
)


@contextmanager
def asked_beside_tensors(answer_of: Callable[[str, Any, Any], Any]) -> Iterator[None]:
    """A context in which `answer_of(name, answer, frame)` is what code is answered.

    Code of torch itself is answered truly; so is what took the function by its own name before.
    """
    thread = threading.get_ident()

    def asking(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def asked(*args: Any, **kwargs: Any) -> Any:
            real = original(*args, **kwargs)
            frame = sys._getframe(1)
            inside = str(frame.f_globals.get("__name__", "")).partition(".")[0]
            if threading.get_ident() != thread or inside in ("torch", "torchfuse", "threading"):
                return real
            return answer_of(name, real, frame)

        return asked

    before = [(module, name, getattr(module, name)) for module, name in _ASKED]
    for module, name, original in before:
        setattr(module, name, asking(name, original))
    try:
        yield
    finally:
        for module, name, original in before:
            setattr(module, name, original)


@lru_cache(maxsize=1024)
def catches(code: CodeType) -> bool:
    """Whether the function may go on after an error: `except`, `contextlib.suppress`."""
    steps = [step.opname for step in dis.get_instructions(code)]
    handles = {"CHECK_EXC_MATCH", "CHECK_EG_MATCH", "JUMP_IF_NOT_EXC_MATCH"} & {*steps}
    bare = any(pair == ("PUSH_EXC_INFO", "POP_TOP") for pair in pairwise(steps)) or (
        "POP_EXCEPT" in steps and not {"PUSH_EXC_INFO", "WITH_EXCEPT_START"} & {*steps}  # 3.10
    )
    return bool(handles) or bare or "suppress" in code.co_names
