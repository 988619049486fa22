"""AOSP's own adbd for this machine, from Debian's source of Android's platform tools.

Two lines differ from the source: it listens on 127.0.0.1 rather than everywhere, and on no vsock.
"""

import concurrent.futures
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from devices.parts import cache, debian

RELEASE = "bookworm"
VERSION = "29.0.6"
LIBRARIES = ["libbase", "libcutils", "liblog", "libboringssl"]
ADB = "system/core/adb"
ADB_SOURCES = """
adb adb_io adb_listeners adb_trace adb_unique_fd adb_utils fdevent/fdevent fdevent/fdevent_poll
fdevent/fdevent_epoll services sockets socket_spec sysdeps/errno sysdeps/posix/network sysdeps_unix
transport transport_fd transport_local transport_usb types shell_service_protocol daemon/auth
daemon/jdwp_service daemon/usb_dummy daemon/file_sync_service daemon/services daemon/shell_service
adbconnection/adbconnection_server
"""
SOURCES = [
    *(f"{ADB}/{name}.cpp" for name in ADB_SOURCES.split()),
    "system/core/libasyncio/AsyncIO.cpp",
    "frameworks/native/libs/adbd_auth/adbd_auth.cpp",
    "system/core/diagnose_usb/diagnose_usb.cpp",
    "system/core/libcrypto_utils/android_pubkey.c",
]
MAIN = f"{ADB}/daemon/main.cpp"
INCLUDES = [
    ADB,
    f"{ADB}/daemon/include",
    f"{ADB}/adbconnection/include",
    "system/core/base/include",
    "system/core/libcutils/include",
    "system/core/include",
    "system/core/libasyncio/include",
    "system/core/diagnose_usb/include",
    "system/core/libcrypto_utils/include",
    "frameworks/native/libs/adbd_auth/include",
]
NEEDED = ["apt-get", "clang", "clang++", "dpkg-deb", "dpkg-source", "patch"]


def adbd() -> Path:
    """A folder with `adbd`, which trusts everyone, and `adbd-auth`, which asks for keys.

    Each is a small script's worth of command: `ld.so --library-path lib ./adbd`, with all that it
    needs beside it, so that it also runs where this machine's libraries are not.
    """
    return cache.kept(f"adbd-{VERSION}", _build, sys.modules[__name__], platform.machine())


def _build(out: Path) -> None:
    with tempfile.TemporaryDirectory(dir=out.parent) as work:
        apt = debian.Debian(Path(work) / "apt", RELEASE, _debian_machine())
        source, system = Path(work) / "source", Path(work) / "system"
        apt.source("android-platform-tools", source)
        packages = [f"android-{library}{kind}" for library in LIBRARIES for kind in ("", "-dev")]
        apt.unpack([*packages, "libcap-dev"], system)
        _loopback_only(source)
        _compile(source, system, Path(work), out)


def _loopback_only(source: Path) -> None:
    everywhere = r"network_inaddr_any_server\(port, SOCK_STREAM, error\)"
    loopback = "network_loopback_server(port, SOCK_STREAM, error, true)"
    _edit(source / f"{ADB}/socket_spec.cpp", everywhere, loopback)
    _edit(source / MAIN, r".*\"vsock:%d\", port.*\n", "")


def _edit(file: Path, old: str, new: str) -> None:
    text, count = re.subn(old, new, file.read_text())
    if count != 1:
        raise RuntimeError(f"{file} is not the source that is known here")
    file.write_text(text)


def _compile(source: Path, system: Path, work: Path, out: Path) -> None:
    flags = [
        "-w",
        "-O1",
        "-fPIC",
        "-D_GNU_SOURCE",
        "-DADB_HOST=0",
        "-DALLOW_ADBD_ROOT=0",
        f'-DADB_VERSION="{VERSION}"',
        f'-DPLATFORM_TOOLS_VERSION="{VERSION}"',
        "-DANDROID_BASE_UNIQUE_FD_DISABLE_IMPLICIT_CONVERSION=1",
        f"-I{system}/usr/include/android",
        f"-I{system}/usr/include",
        *(f"-I{folder}" for folder in INCLUDES),
    ]
    cpp = ["-std=gnu++2a", "-fno-exceptions", "-include", "atomic", "-include", "optional"]

    def compiled(file: str, name: str, *more: str) -> str:
        tool = ["clang"] if file.endswith(".c") else ["clang++", *cpp]
        _run([*tool, *flags, *more, "-c", file, "-o", f"{work}/{name}.o"], source)
        return f"{work}/{name}.o"

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [pool.submit(compiled, file, file.replace("/", "_")) for file in SOURCES]
        mains = {
            "adbd": pool.submit(compiled, MAIN, "main", "-DALLOW_ADBD_NO_AUTH"),
            "adbd-auth": pool.submit(compiled, MAIN, "main-auth"),
        }
        objects = [job.result() for job in jobs]
        (android,) = system.glob("usr/lib/*/android")
        libraries = "-lbase -lcrypto -lcutils -llog -lpthread -lresolv -lutil"
        for name, main in mains.items():
            link = [f"-L{android}", f"-Wl,-rpath-link,{android}", *libraries.split()]
            _run(["clang++", "-o", f"{out}/{name}", *objects, main.result(), *link], source)
    _gather_libraries(out / "adbd", android, out)


def _gather_libraries(program: Path, android: Path, out: Path) -> None:
    listed = subprocess.run(
        ["ldd", program],
        env=os.environ | {"LD_LIBRARY_PATH": str(android)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    (out / "lib").mkdir()
    for line in listed.splitlines():
        if found := re.search(r"(?:=> )?(/\S+) \(0x", line):
            library = Path(found[1])
            name = "ld.so" if library.name.startswith("ld-linux") else f"lib/{library.name}"
            shutil.copy(library, out / name)


def _debian_machine() -> str:
    return {"x86_64": "amd64", "aarch64": "arm64"}[platform.machine()]


def _run(command: list[str], folder: Path) -> None:
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RuntimeError(f"{' '.join(command)}: {ran.stderr[-2000:]}")
