"""Workers, from the outside: starting them, telling them what to do, and how one ended."""

import contextlib
import functools
import json
import os
import signal
import subprocess
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torchfuse.runner.allocator import keep_freed_memory
from torchfuse.runner.interpreter import ONE_THREAD, command_for, environment
from torchfuse.runner.runtimes import runtime_for
from torchfuse.runner.worker import become_worker

__all__ = ["Worker", "WorkerError", "forked_workers", "start_workers"]

Pipe = tuple[int, int]  # file descriptors: of commands, of answers


class WorkerError(Exception):
    """A worker could not do what it was told, or ended; the text is the reason."""

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(reason)
        self.index = index


class Worker:
    """One model in a process of its own, as seen from the process that tells it what to do."""

    def __init__(self, index: int, pipe: Pipe, end: Callable[[], str]) -> None:
        self.index = index
        self._commands = os.fdopen(pipe[0], "w")
        self._answers = os.fdopen(pipe[1])
        self._end = end

    def ask(self, do: str, **what: Any) -> dict[str, Any]:
        """Return the answer.

        Raises:
            WorkerError: the worker could not do it, or its process ended.
        """
        line = ""
        with contextlib.suppress(BrokenPipeError):
            self._commands.write(json.dumps({"do": do, **what}) + "\n")
            self._commands.flush()
            line = self._answers.readline()
        if not line.endswith("\n"):  # half an answer is none
            raise WorkerError(self.index, f"its process ended {self._end()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(self.index, answer["error"])
        return answer

    def load(
        self, artifact: Mapping[str, Any], path: str, folder: str, threads: int
    ) -> dict[str, Any]:
        """Have the file at `path` loaded and called once; return what is to be known of that.

        `artifact` tells its form, args and kwargs; inputs are read from `folder`, and outputs
        written there.
        """
        return self.ask(
            "load",
            **{name: artifact[name] for name in ("form", "args", "kwargs")},
            path=path,
            folder=folder,
            threads=threads,
            outputs=f"output-{self.index}-",
        )

    def turn(self, untimed: int, timed: int) -> list[float]:
        """Return the seconds that each of the timed calls took."""
        samples_s: list[float] = self.ask("turn", untimed=untimed, timed=timed)["samples_s"]
        return samples_s

    def close(self) -> None:
        """Let the worker end: it does when nobody can tell it anything more."""
        for end in (self._commands, self._answers):
            with contextlib.suppress(OSError):
                end.close()


@contextlib.contextmanager
def start_workers(count: int, forms: Sequence[str]) -> Iterator[list[Worker]]:
    """Start workers for files of these forms; they end with the block, whatever happens in it.

    They are forked from one new process, which has the runtimes loaded: torch is imported once,
    not once a worker, and its libraries are in memory once. (A fork of this process would not do:
    torch may have threads here already.)
    """
    if count == 0:
        yield []
        return
    theirs, ours = _pipes(count)
    inherited = [fd for pipe in theirs for fd in pipe]
    nursery = subprocess.Popen(  # noqa: S603  # our own interpreter and code, no shell
        command_for(__name__, "nurse", json.dumps([theirs, list(forms)])),
        env=environment() | ONE_THREAD,
        pass_fds=inherited,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for who asked, who then ends the workers
        text=True,
    )
    for fd in inherited:
        os.close(fd)
    ends: dict[int, str] = {}

    def end_of(index: int) -> str:
        assert nursery.stdout is not None
        while index not in ends and (line := nursery.stdout.readline()):
            number, end = json.loads(line)
            ends[number] = end
        return ends.get(index, "before it began")

    try:
        with _listening(ours, end_of) as workers:
            yield workers
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(nursery.pid, signal.SIGKILL)
        nursery.wait()
        assert nursery.stdout is not None
        nursery.stdout.close()


def nurse(argument: str) -> None:
    """Be the process that workers are forked from, and say how each ends, until all have."""
    pipes, forms = json.loads(argument)
    keep_freed_memory()
    warnings.simplefilter("ignore")
    for form in forms:
        with contextlib.suppress(RuntimeError):  # the worker that needs it will say so
            runtime_for(form)
    pids = _fork([(commands, answers) for commands, answers in pipes], ())
    for _ in pids:
        pid, status = os.wait()
        print(json.dumps([pids.index(pid), _described_end(status)]), flush=True)


@contextlib.contextmanager
def forked_workers(count: int, forms: Sequence[str]) -> Iterator[list[Worker]]:
    """Fork workers from this process, which must have no threads; they end with the block."""
    for form in forms:
        runtime_for(form)
    theirs, ours = _pipes(count)
    pids = _fork(theirs, [fd for pipe in ours for fd in pipe])

    def end_of(index: int) -> str:
        return _described_end(os.waitpid(pids[index], 0)[1])

    try:
        with _listening(ours, end_of) as workers:
            yield workers
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):  # its end was asked for already
                os.waitpid(pid, 0)


@contextlib.contextmanager
def _listening(pipes: Sequence[Pipe], end_of: Callable[[int], str]) -> Iterator[list[Worker]]:
    """Speak to the workers at the other ends of these pipes; close them with the block."""
    workers = [Worker(i, pipe, functools.partial(end_of, i)) for i, pipe in enumerate(pipes)]
    try:
        yield workers
    finally:
        for worker in workers:
            worker.close()


def _pipes(count: int) -> tuple[list[Pipe], list[Pipe]]:
    """Return the workers' ends, and the ends of who tells them what to do."""
    theirs, ours = [], []
    for _ in range(count):
        commands, to_worker = os.pipe()
        from_worker, answers = os.pipe()
        theirs.append((commands, answers))
        ours.append((to_worker, from_worker))
    return theirs, ours


def _fork(pipes: Sequence[Pipe], others: Sequence[int]) -> list[int]:
    """Return the process ids of workers on these pipes; `others` they must not hold open."""
    pids = []
    for pipe in pipes:
        pid = os.fork()
        if pid == 0:
            for fd in {*others, *(fd for other in pipes for fd in other)} - {*pipe}:
                with contextlib.suppress(OSError):
                    os.close(fd)
            become_worker(*pipe)
        pids.append(pid)
    for pipe in pipes:
        for fd in pipe:
            os.close(fd)
    return pids


def _described_end(status: int) -> str:
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return f"by signal {number} ({signal.Signals(number).name})"
    return f"with status {os.WEXITSTATUS(status)}"
