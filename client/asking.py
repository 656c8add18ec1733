"""Methods that send one call of client.calls and return its answer: all that most of the API needs of a client.

`get = Asks(calls.get_job)` is a method with the arguments and the words of `calls.get_job` that returns what its Call answers with.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import wraps
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, Self, TypeVar, overload

from nightpress.client.calls import Call
from nightpress.core.wire.base import Page

if TYPE_CHECKING:
    from nightpress.client.asynchronous import AsyncClient
    from nightpress.client.client import Client

P = ParamSpec("P")
Answer = TypeVar("Answer")
Item = TypeVar("Item")
_PAGE = 200  #: items a request, where all are asked for


class Resource:
    """A kind of thing that one client asks for."""

    def __init__(self, client: "Client") -> None:
        self._client = client
        self._send = client.send


class AsyncResource:
    """The same for an event loop."""

    def __init__(self, client: "AsyncClient") -> None:
        self._client = client
        self._send = client.send


class _Method(Generic[P, Answer]):
    def __init__(self, make: Callable[P, Call[Answer]]) -> None:
        self.make = make
        self.__doc__ = make.__doc__


class Asks(_Method[P, Answer]):
    """Send it and wait. Raises ApiError or UnreachableError."""

    @overload
    def __get__(self, resource: None, owner: type) -> Self: ...

    @overload
    def __get__(self, resource: Resource, owner: type) -> Callable[P, Answer]: ...

    def __get__(self, resource: Resource | None, owner: type) -> Self | Callable[P, Answer]:
        if resource is None:
            return self

        @wraps(self.make)
        def ask(*args: P.args, **kwargs: P.kwargs) -> Answer:
            return resource._send(self.make(*args, **kwargs))

        return ask


class AsksAsync(_Method[P, Answer]):
    @overload
    def __get__(self, resource: None, owner: type) -> Self: ...

    @overload
    def __get__(self, resource: AsyncResource, owner: type) -> Callable[P, Awaitable[Answer]]: ...

    def __get__(self, resource: AsyncResource | None, owner: type) -> Self | Callable[P, Awaitable[Answer]]:
        if resource is None:
            return self

        @wraps(self.make)
        async def ask(*args: P.args, **kwargs: P.kwargs) -> Answer:
            return await resource._send(self.make(*args, **kwargs))

        return ask


class Pages(_Method[P, Page[Item]]):
    """Everything a paged list has, newest first, asking for the next page as it is needed: `limit` items a request."""

    @overload
    def __get__(self, resource: None, owner: type) -> Self: ...

    @overload
    def __get__(self, resource: Resource, owner: type) -> Callable[P, Iterator[Item]]: ...

    def __get__(self, resource: Resource | None, owner: type) -> Self | Callable[P, Iterator[Item]]:
        if resource is None:
            return self

        @wraps(self.make)
        def every(*args: P.args, **kwargs: P.kwargs) -> Iterator[Item]:
            turned: dict[str, Any] = {"limit": _PAGE, **kwargs}
            while True:
                page = resource._send(self.make(*args, **turned))
                yield from page.items
                if not page.next_cursor:
                    return
                turned["cursor"] = page.next_cursor

        return every


class PagesAsync(_Method[P, Page[Item]]):
    @overload
    def __get__(self, resource: None, owner: type) -> Self: ...

    @overload
    def __get__(self, resource: AsyncResource, owner: type) -> Callable[P, AsyncIterator[Item]]: ...

    def __get__(self, resource: AsyncResource | None, owner: type) -> Self | Callable[P, AsyncIterator[Item]]:
        if resource is None:
            return self

        @wraps(self.make)
        async def every(*args: P.args, **kwargs: P.kwargs) -> AsyncIterator[Item]:
            turned: dict[str, Any] = {"limit": _PAGE, **kwargs}
            while True:
                page = await resource._send(self.make(*args, **turned))
                for item in page.items:
                    yield item
                if not page.next_cursor:
                    return
                turned["cursor"] = page.next_cursor

        return every
