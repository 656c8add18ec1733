"""Methods that both clients have, written once. The driver of the client runs them, with or without `await`.

`get = ask(calls.get_job)` takes the arguments and the docstring of `calls.get_job`. In `Client` it returns what the call
answers, in `AsyncClient` a coroutine of it.
"""

from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from functools import wraps
from typing import Any, Concatenate, Generic, ParamSpec, Self, TypeVar, overload

from nightpress.client.calls import Call
from nightpress.client.drivers import Blocking, EventLoop
from nightpress.client.flows import Flow, Listing, every_page, send
from nightpress.core.wire.base import Page

P = ParamSpec("P")
Answer = TypeVar("Answer")
Item = TypeVar("Item")
Driver = TypeVar("Driver", bound=Blocking | EventLoop)

_Start = Callable[["Resource[Any]"], Callable[..., Any]]  #: from a resource to the function that its method is


class Resource(Generic[Driver]):
    """The methods about one kind of thing, with the driver that runs them."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver

    def _ask(self, call: Call[Answer]) -> Flow[Answer]:
        """Send a call from within a flow. Raises ApiError or UnreachableError."""
        return send(call, self._driver.options)


class _Method:
    """`described`: whose docstring and parameters the method has. `start`: makes the bound method."""

    def __init__(self, described: Callable[..., Any], start: _Start) -> None:
        self.described = described
        self.start = start
        self.__doc__ = described.__doc__


class Answering(_Method, Generic[P, Answer]):
    """A method that returns an answer."""

    @overload
    def __get__(self, resource: None, owner: type) -> Self: ...

    @overload
    def __get__(self, resource: Resource[Blocking], owner: type) -> Callable[P, Answer]: ...

    @overload
    def __get__(self, resource: Resource[EventLoop], owner: type) -> Callable[P, Coroutine[Any, Any, Answer]]: ...

    def __get__(self, resource: Resource[Any] | None, owner: type) -> Any:
        return self if resource is None else self.start(resource)


class Iterating(_Method, Generic[P, Item]):
    """A method that returns an iterator."""

    @overload
    def __get__(self, resource: None, owner: type) -> Self: ...

    @overload
    def __get__(self, resource: Resource[Blocking], owner: type) -> Callable[P, Iterator[Item]]: ...

    @overload
    def __get__(self, resource: Resource[EventLoop], owner: type) -> Callable[P, AsyncIterator[Item]]: ...

    def __get__(self, resource: Resource[Any] | None, owner: type) -> Any:
        return self if resource is None else self.start(resource)


def ask(make: Callable[P, Call[Answer]]) -> Answering[P, Answer]:
    """A method that sends a call and returns its answer. It raises ApiError or UnreachableError."""

    def start(resource: Resource[Any]) -> Callable[..., Any]:
        @wraps(make)
        def method(*args: P.args, **kwargs: P.kwargs) -> Any:
            return resource._driver.send(make(*args, **kwargs))

        return method

    return Answering(make, start)


def pages(make: Callable[P, Call[Page[Item]]]) -> Iterating[P, Item]:
    """A method that iterates over a paged list, newest first. It asks for the next page when that is needed."""

    def start(resource: Resource[Any]) -> Callable[..., Any]:
        @wraps(make)
        def method(*args: P.args, **kwargs: P.kwargs) -> Any:
            return resource._driver.iterate(every_page(make, resource._driver.options, *args, **kwargs))

        return method

    return Iterating(make, start)


def flow(make: Callable[Concatenate[Any, P], Flow[Answer]]) -> Answering[P, Answer]:
    """A method that runs a flow and returns its answer."""

    def start(resource: Resource[Any]) -> Callable[..., Any]:
        bound = make.__get__(resource)

        @wraps(bound)
        def method(*args: P.args, **kwargs: P.kwargs) -> Any:
            return resource._driver.run(bound(*args, **kwargs))

        return method

    return Answering(make, start)


def listing(make: Callable[Concatenate[Any, P], Listing[Item]]) -> Iterating[P, Item]:
    """A method that iterates over the items of a listing."""

    def start(resource: Resource[Any]) -> Callable[..., Any]:
        bound = make.__get__(resource)

        @wraps(bound)
        def method(*args: P.args, **kwargs: P.kwargs) -> Any:
            return resource._driver.iterate(bound(*args, **kwargs))

        return method

    return Iterating(make, start)


def transfer(work: Callable[Concatenate[Any, P], Answer]) -> Answering[P, Answer]:
    """A method that moves files, written for the blocking driver. `AsyncClient` runs it in a thread."""

    def start(resource: Resource[Any]) -> Callable[..., Any]:
        bound = work.__get__(type(resource)(resource._driver.blocking))

        @wraps(bound)
        def method(*args: P.args, **kwargs: P.kwargs) -> Any:
            return resource._driver.transfer(bound, *args, **kwargs)

        return method

    return Answering(work, start)
