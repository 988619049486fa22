"""Models measured on devices, by torchfuse's runner and by runners of the user's own."""

import dataclasses
import json
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from devices.fake_adbd import Device
from devices.pausing import pausing_python
from devices.sshd import Sshd
from torchfuse.cases import Case
from torchfuse.devices import several
from torchfuse.devices.adb import Adb
from torchfuse.devices.benching import Settings, bench_on
from torchfuse.devices.local import Local
from torchfuse.devices.several import bench_devices
from torchfuse.devices.ssh import Ssh
from torchfuse.devices.transport import Transport
from torchfuse.errors import DeviceError
from torchfuse.measuring.tasks import Task, task_of

Files = Callable[[str], str]
WITH_TORCH = Settings(runs=10, warmup=2, python=sys.executable, timeout_s=120)


@pytest.fixture
def settings(light_python: Path) -> Settings:
    return dataclasses.replace(WITH_TORCH, python=str(light_python))


def task(model_files: Files, folder: Path, name: str) -> Task:
    folder.mkdir(exist_ok=True)
    case = Case((torch.arange(48.0).reshape(1, 3, 4, 4),))
    return task_of(model_files(name), case, folder)


@pytest.fixture
def tasks(model_files: Files, tmp_path: Path) -> dict[str, Task]:
    program = task(model_files, tmp_path / "inputs", "third.pte")
    return {"third.pte": program, "again.pte": dataclasses.replace(program)}


def test_models_are_measured_over_ssh_and_nothing_is_left(
    sshd: Sshd, model_files: Files, tmp_path: Path
) -> None:
    names = ("third.ptl", "third.pt")
    tasks = {name: task(model_files, tmp_path / "inputs", name) for name in names}
    run = bench_on(Ssh("board"), tasks, WITH_TORCH)
    assert run.error is None
    assert [(m.name, m.runs, m.threads) for m in run.measurements] == [
        ("third.ptl", 10, 1),
        ("third.pt", 10, 1),
    ]
    assert [(name, d.max_abs) for name, d in run.differences] == [
        ("third.ptl", 0.0),
        ("third.pt", 0.0),
    ]
    first = run.measurements[0].file
    assert first is not None
    assert first.load_s is not None
    assert first.model_memory_bytes is not None
    assert run.measurements[0].round_id == run.measurements[1].round_id
    assert run.runner is not None
    assert re.fullmatch(r"torch 2\.13\S*", run.runner)
    assert list(sshd.tmp.iterdir()) == []
    assert sshd.processes() == []


def test_models_are_measured_over_adb_and_nothing_is_left(
    adb_device: Device, tasks: dict[str, Task], settings: Settings
) -> None:
    steps: list[str] = []
    run = bench_on(Adb(), tasks, settings, on_step=steps.append)
    assert run.error is None
    assert run.runner == "executorch-numpy-runtime 1.4.0"
    assert [m.runs for m in run.measurements] == [10, 10]
    assert run.device.model == "Fake Fake Phone 8"
    assert steps[:3] == ["connecting", "pushing", "comparing outputs with this machine's"]
    assert "round 10 of 10" in steps
    assert list(adb_device.tmp.iterdir()) == []
    assert adb_device.processes() == []


def test_an_output_that_differs_stops_the_run_before_anything_is_timed(
    sshd: Sshd, tasks: dict[str, Task], settings: Settings
) -> None:
    wrong = tasks["third.pte"]
    object.__setattr__(wrong, "expected", (wrong.expected[0] * 1.01,))
    run = bench_on(Ssh("board"), {"third.pte": wrong}, settings)
    assert run.error is not None
    assert run.error.startswith("ssh:board: third.pte computes something else there than here: ")
    assert run.measurements == ()
    assert list(sshd.tmp.iterdir()) == []


def test_a_device_without_that_python_is_an_error_that_names_the_option(
    sshd: Sshd, tasks: dict[str, Task]
) -> None:
    run = bench_on(Ssh("board"), tasks, Settings(python="python9"))
    assert run.error is not None
    assert "there is no 'python9' there" in run.error
    assert "--device-python" in run.error


