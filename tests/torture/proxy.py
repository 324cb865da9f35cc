"""A TCP proxy between an actor and a server that delays, cuts, resets and swallows, as networks do."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Coroutine
from typing import Any

CHUNK = 65_536


class Proxy:
    """Forwards 127.0.0.1:port to a server, in a thread and an event loop of its own; a context manager."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.port = 0
        self.delay = 0.0  # seconds that each chunk waits, in either direction
        self._open = asyncio.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._pairs: set[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = set()
        self._server: asyncio.Server | None = None

    def __enter__(self) -> Proxy:
        self._thread.start()
        self._call(self._start())
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._call(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    # --- what it does to connections -------------------------------------------------------------------------------

    def cut(self) -> int:
        """Ends every connection in good order; returns how many."""
        return int(self._call(self._end(reset=False)))

    def reset(self) -> int:
        """Ends every connection with a TCP reset, in the middle of whatever is under way."""
        return int(self._call(self._end(reset=True)))

    def swallow(self) -> None:
        """From now on nothing passes, and nobody is told: a cable that was pulled."""
        self._loop.call_soon_threadsafe(self._open.clear)

    def flow(self) -> None:
        self._loop.call_soon_threadsafe(self._open.set)

    # --- inside ----------------------------------------------------------------------------------------------------

    def _call(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(20)

    async def _start(self) -> None:
        self._open.set()
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _stop(self) -> None:
        assert self._server is not None
        self._server.close()
        self._open.set()
        await self._end(reset=False)
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._open.wait()
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.close()
            return
        pair = (writer, far_writer)
        self._pairs.add(pair)
        try:
            await asyncio.gather(self._pump(reader, far_writer), self._pump(far_reader, writer))
        finally:
            self._pairs.discard(pair)
            for one in pair:
                one.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(CHUNK):
                if self.delay:
                    await asyncio.sleep(self.delay)
                await self._open.wait()
                writer.write(data)
                await writer.drain()
        with contextlib.suppress(OSError):
            writer.close()

    async def _end(self, *, reset: bool) -> int:
        pairs = list(self._pairs)
        for writer in [one for pair in pairs for one in pair]:
            if reset:
                found = writer.get_extra_info("socket")
                if found is not None:
                    with contextlib.suppress(OSError):
                        found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                writer.transport.abort()
            else:
                writer.close()
        return len(pairs)
