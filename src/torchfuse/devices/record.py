"""What a runner's events add up to: measurements, the machine's state, what went wrong."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torchfuse.devices.events import checked
from torchfuse.devices.printable import printable
from torchfuse.measuring.cautions import Caution, cautions, resumed
from torchfuse.measuring.timing import Measurement, file_facts
from torchfuse.runner.job import read_event
from torchfuse.runner.machine_state import MachineState
from torchfuse.serialization import from_plain

__all__ = ["ArtifactName", "Record"]


@dataclass(frozen=True)
class ArtifactName:
    """What a measurement says of the file that it is of."""

    name: str
    size_bytes: int
    sha256: str


@dataclass
class Record:
    """The events of a runner, taken as they come; what there is of them can be asked any time."""

    artifacts: Sequence[ArtifactName]
    threads: int  # asked for
    round_id: str | None = None
    earlier: Mapping[str, Measurement] = field(default_factory=dict)
    runtimes: list[Mapping[str, Any]] = field(default_factory=list)
    loaded: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    failed: tuple[int, str] | None = None  # which artifact, and why
    ended: bool = False
    rounds: tuple[int, int] = (0, 0)  # done, of how many
    _warm: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    _memory: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    _samples_s: dict[int, list[float]] = field(default_factory=dict)
    _turn_runs: int = 1
    _kept: int = 0  # samples of an earlier run that this one goes on after: its whole rounds
    _states: list[MachineState] = field(default_factory=list)

    def take(self, line: str) -> Mapping[str, Any] | None:
        """Take in a line of the runner's output; return the event that it tells, if it does.

        Raises:
            ValueError: it tells an event that no runner of ours tells of these models.
        """
        event = read_event(line)
        if event is not None:
            self.note(checked(event, len(self.artifacts)))
        return event

    def note(self, event: Mapping[str, Any]) -> None:
        """Take in an event, as `runner.job` tells them."""
        match event["kind"]:
            case "runtime":
                names = {name: _shown(event[name]) for name in ("name", "version")}
                self.runtimes.append({**event, **names})
            case "loaded":
                self.loaded[event["artifact"]] = event
            case "warm":
                self._warm[event["artifact"]] = event
            case "state":
                self.note_state(from_plain(MachineState, event["state"]))
            case "round":
                if not self._samples_s:  # the first: those before it are an earlier run's
                    self._kept = (event["done"] - 1) * event["turn_runs"]
                self._turn_runs = event["turn_runs"]
                self.rounds = event["done"], event["rounds"]
                for index, times in event["samples_s"].items():
                    self._samples_s.setdefault(int(index), []).extend(times)
            case "measured":
                self._memory[event["artifact"]] = event
            case "failed":
                self.failed = event["artifact"], printable(event["reason"]).rstrip(".")
            case "end":
                self.ended = True

    def note_state(self, state: MachineState) -> None:
        """Take in what the machine was doing: before the first round, and after the last."""
        self._states.append(state)

    @property
    def runner(self) -> str | None:
        """What ran the models, and its version; None: it did not come to that."""
        names = [f"{event['name']} {event['version'] or ''}".strip() for event in self.runtimes]
        return ", ".join(dict.fromkeys(names)) or None

    @property
    def runs_before(self) -> int:
        """How many runs of each model an earlier run made."""
        earlier = [self.earlier.get(artifact.name) for artifact in self.artifacts]
        return min((0 if m is None else m.runs for m in earlier), default=0)

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        """What was measured so far, in whole rounds."""
        together = len(self.artifacts) > 1
        found = []
        for index, artifact in enumerate(self.artifacts):
            earlier = self.earlier.get(artifact.name)
            new_s = self._samples_s.get(index, ())
            if not new_s:
                if earlier is not None:  # there was nothing left to do, or it did not come to it
                    found.append(earlier)
                continue
            samples_s = (*(earlier.samples_s[: self._kept] if earlier else ()), *new_s)
            loaded, warm = self.loaded[index], self._warm[index]
            memory = self._memory.get(index, {})
            facts = replace(
                file_facts(artifact.size_bytes, artifact.sha256, loaded),
                peak_memory_bytes=memory.get("peak_memory_bytes"),
                page_faults=memory.get("page_faults"),
            )
            found.append(
                Measurement(
                    artifact.name,
                    samples_s,
                    warm["warmup_runs"],
                    warm["settled"],
                    loaded["threads"],
                    self.round_id if together else None,
                    self._turn_runs,
                    facts,
                )
            )
        return tuple(found)

    def cautions(self, *, emulated: bool | None) -> tuple[Caution, ...]:
        """Return what makes these measurements less trustworthy."""
        before, after = self._states if len(self._states) == 2 else (None, None)
        debug = [f"{runtime['name']}" for runtime in self.runtimes if runtime["debug_build"]]
        found = cautions(
            before,
            after,
            {m.name: m.samples for m in self.measurements},
            self.threads,
            debug_build=debug[0] if debug else None,
            emulated=emulated,
        )
        return (*found, *self._threads_not_as_asked(), *resumed(self.runs_before))

    def _threads_not_as_asked(self) -> tuple[Caution, ...]:
        cannot = next((e for e in self.loaded.values() if not e["can_set_threads"]), None)
        if cannot is None or cannot["threads"] == self.threads:
            return ()
        runtime = self.runtimes[0]["name"] if self.runtimes else "the runner"
        count = cannot["threads"]
        takes = "as many threads as it likes" if count is None else f"{count} threads"
        return (
            Caution(
                "threads",
                f"{runtime} ran on {takes} and cannot be told to run on {self.threads}; compare "
                "only with figures of the same runtime on the same device",
                fails=False,
            ),
        )


def _shown(name: str | None) -> str | None:
    return None if name is None else printable(name)
