"""The devices that there are: this machine, those that adb knows, hosts that were named."""

from collections.abc import Sequence

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
    found, problems = [_facts(Local())], []
    try:
        known = adb_devices()
    except DeviceError as error:
        known = []
        problems.append(str(error))
    for device in known:
        if device.advice is None:
            found.append(_facts(Adb(device.serial)))
        else:
            name = f"adb:{device.serial}"
            found.append(DeviceFacts(name, device.state, device.advice, device.model))
    found += [_facts(Ssh(host)) for host in hosts]
    return found, problems


def _facts(transport: Transport) -> DeviceFacts:
    try:
        return facts_of(transport)
    except DeviceError as error:
        reason = str(error).removeprefix(f"{transport.name}: ").rstrip(".")
        return DeviceFacts(transport.name, "unreachable", reason)
