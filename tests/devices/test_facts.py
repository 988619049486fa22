"""What a device says of itself, as facts; the scripts that ask run over real connections elsewhere.

The texts are as these devices print them.
"""

import os
from typing import Any

import pytest

from torchfuse.devices.facts import DeviceFacts, facts_from, facts_of
from torchfuse.devices.local import Local

PIXEL = """\
architecture=aarch64
kernel=Linux 6.1.75-android14
cores=9
memory_kb=11776304
product=Google Pixel 8
soc=Google Tensor G3
hardware=shiba
android=14
sdk=34
flags=fp asimd evtstrm aes asimdhp asimddp sve i8mm bf16
governor=sched_pixel
governor=sched_pixel
governor=powersave
millidegrees=38100
millidegrees=-273000
millidegrees=65535000
millidegrees=0
millidegrees=41250
battery=83
battery=100
"""
RASPBERRY = """\
architecture=aarch64
kernel=Linux 6.6.51
cores=4
memory_kb=8245236
board=Raspberry Pi 5 Model B Rev 1.0
distribution=Debian GNU/Linux 12 (bookworm)
governor=ondemand
millidegrees=52350
"""


@pytest.mark.parametrize(
    ("printed", "facts"),
    [
        (
            PIXEL,
            {
                "model": "Google Pixel 8",
                "soc": "Google Tensor G3",
                "system": "Android 14 (API 34)",
                "cores": 9,
                "memory_bytes": 11776304 * 1024,
                "governors": ("powersave", "sched_pixel"),
                "battery_percent": 83,
                "temperature_c": 41.25,
                "instructions": ("asimd", "asimdhp", "asimddp", "i8mm", "sve", "bf16"),
                "emulated": False,
            },
        ),
        (
            RASPBERRY,
            {
                "model": "Raspberry Pi 5 Model B Rev 1.0",
                "soc": None,
                "system": "Debian GNU/Linux 12 (bookworm)",
                "battery_percent": None,
                "temperature_c": 52.35,
                "emulated": None,
            },
        ),
        ("", {"state": "ready", "model": None, "cores": None, "emulated": None}),
        ("kernel=Linux 5.4\n", {"system": "Linux 5.4"}),
        ("hardware=ranchu\n", {"emulated": True}),
        ("qemu=1\n", {"emulated": True}),
        ("architecture=aarch64\nflags=fpu sse2 avx2\n", {"emulated": True}),
        ("architecture=x86_64\nflags=fpu sse2 avx2\n", {"emulated": False}),
        ("cores=many\nmemory_kb=\nbattery=full\n", {"cores": None, "battery_percent": None}),
        (f"cores={'9' * 5000}\nmillidegrees={'9' * 5000}\n", {"cores": None}),
        ("model=no key of ours\nwelcome = to this machine\n=\n\n", {"model": None}),
        (
            "product=\x1b]0;owned\x07Phone\x1b[31m\n",
            {"model": "\ufffd]0;owned\ufffdPhone\ufffd[31m"},
        ),
    ],
)
def test_what_it_prints_becomes_facts(printed: str, facts: dict[str, Any]) -> None:
    found = facts_from("adb:1", printed)
    assert found.name == "adb:1"
    assert {name: getattr(found, name) for name in facts} == facts


def test_cores_are_the_machines_whatever_number_of_threads_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # which `nproc` prints in place of the cores
    assert facts_of(Local()).cores == len(os.sched_getaffinity(0))


def test_this_machine_says_what_it_is() -> None:
    facts = facts_of(Local())
    assert (facts.name, facts.state) == ("local", "ready")
    assert facts.architecture
    assert facts.cores
    assert facts.memory_bytes
    assert facts != DeviceFacts("local", "ready")
