"""The calls of a model as a picture of it needs them: what reads what, and how long each takes."""

import statistics
import time
from collections.abc import Mapping

import torch
from torch import nn

from torchfuse.cases import Case
from torchfuse.comparing.comparison import Operation
from torchfuse.errors import TorchfuseError
from torchfuse.graph.recording import record
from torchfuse.isolation.model_copy import copied

__all__ = ["operations"]

_NO_CALLS = frozenset({"output", "hook", "held"})
_TIMED_RUNS = 7


def operations(model: nn.Module, case: Case) -> tuple[Operation, ...]:
    """Return the calls that the model makes on a case; none where it cannot be recorded."""
    try:
        graph = record(model, [case])
        times_s = _module_times(model, case)
    except TorchfuseError:
        return ()
    found: list[Operation] = []
    producer: dict[int, int] = {}  # value → the operation that made or changed it last
    counts: dict[str, int] = {}
    for call in graph.calls:
        if call.kind not in _NO_CALLS and call.module_path is not None:
            counts[call.module_path] = counts.get(call.module_path, 0) + 1
    for call in graph.calls:
        if call.kind in _NO_CALLS or not call.results:
            continue
        sources = [producer[value] for value in call.inputs if value in producer]
        module = call.module_path or ""
        found.append(
            Operation(
                kind=call.kind,
                module=module,
                sizes=call.results[0].shape,
                inputs=tuple(dict.fromkeys(sources)),
                # A module's time is that of its only call; which of several took it is not known.
                time_s=times_s.get(module) if counts.get(module) == 1 else None,
            )
        )
        for value in call.outputs:
            producer[value] = len(found) - 1
    return tuple(found)


def _module_times(model: nn.Module, case: Case) -> Mapping[str, float]:
    """Return the median time of each module without children that is called once, in seconds.

    Scripted modules take no hooks: theirs are not known.
    """
    timed = copied(model)
    samples_s: dict[str, list[float]] = {}
    began_s: dict[str, float] = {}

    def begin(path: str) -> None:
        began_s[path] = time.perf_counter()

    def end(path: str) -> None:
        samples_s.setdefault(path, []).append(time.perf_counter() - began_s[path])

    for path, module in timed.named_modules():
        if isinstance(module, nn.Identity | torch.jit.ScriptModule):
            continue
        if not any(True for _ in module.children()):
            module.register_forward_pre_hook(lambda *_, path=path: begin(path))
            module.register_forward_hook(lambda *_, path=path: end(path))
    with torch.inference_mode():
        for _ in range(_TIMED_RUNS + 1):
            timed(*case.args, **case.kwargs)
    return {
        path: statistics.median(times[1:])
        for path, times in samples_s.items()
        if len(times) == _TIMED_RUNS + 1
    }
