"""Running a suite on Dask: which jobs there are, when each can begin, and what came of them.

Dask places jobs, moves them from lost workers to others, and keeps their order. What it is told: a
resource that admitted workers have, one per machine whose times are wanted, one per device.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import queue
import secrets
import threading
import time
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from distributed import Client, Future, KilledWorker, get_worker
from distributed import TimeoutError as DaskTimeoutError

from torchfuse.comparing.comparison import LOCAL
from torchfuse.errors import InputError, first_line
from torchfuse.suites.admission import Admitted, Asked, admit, versions_here
from torchfuse.suites.results import Failure, Result, SuiteResult
from torchfuse.suites.store import leave_mark, remove_mark
from torchfuse.suites.worker_jobs import Job, MadeFiles, Outcome, perform

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torchfuse.comparing.comparison import Comparison
    from torchfuse.suites.suite_file import Entry

__all__ = ["MACHINE", "Suite"]

MACHINE = "machine"  # the resource of workers on whose machine times are taken

_TOPIC = "torchfuse"
_MOST_ATTEMPTS = 3  # of a job for which another one may help
_MOST_DEATHS = 2  # of workers at a job while nothing else runs: it is what ends them
_LOOK_EVERY_S = 0.5
_FETCH_S = 5.0  # for an outcome, which is small
_PATIENCE_S = 30.0  # until a worker that is gone is not waited for any more
_SAY_EVERY_S = 0.2
_FIRST, _THEN = 1_000_000, 0  # priorities: a model's files are timed before others are made
_OF_DASK = ("MALLOC_TRIM_THRESHOLD_", "65536")  # in the environment of each worker


@dataclass
class _Running:
    """A job that was given to Dask."""

    job: Job
    future: Future
    attempt: int
    deaths: int = 0  # workers that ended at it alone before Dask was given it this time
    alone: bool = False  # nothing else of the suite runs
    began: int = 0  # times
    worker: str | None = None  # where it began last
    unplaced_since_s: float | None = None


@dataclass
class _State:
    """What is known of one entry so far."""

    entry: Entry
    settings: str
    earlier: Result | None
    parts: dict[int, MadeFiles] = field(default_factory=dict)
    wanted_parts: int = 1
    comparisons: dict[str, Comparison] = field(default_factory=dict)  # by device
    machines: dict[str, str] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    remakes: int = 0

    def result(self) -> Result:
        entry = self.entry
        found = [self.comparisons[d] for d in entry.devices if d in self.comparisons]
        return Result(
            name=entry.name,
            model=entry.model,
            source=entry.source,
            data=entry.data,
            settings=self.settings,
            devices=entry.devices,
            comparison=_joined(found) if found else None,
            machines={d: self.machines[d] for d in entry.devices if d in self.machines},
            failures=tuple(self.failures),
        )


class Suite:
    """A suite as it runs."""

    def __init__(
        self,
        entries: Sequence[Entry],
        client: Client,
        *,
        store: str,
        is_ours: bool,
        anew: bool = False,
        earlier: SuiteResult | None = None,
        command: str | None = None,
        patience_s: float = _PATIENCE_S,
        on_step: Callable[[str], object] = lambda _: None,
        on_line: Callable[[str], object] = lambda _: None,
        on_result: Callable[[], object] = lambda: None,
    ) -> None:
        """Prepare to run.

        Args:
            entries: what is to be compared.
            client: of the cluster.
            store: the cache, a folder or a URL, which client and workers see.
            is_ours: the cluster is this machine's own, started for this suite.
            anew: find nothing that was made before.
            earlier: an interrupted result, whose finished measurements are not repeated.
            command: what makes it again in a shell.
            patience_s: how long a worker is waited for that alone can do a job.
            on_step: told all that begins anywhere.
            on_line: told what is worth a line: a job that is done, or failed, a refused worker.
            on_result: called when there is a result more.
        """
        self.client, self.store, self.is_ours = client, store, is_ours
        self.run_id = secrets.token_hex(8)
        self.salt = self.run_id if anew else None
        self.command, self.patience_s = command, patience_s
        self.on_step, self.on_line, self.on_result = on_step, on_line, on_result
        self.versions = versions_here()
        versions = ", ".join(f"{name} {version}" for name, version in sorted(self.versions.items()))
        self.resource = f"torchfuse-{hashlib.sha256(versions.encode()).hexdigest()[:12]}"
        self.states = {entry.name: _state(entry, earlier) for entry in entries}
        self.running: dict[str, _Running] = {}
        self.suspects: list[_Running] = []  # jobs whose workers ended, to run again one by one
        self.outcomes: list[tuple[Job, Outcome]] = []
        self.refused: dict[str, str] = {}  # by the worker's address
        self.machines: dict[str, str] = {}  # likewise, of admitted workers
        self.done = 0
        self.took_s: float | None = None
        self._seen: set[str] = set()
        self._events: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._numbers = itertools.count()
        self._mark = ""

    # ── from outside ─────────────────────────────────────────────────────────────────────────────

    def run(self) -> SuiteResult:
        """Run to the end; what cannot be done is in the result.

        Raises:
            InputError: no worker can be used, or none for a device; or the cache cannot be written.
        """
        began_s = time.monotonic()
        self._mark = leave_mark(self.store)
        self.client.subscribe_topic(_TOPIC, self._event_came)
        try:
            self._look_at_workers()
            self._require_workers()
            for state in self.states.values():
                self._make(state)
            self._until_done()
        finally:
            for running in self.running.values():
                with contextlib.suppress(Exception):  # the scheduler may be gone
                    running.future.cancel()
            with contextlib.suppress(Exception):
                self.client.unsubscribe_topic(_TOPIC)
            with contextlib.suppress(Exception):
                remove_mark(self.store, self._mark)
        self.took_s = time.monotonic() - began_s
        return self.so_far()

    def so_far(self) -> SuiteResult:
        """Return what there is."""
        counts: dict[str, int] = {}
        for machine in self.machines.values():
            counts[machine] = counts.get(machine, 0) + 1
        return SuiteResult(
            results=tuple(state.result() for state in self.states.values()),
            versions={name: version for name, version in self.versions.items() if version},
            machines=counts,
            refused=tuple(self.refused.values()),
            command=self.command,
            took_s=self.took_s,
            unfinished=bool(self._left()),
        )

    # ── jobs ─────────────────────────────────────────────────────────────────────────────────────

    def _make(self, state: _State) -> None:
        """Have a model's files made: in shares, where there are fewer models than workers."""
        state.parts.clear()
        workers = max(1, len(self.machines))
        known = None
        earlier, wanted = state.earlier, set(state.entry.devices)
        if earlier is not None and earlier.comparison and wanted <= earlier.machines.keys():
            known = earlier.comparison.digest
        state.wanted_parts = 1 if known else max(1, workers // len(self.states))
        for part in range(state.wanted_parts):
            self._submit(self._job(state, part=part, parts=state.wanted_parts, known=known))

    def _left(self) -> list[_Running]:
        return [*self.running.values(), *self.suspects]

    def _is_running(self, state: _State, device: str | None) -> bool:
        jobs = (running.job for running in self._left())
        return any(job.entry.name == state.entry.name and job.device == device for job in jobs)

    def _job(self, state: _State, **more: Any) -> Job:
        return Job(run=self.run_id, entry=state.entry, store=self.store, salt=self.salt, **more)

    def _submit(self, job: Job, attempt: int = 1, deaths: int = 0, *, alone: bool = False) -> None:
        """Give a job to Dask, to be done after those that were given before.

        That takes a priority: among equals Dask may begin with any. A worker is not preferred,
        though one has the model already: where that one is gone, Dask would place the job without
        looking at resources.
        """
        kind = "make" if job.device is None else "time"
        number = next(self._numbers)
        key = f"{kind} {job.entry.name} {self.run_id}-{number}"
        future = self.client.submit(
            _work_on,
            job,
            key,
            key=key,
            pure=False,
            resources=self._needs(job),
            priority=(_THEN if job.device is None else _FIRST) - number,
        )
        self._wait_for(key, _Running(job, future, attempt, deaths, alone))

    def _wait_for(self, key: str, running: _Running) -> None:
        self.running[key] = running
        running.future.add_done_callback(lambda _: self._events.put(("done", key)))

    def _needs(self, job: Job) -> dict[str, float]:
        needs = {self.resource: 1.0}
        if job.device is not None:
            needs[MACHINE if job.device == LOCAL else job.device] = 1.0
        return needs

    # ── what comes of them ───────────────────────────────────────────────────────────────────────

    def _event_came(self, event: tuple[float, Any]) -> None:
        self._events.put(("told", event[1]))

    def _until_done(self) -> None:
        looked_s = time.monotonic()
        while self._left():
            if not self.running:
                suspect = self.suspects[0]
                self._submit(suspect.job, suspect.attempt, suspect.deaths, alone=True)
                del self.suspects[0]  # not before: Ctrl-C may come at any time
            with contextlib.suppress(queue.Empty):
                kind, what = self._events.get(timeout=_LOOK_EVERY_S)
                if kind == "done":
                    self._done(what)
                else:
                    self._told(what)
            if self.client.status != "running":
                self._lost("the connection to the scheduler ended")
                return
            if time.monotonic() - looked_s > 2 * _LOOK_EVERY_S:
                looked_s = time.monotonic()
                try:
                    self._look_at_workers()
                    self._look_at_places()
                except OSError as error:
                    self._lost(f"the scheduler does not answer: {first_line(error)}")
                    return

    def _told(self, message: Mapping[str, str]) -> None:
        running = self.running.get(message["key"])
        if running is None:  # of another suite, or done meanwhile
            return
        where = f"{running.job.entry.name}: {message['text']}, on {message['machine']}"
        if message["kind"] == "began":
            deaths = running.deaths + running.began
            if running.alone and deaths >= _MOST_DEATHS:
                self._drop(message["key"])
                self._ends_workers(running.job, deaths)
                return
            running.began += 1
            running.worker = message["worker"]
        if message["kind"] == "outran":
            self._end_worker(message["key"], running, message["worker"])
            return
        self.on_step(f"{self.done} of {self.done + len(self._left())} jobs; {where}")

    def _end_worker(self, key: str, running: _Running, worker: str) -> None:
        """End the worker of a job that takes too long: nothing less ends one."""
        self._drop(key)
        limit_s = running.job.entry.time_limit_s
        self._failed(running.job, f"it took longer than its time-limit-s, {limit_s:g}")

        def restart() -> None:
            with contextlib.suppress(Exception):  # it has no nanny, or is gone already
                self.client.restart_workers([worker], timeout=60, raise_for_error=False)

        threading.Thread(target=restart, daemon=True).start()

    def _done(self, key: str) -> None:
        running = self.running.pop(key, None)
        if running is None:
            return
        job, future = running.job, running.future
        if future.status in ("lost", "pending"):  # its worker ended: Dask has it done again
            self._wait_for(key, running)
            return
        if future.status == "finished":
            try:
                outcome = future.result(timeout=_FETCH_S)
            except (TimeoutError, DaskTimeoutError):  # likewise, before it could be fetched
                self._wait_for(key, running)
                return
            self._ended(running, outcome)
        elif future.status == "error":
            error = future.exception()
            if isinstance(error, KilledWorker):
                # Dask counts the deaths of workers that it waited at, too; but one that ends its
                # worker at once may never have been heard to begin.
                self._submit_again(running, max(running.began, 1))
            else:
                self._failed(job, f"{type(error).__name__}: {first_line(error or Exception())}")
        else:
            self._failed(job, "it was cancelled from outside")
        future.release()

    def _ended(self, running: _Running, outcome: Outcome) -> None:
        job = running.job
        self.outcomes.append((job, outcome))
        state = self.states[job.entry.name]
        if outcome.error is not None:
            if outcome.may_help == "again" and running.attempt < _MOST_ATTEMPTS:
                self.on_line(f"{job.entry.name}: {job.what}: {outcome.error} (tried again)")
                self._submit(job, running.attempt + 1)
            elif outcome.may_help == "remake" and state.remakes < _MOST_ATTEMPTS:
                if not self._is_running(state, None):  # another device's job asked for it too
                    state.remakes += 1
                    self._make(state)
            else:
                self._failed(job, f"{outcome.error.rstrip('.')}, on {outcome.machine}")
            return
        if job.device is not None and outcome.value and not isinstance(outcome.value, MadeFiles):
            # Before anything is said of it: whoever reads that may interrupt.
            state.comparisons[job.device] = outcome.value
            state.machines[job.device] = outcome.machine
        self.done += 1
        took_s = outcome.ended_s - outcome.began_s - outcome.waited_s
        is_same = isinstance(outcome.value, MadeFiles) and outcome.value.is_same
        what = "the same as before, looked at in" if is_same else f"{job.what}:"
        self.on_line(
            f"{job.entry.name}: {what} {took_s:.1f} s on {outcome.machine} "
            f"({self.done} of {self.done + len(self._left())} jobs)"
        )
        if isinstance(outcome.value, MadeFiles):
            state.parts[job.part] = outcome.value
            if len(state.parts) == state.wanted_parts:
                self._made(state)
        else:
            self.on_result()

    def _made(self, state: _State) -> None:
        """Have what was made timed, where it is not known already."""
        made, *others = (state.parts[part] for part in sorted(state.parts))
        for other in others:
            made = made.joined(other)
        state.parts.clear()
        earlier = state.earlier
        if earlier is not None and earlier.comparison is not None:
            digest = earlier.comparison.digest
            if digest is not None and digest == made.base.digest:
                for device, machine in earlier.machines.items():
                    if device in state.entry.devices:
                        state.comparisons[device] = _on_device(earlier.comparison, device)
                        state.machines[device] = machine
                self.on_result()
        for device in state.entry.devices:
            if device not in state.comparisons and not self._is_running(state, device):
                self._submit(self._job(state, device=device, made=made))

    def _failed(self, job: Job, reason: str) -> None:
        self.done += 1
        failure = Failure(job.what, reason)
        state = self.states[job.entry.name]
        state.failures.append(failure)
        self.on_line(f"{job.entry.name}: {job.what}: {reason}.")
        self.on_result()

    def _submit_again(self, running: _Running, more_deaths: int) -> None:
        """Have a job done once more, unless it is what ends workers.

        Whoever was there when a worker ended is suspected, and the others of that worker lose what
        they had just made as well: only a job that ends some while nothing else runs is at fault.
        """
        deaths = running.deaths + (more_deaths if running.alone else 0)
        if not more_deaths:
            self._submit(running.job, running.attempt, deaths, alone=running.alone)
        elif deaths >= _MOST_DEATHS:
            self._ends_workers(running.job, deaths)
        else:
            self.suspects.append(replace(running, deaths=deaths))

    def _ends_workers(self, job: Job, deaths: int) -> None:
        self._failed(
            job,
            f"{deaths} worker processes ended while at it: out of memory, or a crash in a library; "
            "the workers' logs say more",
        )

    def _drop(self, key: str) -> None:
        """Have Dask forget a job."""
        self.running.pop(key).future.cancel()

    def _lost(self, reason: str) -> None:
        for running in self._left():
            self._failed(running.job, reason)
        self.running.clear()
        self.suspects.clear()

    # ── workers ──────────────────────────────────────────────────────────────────────────────────

    def _workers(self) -> dict[str, Any]:
        """Return what the scheduler says of its workers, by their addresses.

        `Client.scheduler_info` gives a copy that another thread may replace by one without workers.
        """
        found: dict[str, Any] = self.client.sync(self.client.scheduler.identity, n_workers=-1)
        workers: dict[str, Any] = found["workers"]
        return workers

    def _resources(self) -> dict[str, Mapping[str, float]]:
        """Return the resources of each admitted worker that is there, by its address."""
        return {
            address: {name: count for name, count in worker["resources"].items() if count}
            for address, worker in self._workers().items()
            if self.resource in worker["resources"] and address in self.machines
        }

    def _look_at_workers(self) -> None:
        """Admit workers that came, or refuse them."""
        present = set(self._workers())
        self._seen &= present  # one that comes back is looked at again
        self.machines = {a: machine for a, machine in self.machines.items() if a in present}
        new = sorted(present - self._seen)
        if not new:
            return
        self._seen.update(new)
        # Of this machine's own workers one has its devices, so that a job waits for none of them.
        devices = {d for state in self.states.values() for d in state.entry.devices} - {LOCAL}
        has_them = any(devices <= found.keys() for found in self._resources().values())
        keeper = new[0] if self.is_ours and not has_them else None
        for group in ([keeper] if keeper else [], [each for each in new if each != keeper]):
            if not group:
                continue
            more = {MACHINE: 1.0} if self.is_ours else {}
            if group == [keeper]:
                more.update(dict.fromkeys(devices, 1.0))
            asked = Asked(self.versions, self.store, self._mark, self.resource, more, self.is_ours)
            answers = self.client.run(partial(admit, asked=asked), workers=group, on_error="return")
            for address, answer in answers.items():
                self._answered(address, answer)

    def _answered(self, address: str, answer: Admitted | Exception) -> None:
        if isinstance(answer, Admitted):
            if answer.refused is None:
                self.machines[address] = answer.machine
                return
            where, why = f"{address} on {answer.machine}", answer.refused
        else:
            where, why = address, f"{type(answer).__name__}: {first_line(answer)}"
        self.refused[address] = f"The worker {where} is not used: {why}."
        self.on_line(self.refused[address])

    def _require_workers(self) -> None:
        found = self._resources()
        if not found:
            if self.refused:
                raise InputError(next(iter(self.refused.values())))
            raise InputError(
                "The scheduler has no workers; start one on each machine: dask worker "
                "ADDRESS --nthreads 1 --resources 'machine=1'."
            )
        for state in self.states.values():
            for device in state.entry.devices:
                name = MACHINE if device == LOCAL else device
                if not any(name in resources for resources in found.values()):
                    raise InputError(
                        f"No worker can time anything on '{device}': none has the resource "
                        f"'{name}'; start one with --resources '{name}=1'."
                    )

    def _look_at_places(self) -> None:
        """Give Dask anew the jobs that it has at no worker though one could do them.

        It looks for a worker when one comes, and not when one is given a resource. A job that no
        worker could do any more, for a while, fails.
        """
        placed = {key for keys in self.client.processing().values() for key in keys}
        found = [set(resources) for resources in self._resources().values()]
        now_s = time.monotonic()
        for key, running in list(self.running.items()):
            if key in placed or running.future.done():
                running.unplaced_since_s = None
                continue
            if running.unplaced_since_s is None:  # it may be on its way to the scheduler
                running.unplaced_since_s = now_s
                continue
            needs = self._needs(running.job).keys()
            if any(needs <= resources for resources in found):
                self._drop(key)
                self._submit_again(running, running.began)
            elif now_s - running.unplaced_since_s > self.patience_s:
                self._drop(key)
                lacking = sorted(needs - {self.resource})
                what = f"with the resource '{lacking[0]}'" if lacking else "left that can be used"
                self._failed(running.job, f"there is no worker {what} any more")


class _UnwantedError(Exception):
    """Nobody waits for the job any more."""


def _work_on(job: Job, key: str) -> Outcome:
    """Do a job in a worker of Dask's."""
    worker = get_worker()
    said_s = 0.0
    if os.environ.get(_OF_DASK[0]) == _OF_DASK[1]:  # it would be in the times
        del os.environ[_OF_DASK[0]]

    def say(kind: str, text: str) -> None:
        machine = os.uname().nodename
        payload = {"key": key, "kind": kind, "text": text, "machine": machine}
        worker.log_event(_TOPIC, {**payload, "worker": worker.address})

    def tell(step: str) -> None:
        nonlocal said_s
        if time.monotonic() - said_s < _SAY_EVERY_S:
            return
        said_s = time.monotonic()
        known = worker.state.tasks.get(key)
        if known is None or known.state == "cancelled":  # whoever asked is gone: Ctrl-C
            raise _UnwantedError
        say("step", step)

    say("began", job.what)
    return perform(job, tell, partial(say, "outran", job.what))


def _state(entry: Entry, earlier: SuiteResult | None) -> _State:
    plain = replace(entry, name="", devices=(), time_limit_s=0.0)
    settings = hashlib.sha256(repr(plain).encode()).hexdigest()[:40]
    found = None if earlier is None else earlier.find(entry.name)
    if found is not None and (found.settings != settings or found.comparison is None):
        found = None
    return _State(entry, settings, found)


def _on_device(comparison: Comparison, device: str) -> Comparison:
    """Return what a comparison has of one device."""
    return replace(
        comparison,
        rows=tuple(row for row in comparison.rows if row.device == device),
        devices=tuple(facts for facts in comparison.devices if facts.name == device),
    )


def _joined(comparisons: Iterable[Comparison]) -> Comparison:
    """Return the comparisons of one model on several devices as one."""
    found = list(comparisons)
    return replace(
        found[0],
        rows=tuple(row for each in found for row in each.rows),
        devices=tuple(facts for each in found for facts in each.devices),
        notes=tuple(dict.fromkeys(note for each in found for note in each.notes)),
    )
