"""What a client does, without I/O: a flow yields a step, is sent what came of it, and returns its answer.

`drivers` runs flows: `Blocking` with threads and sockets, `EventLoop` with `await`. No flow knows which of the two runs it.
"""

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, ParamSpec, TypeVar

import httpx

from nightpress.client.calls import Call
from nightpress.client.transport import Options, read_answer, retry_of
from nightpress.core.wire.base import Page

P = ParamSpec("P")
Answer = TypeVar("Answer")
Item = TypeVar("Item")
AnyStep = TypeVar("AnyStep")

_PAGE_SIZE = 200  #: items a request, where every page of a list is read


@dataclass(frozen=True)
class Request:
    """Send this and read the whole response. Sent back: the response, or the transport error that came instead."""

    arguments: Mapping[str, Any]  #: of `request()` of either httpx client


@dataclass(frozen=True)
class Pause:
    """Do nothing for a while. Sent back: None."""

    seconds: float


@dataclass(frozen=True)
class Listen(Generic[Item]):
    """Read a response line by line and hand out each item that `feed` makes of a line.

    Sent back: None when the response has ended, or the error that came instead: a problem, or a broken connection.
    """

    arguments: Mapping[str, Any]  #: of `stream()` of either httpx client
    feed: Callable[[str], Item | None]


@dataclass(frozen=True)
class Yield(Generic[Item]):
    """Hand out an item. Sent back: None."""

    item: Item


@dataclass(frozen=True)
class Return(Generic[Answer]):
    """The flow is over, and this is its answer."""

    answer: Answer


Step = Request | Pause
Flow = Generator[Step, Any, Answer]  #: returns an answer
Listing = Generator[Step | Listen[Item] | Yield[Item], Any, None]  #: hands out items


def advance(flow: Generator[AnyStep, Any, Answer], outcome: object = None) -> AnyStep | Return[Answer]:
    """Send a flow what came of its last step. Returns its next step, or its end. Raises what the flow raises."""
    try:
        return flow.send(outcome)
    except StopIteration as end:
        return Return(end.value)


def send(call: Call[Answer], options: Options) -> Flow[Answer]:
    """Send a call, again where that helps. Raises ApiError or UnreachableError."""
    retry = retry_of(call, options)
    while True:
        outcome: httpx.Response | httpx.TransportError = yield Request(options.request(call))
        pause = retry.pause_after(outcome)
        if pause is None:
            return read_answer(call, options, outcome, answer_lost=retry.answer_lost)
        yield Pause(pause)


def every_page(
    make: Callable[P, Call[Page[Item]]], options: Options, *args: P.args, **kwargs: P.kwargs
) -> Listing[Item]:
    """Hand out every item of a paged list. The next page is asked for when the items of the last are used up."""
    chosen: dict[str, Any] = {"limit": _PAGE_SIZE, **kwargs}
    while True:
        page = yield from send(make(*args, **chosen), options)
        for item in page.items:
            yield Yield(item)
        if not page.next_cursor:
            return
        chosen["cursor"] = page.next_cursor
