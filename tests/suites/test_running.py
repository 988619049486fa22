"""Suites on a real scheduler with two worker processes: what is lost, and that nothing is."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner
from distributed import Client, Worker

from torchfuse.cli import cli
from torchfuse.suites.cluster import cluster
from torchfuse.suites.results import SuiteResult
from torchfuse.suites.running import Suite
from torchfuse.suites.suite_file import read_suite

NET = """
import os
import time
from pathlib import Path

import torch
from torch import nn

HERE = Path(__file__).parent


def net(width=4):
    layers = nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU()
    return nn.Sequential(*layers), torch.zeros(1, 3, 8, 8)


def broken():
    raise RuntimeError("no such weights")


def crashing():
    os.kill(os.getpid(), 9)


def first_time_endless(run):
    if not (HERE / "began").exists():
        (HERE / "began").write_text(str(os.getpid()))
        time.sleep(600)
    return 0.5


def endless(run):
    time.sleep(600)
"""
HEAD = 'targets = ["eager"]\nvariants = ["fused"]\nruns = 6\n'


@dataclass
class Cluster:
    address: str
    client: Client

    def start_worker(self, *words: str, **environment: str) -> subprocess.Popen[bytes]:
        # Tests' own: what a shell would do in the docs' second command.
        return subprocess.Popen(
            [
                *(sys.executable, "-m", "distributed.cli.dask_worker", self.address),
                *("--nthreads", "1", "--no-dashboard", *words),
            ],
            env={**os.environ, **environment},
            stderr=subprocess.DEVNULL,
        )


@contextlib.contextmanager
def started(folder: Path, workers: int) -> Iterator[Cluster]:
    """Start a scheduler with so many workers on one machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"tcp://127.0.0.1:{port}"
    scheduler = subprocess.Popen(
        [
            *(sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1"),
            *("--port", str(port), "--no-dashboard"),
        ],
        cwd=folder,
        stderr=subprocess.DEVNULL,
    )
    made = Cluster(address, None)  # type: ignore[arg-type]  # it comes below
    processes = made.start_worker(
        *("--nworkers", str(workers), "--resources", "machine=1 adb:none=1", "--local-directory"),
        str(folder),
    )
    try:
        while scheduler.poll() is None:  # a busy machine takes long to start it
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.1)
        with cluster(address) as made.client:
            made.client.wait_for_workers(workers, timeout=60)
            yield made
    finally:
        for process in (processes, scheduler):
            process.terminate()
            process.wait(30)


@pytest.fixture(scope="module")
def dask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with started(tmp_path_factory.mktemp("dask"), workers=2) as cluster_of_two:
        yield cluster_of_two


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "net.py").write_text(NET)
    return tmp_path


def suite_of(folder: Path, dask: Cluster, models: str, **more: object) -> Suite:
    (folder / "suite.toml").write_text(HEAD + models)
    given = {"store": str(folder / "store"), "is_ours": False, **more}
    return Suite(read_suite(folder / "suite.toml"), dask.client, **given)  # type: ignore[arg-type]


def counted(suite: Suite) -> dict[tuple[str, str], int]:
    return Counter((job.entry.name, job.what) for job, _ in suite.outcomes)


def assert_whole(found: SuiteResult) -> None:
    assert [result.failures for result in found.results] == [(), ()]
    assert all(result.is_whole for result in found.results)


ALL = "making its files", "timing on local"
TWO = '[models.a]\nsource = "net.py:net"\n[models.b]\nsource = "net.py:net(width=8)"\n'


def test_every_model_is_made_and_timed_once_alone_and_says_where(
    dask: Cluster, folder: Path
) -> None:
    with_files = TWO.replace('"\n[', '"\ntargets = ["eager", "pt"]\n[')
    suite = suite_of(folder, dask, with_files, store=f"file://{folder}/store")
    found = suite.run()
    assert_whole(found)
    assert {result.machines["local"] for result in found.results} == {socket.gethostname()}
    assert counted(suite) == {(name, what): 1 for name in "ab" for what in ALL}
    a, _ = (result.comparison for result in found.results)
    assert a is not None
    assert [row.target for row in a.rows] == ["eager", "eager", ".pt"]
    assert SuiteResult.from_json(found.to_json()) == found
    timings = [outcome for job, outcome in suite.outcomes if job.device is not None]
    first, second = sorted((o.began_s + o.waited_s, o.ended_s) for o in timings)
    assert first[1] <= second[1]


