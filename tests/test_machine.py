"""What the kernel says about the processor."""

from pathlib import Path

import pytest

from torchfuse.machine import this_machine

X86 = """\
processor\t: 0
model name\t: Some Processor @ 2.60GHz
flags\t\t: fpu sse2 avx512f {flag}
bugs\t\t: none

processor\t: 1
model name\t: Some Processor @ 2.60GHz
"""


@pytest.mark.parametrize(
    ("flag", "expected"), [("avx512_vnni", True), ("avx_vnni", False), ("avx512bw", False)]
)
def test_the_processor_and_its_int8_instructions_are_read_off(
    tmp_path: Path, flag: str, expected: bool
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(X86.format(flag=flag))
    machine = this_machine(cpuinfo)
    assert machine.processor == "Some Processor @ 2.60GHz"
    assert machine.avx512_vnni is expected
    assert machine.logical_cpus >= 1


def test_a_system_that_does_not_say_is_unknown_and_not_a_no(tmp_path: Path) -> None:
    machine = this_machine(tmp_path / "none")
    assert machine.avx512_vnni is None
    assert machine.processor
