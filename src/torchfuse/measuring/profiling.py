"""Where the time of a run goes, operator by operator, as far as the runtime says.

torch's profiler says it of models in this process and of TorchScript files, ExecuTorch's event
tracer of its programs.
"""

import os
from collections.abc import Callable
from typing import Any

from torchfuse.errors import InputError, UnsupportedError
from torchfuse.operator_times import Profile, profile_of

__all__ = ["profile"]


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

    from torchfuse.cases import cases
    from torchfuse.isolation.warning_filters import runtime_logs_captured
    from torchfuse.measuring.timing import check_counts, pinned_threads

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
        with runtime_logs_captured(), profiler:
            for _ in range(runs):
                model(*case.args, **case.kwargs)
    events = profiler.key_averages()
    return profile_of(
        name,
        {(event.key, False, None): event.self_cpu_time_total * 1e-6 for event in events},
        {(event.key, False, None): event.count for event in events},
        runs,
        "torch.profiler",
    )


def _loaded(runnable_or_path: Callable[..., Any] | str | os.PathLike[str]) -> Callable[..., Any]:
    if not isinstance(runnable_or_path, (str, os.PathLike)):
        return runnable_or_path
    from torchfuse.exporting.model_files import load

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
