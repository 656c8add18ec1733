"""The asynchronous client."""

from types import TracebackType
from typing import Self, TypeVar

from nightpress.client.calls import Call
from nightpress.client.discovery import options_from
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

    def __init__(
        self,
        api_url: str | None = None,
        api_key: str | None = None,
        *,
        profile: str | None = None,
        timeout_s: float = 30.0,
        retries: int = 3,
    ) -> None:
        super().__init__(EventLoop(options_from(api_url, api_key, profile, timeout_s=timeout_s, retries=retries)))
        self.options = self._driver.options
        self.http = self._driver.http

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
