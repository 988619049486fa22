"""The devices that there are: this machine, those that adb knows, hosts that were named."""

import functools
from collections.abc import Callable, Sequence

from torchfuse.devices.adb import Adb, adb_devices
from torchfuse.devices.facts import DeviceFacts, facts_of
from torchfuse.devices.local import Local
from torchfuse.devices.ssh import Ssh
from torchfuse.devices.transport import Transport
from torchfuse.errors import DeviceError

__all__ = ["listed"]


def listed(hosts: Sequence[str] = ()) -> tuple[list[DeviceFacts], list[str]]:
    """Return what each device says of itself, and what kept others from being looked for.

    Raises:
        InputError: a host's name is none.
    """
    found, problems = [_facts("local", Local)], []
    try:
        known = adb_devices()
    except DeviceError as error:
        known = []
        problems.append(str(error))
    for device in known:
        name = f"adb:{device.serial}"
        if device.advice is None:
            found.append(_facts(name, functools.partial(Adb, device.serial)))
        else:
            found.append(DeviceFacts(name, device.state, device.advice, device.model))
    found += [_facts(f"ssh:{host}", functools.partial(Ssh, host)) for host in hosts]
    return found, problems


def _facts(name: str, opened: Callable[[], Transport]) -> DeviceFacts:
    try:
        return facts_of(opened())
    except DeviceError as error:  # one that has just gone, too
        reason = str(error).removeprefix(f"{name}: ").rstrip(".")
        return DeviceFacts(name, "unreachable", reason)
