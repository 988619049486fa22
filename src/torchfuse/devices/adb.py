"""Android devices, and whatever else runs adbd, by the system's own `adb`."""

import re
import subprocess
from dataclasses import dataclass

from torchfuse.devices.printable import printable
from torchfuse.devices.transport import Transport, last_line
from torchfuse.errors import DeviceError

__all__ = ["Adb", "AdbDevice", "adb_devices", "chosen"]

_LISTING_S = 20.0  # starting adb's server takes a few of them

# What to do about each state of `adb devices` in which a device takes no commands.
_ADVICE = {
    "unauthorized": "unlock the device and allow this computer in the dialog that it shows",
    "authorizing": "unlock the device and allow this computer in the dialog that it shows",
    "offline": "take the cable out and put it in again, or run 'adb reconnect offline'",
    "connecting": "wait a moment and try again",
    "no permissions": "give your user access to it (a udev rule), then run 'adb kill-server'",
    "bootloader": "start Android on it: 'fastboot reboot'",
    "recovery": "start Android on it: 'adb reboot'",
    "sideload": "start Android on it: 'adb reboot'",
    "host": "it is in host mode; start Android on it",
}

# What adb prints → what it means and what to do. The first that is found counts.
_ERRORS = (
    (r"device (still )?(unauthorized|authorizing)|device not authorized", "unauthorized"),
    (r"device offline", "offline"),
    (r"no permissions", "no permissions"),
)


@dataclass(frozen=True)
class AdbDevice:
    """A line of `adb devices -l`."""

    serial: str
    state: str  # "device": ready
    model: str | None

    @property
    def advice(self) -> str | None:
        """What to do so that it takes commands; None: it does."""
        if self.state == "device":
            return None
        return _ADVICE.get(self.state, "see what its screen says")


def adb_devices() -> list[AdbDevice]:
    """Return the devices that adb knows, ready or not.

    Raises:
        DeviceError: adb is not installed, or its server does not start.
    """
    try:
        listed = subprocess.run(
            ["adb", "devices", "-l"],  # noqa: S607  # the user's own adb, by their PATH
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_LISTING_S,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except FileNotFoundError:
        raise DeviceError(
            "'adb' is not installed here; install it (Debian and Ubuntu: apt install adb)."
        ) from None
    except subprocess.TimeoutExpired:
        raise DeviceError(
            f"'adb devices' got no answer in {_LISTING_S:g} s; run 'adb kill-server'."
        ) from None
    if listed.returncode:
        reason = last_line(listed.stderr) or last_line(listed.stdout) or "no message"
        raise DeviceError(
            f"adb cannot list its devices: {reason}; run 'adb kill-server' and try again."
        )
    return _parsed(listed.stdout)


def _parsed(text: str) -> list[AdbDevice]:
    r"""Return the devices of a listing.

    >>> _parsed("List of devices attached\nA1  device product:p model:Pixel_8 device:d\n")
    [AdbDevice(serial='A1', state='device', model='Pixel 8')]
    >>> _parsed("A2   no permissions (missing udev rules?); see [http://…] usb:1-1\n")
    [AdbDevice(serial='A2', state='no permissions', model=None)]
    """
    devices = []
    for line in text.splitlines():
        if line.startswith(("List of devices", "*")) or not line.strip():
            continue
        serial, _, rest = line.partition(" ")
        rest = rest.strip()
        if not rest or serial != printable(serial):  # whoever makes a device names it as they like
            continue
        state = "no permissions" if rest.startswith("no permissions") else rest.split()[0]
        model = re.search(r"\bmodel:(\S+)", rest)
        devices.append(AdbDevice(serial, state, model[1].replace("_", " ") if model else None))
    return devices


def chosen(serial: str | None) -> str:
    """Return the serial number of the device to use: the one named, or the only one.

    Raises:
        DeviceError: there is none of that name, several and none named, or it is not ready.
    """
    devices = adb_devices()
    names = ", ".join(device.serial for device in devices)
    if serial is None and len(devices) != 1:
        raise DeviceError(
            "adb sees no device; connect one and allow USB debugging on it."
            if not devices
            else f"adb sees {len(devices)} devices ({names}) and none was named; name one: "
            f"--device adb:{devices[0].serial}."
        )
    for device in devices:
        if serial in (None, device.serial):
            if device.advice is not None:
                raise DeviceError(f"adb:{device.serial} is {device.state}; {device.advice}.")
            return device.serial
    raise DeviceError(
        f"adb sees no device '{serial}' ({f'it sees {names}' if names else 'it sees none'}); "
        "'torchfuse devices' lists them."
    )


class Adb(Transport):
    """A device that adb knows, by its serial number."""

    base = "/data/local/tmp"

    def __init__(self, serial: str | None = None, base: str | None = None) -> None:
        """Choose the device.

        Raises:
            DeviceError: there is none, several and none named, or it is not ready.
        """
        super().__init__(base)
        self.serial = chosen(serial)
        self.name = f"adb:{self.serial}"

    def _shell_words(self, script: str) -> list[str]:
        return ["adb", "-s", self.serial, "shell", script]

    def _copy_words(self, source: str, target: str, *, push: bool) -> list[str]:
        return ["adb", "-s", self.serial, "push" if push else "pull", source, target]

    def _explained(self, errors: str) -> str | None:
        for pattern, state in _ERRORS:
            if re.search(pattern, errors):
                return f"the device is {state}; {_ADVICE[state]}."
        if re.search(r"device '.*' not found|no devices/emulators found", errors):
            return "adb lost the device; check the cable, and that it is on."
        if re.search(r"read-only file system|permission denied", errors, re.IGNORECASE):
            line = next(
                line for line in errors.splitlines()
                if re.search(r"read-only|permission", line, re.IGNORECASE)
            )  # fmt: skip
            return (
                f"nothing can be written there ({printable(line)}); name a folder with "
                "--device-folder."
            )
        return None
