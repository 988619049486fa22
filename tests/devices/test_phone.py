"""The emulated phone is one, as far as adb, ssh and the models that run there can tell."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import torchfuse
from devices.adb_server import AdbServer
from devices.parts import phone as phones
from devices.parts.phone import Phone
from devices.sshd import Sshd

pytestmark = pytest.mark.devices

RUN = """
import sys
import numpy
from executorch_numpy_runtime import Runtime

model, input, output = sys.argv[1:]
x = numpy.fromfile(input, dtype=numpy.float32).reshape(1, 3, 32, 32)
(y,) = Runtime.get().load_program(model).load_method("forward")([x])
y.tofile(output)
"""


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 10),
    ).eval()


@pytest.fixture(scope="module", params=["fp32", "int8"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model.pte, input.bin, and the host's output.bin."""
    folder = tmp_path_factory.mktemp("exported")
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    calibration = [torch.randn(1, 3, 32, 32) for _ in range(8)]
    torchfuse.export(
        network(),
        x,
        folder / "model.pte",
        precision=request.param,
        calibration=calibration if request.param == "int8" else None,
    )
    output = torchfuse.load(folder / "model.pte")(x)
    x.numpy().tofile(folder / "input.bin")
    output.numpy().tofile(folder / "output.bin")
    if request.param == "int8":
        (folder / "is_int8").touch()
    return folder


def assert_same(ours: Path, exported: Path) -> None:
    """Integers to the last bit; floats as close as another order of additions leaves them."""
    there, here = (np.fromfile(path, np.float32) for path in (ours, exported / "output.bin"))
    if (exported / "is_int8").exists():
        assert there.tobytes() == here.tobytes()
    else:
        np.testing.assert_allclose(there, here, rtol=1e-5, atol=1e-6)


def push(adb: AdbServer, *files: Path) -> None:
    ran = adb.adb("push", *map(str, files), "/data/local/tmp/")
    assert ran.returncode == 0, ran


def test_it_is_an_arm64_machine_and_adb_is_no_ones_but_the_shell_user(
    adb: AdbServer, phone: Phone
) -> None:
    ran = adb.adb("shell", "uname -m; id -un; getprop ro.product.cpu.abi; exit 7")
    assert ran.returncode == 7
    assert ran.stdout.split() == [b"aarch64", b"shell", b"arm64-v8a"]
    assert adb.adb("shell", "kill -SEGV $$").returncode == 139
    assert not Path("/proc/sys/fs/binfmt_misc/aarch64").exists()


def test_files_go_there_and_back(adb: AdbServer, phone: Phone, tmp_path: Path) -> None:
    name = "-a 'b\" ;c$(d)\n.bin"
    (tmp_path / name).write_bytes(bytes(range(256)) * 20_000)
    push(adb, tmp_path / name)
    assert [path.name for path in phone.tmp.iterdir()] == [name]
    assert adb.adb("pull", f"/data/local/tmp/{name}", str(tmp_path / "back")).returncode == 0
    assert (tmp_path / "back").read_bytes() == (tmp_path / name).read_bytes()
    ran = adb.adb("push", str(tmp_path / name), "/system/bin/new")
    assert ran.returncode == 1
    assert b"Read-only file system" in ran.stdout + ran.stderr


def test_a_model_gives_there_what_it_gives_here(
    adb: AdbServer, phone: Phone, exported: Path, tmp_path: Path
) -> None:
    (tmp_path / "run.py").write_text(RUN)
    push(adb, tmp_path / "run.py", exported / "model.pte", exported / "input.bin")
    ran = adb.adb("shell", "cd /data/local/tmp && python3 run.py model.pte input.bin out.bin")
    assert ran.returncode == 0, ran
    adb.adb("pull", "/data/local/tmp/out.bin", str(tmp_path))
    assert_same(tmp_path / "out.bin", exported)


