"""The I/O of both clients: each driver sends the requests of a flow and makes its pauses."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, TypeVar

import httpx

from nightpress.client.calls import Call
from nightpress.client.errors import ApiError
from nightpress.client.flows import Flow, Listen, Listing, Request, Return, Step, Yield, advance, send
from nightpress.client.transport import Options

Answer = TypeVar("Answer")
Item = TypeVar("Item")
Outcome = httpx.Response | httpx.TransportError | ApiError | None  #: of a step, for the flow that took it


class Blocking:
    """Runs flows in the thread that asks. Safe to share between threads."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.http = httpx.Client(**options.http_options())
        self.blocking = self  #: the driver that moves files

    def send(self, call: Call[Answer]) -> Answer:
        """Send a call and return its answer. Raises ApiError or UnreachableError."""
        return self.run(send(call, self.options))

    def run(self, flow: Flow[Answer]) -> Answer:
        """Run a flow to its end and return its answer. Raises what the flow raises."""
        step = advance(flow)
        while not isinstance(step, Return):
            step = advance(flow, self._take(step))
        return step.answer

    def iterate(self, listing: Listing[Item]) -> Iterator[Item]:
        """Yield what a listing hands out. Raises what the listing raises."""
        step = advance(listing)
        while not isinstance(step, Return):
            outcome: Outcome = None
            if isinstance(step, Yield):
                yield step.item
            elif isinstance(step, Listen):
                try:
                    with self.http.stream(**step.arguments) as response:
                        if response.is_error:
                            response.read()
                            raise ApiError.from_response(response)
                        for line in response.iter_lines():
                            if (item := step.feed(line)) is not None:
                                yield item
                except (httpx.TransportError, ApiError) as error:
                    outcome = error
            else:
                outcome = self._take(step)
            step = advance(listing, outcome)

    def transfer(self, work: Callable[..., Answer], *args: Any, **kwargs: Any) -> Answer:
        """Do work that reads or writes files."""
        return work(*args, **kwargs)

    def _take(self, step: Step) -> Outcome:
        if isinstance(step, Request):
            try:
                return self.http.request(**step.arguments)
            except httpx.TransportError as error:
                return error
        time.sleep(step.seconds)
        return None

    def close(self) -> None:
        self.http.close()


class EventLoop:
    """Runs flows as coroutines, and transfers in threads: hashing and disks block."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.http = httpx.AsyncClient(**options.http_options())
        self.blocking = Blocking(options)

    async def send(self, call: Call[Answer]) -> Answer:
        """Send a call and return its answer. Raises ApiError or UnreachableError."""
        return await self.run(send(call, self.options))

    async def run(self, flow: Flow[Answer]) -> Answer:
        """Run a flow to its end and return its answer. Raises what the flow raises."""
        step = advance(flow)
        while not isinstance(step, Return):
            step = advance(flow, await self._take(step))
        return step.answer

    async def iterate(self, listing: Listing[Item]) -> AsyncIterator[Item]:
        """Yield what a listing hands out. Raises what the listing raises."""
        step = advance(listing)
        while not isinstance(step, Return):
            outcome: Outcome = None
            if isinstance(step, Yield):
                yield step.item
            elif isinstance(step, Listen):
                try:
                    async with self.http.stream(**step.arguments) as response:
                        if response.is_error:
                            await response.aread()
                            raise ApiError.from_response(response)
                        async for line in response.aiter_lines():
                            if (item := step.feed(line)) is not None:
                                yield item
                except (httpx.TransportError, ApiError) as error:
                    outcome = error
            else:
                outcome = await self._take(step)
            step = advance(listing, outcome)

    async def transfer(self, work: Callable[..., Answer], *args: Any, **kwargs: Any) -> Answer:
        """Do work that reads or writes files, in a thread. Cancelling the task stops it at its next chunk."""
        stop = kwargs.setdefault("stop", threading.Event())
        try:
            return await asyncio.to_thread(work, *args, **kwargs)
        finally:
            stop.set()

    async def _take(self, step: Step) -> Outcome:
        if isinstance(step, Request):
            try:
                return await self.http.request(**step.arguments)
            except httpx.TransportError as error:
                return error
        await asyncio.sleep(step.seconds)
        return None

    async def aclose(self) -> None:
        self.blocking.close()
        await self.http.aclose()