def test_a_worker_that_is_killed_amid_a_build_loses_nothing(dask: Cluster, folder: Path) -> None:
    models = TWO.replace("\n[models.b]", '\nevaluate = "net.py:first_time_endless"\n[models.b]')

    def kill(_: str) -> None:
        if (folder / "began").exists() and (pid := (folder / "began").read_text()):
            (folder / "began").write_text("")
            os.kill(int(pid), signal.SIGKILL)

    suite = suite_of(folder, dask, models, on_step=kill)
    found = with_ticks(suite, kill)
    assert_whole(found)
    assert counted(suite) == {(name, what): 1 for name in "ab" for what in ALL}


def test_a_worker_that_is_killed_amid_a_measurement_loses_nothing(
    dask: Cluster, folder: Path
) -> None:
    killed: list[str] = []
    suite: Suite

    def kill(text: str) -> None:
        if "timing, round" in text and not killed:
            where = next(r.worker for r in suite.running.values() if r.job.device is not None)
            assert where is not None
            killed.append(where)
            os.kill(dask.client.run(os.getpid, workers=[where])[where], signal.SIGKILL)

    suite = suite_of(folder, dask, TWO.replace('"\n[', '"\nruns = 3000\n['), on_step=kill)
    found = suite.run()
    assert len(killed) == 1
    assert_whole(found)
    assert counted(suite) == {(name, what): 1 for name in "ab" for what in ALL}
    comparison = found.results[0].comparison
    assert comparison is not None
    assert {row.latency.runs for row in comparison.rows} == {3000}


def test_what_fails_or_takes_too_long_is_named_and_the_others_go_on(
    dask: Cluster, folder: Path
) -> None:
    models = (
        f'{TWO}devices = ["local", "adb:none"]\ntargets = ["pt"]\n'
        '[models.c]\nsource = "net.py:broken"\n'
        '[models.d]\nsource = "net.py:net"\nevaluate = "net.py:endless"\ntime-limit-s = 2\n'
    )
    suite = suite_of(folder, dask, models)
    a, b, c, d = suite.run().results
    assert a.is_whole
    assert set(b.machines) == {"local"}
    assert [(f.what, f.reason.partition(":")[0]) for f in c.failures] == [
        ("making its files", f"'{folder / 'net.py'}")
    ]
    assert "it raised RuntimeError: no such weights" in c.failures[0].reason
    assert [(f.what, f.reason) for f in d.failures] == [
        ("making its files", "it took longer than its time-limit-s, 2")
    ]
    (gone,) = b.failures
    assert gone.what == "timing on adb:none"
    assert gone.reason.startswith("adb sees no device 'none'")
    assert counted(suite)["b", "timing on adb:none"] == 3  # it may be back the next time


def test_a_model_that_ends_its_workers_is_named_and_the_others_go_on(
    dask: Cluster, folder: Path
) -> None:
    models = '[models.a]\nsource = "net.py:net"\n[models.b]\nsource = "net.py:crashing"\n'
    a, b = suite_of(folder, dask, models).run().results
    assert a.is_whole
    (failure,) = b.failures
    assert "worker processes ended while at it: out of memory, or a crash" in failure.reason


def test_a_model_that_shares_its_worker_with_one_that_ends_it_is_not_blamed(
    tmp_path_factory: pytest.TempPathFactory, folder: Path
) -> None:
    """It is done, and lost before it is fetched, as often as its worker ends."""
    models = '[models.a]\nsource = "net.py:net"\n[models.b]\nsource = "net.py:crashing"\n'
    with started(tmp_path_factory.mktemp("one_worker"), workers=1) as dask:
        slow = suite_of(folder, dask, models, on_step=lambda _: time.sleep(1))
        a, b = slow.run().results
    assert a.is_whole
    assert len(b.failures) == 1


