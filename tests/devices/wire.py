"""A wire that can be cut: a forwarder on 127.0.0.1 that drops its connections when told to."""

import asyncio
import contextlib

from devices.listener import Listener


class Wire(Listener):
    """Forwards a port of 127.0.0.1 to another one, from start() to stop().

    `cut_in_after` and `cut_out_after` are the bytes, towards the server and back, that still pass
    before the wire is cut; as they pass, they are counted down. A cut wire stays so until mend().
    """

    def __init__(self, target: int) -> None:
        super().__init__()
        self.target = target
        self.cut_in_after: int | None = None
        self.cut_out_after: int | None = None
        self.cuts = 0
        self.frozen = False
        self._writers: set[asyncio.StreamWriter] = set()

    def cut(self) -> None:
        """Every connection is reset, and none is taken."""
        self._do(self._cut())

    def freeze(self) -> None:
        """Nothing passes any more, and nobody is told."""
        self.frozen = True

    def mend(self) -> None:
        self.frozen = False
        self._do(self._listen())

    def stop(self) -> None:
        if self._loop is None:
            return
        self.frozen = False
        self._do(self._cut())
        self._do(self._end())
        self._end_thread()

    async def _cut(self) -> None:
        self.cuts += 1
        self._stop_listening()
        for writer in list(self._writers):
            writer.transport.abort()

    async def _end(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*others, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self.target)
        self._writers |= {writer, back}
        try:
            await asyncio.gather(
                self._pass(reader, back, "cut_in_after"), self._pass(there, writer, "cut_out_after")
            )
        finally:
            self._writers -= {writer, back}

    async def _pass(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, limit: str
    ) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(32 * 1024):
                while self.frozen:
                    await asyncio.sleep(0.01)
                left = getattr(self, limit)
                writer.write(data[:left])
                await writer.drain()
                if left is None:
                    continue
                setattr(self, limit, left - len(data) if left > len(data) else None)
                if left <= len(data):
                    await self._cut()
        # One end has closed, which ends the other as well.
        with contextlib.suppress(ConnectionError):
            writer.close()
            await writer.wait_closed()
