"""The file system of an arm64 machine: Debian's packages unpacked, laid out as on a phone.

Python 3.13 with executorch-numpy-runtime is in it, so that .pte files run there; no torch.
"""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from devices import fake_adbd
from devices.parts import cache, debian

RELEASE = "trixie"
PACKAGES = """
busybox libbz2-1.0 libc6 libexpat1 libffi8 libgcc-s1 liblzma5 libpython3.13 libpython3.13-minimal
libpython3.13-stdlib libssl3t64 libstdc++6 libzstd1 mksh openssh-sftp-server python3.13-minimal
zlib1g
"""
PYTHON = "3.13"
LIBPYTHON = "libpython3.13.so.1.0"
WHEELS = ["executorch-numpy-runtime==1.4.0", "numpy==2.5.5"]
PLATFORMS = ["manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux2014_aarch64"]
QEMU = "qemu-aarch64-static"
QEMU_RELEASE = "bookworm"
NEEDED = ["apt-get", "dpkg-deb"]

SHELL = 2000  # the user that adbd's shell is, on Android
PROPERTIES = fake_adbd.PROPERTIES | {
    "ro.serialno": "QEMU0001",
    "ro.product.manufacturer": "QEMU",
    "ro.product.model": "Emulated Phone",
    "ro.product.cpu.abi": "arm64-v8a",
    "ro.hardware": "qemu",
    "ro.soc.manufacturer": "QEMU",
    "ro.soc.model": "cortex-a76",
    "ro.kernel.qemu": "1",  # as Android's own emulator says
}
APPLETS = """
awk basename cat chmod cmp cp cut date dd df dirname du echo env expr false find free grep head
hostname id kill ln ls md5sum mkdir mktemp mv nice nohup nproc od pgrep pidof pkill printf ps pwd
readlink realpath rm rmdir sed seq setsid sha256sum sleep sort stat sync tail tee test time timeout
touch tr true uname uniq uptime usleep wc which xargs
"""


def qemu() -> Path:
    """A static qemu-aarch64, not registered anywhere."""

    def build(out: Path) -> None:
        with tempfile.TemporaryDirectory(dir=out.parent) as work:
            _unpack(QEMU_RELEASE, ["qemu-user-static"], Path(work) / "all", "amd64")
            shutil.copy(Path(work) / "all/usr/bin" / QEMU, out)  # one of thirty machines

    return cache.kept("qemu", build, QEMU_RELEASE, QEMU) / QEMU


def root() -> Path:
    """The root folder. It is shared and meant to be mounted read-only, with a /data of its own."""
    return cache.kept("arm64-root", _build, sys.modules[__name__], fake_adbd)


def _unpack(release: str, packages: list[str], out: Path, machine: str) -> None:
    with tempfile.TemporaryDirectory(dir=out.parent) as work:
        debian.Debian(Path(work) / "apt", release, machine).unpack(packages, out)


def _build(out: Path) -> None:
    for name in ("bin", "lib", "sbin"):
        (out / "usr" / name).mkdir(parents=True)
        (out / name).symlink_to(f"usr/{name}")
    _unpack(RELEASE, PACKAGES.split(), out, "arm64")
    _lay_out_like_a_phone(out)
    _add_wheels(out)


def _lay_out_like_a_phone(out: Path) -> None:
    for name in ("data", "dev/pts", "proc", "sys", "tmp", "system/bin", "opt/adbd", "opt/torch"):
        (out / name).mkdir(parents=True)
    for name in ("null", "zero", "urandom"):
        (out / "dev" / name).touch()
    (out / "dev/ptmx").symlink_to("pts/ptmx")
    (out / "dev/fd").symlink_to("/proc/self/fd")
    (out / "etc/passwd").write_text(f"root:x:0:0::/:/bin/sh\nshell:x:{SHELL}:{SHELL}::/:/bin/sh\n")
    (out / "etc/group").write_text(f"root:x:0:\nshell:x:{SHELL}:\n")
    for applet in APPLETS.split():
        if not (out / "usr/bin" / applet).exists():
            (out / "usr/bin" / applet).symlink_to("busybox")
    for name, target in {"sh": "mksh", "python3": f"python{PYTHON}"}.items():
        (out / "usr/bin" / name).unlink(missing_ok=True)
        (out / "usr/bin" / name).symlink_to(target)
    (out / "system/bin/sh").symlink_to("/bin/mksh")
    (out / "system/build.prop").write_text(
        "".join(f"{name}={value}\n" for name, value in PROPERTIES.items())
    )
    (out / "system/battery").write_text(fake_adbd.BATTERY)
    for name, script in {"getprop": fake_adbd.GETPROP, "dumpsys": fake_adbd.DUMPSYS}.items():
        (out / "system/bin" / name).write_text(script)
        (out / "system/bin" / name).chmod(0o755)


def _add_wheels(out: Path) -> None:
    into = out / "usr/lib/python3/dist-packages"
    into.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as work:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", work]
        command += ["--only-binary", ":all:", "--python-version", PYTHON]
        command += [option for platform in PLATFORMS for option in ("--platform", platform)]
        subprocess.run([*command, *WHEELS], check=True, stdin=subprocess.DEVNULL)
        for wheel in Path(work).glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(into)
