"""Memory that is freed stays a process's own while models are measured."""

import os
import platform
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from torchfuse.measuring.timing import measure

CALLS = 5
LARGE = 40 << 20  # glibc maps what is larger than 32 MiB anew each time, whatever came before
COUNTING = f"""
from resource import RUSAGE_SELF, getrusage
from torchfuse.runner.allocator import keep_freed_memory
keep_freed_memory()
for n in range({CALLS} + 1):
    if n == 1:
        before = getrusage(RUSAGE_SELF).ru_minflt
    b"x" * {LARGE}
print(getrusage(RUSAGE_SELF).ru_minflt - before)
"""
LIVE = f"""
import torch, torchfuse
x = torch.ones({LARGE} // 4)
live = torchfuse.measure(lambda x: x * 0.333333, x, runs={CALLS}, warmup=1)
print(live.page_faults, *(caution.kind for caution in live.cautions))
"""
PAGES = CALLS * LARGE // os.sysconf("SC_PAGE_SIZE")

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc",
    reason="for glibc",
)


def faults(**environment: str) -> int:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_TUN"))}
    counted = subprocess.run(
        [sys.executable, "-c", COUNTING],
        env={**clean, **environment},
        capture_output=True,
        check=True,
        text=True,
    )
    return int(counted.stdout)


def test_memory_that_was_freed_is_not_mapped_anew() -> None:
    assert faults() < PAGES / 100


def test_a_file_is_measured_so_and_a_live_model_that_is_not_is_cautioned_about(
    model_files: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in list(os.environ):
        if name.startswith(("MALLOC_", "GLIBC_TUNABLES")):
            monkeypatch.delenv(name)
    x = torch.ones(LARGE // 4)
    in_file = measure(model_files("third.pt"), x, runs=100, warmup=10)
    assert in_file.file is not None
    # The heap may still grow by a block once or twice; without keeping, each call maps one.
    assert in_file.file.page_faults < PAGES / CALLS / 10
    # In a process of its own: once `compare` was run in this one, this one keeps what is freed.
    live = subprocess.run([sys.executable, "-c", LIVE], capture_output=True, check=True, text=True)
    page_faults, *cautions = live.stdout.split()
    assert float(page_faults) >= PAGES / CALLS * 0.9
    assert "page-faults" in cautions


def test_settings_of_the_users_own_stay() -> None:
    assert faults(MALLOC_MMAP_THRESHOLD_="131072") >= PAGES * 0.9
