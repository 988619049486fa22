"""A device by the name that --device takes: local, adb, adb:SERIAL or ssh:HOST."""

from torchfuse.devices.adb import Adb
from torchfuse.devices.local import Local
from torchfuse.devices.ssh import Ssh
from torchfuse.devices.transport import Transport
from torchfuse.errors import InputError

__all__ = ["checked_device", "device_named"]


def checked_device(name: str) -> str:
    """Return the name, if it is one that a device can have.

    Raises:
        InputError: it is none.
    """
    kind, colon, rest = name.partition(":")
    if (kind, colon) == ("local", "") or kind == "adb" or (kind == "ssh" and rest):
        return name
    raise InputError(
        f"Expected a device named local, adb, adb:SERIAL or ssh:HOST, got '{name}'; "
        "'torchfuse devices' lists those that are there."
    )


def device_named(name: str, folder: str | None = None) -> Transport:
    """Return the way to a device, not yet opened; `folder` is where its private folder is made.

    Raises:
        InputError: no such name.
        DeviceError: adb has no such device, has several and none was named, or it is not ready.
    """
    kind, _, rest = checked_device(name).partition(":")
    if kind == "adb":
        return Adb(rest or None, folder)
    if kind == "ssh":
        return Ssh(rest, folder)
    return Local(folder)
