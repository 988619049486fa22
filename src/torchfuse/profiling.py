"""Where the time of a run goes, operator by operator, as far as the runtime says.

torch's profiler says it of models in this process and of TorchScript files. ExecuTorch's event
tracer says it of its programs, kernels inside of delegates included: here, and in the ETDump files
that a runner built with it writes on a device.
"""

import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torchfuse.errors import ArtifactError, InputError, UnsupportedError, first_line

__all__ = ["OperatorTime", "Profile", "profile", "profile_of_etdump"]

THE_REST = "(the runtime itself)"


@dataclass(frozen=True)
class OperatorTime:
    """What the calls of one operator take in a run."""

    operator: str
    calls: float  # in a run; not whole where the runs differ
    self_s: float  # in a run, without the operators that it called
    share: float  # of the run, 0 to 1
    in_delegate: bool = False  # whether it was run by a delegate, such as XNNPACK
    delegate: str | None = None  # which one; None: none, or the runtime does not say


@dataclass(frozen=True)
class Profile:
    """Where the time of a run goes. Profiling takes time too: compare shares, and not run times."""

    name: str
    operators: tuple[OperatorTime, ...]  # the most expensive first
    run_s: float  # a run, profiled, on average
    runs: int
    source: Literal["torch.profiler", "ETDump"]


def profile(
    runnable_or_path: Callable[..., Any] | str | os.PathLike[str],
    inputs: Any,
    *,
    name: str | None = None,
    warmup: int = 5,
    runs: int = 20,
    threads: int = 1,
) -> Profile:
    """Return where the time goes in a model, or in the model file at a path.

    `inputs` is one case: a tensor, a tuple of tensors, or a dict of keyword tensors.

    Raises:
        InputError: no runs, no threads, or several cases.
        ArtifactError: the file is missing, damaged or of an unknown kind.
        UnsupportedError: a file whose runtime is not asked for a profile.
    """
    import torch

    from torchfuse.inputs import cases
    from torchfuse.quieting import quiet_runtime
    from torchfuse.timing import check_counts, pinned_threads

    if runs < 1 or warmup < 0:
        raise InputError(
            f"Expected at least one run and no fewer than zero warm-up runs, got {runs} and "
            f"{warmup}."
        )
    all_cases = cases(inputs)
    if len(all_cases) != 1:
        raise InputError(
            f"A profile belongs to one input, got {len(all_cases)} cases; profile each on its own."
        )
    case = all_cases[0]
    name = name or _name(runnable_or_path)
    if isinstance(runnable_or_path, (str, os.PathLike)):
        check_counts(runs, threads, warmup, {name: runnable_or_path})
        by_runtime = _by_runtime(runnable_or_path, case, name, warmup, runs, threads)
        if by_runtime is not None:
            return by_runtime
    model = _loaded(runnable_or_path)
    with pinned_threads(threads), torch.inference_mode():
        for _ in range(warmup):
            model(*case.args, **case.kwargs)
        profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
        with quiet_runtime(), profiler:
            for _ in range(runs):
                model(*case.args, **case.kwargs)
    events = profiler.key_averages()
    return _profile(
        name,
        {(event.key, False, None): event.self_cpu_time_total * 1e-6 for event in events},
        {(event.key, False, None): event.count for event in events},
        runs,
        "torch.profiler",
    )


def _loaded(runnable_or_path: Callable[..., Any] | str | os.PathLike[str]) -> Callable[..., Any]:
    if not isinstance(runnable_or_path, (str, os.PathLike)):
        return runnable_or_path
    from torchfuse.exporting import load

    return load(runnable_or_path)


def _by_runtime(
    path: str | os.PathLike[str], case: Any, name: str, warmup: int, runs: int, threads: int
) -> Profile | None:
    """Return the profile by the file's own runtime; None: it is torch that runs it."""
    from torchfuse.targets import target_for
    from torchfuse.targets.opening import check

    target = target_for(path)
    if (obstacle := target.profile_obstacle()) is not None:
        raise UnsupportedError(
            f"Expected a model, or a file of a runtime that can be asked for a profile, got "
            f"'{os.fspath(path)}': {obstacle}."
        )
    return target.profile(check(path), case, name=name, warmup=warmup, runs=runs, threads=threads)


def _name(runnable_or_path: Any) -> str:
    if isinstance(runnable_or_path, (str, os.PathLike)):
        return os.path.basename(runnable_or_path)
    return getattr(runnable_or_path, "__name__", type(runnable_or_path).__name__)


_Key = tuple[str, bool, str | None]  # of an OperatorTime: operator, in_delegate, delegate


