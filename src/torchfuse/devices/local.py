"""The machine that torchfuse runs on, as a device: the same shell scripts, no connection."""

from torchfuse.devices.transport import Transport

__all__ = ["Local"]


class Local(Transport):
    """The machine that torchfuse runs on."""

    name = "local"
    base = '"${TMPDIR:-/tmp}"'

    def _shell_words(self, script: str) -> list[str]:
        return ["sh", "-c", script]

    def _copy_words(self, source: str, target: str, *, push: bool) -> list[str]:
        del push  # both are here
        return ["cp", "--", source, target]

    def _explained(self, errors: str) -> str | None:
        del errors
        return None
