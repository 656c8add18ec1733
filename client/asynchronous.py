"""The asynchronous client."""

from types import TracebackType
from typing import Self, TypeVar

import httpx

from nightpress.client.calls import Call
from nightpress.client.drivers import EventLoop
from nightpress.client.resources import BaseClient

Answer = TypeVar("Answer")


class AsyncClient(BaseClient[EventLoop]):
    """`Client` for an event loop: its methods are awaited, its lists are read with `async for`. Transfers run in threads.

    Use it with `async with`, or close it with `aclose()`. The arguments are those of `Client`.

    >>> from nightpress import AsyncClient
    >>> async with AsyncClient() as nightpress:
    ...     job = await nightpress.jobs.submit("all-minilm-l6-v2", "int8-encoder")
    ...     job = await nightpress.jobs.wait(job.id)
    """

    _open = EventLoop

    @property
    def http(self) -> httpx.AsyncClient:
        return self._driver.http

    async def send(self, call: Call[Answer]) -> Answer:
        """Send a call of `client.calls` or `client.access`, with retries. Raises ApiError or UnreachableError."""
        return await self._driver.send(call)

    async def aclose(self) -> None:
        await self._driver.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()