async def give_board(*, dask_worker: Worker, count: int) -> None:
    await dask_worker.set_resources(**{"ssh:board": count})


def test_a_device_whose_worker_is_gone_is_not_waited_for_endlessly(
    dask: Cluster, folder: Path
) -> None:
    def take_away(_: str) -> None:
        dask.client.run(give_board, count=0)

    dask.client.run(give_board, count=1)
    models = f'{TWO}devices = ["ssh:board"]\ntargets = ["pt"]\n'
    suite = suite_of(folder, dask, models, on_line=take_away, patience_s=1)
    a, b = suite.run().results
    assert a.is_whole
    (failure,) = b.failures
    assert failure.reason == "there is no worker with the resource 'ssh:board' any more"


def test_a_worker_of_another_version_is_refused_and_the_difference_named(
    dask: Cluster, folder: Path
) -> None:
    metadata = folder / "other" / "torchfuse-9.9.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: torchfuse\nVersion: 9.9\n")
    process = dask.start_worker("--no-nanny", "--name", "other", PYTHONPATH=str(folder / "other"))
    try:
        dask.client.wait_for_workers(3, timeout=60)
        suite = suite_of(folder, dask, TWO)
        found = suite.run()
    finally:
        process.terminate()
        process.wait(30)
    (sentence,) = found.refused
    assert "is not used: it has torchfuse 9.9 (here it is " in sentence
    assert_whole(found)
    assert sum(found.machines.values()) == 2


def test_a_worker_that_does_not_see_the_cache_is_refused(dask: Cluster, folder: Path) -> None:
    suite = suite_of(folder, dask, TWO, store="memory://store")
    with pytest.raises(Exception, match="is not used: it does not see the cache 'memory://store'"):
        suite.run()


@pytest.fixture
def one_worker(folder: Path) -> Iterator[Cluster]:
    """A worker that times what was made first, first."""
    with started(folder, workers=1) as cluster_of_one:
        yield cluster_of_one


def test_an_interrupted_suite_is_gone_on_with(
    one_worker: Cluster, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    endless = f'{HEAD}{TWO}[models.c]\nsource = "net.py:net"\nruns = 1000000\n'
    (folder / "suite.toml").write_text(endless)
    words = ["--scheduler", one_worker.address, "--cache", "store", "--json", "suite.json"]
    command = [sys.executable, "-m", "torchfuse", "compare", "--suite", "suite.toml", *words]
    process = subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    timed = 0
    for line in process.stderr:
        timed += "timing on local: " in line
        if timed == 2:
            break
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 130, errors
    assert errors.endswith("'suite.json', and --resume goes on with them.\n")
    before = SuiteResult.from_json((folder / "suite.json").read_text())
    assert before.unfinished
    assert [bool(result.comparison) for result in before.results] == [True, True, False]
    (folder / "suite.toml").write_text(endless.replace("runs = 1000000\n", ""))
    monkeypatch.chdir(folder)
    again = CliRunner().invoke(cli, [*command[3:], "--resume"])
    assert again.exit_code == 0, again.output
    assert again.stderr.count("timing on local") == 1, again.stderr
    after = SuiteResult.from_json((folder / "suite.json").read_text())
    assert not after.unfinished
    assert [result.is_whole for result in after.results] == [True, True, True]
    assert [r.comparison for r in after.results[:2]] == [r.comparison for r in before.results[:2]]


def with_ticks(suite: Suite, tick: Callable[[str], None]) -> SuiteResult:
    """Run a suite, and call `tick` often meanwhile."""
    ended = threading.Event()

    def ticking() -> None:
        while not ended.wait(0.1):
            with contextlib.suppress(ProcessLookupError):
                tick("")

    thread = threading.Thread(target=ticking)
    thread.start()
    try:
        return suite.run()
    finally:
        ended.set()
        thread.join()