def test_a_python_without_a_runtime_is_an_error_that_says_what_to_install(
    sshd: Sshd, tasks: dict[str, Task], tmp_path: Path
) -> None:
    bare = tmp_path / "python-bare"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E "$@"\n')
    bare.chmod(0o755)
    one = {"third.pte": tasks["third.pte"]}
    run = bench_on(Ssh("board"), one, Settings(python=str(bare)))
    assert run.error is not None
    assert "a .pte needs executorch or executorch-numpy-runtime" in run.error


@pytest.mark.usefixtures("lost_for_good")
def test_a_device_lost_between_rounds_keeps_the_rounds_before(
    adb_device: Device, tasks: dict[str, Task], light_python: Path, tmp_path: Path
) -> None:
    pausing, _ = pausing_python(tmp_path, light_python, '"done": 4,')

    def lose(step: str) -> None:
        if step == "round 4 of 10":
            threading.Thread(target=adb_device.drop).start()

    settings = dataclasses.replace(WITH_TORCH, python=str(pausing))
    run = bench_on(Adb(), tasks, settings, on_step=lose)
    assert run.error is not None
    assert "lost" in run.error
    assert [m.runs for m in run.measurements] == [4, 4]


def test_a_run_goes_on_with_the_rounds_that_an_earlier_one_had(
    adb_device: Device, tasks: dict[str, Task], settings: Settings
) -> None:
    whole = bench_on(Adb(), tasks, settings)
    earlier = {
        m.name: type(m)(**{**vars(m), "samples_s": m.samples_s[:6]}) for m in whole.measurements
    }
    rounds: list[str] = []
    resumed = bench_on(Adb(), tasks, settings, earlier=earlier, on_step=rounds.append)
    assert next(step for step in rounds if step.startswith("round")) == "round 7 of 10"
    for m in resumed.measurements:
        assert m.runs == 10
        assert m.samples_s[:6] == earlier[m.name].samples_s
        assert m.round_id == earlier[m.name].round_id


def test_several_devices_are_measured_at_once_and_one_that_fails_stops_no_other(
    adb_devices: Callable[..., Device], sshd: Sshd, tasks: dict[str, Task], settings: Settings
) -> None:
    first, second = adb_devices(), adb_devices()
    second.faults.read_only = True
    names = [f"adb:{first.serial}", f"adb:{second.serial}", "ssh:board", "ssh:refused", "local"]
    runs = bench_devices(tasks, names, settings)
    assert [run.device.name for run in runs] == [*names[:3], "ssh:refused", "local"]
    assert [run.error is None for run in runs] == [True, False, True, False, True]
    assert [len(run.measurements) for run in runs] == [2, 0, 2, 0, 2]


def test_an_error_that_nobody_foresaw_ends_the_others(
    monkeypatch: pytest.MonkeyPatch, settings: Settings
) -> None:
    """A full disk where the report is written, say: what the others would measure is lost too."""
    opened = {"first": Local(), "second": Local()}
    ended = []

    def measures(transport: Transport, *_: object, **__: object) -> None:
        if transport is opened["first"]:
            raise OSError("disk full")
        with pytest.raises(DeviceError, match="stopped"):
            transport.shell("sleep 20")
        ended.append(transport)

    monkeypatch.setattr(several, "device_named", lambda name, _: opened[name])
    monkeypatch.setattr(several, "bench_on", measures)
    with pytest.raises(OSError, match="disk full"):
        bench_devices({}, list(opened), settings)
    assert ended == [opened["second"]]


# A runner of the user's own: what it logs is what executor_runner.cpp logs, the rest is a stand-in.
EXECUTOR_RUNNER = """#!{python}
import os, sys
flags = dict(word[2:].split("=", 1) for word in sys.argv[1:])
{fault}
def log(text):
    print("I 00:00:00.000000 executorch:executor_runner.cpp:123]", text, file=where)
count = int(flags["num_executions"])
where = sys.stderr
log("Model loaded in 12.500000 ms.")
for n in range(count):
    log(f"Iteration {{n + 1}} of {{count}}: {{1.0 + n / 100:f}} ms")
if "output_file" in flags:
    import numpy
    x = numpy.fromfile(flags["inputs"], numpy.float32)
    (x * numpy.float32(0.333333)).tofile(flags["output_file"] + "-0.bin")
"""


