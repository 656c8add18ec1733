"""Reading a list that grows while a job or a study runs: what there is, or also what comes until its end."""

from collections.abc import Callable
from typing import Protocol, TypeVar

import httpx

from nightpress.client.calls import Call
from nightpress.client.drivers import Blocking, EventLoop
from nightpress.client.errors import ApiError
from nightpress.client.events import Numbered, Stream, StreamPosition
from nightpress.client.flows import Listen, Listing, Pause, Yield
from nightpress.client.methods import Resource
from nightpress.core.wire.jobs import TERMINAL_STATES

Item = TypeVar("Item", bound=Numbered)
Driver = TypeVar("Driver", bound=Blocking | EventLoop)


class _Subject(Protocol):
    """A job or a study."""

    @property
    def state(self) -> str: ...


Subject = TypeVar("Subject", bound=_Subject)


def past_lines(resource: Resource[Driver], stream: Stream[Item], subject_id: str, after: int) -> Listing[Item]:
    """The items up to now, from number `after` + 1 on."""
    while items := (yield from resource._ask(stream.page(subject_id, after=after))):
        for item in items:
            yield Yield(item)
        after = items[-1].seq


def follow_lines(
    resource: Resource[Driver],
    stream: Stream[Item],
    subject_id: str,
    after: int,
    patience_s: float,
    get: Callable[[], Call[Subject]],
) -> Listing[Item]:
    """The items as they come, until the subject is over. A broken connection neither skips nor repeats an item.

    Raises UnreachableError or ApiError where the server has been away for more than `patience_s`.
    """
    tail = StreamPosition(resource._driver.options, stream, subject_id, after, patience_s)
    while True:
        error: httpx.TransportError | ApiError | None = yield Listen(tail.request(), tail.feed)
        if error is not None:
            yield Pause(tail.pause_after(error))
        elif (yield from resource._ask(get())).state in TERMINAL_STATES:
            while rest := (yield from resource._ask(tail.rest())):
                for item in rest:
                    if tail.seen(item) is not None:
                        yield Yield(item)
            return