def test_a_runner_in_c_plus_plus_gives_it_as_well(
    adb: AdbServer, phone: Phone, exported: Path, arm64_executor_runner: Path, tmp_path: Path
) -> None:
    push(adb, arm64_executor_runner, exported / "model.pte", exported / "input.bin")
    options = "--model_path=model.pte --inputs=input.bin --output_file=out --num_executions=3"
    ran = adb.adb("shell", f"cd /data/local/tmp && ./executor_runner {options}")
    assert ran.returncode == 0, ran
    said = (ran.stdout + ran.stderr).decode()
    assert "Iteration 3 of 3: " in said
    assert "Model executed successfully 3 time(s) in " in said
    adb.adb("pull", "/data/local/tmp/out-0.bin", str(tmp_path))
    assert_same(tmp_path / "out-0.bin", exported)


def test_pytorchs_own_benchmark_runs_there(
    adb: AdbServer, phone: Phone, arm64_speed_benchmark: Path, tmp_path: Path
) -> None:
    torchfuse.export(network(), torch.randn(1, 3, 32, 32), tmp_path / "model.ptl")
    push(adb, arm64_speed_benchmark, tmp_path / "model.ptl")
    options = "--model=model.ptl --input_dims=1,3,32,32 --input_type=float --warmup=1 --iter=3"
    ran = adb.adb("shell", f"cd /data/local/tmp && ./speed_benchmark_torch {options}", timeout_s=60)
    assert ran.returncode == 0, ran
    assert "Main run finished. Microseconds per iter: " in (ran.stdout + ran.stderr).decode()


def test_lost_and_found(adb: AdbServer, phone: Phone) -> None:
    phone.stop_adbd()
    adb.wait_for(phone.serial, "offline")
    phone.start_adbd()
    adb.wait_for(phone.serial, "device")
    assert adb.adb("shell", "echo back").stdout == b"back\n"


def test_it_asks_for_a_key_and_remembers_it(adb: AdbServer, emulated_phone: Phone) -> None:
    with phones.running(asks=True) as phone:
        adb.adb("connect", phone.serial)
        adb.wait_for(phone.serial, "unauthorized")
        phone.trust(adb.home / ".android/adbkey.pub")
        adb.adb("disconnect", phone.serial)
        adb.adb("connect", phone.serial)
        adb.wait_for(phone.serial, "device")
        assert adb.adb("shell", "echo known", serial=phone.serial).stdout == b"known\n"


def test_two_at_once_and_a_full_one(adb: AdbServer, phone: Phone, tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(bytes(2_000_000))
    with phones.running(space="1m") as small:
        adb.adb("connect", small.serial)
        adb.wait_for(small.serial, "device")
        ran = adb.adb("push", str(tmp_path / "big"), "/data/local/tmp/", serial=small.serial)
        assert ran.returncode == 1
        assert b"No space left on device" in ran.stdout + ran.stderr
        ran = adb.adb("push", str(tmp_path / "big"), "/data/local/tmp/", serial=phone.serial)
        assert ran.returncode == 0


def test_what_runs_on_it_is_seen_and_ends_with_it(adb: AdbServer, emulated_phone: Phone) -> None:
    with phones.running() as phone:
        adb.adb("connect", phone.serial)
        adb.wait_for(phone.serial, "device")
        adb.adb("shell", "sleep 1000 > /dev/null 2>&1 < /dev/null &")
        (pid,) = phone.processes()
    assert not Path(f"/proc/{pid}").exists()


def test_over_ssh_it_is_an_arm64_machine_as_well(
    arm64_board: Sshd, exported: Path, tmp_path: Path
) -> None:
    assert arm64_board.ssh("board", "uname -m; exit 7").stdout == b"aarch64\n"
    folder = arm64_board.ssh("board", "mktemp -d").stdout.decode().strip()
    (tmp_path / "run.py").write_text(RUN)
    files = [tmp_path / "run.py", exported / "model.pte", exported / "input.bin"]
    assert arm64_board.scp(*map(str, files), f"board:{folder}").returncode == 0
    ran = arm64_board.ssh("board", f"cd {folder} && python3 run.py model.pte input.bin out.bin")
    assert ran.returncode == 0, ran
    arm64_board.scp(f"board:{folder}/out.bin", str(tmp_path))
    assert_same(tmp_path / "out.bin", exported)
