"""A way to a database, or to another server, that a test can close and open again, or make slow."""

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar
from urllib.parse import urlsplit

from tests.server import TIMEOUT

T = TypeVar("T")


class Gateway:
    """A way to a server that can be closed: who is connected is cut, who comes is refused.

    `delay`: so many seconds later arrives what is sent.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        assert parts.hostname and parts.port
        self._to = parts.hostname, parts.port
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._writers: set[asyncio.StreamWriter] = set()
        self.port = 0
        self.delay = 0.0
        self.open()
        whose, at, _ = parts.netloc.rpartition("@")
        self.url = parts._replace(netloc=f"{whose}{at}127.0.0.1:{self.port}").geturl()

    def open(self) -> None:
        self._server = self._run(asyncio.start_server(self._pass, "127.0.0.1", self.port))
        self.port = self._server.sockets[0].getsockname()[1]

    def close(self) -> None:
        async def close() -> None:
            self._server.close()
            for writer in self._writers:
                writer.transport.abort()

        self._run(close())

    def end(self) -> None:
        self.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(TIMEOUT)
        self._loop.close()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(TIMEOUT)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(*self._to)
        both = {writer, far_writer}
        self._writers |= both
        with suppress(OSError):
            await asyncio.gather(self._copy(reader, far_writer), self._copy(far_reader, writer))
        self._writers -= both

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                await asyncio.sleep(self.delay)
                writer.write(data)
                await writer.drain()
        finally:
            writer.close()


@contextmanager
def gateway(url: str) -> Iterator[Gateway]:
    way = Gateway(url)
    try:
        yield way
    finally:
        way.end()
