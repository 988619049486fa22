"""The same models on several devices at once, one job a device at a time."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

from torchfuse.devices.benching import Settings, bench_on
from torchfuse.devices.facts import DeviceFacts, facts_of
from torchfuse.devices.local import Local
from torchfuse.devices.named import device_named
from torchfuse.devices.run import DeviceRun
from torchfuse.errors import DeviceError, UnsupportedError
from torchfuse.measuring.profiling import profile
from torchfuse.measuring.tasks import Task
from torchfuse.measuring.timing import Measurement, measure_prepared

if TYPE_CHECKING:
    from torchfuse.devices.transport import Transport

__all__ = ["bench_devices"]

Earlier = Mapping[str, Mapping[str, Measurement]]  # by device, by model
OnStep = Callable[[str, str], object]  # device, what is done there
OnPartial = Callable[[DeviceRun], object]

# Ctrl-C may wake another thread than the one that is to raise it, while one starts processes (seen
# in up to one try of three, Linux 6.18). So that one looks for itself.
_LOOK_EVERY_S = 0.1


def bench_devices(
    tasks: Mapping[str, Task],
    devices: Sequence[str],
    settings: Settings,
    *,
    folder: str | None = None,
    earlier: Earlier | None = None,
    on_step: OnStep = lambda _device, _step: None,
    on_partial: OnPartial = lambda _: None,
) -> list[DeviceRun]:
    """Return what was measured on each device, in their order.

    Devices other than this machine are all at work at once; this machine comes when they are done,
    since what it does for them would disturb its own times. What ends a device's job early is in
    its result; the others go on.
    """
    lock = threading.Lock()  # whoever is told things need not expect two at once

    def stepped(name: str) -> Callable[[str], object]:
        def note_step(step: str) -> None:
            with lock:
                on_step(name, step)

        return note_step

    def partial_came(run: DeviceRun) -> None:
        with lock:
            on_partial(run)

    def on_device(name: str) -> DeviceRun:
        try:
            transport = device_named(name, folder)
        except DeviceError as error:
            return DeviceRun(DeviceFacts(name, "not ready"), None, (), error=str(error))
        opened.append(transport)
        if stopped.is_set():
            transport.stop()
        return bench_on(
            transport,
            tasks,
            settings,
            earlier=(earlier or {}).get(name),
            on_step=stepped(name),
            on_partial=partial_came,
        )

    remote = [name for name in devices if name != Local.name or settings.runner is not None]
    opened: list[Transport] = []
    stopped = threading.Event()
    runs: dict[str, DeviceRun] = {}
    with ThreadPoolExecutor(max_workers=max(1, len(remote))) as pool:
        try:
            futures = {name: pool.submit(on_device, name) for name in remote}
            while len(runs) < len(futures):
                time.sleep(_LOOK_EVERY_S)
                # One that was not foreseen to fail ends the others.
                runs = {name: future.result() for name, future in futures.items() if future.done()}
        except BaseException:  # Ctrl-C comes to this thread only
            stopped.set()
            for transport in opened:
                transport.stop()
            raise
    if Local.name in devices and Local.name not in runs:
        runs[Local.name] = _on_this_machine(
            tasks, settings, (earlier or {}).get(Local.name), stepped(Local.name), partial_came
        )
    return [runs[name] for name in devices]


def _on_this_machine(
    tasks: Mapping[str, Task],
    settings: Settings,
    earlier: Mapping[str, Measurement] | None,
    on_step: Callable[[str], object],
    on_partial: OnPartial,
) -> DeviceRun:
    facts = facts_of(Local())

    def as_run(measured: Mapping[str, Measurement]) -> DeviceRun:
        cautions = {c: None for m in measured.values() for c in m.cautions}
        return DeviceRun(facts, "torchfuse", tuple(measured.values()), tuple(cautions))

    latest: Mapping[str, Measurement] = earlier or {}

    def partial_came(measured: Mapping[str, Measurement]) -> None:
        nonlocal latest
        latest = measured
        on_partial(as_run(measured))

    try:
        run = as_run(
            measure_prepared(
                tasks,
                warmup=settings.warmup,
                runs=settings.runs,
                threads=settings.threads,
                earlier=earlier,
                on_round=lambda done, rounds: on_step(f"round {done} of {rounds}"),
                on_partial=partial_came,
            )
        )
    except UnsupportedError as error:  # a process that ended: what was measured until then stays
        return replace(as_run(latest), error=str(error))
    if not settings.profile:
        return run
    on_step("profiling")
    profiles = (
        profile(task.path, task.case, name=name, threads=settings.threads)
        for name, task in tasks.items()
    )
    return replace(run, profiles=tuple(profiles))