def stand_in(folder: Path, fault: str = "") -> Path:
    path = folder / "my runner"
    path.write_text(EXECUTOR_RUNNER.format(python=sys.executable, fault=fault))
    return path


def only_pte(tasks: dict[str, Task]) -> dict[str, Task]:
    return {"a model.pte": tasks["third.pte"]}


def test_executor_runner_is_pushed_run_in_rounds_and_read(
    adb_device: Device, tasks: dict[str, Task], tmp_path: Path
) -> None:
    settings = Settings(runs=10, warmup=3, runner=stand_in(tmp_path), timeout_s=120)
    run = bench_on(Adb(), only_pte(tasks), settings)
    assert run.error is None
    (measured,) = run.measurements
    assert measured.runs == 10
    assert measured.samples_s[:5] == pytest.approx([1.03e-3, 1.04e-3, 1.05e-3, 1.06e-3, 1.07e-3])
    assert measured.warmup_runs == 3
    assert measured.file is not None
    assert measured.file.load_s == 0.0125
    assert run.runner == "executor_runner"
    assert [d.max_abs for _, d in run.differences] == [0.0]
    assert list(adb_device.tmp.iterdir()) == []


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("print('hello'); sys.exit(0)", r"expected 'Iteration 1 of 1: … ms' and so on"),
        ("os.kill(os.getpid(), 11)", r"the runner ended by signal 11 \(SIGSEGV\) on a model\.pte"),
        ("sys.exit('no such kernel')", r"the runner ended with status 1 on .*: no such kernel"),
        (
            "sys.exit(\"ERROR: unknown command line flag 'output_file'\")",
            r"the runner does not know --output_file; build the one of ExecuTorch 1\.4",
        ),
    ],
)
def test_a_runner_that_fails_is_an_error_that_says_how(
    adb_device: Device, tasks: dict[str, Task], tmp_path: Path, fault: str, message: str
) -> None:
    settings = Settings(runs=10, runner=stand_in(tmp_path, fault))
    run = bench_on(Adb(), only_pte(tasks), settings)
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(run.error)
    assert run.measurements == ()
    assert list(adb_device.tmp.iterdir()) == []


def test_a_runner_that_hangs_is_ended_on_the_device(
    adb_device: Device, tasks: dict[str, Task], tmp_path: Path
) -> None:
    hang = "if int(flags['num_executions']) > 1: import time; time.sleep(1000)"
    settings = Settings(runs=10, runner=stand_in(tmp_path, hang), timeout_s=3)
    run = bench_on(Adb(), only_pte(tasks), settings)
    assert run.error is not None
    assert "was ended on the device after" in run.error
    assert adb_device.processes() == []


def test_a_runner_for_another_processor_is_known_before_it_is_pushed(
    adb_device: Device, tasks: dict[str, Task], tmp_path: Path
) -> None:
    runner = tmp_path / "runner"
    runner.write_bytes(b"\x7fELF\x02\x01" + bytes(12) + (0xF3).to_bytes(2, "little") + bytes(100))
    run = bench_on(Adb(), only_pte(tasks), Settings(runner=runner))
    assert run.error is not None
    assert "was built for RISC-V, and adb:" in run.error
    assert adb_device.pushed == []


def test_a_file_that_is_no_program_is_refused(
    adb_device: Device, tasks: dict[str, Task], tmp_path: Path
) -> None:
    runner = tmp_path / "runner"
    runner.write_text("just text")
    run = bench_on(Adb(), only_pte(tasks), Settings(runner=runner))
    assert run.error is not None
    assert "Expected a program for the device (an ELF file)" in run.error