def _profile(
    name: str,
    total_s: Mapping[_Key, float],
    calls: Mapping[_Key, int],
    runs: int,
    source: Literal["torch.profiler", "ETDump"],
) -> Profile:
    all_s = sum(total_s.values())
    operators = [
        OperatorTime(
            operator,
            calls[key] / runs,
            self_s / runs,
            self_s / all_s if all_s else 0.0,
            in_delegate,
            delegate,
        )
        for key, self_s in total_s.items()
        for operator, in_delegate, delegate in [key]
    ]
    operators.sort(key=lambda row: (-row.self_s, row.operator))
    return Profile(name, tuple(operators), all_s / runs, runs, source)


# What ExecuTorch's runtime calls the parts of a run. A call holds the kernel's or the delegate's
# own events, where they log any.
_RUN = "Method::execute"
_CALLS = ("OPERATOR_CALL", "DELEGATE_CALL")
_KERNEL = "native_call_"


def profile_of_etdump(
    etdump: str | os.PathLike[str],
    *,
    etrecord: str | os.PathLike[str] | None = None,
    name: str | None = None,
    ticks_per_s: float = 1e9,
    skip: int = 0,
) -> Profile:
    """Return where the time goes in the runs that an ETDump file tells of.

    A runner built with ExecuTorch's event tracer writes it (`executor_runner --etdump_path`). An
    `etrecord`, which ExecuTorch writes when it exports with `generate_etrecord=True`, adds the
    delegates' names and the operators of what has no name of its own. `ticks_per_s` is the speed
    of the device's clock, 1e9 on Linux and Android. The first `skip` runs, which warm up, are left
    out.

    Raises:
        ArtifactError: a file is missing, damaged, or tells of no run.
    """
    blocks = _event_blocks(etdump, etrecord)
    ticks: dict[_Key, float] = defaultdict(float)
    calls: dict[_Key, int] = defaultdict(int)
    runs, all_ticks = 0, 0.0
    for block in blocks:
        timed = [event for event in block.events if event.perf_data is not None]
        whole = [event.perf_data.raw[skip:] for event in timed if event.name == _RUN]
        if not whole:  # loading, not running
            continue
        runs += len(whole[0])
        all_ticks += sum(map(sum, whole))
        for event in _innermost(timed):
            key = _key(event)
            ticks[key] += sum(event.perf_data.raw[skip:])
            calls[key] += len(event.perf_data.raw[skip:])
    if not runs:
        raise ArtifactError(
            f"Expected the events of at least one run in '{etdump}', got none; the runner must be "
            "built with -DEXECUTORCH_ENABLE_EVENT_TRACER=ON, and have run the program."
        )
    rest = (THE_REST, False, None)
    ticks[rest] = max(0.0, all_ticks - sum(ticks.values()))
    calls[rest] = runs
    seconds = {key: value / ticks_per_s for key, value in ticks.items()}
    return _profile(name or os.path.basename(etdump), seconds, calls, runs, "ETDump")


def _event_blocks(
    etdump: str | os.PathLike[str], etrecord: str | os.PathLike[str] | None
) -> list[Any]:
    for path in (etdump, etrecord):
        if path is not None and not Path(path).is_file():
            raise ArtifactError(f"Expected a file at '{path}', found none.")
    import warnings

    from torchfuse.quieting import quiet

    with quiet(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Output Buffer not found")  # intermediate results
        from executorch.devtools import Inspector
        from executorch.devtools.inspector import TimeScale

        # In ticks both ways: it scales what a delegate logged otherwise than the rest.
        try:
            inspector = Inspector(
                etdump_path=os.fspath(etdump),
                etrecord=None if etrecord is None else os.fspath(etrecord),
                source_time_scale=TimeScale.CYCLES,
                target_time_scale=TimeScale.CYCLES,
            )
        except Exception as error:
            raise ArtifactError(
                f"ExecuTorch's Inspector cannot read '{etdump}'"
                f"{'' if etrecord is None else f' with {str(etrecord)!r}'}: {first_line(error)}; "
                "take files that the same version of ExecuTorch wrote, whole."
            ) from error
    return list(inspector.event_blocks)


def _innermost(events: list[Any]) -> Iterable[Any]:
    """Return the events of kernels and inside delegates, and calls with nothing logged inside."""
    inside = [event for event in events if event.is_delegated_op or event.name.startswith(_KERNEL)]
    explained = {event._instruction_id for event in inside}
    return inside + [
        event for event in events if event.name in _CALLS and event._instruction_id not in explained
    ]


def _key(event: Any) -> _Key:
    delegate = event.delegate_backend_name or None
    if event.name.startswith(_KERNEL):
        return event.name.removeprefix(_KERNEL), False, None
    operators = ", ".join(event.op_types)
    if not event.is_delegated_op:
        in_delegate = event.name == "DELEGATE_CALL"
        return operators or event.name, in_delegate, delegate
    if isinstance(event.delegate_debug_identifier, str):
        # XNNPACK counts calls of the same kernel: "Convolution (NHWC, F32) IGEMM #3".
        return re.sub(r" #\d+$", "", event.delegate_debug_identifier), True, delegate
    return operators or f"operator {event.delegate_debug_identifier}", True, delegate
