"""The command `torchfuse devices`: what models can be measured on, and how it is."""

import click

from torchfuse.commands.status import STDOUT
from torchfuse.errors import TorchfuseError


@click.command("devices", short_help="What models can be measured on, and how it is.")
@click.argument("hosts", nargs=-1, metavar="[HOST]...")
@click.option(
    "--json", "json_path", metavar="FILE",
    help="Write every fact as JSON; '-' prints it instead of the table.",
)  # fmt: skip
def command(hosts: tuple[str, ...], json_path: str | None) -> None:
    """List this machine, the devices that adb knows, and each HOST that ssh reaches.

    \b
      torchfuse devices
      torchfuse devices pi@raspberrypi

    What a device does not say is left empty.
    """  # noqa: D301  # \b keeps click from re-filling the next paragraph
    from torchfuse.artifacts import check_destination, write_atomically
    from torchfuse.devices.listing import listed
    from torchfuse.render.devices_text import show
    from torchfuse.serialization import to_json

    if json_path not in (None, STDOUT):
        check_destination(json_path)
    hosts = tuple(host.removeprefix("ssh:") for host in hosts)  # as --device takes them
    devices, problems = listed(hosts)
    if json_path == STDOUT:
        click.echo(to_json(devices))
    else:
        show(devices)
    for device in devices:
        if device.advice is not None:
            click.echo(f"{device.name}: {device.advice}.", err=True)
    for problem in problems:
        click.echo(f"Note: {problem}", err=True)
    if json_path not in (None, STDOUT):
        write_atomically(json_path, (to_json(devices) + "\n").encode())
    asked = {f"ssh:{host}" for host in hosts}
    if unreachable := [d for d in devices if d.name in asked and d.advice is not None]:
        raise TorchfuseError(f"{', '.join(d.name for d in unreachable)} cannot be used as it is.")