def test_a_runner_that_lacks_an_operator_is_known_before_it_is_pushed(
    adb_device: Device, tasks: dict[str, Task], tmp_path: Path
) -> None:
    header = Path("/bin/true").read_bytes()[:64]
    names = [f"aten::op{n}.out".encode() for n in range(9)]
    runner = tmp_path / "runner"
    runner.write_bytes(header + b"\0".join([b"", *names, b"XnnpackBackend", b""]))
    task = tasks["third.pte"]
    object.__setattr__(task, "metadata", {"operators": ["aten::mul.out"], "backends": []})
    run = bench_on(Adb(), {"third.pte": task}, Settings(runner=runner))
    assert run.error is not None
    assert "third.pte needs aten::mul.out, and " in run.error
    assert adb_device.pushed == []


def test_a_runner_of_another_version_is_known_before_it_is_pushed(
    adb_device: Device, tasks: dict[str, Task], tmp_path: Path
) -> None:
    runner = tmp_path / "runner"
    runner.write_bytes(Path("/bin/true").read_bytes()[:64] + b"\0ET13\0")
    run = bench_on(Adb(), only_pte(tasks), Settings(runner=runner))
    assert run.error is not None
    assert "a model.pte is a program of version ET12, and " in run.error
    assert "reads ET13; build the runner" in run.error
    assert adb_device.pushed == []


def test_what_the_runner_tells_android_s_log_is_read_from_there(
    adb_device: Device, tasks: dict[str, Task], tmp_path: Path
) -> None:
    log = adb_device.tmp.parent / "log"
    adb_device.install("logcat", f"#!/bin/sh\ncat {log}\nrm -f {log}\n")
    runner = stand_in(tmp_path, f"import io; where = open({str(log)!r}, 'a')")
    runner.write_text(runner.read_text().replace("where = sys.stderr", ""))
    settings = Settings(runs=5, warmup=1, runner=runner, timeout_s=120)
    run = bench_on(Adb(), only_pte(tasks), settings)
    assert run.error is None
    assert run.measurements[0].runs == 5


SPEED_BENCHMARK = """#!{python}
import sys
sys.path[:0] = {path!r}
import torch
torch.set_num_threads(1)
from torchfuse.measuring.speed_benchmark import main
sys.exit(main())
"""


def test_speed_benchmark_torch_is_pushed_run_in_rounds_and_read(
    adb_device: Device, model_files: Files, tmp_path: Path
) -> None:
    runner = tmp_path / "speed_benchmark_torch"
    runner.write_text(SPEED_BENCHMARK.format(python=sys.executable, path=sys.path))
    case = Case((torch.ones(2, 3, 30, 30).contiguous(memory_format=torch.channels_last),))
    tasks = {"third.ptl": task_of(model_files("third.ptl"), case, tmp_path)}
    settings = Settings(runs=5, warmup=1, runner=runner, timeout_s=120)
    run = bench_on(Adb(), tasks, settings)
    assert run.error is None
    assert [m.runs for m in run.measurements] == [5]
    assert all(d.max_abs is not None and d.max_abs < 1e-4 for _, d in run.differences)
    assert any("channels_last" in command for command in adb_device.commands)


def test_the_command_measures_on_devices_and_saves_one_report(
    adb_device: Device,
    sshd: Sshd,
    light_python: Path,
    model_files: Files,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from torchfuse.cli import main

    saved = tmp_path / "out.json"
    words = ["bench", model_files("third.pte"), "--iter=6", "--warmup=1"]
    words += ["--device=adb", "--device=ssh:board", f"--device-python={light_python}"]
    monkeypatch.setattr(sys, "argv", ["torchfuse", *words, f"--json={saved}"])
    with pytest.raises(SystemExit) as ended:
        main()
    printed = capsys.readouterr().out
    assert ended.value.code == 0
    assert f"On adb:{adb_device.serial}: Fake Fake Phone 8, Fake FK8000, " in printed
    assert "On ssh:board: " in printed
    assert printed.count("outputs there and here differ by nothing") == 2
    report = json.loads(saved.read_text())
    assert [run["device"]["battery_percent"] for run in report["runs"]] == [87, None]
    assert [len(run["results"][0]["samples_s"]) for run in report["runs"]] == [6, 6]
    assert report["settings"]["inputs"]["args"] == [{"ones": [1, 3, 4, 4], "dtype": "float32"}]
