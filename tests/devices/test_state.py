"""What a device is doing, read by its own shell; any shell text may come back."""

from pathlib import Path

import pytest

from torchfuse.devices.local import Local
from torchfuse.devices.state import state_of
from torchfuse.devices.transport import Finished
from torchfuse.runner.machine_state import MachineState, this_state


def test_it_is_what_a_process_there_reads_but_for_its_own_share() -> None:
    there, here = state_of(Local()), this_state()
    assert there.cores == here.cores
    assert there.usable_cores == here.usable_cores
    assert there.uptime_s is not None
    assert here.uptime_s is not None
    assert 0 <= here.uptime_s - there.uptime_s < 60
    assert there.own_cpu_s is None


@pytest.mark.parametrize(
    ("printed", "state"),
    [
        ("", MachineState()),
        ("garbage\n==> \n==> /proc/uptime\nsoon\n==> pid\nx\n", MachineState()),
        ("\n==> /proc/uptime\n12.5 9\n==> /proc/loadavg\n0.5 1 2\n\n==> pid\n1\n",
         MachineState(uptime_s=12.5, load_average=0.5)),
        ("\n==> /proc/7/status\nCpus_allowed_list: a-b\n\n==> pid\n7\n", MachineState()),
        ("\n==> /proc/7/cgroup\nno colons\n\n==> pid\n7\n", MachineState()),
    ],
)  # fmt: skip
def test_what_it_does_not_say_is_unknown(
    monkeypatch: pytest.MonkeyPatch, printed: str, state: MachineState
) -> None:
    monkeypatch.setattr(Local, "shell", lambda _self, _script: Finished(0, printed, ""))
    assert state_of(Local()) == state


def test_a_device_that_says_to_have_a_billion_cores_does_not_fill_the_memory_here(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    printed = "\n==> /proc/7/status\nCpus_allowed_list:\t0-999999999\n\n==> pid\n7\n"
    monkeypatch.setattr(Local, "shell", lambda _self, _script: Finished(0, printed, ""))
    cores = state_of(Local()).cores
    assert cores is not None
    assert cores < 10_000


def test_nothing_is_written_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "none"))
    assert state_of(Local()).uptime_s is not None
